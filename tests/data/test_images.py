"""Image data sets: shapes, ranges and what is known of their contents; damaged files are refused."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from cutlayer.data import images
from cutlayer.data.files import package_file
from cutlayer.data.images import brain_slices, fashion_mnist, mnist_5k
from cutlayer.errors import DataError
from tests.data.sets import need


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work where there is no data, and Debian's folder is another one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(images, "_DEBIAN", tmp_path / "debian")
    return tmp_path


def idx(path: Path, magic: int, values: np.ndarray) -> None:
    header = b"".join(size.to_bytes(4, "big") for size in (magic, *values.shape))
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(header + values.astype(np.uint8).tobytes())


def write_fashion(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Write a test set of the right size; return its images and labels."""
    pixels = np.arange(10_000 * 28 * 28).reshape(10_000, 28, 28) % 251
    labels = np.arange(10_000) % 10
    idx(folder / "t10k-images-idx3-ubyte.gz", 2051, pixels)
    idx(folder / "t10k-labels-idx1-ubyte.gz", 2049, labels)
    return pixels, labels


def test_mnist_has_500_of_each_digit_in_order():
    need("mnist_5k")
    x, y = mnist_5k()
    assert (x.shape, x.dtype, y.dtype) == ((5000, 1, 28, 28), torch.float32, torch.int64)
    assert y.tolist() == [digit for digit in range(10) for _ in range(500)]
    assert (x.min(), x.max()) == (0.0, 1.0)
    assert x[y == 1].mean() < x[y == 0].mean()  # a one has less ink than a zero


@pytest.mark.parametrize(("train", "count"), [(True, 60_000), (False, 10_000)])
def test_fashion_mnist_is_balanced(train, count):
    need("fashion_mnist")
    x, y = fashion_mnist(train=train)
    assert (x.shape, x.dtype, y.dtype) == ((count, 1, 28, 28), torch.float32, torch.int64)
    assert y.bincount().tolist() == [count // 10] * 10
    assert (x.min(), x.max()) == (0.0, 1.0)
    assert x.mean() == pytest.approx(0.286, abs=0.002)


def test_fashion_mnist_is_read_as_it_is_written_from_the_first_folder_that_has_it(folder):
    pixels, labels = write_fashion(folder / "debian")
    x, y = fashion_mnist(train=False)
    assert torch.equal(x, torch.from_numpy(pixels).unsqueeze(1).float() / 255)
    assert torch.equal(y, torch.from_numpy(labels))
    idx(folder / ".data" / "fashion-mnist" / "t10k-images-idx3-ubyte.gz", 2051, pixels[::-1])
    assert torch.equal(fashion_mnist(train=False)[0], x)  # images without labels are no data set
    idx(folder / ".data" / "fashion-mnist" / "t10k-labels-idx1-ubyte.gz", 2049, labels)
    assert torch.equal(fashion_mnist(train=False)[0], x.flip(0))


@pytest.mark.provokes("E257")
def test_without_fashion_mnist_it_says_how_to_get_it(folder):
    with pytest.raises(DataError, match="the package 'dataset-fashion-mnist' is not here") as caught:
        fashion_mnist()
    assert caught.value.code == "E257"
    assert "apt-get install dataset-fashion-mnist" in caught.value.remedy
    assert ".data/fashion-mnist" in caught.value.remedy


@pytest.mark.provokes("E258")
@pytest.mark.parametrize("how", ["cut", "other kind", "other size", "short", "no gzip"])
def test_a_damaged_file_of_fashion_mnist_is_refused(folder, how):
    debian = folder / "debian"
    pixels, _ = write_fashion(debian)
    path = debian / "t10k-images-idx3-ubyte.gz"
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-1000])
    elif how == "other kind":
        idx(path, 2049, pixels)
    elif how == "other size":
        idx(path, 2051, pixels[:9999])
    elif how == "short":
        whole = gzip.decompress(path.read_bytes())
        path.write_bytes(gzip.compress(whole[:-1], 1))
    else:
        path.write_bytes(b"<html>not found</html>")
    with pytest.raises(DataError, match="damaged") as caught:
        fashion_mnist(train=False)
    assert (caught.value.code, caught.value.where) == ("E258", str(path))


def test_brain_slices_are_of_one_symmetric_head():
    need("brain_slices")
    brain = brain_slices()
    image, grey, white = brain["image"], brain["grey"], brain["white"]
    assert image.shape == (157, 1, 192, 160)
    assert grey.shape == white.shape == (157, 192, 160)
    assert {t.dtype for t in (image, grey, white)} == {torch.float32}
    assert torch.equal(brain["slice"], torch.arange(157))
    assert (image.min(), image.max()) == (0.0, 1.0)
    assert (grey + white).max() <= 1.01
    inside = image.squeeze(1) > 0.1
    assert (inside & inside.flip(2)).sum() / inside.sum() > 0.97  # the halves are mirror images
    assert image.squeeze(1)[white > 0.9].mean() > image.squeeze(1)[grey > 0.9].mean()  # T1: white matter is brighter
    assert not inside[:, 0].any()  # all of the brain is in the picture
    assert not inside[:, -1].any()


@pytest.mark.provokes("E258")
@pytest.mark.parametrize("how", ["cut", "other"])
def test_a_damaged_volume_is_refused(folder, how, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    need("brain_slices")
    inner = "datasets/data/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"
    source = package_file("nilearn", inner)
    monkeypatch.chdir(folder)
    path = folder / ".data" / "nilearn" / inner
    path.parent.mkdir(parents=True)
    if how == "cut":
        path.write_bytes(source.read_bytes()[:100_000])
    else:
        shutil.copy(Path(__file__), path)
    with pytest.raises(DataError, match="damaged") as caught:
        brain_slices()
    assert (caught.value.code, caught.value.where) == ("E258", str(path))
