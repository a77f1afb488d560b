"""The commands as people meet them: help, version, wrong usage, and how quickly they start."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import pytest

from tests.cli.tree import COMMANDS, GROUPS

Call = Callable[..., Any]


def test_the_tree_is_found():
    assert {("run",), ("explain",), ("pki", "issue")} <= set(COMMANDS)
    assert GROUPS == [(), ("pki",)]


@pytest.mark.parametrize("words", [*GROUPS, *COMMANDS], ids=" ".join)
def test_help_has_an_example(call: Call, words: tuple[str, ...]):
    result = call(*words, "--help")
    assert result.code == 0
    shown = " ".join(" ".join(result.out).split())
    assert f"Example: cutlayer {' '.join(words)}".strip() in shown


def test_brackets_of_an_example_are_shown(call: Call):
    shown = " ".join(" ".join(call("cut", "--help").out).split())
    assert "--input 'float32[batch, 3, 32, 32]'" in shown


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_has_the_common_options(call: Call, words: tuple[str, ...]):
    shown = "\n".join(call(*words, "--help").out)
    assert all(option in shown for option in ("--json", "--quiet", "-q", "--verbose", "-v"))


def test_version(call: Call):
    result = call("--version")
    assert (result.code, result.out) == (0, [f"cutlayer {version('cutlayer')}"])
    for words in (("--version", "--json"), ("--json", "--version"), ("--version", "--help", "--json")):
        told = call(*words)
        assert (told.code, told.json(), told.err) == (0, {"version": version("cutlayer")}, [])


@pytest.mark.provokes("E210")
@pytest.mark.parametrize(
    ("words", "what", "where"),
    [
        (("ru",), "no such command 'ru'. Did you mean 'run'?", "cutlayer"),
        (("pki", "isue"), "no such command 'isue'. Did you mean 'issue'?", "cutlayer pki"),
        (("join",), "missing argument", "cutlayer join"),
        (("plan", "c", "--gird"), "no such option: --gird", "cutlayer plan"),
        (("plan", "c", "--program", "x", "--samples", "0"), "invalid value for '--samples'", "cutlayer plan"),
        (("plan", "c", "--samples", "few"), "invalid value for '--samples'", "cutlayer plan"),
    ],
)
def test_wrong_usage_is_four_lines_and_exits_with_2(call: Call, words: tuple[str, ...], what: str, where: str):
    result = call(*words)
    assert (result.code, result.out, len(result.err)) == (2, [], 4)
    assert result.err[0].startswith(f"E210 {what}")
    assert result.err[1] == f"  where: {where}"
    assert result.err[2].startswith(f"  why:   expected {where} ")
    assert result.err[3] == f"  do:    read `{where} --help` (more: cutlayer explain E210)"
    error = call(*words, "--json").json()["error"]
    assert (error["code"], error["where"], error["what"]) == ("E210", where, result.err[0].removeprefix("E210 "))


@pytest.mark.parametrize("words", [(), ("pki",)], ids=" ".join)
def test_a_group_without_a_command_prints_its_help(call: Call, words: tuple[str, ...]):
    result = call(*words)
    assert "Example:" in "\n".join([*result.out, *result.err])
    assert "E210" not in "".join(result.err)


@pytest.mark.parametrize("words", ["'--help'", "'run', '--help'", "'--version'", "'explain', 'E351'", "'ru'"])
def test_help_loads_neither_torch_nor_grpc(words: str):
    script = (
        f"import sys; sys.argv = ['cutlayer', {words}]\n"
        "from cutlayer.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    assert end.code in (0, 2), end.code\n"
        "heavy = {'torch', 'grpc', 'numpy', 'cryptography', 'torchmetrics'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, timeout=60)


def test_module_is_the_command():
    words = [sys.executable, "-m", "cutlayer", "--version"]
    done = subprocess.run(words, check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout == f"cutlayer {version('cutlayer')}\n"
