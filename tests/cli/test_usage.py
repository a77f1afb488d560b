"""Wrong usage in detail: whatever is typed, four lines, an exit code, and a document where it was asked for.

tests/cli/test_app.py has the common cases of every kind.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cutlayer.cli.usage import _sentence
from tests.cli.tree import COMMANDS, GROUPS

Call = Callable[..., Any]


@pytest.mark.provokes("E210")
@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_an_option_that_does_not_exist(call: Call, words: tuple[str, ...]):
    result = call(*words, "--no-such-option")
    assert (result.code, len(result.err), result.out) == (2, 4, [])
    assert result.err[0] == "E210 no such option: --no-such-option"
    assert result.err[1] == f"  where: cutlayer {' '.join(words)}"
    error = call(*words, "--no-such-option", "--json").json()["error"]
    assert (error["code"], error["kind"]) == ("E210", "ConfigError")


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("doctor", "a", "b"), "got unexpected extra argument"),
        (("doctor", "--party"), "option '--party' requires an argument"),
        (("doctor", "--minutes", "soon"), "invalid value for '--minutes'"),
        (("doctor", "--minutes", "0"), "invalid value for '--minutes'"),
        (("doctor", "--minutes", "9999"), "invalid value for '--minutes'"),
        (("doctor", "--serv"), "no such option: --serv"),
        (("env", "x"), "got unexpected extra argument"),
        (("pki", "issue"), "missing argument 'parties'"),
        (("--no-such",), "no such option: --no-such"),
    ],
    ids=" ".join,
)
@pytest.mark.provokes("E210")
def test_what_is_wrong_is_said(call: Call, words: tuple[str, ...], what: str):
    result = call(*words)
    assert (result.code, len(result.err)) == (2, 4)
    assert result.err[0].startswith(f"E210 {what}")
    assert not result.err[0].endswith(".")
    assert "--help` (more: cutlayer explain E210)" in result.err[3]


def test_a_near_miss_names_what_may_be_meant(call: Call):
    assert "--serve" in call("doctor", "--serv").err[0]


def test_an_option_of_the_words_after_the_command_is_no_wish_for_json(call: Call):
    """Without --json nothing goes to stdout, whatever else is typed."""
    assert call("explain", "--jsn").out == []


@pytest.mark.parametrize("words", [("explain", "E351"), ("pki", "show", "nowhere"), ("explain", "--", "E351")])
def test_shared_options_may_stand_before_the_command(call: Call, words: tuple[str, ...]):
    before, behind = call("--json", "-q", *words), call(words[0], "--json", "-q", *words[1:])
    if words[0] == "pki":
        behind = call(*words, "--json", "-q")
    assert (before.code, before.json(), before.err) == (behind.code, behind.json(), behind.err)


def test_shared_options_alone_are_no_command(call: Call):
    assert call("-q").code == call("--json").code == 2
    assert call("--json").json()["error"]["code"] == "E210"


@pytest.mark.parametrize("words", [*COMMANDS, *GROUPS], ids=" ".join)
def test_help_shows_flags_as_flags(call: Call, words: tuple[str, ...]):
    shown = "\n".join(call(*words, "--help").out)
    assert "--help" in shown
    assert "<bool>" not in shown


@pytest.mark.parametrize("words", [(), *COMMANDS, *GROUPS], ids=" ".join)
def test_help_is_a_document_where_json_is_asked_for(call: Call, words: tuple[str, ...]):
    shown = "\n".join(call(*words, "--help").out)
    orders = [(*words, "--help", "--json"), (*words, "--json", "-q", "--help"), ("--json", *words, "--help")]
    for result in [call(*order) for order in orders]:
        assert (result.code, result.err) == (0, [])
        assert list(result.json()) == ["help"]
        assert result.json()["help"].split() == shown.split()


@pytest.mark.provokes("E210")
def test_help_of_nothing_is_an_error_as_json(call: Call):
    result = call("no-such", "--help", "--json")
    assert (result.code, result.json()["error"]["what"]) == (2, "no such command 'no-such'")
    assert call("explain", "--json", "--", "--help").json()["error"]["code"] != "E210"  # is no option there


@pytest.mark.provokes("E210")
@pytest.mark.parametrize("words", [("pki", "--json"), ("--json", "pki"), ("pki", "-q", "--json")], ids=" ".join)
def test_a_group_without_a_command_says_so_as_json(call: Call, words: tuple[str, ...]):
    error = call(*words).json()["error"]
    assert (error["code"], error["what"], error["where"]) == ("E210", "no command is given", "cutlayer pki")
    assert error["remedy"] == "read `cutlayer pki --help`"


def test_messages_of_several_lines_become_one():
    assert _sentence("Missing argument\n  'X'.\n") == "missing argument 'X'"
    assert _sentence("") == ""


@pytest.mark.parametrize("words", ["explain", "doctor"])
def test_a_reader_that_leaves_is_no_error(words: str):
    """As `| head -1` does: no message, and none of Python's own as the process ends."""
    line = f"{sys.executable} -m cutlayer {words} | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    assert done.stdout in ("0\n", "1\n")  # 0 if all was written before the reader left


def test_json_is_alone_on_stdout_whatever_a_builder_prints(call: Call, demo: Path):
    text = (demo / "parties.py").read_text()
    (demo / "parties.py").write_text(f'print("loading scans")\n{text}')
    for words in (
        ("check", "contract.toml", "hospital.toml"),
        ("run", "contract.toml", "hospital.toml", "server.toml"),
    ):
        result = call(*words, "--json")
        assert result.code == 0
        assert "error" not in result.json()
        if words[0] == "check":  # the module is loaded once
            assert "loading scans" in result.err


NOISE = """
import ctypes, os, subprocess, sys
ctypes.CDLL(None).printf(b"of C, kept until the process ends\\n")
os.write(1, b"of a descriptor\\n")
subprocess.run(["echo", "of another program"], check=True)
print("of Python", file=sys.__stdout__, flush=True)
"""


@pytest.mark.parametrize("fails", [False, True])
def test_json_is_alone_on_stdout_whatever_is_written_below_python(demo: Path, fails: bool):
    text = (demo / "parties.py").read_text()
    (demo / "parties.py").write_text(f"{NOISE}{'raise KeyError' if fails else ''}\n{text}")
    words = ["check", "contract.toml", "hospital.toml", "--json"]
    done = subprocess.run([sys.executable, "-m", "cutlayer", *words], capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout)["ok"] is not fails
    for one in ("of C, kept", "of a descriptor", "of another program", "of Python"):
        assert one in done.stderr


def test_command_that_is_stopped_prints_its_document(demo: Path):
    text = (demo / "parties.py").read_text()
    (demo / "parties.py").write_text(f"import time\nopen('begun', 'w').close()\ntime.sleep(60)\n{text}")
    words = [sys.executable, "-m", "cutlayer", "check", "contract.toml", "hospital.toml", "--json"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not (demo / "begun").exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "stopped\n")
    assert json.loads(out)["error"]["code"] == "E001"


@pytest.mark.provokes("E210")
def test_shared_options_without_a_command(call: Call):
    result = call("--json")
    assert (result.code, result.json()["error"]["code"], result.err[0]) == (2, "E210", "E210 no command is given")
    assert call("--help", "-q").out == call("--help").out == call("-q", "-v", "--help").out
    assert call("-q").code == 2
