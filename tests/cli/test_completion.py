"""TAB: scripts for the shells, and what they are answered for contracts, party files, runs and error codes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cutlayer.cli.catalogue import catalogue
from cutlayer.cli.completion import (
    complete_code,
    complete_contract,
    complete_ended_run,
    complete_party_file,
    complete_run,
    complete_template,
)

Call = Callable[..., Any]
Answers = Callable[..., list[str]]


@pytest.fixture
def here(demo: Path) -> Path:
    """The demo, with what must not be offered beside it."""
    (demo / "other.toml").write_text("[tool]\nparty_size = 3\n")
    (demo / "damaged.toml").write_text("[contract\n")
    (demo / "deep.toml").write_text("x = " + "[" * 5000)
    (demo / "long.toml").write_text("[contract]\n" + "#" * 2**20)
    (demo / "binary.toml").write_bytes(b"\xff\xfe[contract]")
    (demo / "notes.txt").write_text("[contract]\n")
    (demo / ".hidden").mkdir()
    (demo / "sites").mkdir()
    shutil.copy(demo / "contract.toml", demo / "sites" / "contract b.toml")
    shutil.copy(demo / "hospital.toml", demo / "sites" / "clinic.toml")
    for name, files in (
        ("begun", ["launch.json"]), ("done", ["launch.json", "summary.json"]), ("none", []),
    ):  # fmt: skip
        (demo / "runs" / name).mkdir(parents=True)
        for file in files:
            (demo / "runs" / name / file).write_text("{}")
    return demo


def test_contracts_and_party_files_are_told_apart(here: Path):
    assert complete_contract("") == ["contract.toml", "runs/", "sites/"]
    assert complete_party_file("") == ["hospital.toml", "server.toml", "runs/", "sites/"]
    assert complete_contract("con") == ["contract.toml"]
    assert complete_contract("sites/") == ["sites/contract b.toml"]
    assert complete_party_file(f"{here}/sites/") == [f"{here}/sites/clinic.toml"]
    assert complete_contract(".") == [".hidden/"]
    assert complete_contract("no-such-folder/") == complete_party_file("x") == []


def test_runs_that_can_be_gone_on_with(here: Path):
    assert complete_run("") == ["runs/begun"]
    assert complete_run("runs/b") == ["runs/begun"]
    assert complete_run("runs/d") == ["runs/done/"]  # finished: a folder to look into, as any other
    assert complete_run("si") == ["sites/"]


def test_runs_that_have_ended(here: Path):
    assert complete_ended_run("") == ["runs/done"]
    assert complete_ended_run("runs/d") == ["runs/done"]
    assert complete_ended_run("runs/b") == ["runs/begun/"]


def test_templates():
    assert complete_template("") == ["images-u", "tabular-vertical", "text"]
    assert complete_template("t") == ["tabular-vertical", "text"]
    assert complete_template("x") == []


@pytest.mark.parametrize(("typed", "first"), [("E66", "E660"), ("e66", "e660"), ("66", "660")])
def test_codes_are_offered_as_they_were_begun(typed: str, first: str):
    offered = complete_code(typed)
    assert offered[0] == (first, catalogue()["E660"].title)
    assert len(offered) == 10
    assert all(word.startswith(typed) for word, _ in offered)


def test_all_codes_and_no_code():
    assert [word for word, _ in complete_code("")] == list(catalogue())
    assert complete_code("x") == complete_code("E9999") == []


# --- as the shells ask ------------------------------------------------------------------------------------------------


@pytest.fixture
def ask(call: Call, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Ask as a shell's script does, with everything in variables; return what is answered."""

    def run(instruction: str, words: str = "", **more: str) -> str:
        with monkeypatch.context() as patch:
            patch.setenv("_CUTLAYER_COMPLETE", instruction)
            patch.setenv("COMP_WORDS", words)
            patch.setenv("COMP_CWORD", str(len(words.split(" ")) - 1))
            patch.setenv("_TYPER_COMPLETE_ARGS", words)
            for name, value in more.items():
                patch.setenv(name, value)
            result = call()
        assert result.err == []
        return "\n".join(result.out)

    return run


@pytest.mark.parametrize(
    ("shell", "lines"),
    [
        ("bash", ["complete -o default -F _cutlayer_completion cutlayer", "_CUTLAYER_COMPLETE=complete_bash $1"]),
        ("zsh", ["#compdef cutlayer", "_CUTLAYER_COMPLETE=complete_zsh cutlayer"]),
        ("fish", ["complete --command cutlayer", "_CUTLAYER_COMPLETE=complete_fish"]),
    ],
)
def test_each_shell_has_a_script(ask: Callable[..., str], shell: str, lines: list[str]):
    script = ask(f"source_{shell}")
    assert all(line in script for line in lines)
    assert (
        shutil.which(shell) is None or not subprocess.run([shell, "-n"], input=script.encode(), timeout=20).returncode
    )


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("cutlayer do", ["doctor"]),
        ("cutlayer pki is", ["issue"]),
        ("cutlayer doctor ", ["contract.toml", "runs/", "sites/"]),
        ("cutlayer doctor contract.toml --pa", ["--party"]),
        ("cutlayer doctor contract.toml --party ", ["hospital.toml", "server.toml", "runs/", "sites/"]),
        ("cutlayer join contract.toml h", ["hospital.toml"]),
        ("cutlayer run contract.toml hospital.toml s", ["server.toml", "sites/"]),
        ("cutlayer resume runs/", ["runs/begun"]),
        ("cutlayer explain E36", []),
        ("cutlayer explain 351", ["351"]),
    ],
)
def test_what_is_offered_is_the_same_in_each_shell(here: Path, ask: Callable[..., str], words: str, offered: list[str]):
    assert ask("complete_bash", words).split("\n") == (offered or [""])
    fish = ask("complete_fish", words, _TYPER_COMPLETE_FISH_ACTION="get-args").split("\n")
    assert [line.split("\t")[0] for line in fish] == (offered or [""])
    zsh = ask("complete_zsh", words)
    assert zsh.startswith("_arguments") if offered else zsh == "_files"
    assert all(f'"{word}"' in zsh for word in offered)


def test_titles_of_codes_are_shown_where_a_shell_shows_them(ask: Callable[..., str]):
    title = catalogue()["E661"].title
    assert title in ask("complete_zsh", "cutlayer explain E661")
    assert title in ask("complete_fish", "cutlayer explain E661", _TYPER_COMPLETE_FISH_ACTION="get-args")


def test_bash_completes_with_the_script(here: Path, tmp_path: Path):
    """The real shell: it sources the script, and asks the real command."""
    bash = shutil.which("bash")
    assert bash is not None
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "cutlayer").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m cutlayer "$@"\n')
    (folder / "cutlayer").chmod(0o755)
    script = (
        'eval "$(_CUTLAYER_COMPLETE=source_bash cutlayer)"\n'
        "COMP_WORDS=(cutlayer doctor contract.toml --party h); COMP_CWORD=4\n"
        '_cutlayer_completion cutlayer; printf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [bash, "--norc", "-c", script], env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr, done.returncode) == ("hospital.toml\n", "", 0)


def test_completing_loads_nothing_heavy():
    script = (
        "import sys\n"
        "from cutlayer.cli.completion import complete_code, complete_contract\n"
        "complete_code('E3'), complete_contract('')\n"
        "heavy = {'torch', 'grpc', 'numpy', 'cryptography'} & set(sys.modules)\n"
        "print(sorted(heavy))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr
