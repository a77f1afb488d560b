"""The commands as people meet them: help, version, wrong usage, and how quickly they start."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import pytest

from cutlayer.cli.app import app, pki

Call = Callable[..., Any]

COMMANDS = [
    ("run",), ("join",), ("resume",), ("plan",), ("check",),
    ("pki",), ("pki", "init"), ("pki", "issue"), ("pki", "show"),
]  # fmt: skip


def test_no_command_is_left_out_here():
    names = [command.name or command.callback.__name__ for command in app.registered_commands]  # type: ignore[union-attr]
    inner = [("pki", str(command.name)) for command in pki.registered_commands]
    assert {*((name,) for name in names), ("pki",), *inner} == set(COMMANDS)


@pytest.mark.parametrize("words", [(), *COMMANDS], ids=" ".join)
def test_help_has_an_example(call: Call, words: tuple[str, ...]):
    result = call(*words, "--help")
    assert result.code == 0
    shown = " ".join(" ".join(result.out).split())
    assert f"Example: cutlayer {' '.join(words)}".strip() in shown


@pytest.mark.parametrize("words", [words for words in COMMANDS if words != ("pki",)], ids=" ".join)
def test_every_command_has_the_common_options(call: Call, words: tuple[str, ...]):
    shown = "\n".join(call(*words, "--help").out)
    assert all(option in shown for option in ("--json", "--quiet", "-q", "--verbose", "-v"))


def test_version(call: Call):
    result = call("--version")
    assert (result.code, result.out) == (0, [f"cutlayer {version('cutlayer')}"])


@pytest.mark.parametrize(
    "words", [("ru",), ("run",), ("plan", "c", "--no-such"), ("plan", "c", "--program", "x", "--samples", "0")]
)
def test_wrong_usage_exits_with_2(call: Call, words: tuple[str, ...]):
    assert call(*words).code == 2


@pytest.mark.parametrize("words", ["'--help'", "'run', '--help'", "'--version'"])
def test_help_loads_neither_torch_nor_grpc(words: str):
    script = (
        f"import sys; sys.argv = ['cutlayer', {words}]\n"
        "from cutlayer.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    assert end.code == 0, end.code\n"
        "heavy = {'torch', 'grpc', 'numpy', 'cryptography', 'torchmetrics'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, timeout=60)


def test_module_is_the_command():
    words = [sys.executable, "-m", "cutlayer", "--version"]
    done = subprocess.run(words, check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout == f"cutlayer {version('cutlayer')}\n"
