"""Errors become four lines and an exit code; results and remarks go to different streams."""

from __future__ import annotations

import errno
import io
import json
import sys
from pathlib import Path

import pytest
import typer

from cutlayer import errors
from cutlayer.cli.console import Output, exit_code, reporting, shown_path
from cutlayer.errors import CutlayerError, PlanError, StageError
from tests.provoking import saw

LOUD = Output(json=False, quiet=False, verbose=True)
PLAIN = Output(json=False, quiet=False, verbose=False)
QUIET = Output(json=False, quiet=True, verbose=False)
JSON = Output(json=True, quiet=False, verbose=False)

CODES = {
    "PlanError": 2, "ConfigError": 2, "DataError": 2, "StageError": 3, "NonFiniteError": 3, "LinkError": 4,
    "DeadlineError": 4, "HandshakeError": 4, "CertificateError": 4, "PeerError": 5, "CheckpointError": 6,
    "CutlayerError": 1, "ProgramError": 1, "WireError": 1, "ContractError": 1,
}  # fmt: skip

ERROR = StageError("it failed", where="party a", expected="x", got="y", remedy="do z", code="E301")
LINES = [
    "E301 it failed", "  where: party a", "  why:   expected x, got y", "  do:    do z (more: cutlayer explain E301)",
]  # fmt: skip


def ended(output: Output, error: BaseException) -> int:
    with pytest.raises(typer.Exit) as caught, reporting(output):
        raise error
    return caught.value.exit_code


def test_every_error_class_has_its_documented_exit_code():
    assert {name: exit_code(getattr(errors, name)("x")) for name in errors.__all__} == CODES


def test_error_is_four_lines_on_stderr(capsys: pytest.CaptureFixture[str]):
    assert ended(PLAIN, ERROR) == 3
    shown = capsys.readouterr()
    assert (shown.out, shown.err.splitlines()) == ("", LINES)


def test_traceback_only_with_verbose(capsys: pytest.CaptureFixture[str]):
    ended(LOUD, ERROR)
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert shown.splitlines()[-4:] == LINES


def test_json_error_is_a_document_on_stdout(capsys: pytest.CaptureFixture[str]):
    ended(JSON, ERROR)
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {
        "error": {
            "kind": "StageError", "code": "E301", "what": "it failed", "where": "party a", "expected": "x", "got": "y",
            "remedy": "do z",
        }
    }  # fmt: skip
    assert shown.err.splitlines() == LINES


@pytest.mark.provokes("E000")
def test_unexpected_error_has_help_and_no_traceback(capsys: pytest.CaptureFixture[str]):
    assert ended(PLAIN, KeyError("odd")) == 1
    shown = saw(capsys.readouterr().err).splitlines()
    assert shown[0] == "E000 an unexpected error"
    assert shown[2] == "  why:   got KeyError: 'odd'"
    assert shown[3:] == ["  do:    run with -v and report the output (more: cutlayer explain E000)"]
    ended(LOUD, KeyError("odd"))
    assert "KeyError: 'odd'" in capsys.readouterr().err


@pytest.mark.provokes("E238")
def test_what_the_system_refuses_is_an_error_of_the_user(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    taken = tmp_path / "results"
    taken.write_text("a file")
    with pytest.raises(FileExistsError) as caught:
        taken.mkdir()
    assert ended(PLAIN, caught.value) == 2
    shown = saw(capsys.readouterr().err).splitlines()
    assert shown[:3] == ["E238 a file or folder cannot be used", f"  where: {taken}", "  why:   got File exists"]


def test_interruption(capsys: pytest.CaptureFixture[str]):
    assert ended(PLAIN, KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "stopped\n"


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EIO], ids=["a closed pipe", "a closed terminal"])
@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt(), 130), (PlanError("x", code="E101"), 2), (KeyError("odd"), 1)]
)
def test_an_exit_code_is_the_same_where_nobody_reads(
    number: int, error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch
):
    class Closed(io.StringIO):
        def write(self, _text: str) -> int:
            raise OSError(number, "closed")

    monkeypatch.setattr(sys, "stderr", Closed())
    assert ended(PLAIN, error) == code


@pytest.mark.provokes("E001")
def test_interruption_with_json_is_a_document(capsys: pytest.CaptureFixture[str]):
    assert ended(JSON, KeyboardInterrupt()) == 130
    shown = capsys.readouterr()
    assert shown.err == "stopped\n"
    error = json.loads(saw(shown.out))["error"]
    assert (error["kind"], error["code"], error["what"]) == ("CutlayerError", "E001", "stopped by Ctrl-C or a signal")
    assert error["remedy"].endswith("`cutlayer resume RUNFOLDER`")


def test_own_exits_pass():
    assert ended(PLAIN, typer.Exit(7)) == 7


def test_streams(capsys: pytest.CaptureFixture[str]):
    def everything(output: Output) -> tuple[str, str]:
        output.say("result")
        output.note("remark")
        output.document({"a": 1})
        output.last("last")
        shown = capsys.readouterr()
        return shown.out, shown.err

    assert everything(PLAIN) == ("result\nlast\n", "remark\n")
    assert everything(QUIET) == ("last\n", "")
    assert everything(JSON) == ('{"a": 1}\n', "remark\n")


def test_shown_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert shown_path(tmp_path / "runs" / "x") == shown_path(Path("runs/x")) == "runs/x/"
    assert shown_path(tmp_path.parent / "y") == f"{tmp_path.parent / 'y'}/"


def test_an_error_without_a_remedy_leads_to_its_page():
    assert CutlayerError("x", code="E301").lines() == [
        "E301 x", "  where: not known", "  why:   see above", "  do:    cutlayer explain E301",
    ]  # fmt: skip


def test_default_exit_code_is_1():
    assert exit_code(CutlayerError("x")) == 1
