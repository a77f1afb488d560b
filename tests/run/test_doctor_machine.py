"""The machine, good and bad: Python, packages of wrong versions, torch, memory, and where results go."""

from __future__ import annotations

import errno
import shutil
import sys
from collections import namedtuple
from importlib import metadata
from pathlib import Path

import pytest
import torch

from cutlayer.run import doctor_machine, machine
from cutlayer.run.doctor_machine import folder_row, machine_rows, package_row, python_row, torch_row
from tests.run.practice import by_name

Usage = namedtuple("Usage", "total used free")
WANTED = ["torch>=2.11,<2.14", "grpcio>=1.84,<2", 'transformers>=5; extra == "llm"', 'pytest>=99; extra == "dev"']


def versions(monkeypatch: pytest.MonkeyPatch, **installed: str) -> None:
    def version(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(metadata, "version", version)


def test_this_machine_is_fit():
    rows = by_name(machine_rows())
    assert list(rows) == ["python", "packages", "machine"]
    assert rows["python"].status == rows["packages"].status == "ok"
    assert all(name in rows["packages"].seen for name in ("torch 2.", "grpcio 1.", "cryptography "))
    assert " processors, " in rows["machine"].seen


@pytest.mark.parametrize(
    ("version", "wanted", "status"),
    [
        ("3.11.7", ">=3.11", "ok"), ("3.10.14", ">=3.11", "problem"), ("3.13.0", ">=3.11,<3.13", "problem"),
        ("3.13.0rc1", ">=3.11", "ok"), ("3.9.1", "", "ok"),
    ],
)  # fmt: skip
def test_versions_of_python(version: str, wanted: str, status: str):
    row = by_name([python_row(version, wanted)])["python"]
    assert row.status == status
    assert version in row.seen
    assert row.do == (f"install a Python {wanted} and make a new environment with it" if status == "problem" else "")


def test_packages_that_fit(monkeypatch: pytest.MonkeyPatch):
    versions(monkeypatch, torch="2.13.0+cpu", grpcio="1.84.0")  # neither transformers nor pytest
    row = by_name([package_row(WANTED)])["packages"]
    assert (row.status, row.seen.split(";")[0]) == ("ok", "torch 2.13.0+cpu, grpcio 1.84.0")


@pytest.mark.parametrize(
    ("installed", "seen", "do"),
    [
        ({"torch": "2.10.0"}, "torch 2.10.0, wanted <2.14,>=2.11", '"torch<2.14,>=2.11"'),
        ({"torch": "2.14.0"}, "torch 2.14.0, wanted <2.14,>=2.11", '"torch<2.14,>=2.11"'),
        ({"grpcio": "1.83.2"}, "grpcio 1.83.2, wanted <2,>=1.84", '"grpcio<2,>=1.84"'),
        ({"grpcio": None}, "grpcio is not installed, wanted <2,>=1.84", '"grpcio<2,>=1.84"'),
        ({"transformers": "4.9"}, "transformers 4.9, wanted >=5", '"transformers>=5"'),  # an extra, but it is there
        ({"torch": "2.10", "grpcio": "1.8"}, "torch 2.10, ", '"torch<2.14,>=2.11" "grpcio<2,>=1.84"'),
    ],
)
def test_packages_that_do_not_fit(monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], seen: str, do: str):
    present = {"torch": "2.13.0", "grpcio": "1.85.1", **installed}
    versions(monkeypatch, **{name: version for name, version in present.items() if version})
    row = by_name([package_row(WANTED)])["packages"]
    assert row.status == "problem"
    assert row.seen.startswith(seen)
    assert row.do == f"python -m pip install {do}"


def test_cutlayer_that_is_not_installed(monkeypatch: pytest.MonkeyPatch):
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "metadata", missing)
    rows = by_name(machine_rows())
    assert rows["packages"].status == "problem"
    assert "cutlayer is not installed" in rows["packages"].seen
    assert "machine" in rows


