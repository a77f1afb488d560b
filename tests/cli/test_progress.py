"""Progress from events: a line a round without a terminal, bars with one, nothing when quiet."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from cutlayer.cli import progress as module
from cutlayer.cli.console import Output
from cutlayer.cli.progress import RunProgress, metrics_text

PLAIN = Output(json=False, quiet=False, verbose=False)


def row(number: int, loss: float = 0.5, mode: str = "train", lane: int = 0) -> dict[str, Any]:
    return {"mode": mode, "round": number, "loss": "loss", "lane": lane, "metrics": {"loss": loss, "per class": [1.0]}}


def play(shown: RunProgress) -> None:
    with shown:
        shown("connected", {"party": "server"})
        shown("step", {"party": "a", "mode": "train", "round": 1, "step": 0, "bytes": {"sent up 0": 1500}})
        shown("step", {"party": "a", "mode": "train", "round": 1, "step": 1, "bytes": {"sent up 0": 500}, "steps": 2})
        shown("round", {"party": "a", "mode": "train", "round": 1, "history": [row(1)]})
        shown("round", {"party": "a", "mode": "train", "round": 2, "history": [row(1), row(2, 0.25)]})


def lines(capsys: pytest.CaptureFixture[str], output: Output) -> list[str]:
    play(RunProgress(output, epochs=3))
    shown = capsys.readouterr()
    assert shown.out == ""
    return shown.err.splitlines()


def test_a_line_a_round_without_a_terminal(capsys: pytest.CaptureFixture[str]):
    assert lines(capsys, PLAIN) == ["train 1/3      loss: loss 0.5000", "train 2/3      loss: loss 0.2500"]


def test_link_events_with_verbose(capsys: pytest.CaptureFixture[str]):
    shown = lines(capsys, Output(json=False, quiet=False, verbose=True))
    assert shown[0] == "connected party=server"


@pytest.mark.parametrize("output", [Output(True, False, True), Output(False, True, True)], ids=["json", "quiet"])
def test_nothing_when_nobody_reads(capsys: pytest.CaptureFixture[str], output: Output):
    assert lines(capsys, output) == []


def test_a_repeated_round_is_printed_once(capsys: pytest.CaptureFixture[str]):
    """After a roll-back a round may end again, and replicas of a loss tell the same sums: one line."""
    shown = RunProgress(PLAIN, epochs=2)
    for _ in range(2):
        shown("round", {"party": "a", "mode": "train", "round": 1, "history": [row(1), row(1, lane=1)]})
    shown("round", {"party": "a", "mode": "train", "round": 2, "history": [row(1), row(2)]})
    assert [line.split()[1] for line in capsys.readouterr().err.splitlines()] == ["1/2", "2/2"]


def test_a_lost_party_is_told_to_everybody_with_what_to_do(capsys: pytest.CaptureFixture[str]):
    shown = RunProgress(PLAIN, epochs=1)
    for event in ("lost", "lost", "returned"):
        shown(event, {"party": "hospital-b"})
    shown("waiting", {"parties": ("a", "b")})
    shown("unreached", {"party": "server", "cause": "E601 nobody listens at the server's address"})
    shown("aborted", {"party": "a", "code": "E304", "what": "stage 'head' failed"})
    lost, back, waiting, unreached, stopped = capsys.readouterr().err.splitlines()
    assert lost.startswith("E701 hospital-b is lost")
    assert "cutlayer resume" in lost
    assert back == "hospital-b is back"
    assert waiting == "waiting for a, b"
    assert unreached == "server does not answer yet: E601 nobody listens at the server's address. Trying again"
    assert stopped == "stopped by a: E304 stage 'head' failed"


def test_bars_on_a_terminal(monkeypatch: pytest.MonkeyPatch):
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=160, color_system=None)
    monkeypatch.setattr(module, "Console", lambda **_: terminal)
    play(RunProgress(PLAIN, epochs=3))
    shown = screen.getvalue()
    assert "a  train 1/3" in shown
    assert "2/2" in shown
    assert "sent 2.0 kB, received 0 bytes" in shown


def test_metrics_text():
    assert metrics_text({"loss": 0.12345, "confusion": [[1]], "accuracy": 1.0}) == "loss 0.1235, accuracy 1.0000"
