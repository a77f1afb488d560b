"""--json: every command prints one JSON document on stdout, whether it succeeds or fails, and the same exit code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cutlayer.cli.console import EXIT_CODES
from cutlayer.errors import ConfigError
from tests.cli.tree import COMMANDS

Call = Callable[..., Any]
Words = tuple[str, ...]
ALL = ("contract.toml", "hospital.toml", "server.toml")
RUN = ("run", *ALL, "--folder", "out", "-q")
PARTS = {"kind", "code", "what", "where", "expected", "got", "remedy"}

# command -> what is run before, words with which it succeeds, words with which it fails, and the code of that failure
CASES: dict[Words, tuple[list[Words], Words | None, Words, str]] = {
    ("run",): ([], (*ALL, "--folder", "out"), ("contract.toml", "server.toml"), "E225"),
    # its success needs other processes: tests/cli/test_processes.py reads the document of each
    ("join",): ([], None, ("contract.toml", "hospital.toml"), "E207"),
    ("resume",): ([RUN], ("out",), ("nowhere",), "E208"),
    ("predict",): ([RUN], (*ALL, "--weights", "out"), (*ALL, "--join"), "E210"),
    # its success ends with a signal: tests/cli/test_serving.py reads the document
    ("serve",): ([], None, ("contract.toml", "nowhere.toml"), "E203"),
    ("report",): ([RUN], ("out",), ("nowhere",), "E281"),
    ("plan",): ([], ("contract.toml", "--grid"), ("nowhere.toml",), "E203"),
    ("check",): ([], ALL, ("nowhere.toml",), "E203"),
    ("explain",): ([], ("351",), ("E9999",), "E209"),
    ("doctor",): ([], (), ("--serve",), "E215"),
    ("env",): ([], (), ("--no-such",), "E210"),
    ("export",): ([RUN], ("out",), ("nowhere",), "E229"),
    ("cut",): ([], ("parties.py:small", "--input", "float32[batch, 4]"), ("parties.py:small",), "E237"),
    ("new",): ([], ("study", "--template", "text"), ("study", "--template", "none"), "E247"),
    ("pki", "init"): ([], ("ca",), ("ca", "--name", ""), "E230"),
    ("pki", "issue"): ([("pki", "init", "ca")], ("hospital",), ("Hospital",), "E230"),
    ("pki", "show"): ([("pki", "init", "ca")], ("ca",), ("nowhere",), "E232"),
}


def only_document(result: Any) -> dict[str, Any]:
    """Return what stdout holds: one JSON object and nothing else."""
    text = "\n".join(result.out)
    document, end = json.JSONDecoder().raw_decode(text)
    assert text[end:].strip() == ""
    assert isinstance(document, dict)
    return document


def test_no_command_is_left_out_here():
    assert set(CASES) == set(COMMANDS)


@pytest.fixture(autouse=True)
def whole_demo(demo: Path) -> None:
    """Let the hospital have samples to predict for, and the contract allow that the model is put together there."""
    for name, old, more in (
        ("parties.py", "evaluation=table(20, 2), ", 'prediction=TensorTable(x=table(7, 3).fields["x"]), '),
        ("contract.toml", 'coordinator = "server"\n', 'assemble_at = ["hospital"]\n'),
    ):
        text = (demo / name).read_text()
        assert old in text
        (demo / name).write_text(text.replace(old, old + more))


@pytest.mark.parametrize("words", [words for words in CASES if CASES[words][1] is not None], ids=" ".join)
def test_success_is_one_document(call: Call, demo: Path, words: Words):
    before, good, _, _ = CASES[words]
    for one in before:
        assert call(*one).code == 0
    result = call(*words, *(good or ()), "--json")
    assert result.code == 0, result.err
    assert "error" not in only_document(result)


@pytest.mark.provokes(by="code")
@pytest.mark.parametrize(("words", "code"), [(words, case[3]) for words, case in CASES.items()], ids=str)
def test_failure_is_one_document(call: Call, demo: Path, words: Words, code: str):
    before, _, bad, _ = CASES[words]
    for one in before:
        assert call(*one).code == 0
    result = call(*words, *bad, "--json")
    document = only_document(result)
    assert set(document) == ({"error", "ok", "digest", "findings"} if words == ("check",) else {"error"})
    error = document["error"]
    assert set(error) == PARTS
    assert error["code"] == code, result.err
    assert error["what"]
    assert error["remedy"]
    plain = call(*words, *bad)
    assert plain.code == result.code == next(c for c, kinds in EXIT_CODES.items() if ConfigError in kinds)
    assert plain.err[-4:] == result.err[-4:]


def test_a_bug_is_one_document_too(call: Call, demo: Path, monkeypatch: pytest.MonkeyPatch):
    def fails(*_: object, **__: object) -> None:
        raise KeyError("odd")

    monkeypatch.setattr("cutlayer.cli.showing.show_plan", fails)
    result = call("plan", "contract.toml", "--json")
    assert result.code == 1
    assert only_document(result)["error"]["code"] == "E000"
