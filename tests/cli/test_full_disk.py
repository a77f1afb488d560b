"""A disk that takes no more: what is told, what is kept, and what does not stay behind."""

from __future__ import annotations

import errno
import json
import resource
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from cutlayer.run import results
from cutlayer.run.checkpoint import write_atomic
from cutlayer.run.disk import named

Call = Callable[..., Any]
RUN = ("run", "contract.toml", "hospital.toml", "server.toml", "--folder", "out")


@contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond `size` bytes: writes fail as on a full disk, and name no file."""
    _, hard = before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def full_for(monkeypatch: pytest.MonkeyPatch, name: str, *, within: str = "") -> None:
    """Let results of this name find no room, in folders whose path contains `within`."""

    def write(path: Path, data: bytes) -> None:
        with named(path):
            if path.name == name and within in str(path):
                raise OSError(errno.ENOSPC, "No space left on device")
        write_atomic(path, data)

    monkeypatch.setattr(results, "write_atomic", write)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return where folders for temporary files are made."""
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    return place


def test_a_write_that_fails_names_its_file(tmp_path: Path):
    with no_file_beyond(10), pytest.raises(OSError, match="File too large") as caught:
        write_atomic(tmp_path / "a", b"x" * 100)
    assert caught.value.filename == str(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", ["", "--processes"])
def test_a_run_that_cannot_begin_names_the_file_and_leaves_nothing(how: str, call: Call, demo: Path):
    with no_file_beyond(10):
        result = call(*RUN, *[how] * bool(how))
    assert (result.code, result.err[0]) == (2, "E238 a file or folder cannot be used")
    assert result.err[1:3] == ["  where: out/contract.toml", "  why:   got File too large"]
    assert not (demo / "out").exists()


@pytest.mark.provokes("E238")
def test_results_that_find_no_room_are_put_elsewhere(
    call: Call, demo: Path, place: Path, monkeypatch: pytest.MonkeyPatch
):
    assert call(*RUN[:-1], "whole", "-q").code == 0
    full_for(monkeypatch, "hospital.safetensors", within="out")
    result = call(*RUN)
    (kept,) = place.glob("cutlayer-results-*")
    assert (result.code, result.out) == (2, [])
    assert result.err[-4:] == [
        f"E238 the results could not be written into the run's folder; all of them are in {kept}",
        "  where: out/hospital.safetensors",
        "  why:   got No space left on device",
        "  do:    make room, copy them into out, then: cutlayer report out (more: cutlayer explain E238)",
    ]
    assert any(line.startswith("  evaluate  loss: loss ") for line in result.err)  # the summary is shown all the same
    assert kept.stat().st_mode & 0o077 == 0
    for party in ("hospital", "server"):
        mine, wanted = (safetensors.torch.load_file(one / f"{party}.safetensors") for one in (kept, demo / "whole"))
        assert all(mine[name].equal(wanted[name]) for name in wanted)
    assert json.loads((kept / "summary.json").read_text())["metrics"]["evaluate"]


def test_weights_stay_where_nothing_else_finds_room(
    call: Call, demo: Path, place: Path, monkeypatch: pytest.MonkeyPatch
):
    full_for(monkeypatch, "contract.toml")
    result = call(*RUN)
    weights = "hospital.safetensors, server.safetensors"
    assert result.err[-4] == f"E238 the results could not be written; the weights that are: {weights}"
    assert result.err[-1].startswith("  do:    make room on the disk and start the run again; keep what is in out")
    assert [len(safetensors.torch.load_file(demo / "out" / name)) for name in weights.split(", ")] == [2, 2]
    assert list(place.iterdir()) == []


def test_a_report_without_room_is_told_and_the_run_is_whole(call: Call, demo: Path, monkeypatch: pytest.MonkeyPatch):
    def full(self: Path, *_content: object, **_how: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    assert call(*RUN, "-q").code == 0
    monkeypatch.setattr(Path, "write_text", full)
    result = call("report", "out")
    assert result.err[:2] == ["E238 a file or folder cannot be used", "  where: out/report/curves.csv"]
    assert (demo / "out" / "server.safetensors").exists()


def test_a_disk_that_the_system_does_not_name(call: Call, demo: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_words: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("cutlayer.cli.here.contract_here", full)
    result = call("plan")
    assert (result.code, result.err[0]) == (2, "E238 a file or folder cannot be used")
    assert result.err[1] == "  where: a file that the system does not name"


def test_a_project_without_room_leaves_no_folder(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with no_file_beyond(10):
        result = call("new", "studies/x", "--no-data")
    assert result.err[:2] == ["E238 a file or folder cannot be used", "  where: studies/x/README.md"]
    assert list(tmp_path.iterdir()) == []
    assert call("new", "studies/x", "--no-data").code == 0