def test_torch_is_loaded():
    row = by_name([torch_row()])["torch"]
    assert row.status == "ok"
    assert row.seen.startswith(f"{torch.__version__}, loaded in ")
    assert "computes on: processor" in row.seen


def test_gpus_are_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"X{number}")
    assert torch_row().seen.endswith("computes on: processor, GPU X0, GPU X1")


@pytest.mark.parametrize("how", ["missing", "driver"])
def test_a_torch_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch, how: str):
    def fails() -> int:
        raise RuntimeError("CUDA driver version\nis insufficient")

    if how == "missing":
        monkeypatch.setitem(sys.modules, "torch", None)
    else:
        monkeypatch.setattr(torch.cuda, "device_count", fails)
    row = by_name([torch_row()])["torch"]
    assert row.status == "problem"
    assert ("driver version is insufficient" if how == "driver" else "ModuleNotFoundError") in row.seen
    assert "install torch anew" in row.do


@pytest.mark.parametrize(
    ("installed", "limit", "free", "status", "do"),
    [
        (16e9, None, 12e9, "ok", ""),
        (16e9, 8e9, 12e9, "ok", ""),
        (None, None, None, "ok", ""),
        (1.5e9, None, 1.2e9, "warning", "small models only"),
        (16e9, 1e9, 0.9e9, "warning", "small models only"),  # a container
        (16e9, None, 0.5e9, "warning", "end other programs"),
        (16e9, None, 0, "warning", "end other programs"),
    ],
)
def test_memory(monkeypatch: pytest.MonkeyPatch, installed, limit, free, status: str, do: str):
    for name, value in (("installed_memory", installed), ("memory_limit", limit), ("free_memory", free)):
        monkeypatch.setattr(doctor_machine, name, lambda value=value: value)
    row = by_name(machine_rows())["machine"]
    assert row.status == status
    assert row.do.startswith(do)
    assert (free is not None) == (" free" in row.seen)
    smaller = min(value for value in (installed, limit) if value) if installed else None
    assert (f"{smaller / 1e9:.1f} GB of memory" if smaller else "memory not known") in row.seen


def test_a_folder_for_results(tmp_path: Path):
    row = by_name([folder_row(tmp_path / "deep" / "runs")])["run folder"]
    assert row.status == "ok"
    assert row.seen.endswith(" free, made when needed")
    assert not (tmp_path / "deep").exists()
    assert folder_row(tmp_path).seen.endswith(" free")


@pytest.mark.parametrize(("free", "status"), [(5e8, "warning"), (5e7, "problem"), (2e9, "ok")])
def test_little_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: float, status: str):
    monkeypatch.setattr(shutil, "disk_usage", lambda _place: Usage(1e12, 1e12 - free, free))
    row = by_name([folder_row(tmp_path)])["run folder"]
    assert row.status == status
    assert row.do.startswith("make room, or set `folder` in [run]" if status != "ok" else "")


@pytest.mark.parametrize(
    ("number", "do"),
    [
        (errno.ENOSPC, "make room"),
        (errno.EDQUOT, "make room"),
        (errno.EACCES, "let this user"),
        (errno.EROFS, "let this"),
    ],
)
def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, do: str):
    def fails(**_: object) -> None:
        raise OSError(number, "some reason")

    monkeypatch.setattr(machine.tempfile, "NamedTemporaryFile", fails)
    row = by_name([folder_row(tmp_path)])["run folder"]
    assert (row.status, row.seen) == ("problem", f"{tmp_path}: some reason")
    assert row.do.startswith(do)


def test_a_file_where_the_folder_should_be(tmp_path: Path):
    (tmp_path / "runs").write_text("")
    row = by_name([folder_row(tmp_path / "runs")])["run folder"]
    assert (row.status, row.seen) == ("problem", f"{tmp_path / 'runs'}: Not a directory")
