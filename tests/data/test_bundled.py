"""`cutlayer.data.bundled` names every data set, and reads each without importing the package that brings it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cutlayer.data import bundled, images, records, texts
from cutlayer.errors import DataError
from tests.data.sets import MADE, need

ROOT = Path(__file__).parents[2]


def test_every_loader_is_named_once_and_sorted():
    loaders = {name for module in (images, records, texts) for name in module.__all__ if name.islower()}
    assert set(bundled.__all__) == loaders
    assert bundled.__all__ == sorted(bundled.__all__)
    assert set(MADE) | {"fashion_mnist"} == loaders


def test_no_package_is_imported():
    for name in MADE:
        need(name)
    code = f"""
import sys
from cutlayer.data import bundled
for name in {sorted(MADE)}:
    getattr(bundled, name)()
brought = {set(MADE.values())} & set(sys.modules)
print(sorted(brought))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


@pytest.mark.provokes("E257")
@pytest.mark.parametrize(("name", "module"), [("brain_slices", "nibabel"), ("clothing_reviews", "pyarrow.parquet")])
def test_without_its_reader_it_says_what_to_install(name: str, module: str, monkeypatch: pytest.MonkeyPatch):
    need(name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=f"the package '{module.partition('.')[0]}' is not here") as caught:
        getattr(bundled, name)()
    assert caught.value.code == "E257"
    assert "cutlayer[data]" in caught.value.remedy
