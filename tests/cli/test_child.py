"""A party's process ends with the one that started it, however that ends, and takes the keys of the run with it."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import safetensors.torch
import torch

Call = Callable[..., Any]
ALL = ("contract.toml", "hospital.toml", "server.toml")
ENDS = {"SIGTERM": 130, "SIGHUP": 130, "SIGINT": 130, "SIGKILL": -9}


def parties(folder: Path) -> list[psutil.Process]:
    """Return the processes of the parties of the run in this folder."""
    homes = [str(folder / name) for name in ("hospital", "server")]
    return [p for p in psutil.process_iter(["cmdline"]) if any(w in homes for w in p.info["cmdline"] or ())]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{party}: {name}": tensor
        for party in ("hospital", "server")
        for name, tensor in safetensors.torch.load_file(folder / f"{party}.safetensors").items()
    }


def eventually(true: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.05)
    return true()


@pytest.fixture
def child(demo: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Begin a command as `run --processes` begins it, with the folder `keys`."""
    started: list[subprocess.Popen[str]] = []
    (demo / "keys").mkdir()
    (demo / "keys" / "party.key").write_text("a key")

    def start(*words: str) -> subprocess.Popen[str]:
        line = [sys.executable, "-m", "cutlayer.cli.child", "keys", *words]
        started.append(subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for one in started:
        one.kill()
        with one:
            pass


def test_child_is_the_command_line_and_reads_nothing(child: Callable[..., Any], demo: Path):
    code = demo / "parties.py"
    code.write_text(f"import sys\nassert sys.stdin.read() == ''\n{code.read_text()}")
    process = child("check", "contract.toml", "hospital.toml", "--json")
    assert process.wait(timeout=60) == 0  # its standard input is still open
    assert json.loads(process.stdout.read())["ok"]
    assert (demo / "keys").exists()


def test_child_that_hears_no_signal_ends_all_the_same(child: Callable[..., Any], demo: Path):
    code = demo / "parties.py"
    deaf = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    code.write_text(f"{deaf}open('begun', 'w').close()\ntime.sleep(90)\n{code.read_text()}")
    process = child("check", "contract.toml", "hospital.toml")
    assert eventually((demo / "begun").exists, 60)
    process.stdin.close()
    assert process.wait(timeout=20) == 130
    assert not (demo / "keys").exists()


@pytest.fixture
def begun(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    """Begin a long run with a process for each party; its temporary files are in `temporary`."""
    contract = demo / "contract.toml"
    contract.write_text(contract.read_text().replace("epochs = 2", "epochs = 60"))
    (demo / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(demo / "temporary"))
    words = [sys.executable, "-m", "cutlayer", "run", *ALL, "--folder", str(demo / "many"), "--processes"]
    with (demo / "printed.txt").open("wb") as printed:
        process = subprocess.Popen(words, stdout=printed, stderr=printed, start_new_session=True)
    events = demo / "many" / "hospital" / "metrics.jsonl"
    assert eventually(lambda: events.exists() and '"round":3' in events.read_text(), 120), printed.name
    assert process.poll() is None
    yield process
    for one in (*parties(demo / "many"), psutil.Process(process.pid) if process.poll() is None else None):
        if one is not None:
            one.kill()
    process.wait()


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", ENDS)
def test_parties_end_with_the_run_and_leave_no_key(call: Call, demo: Path, begun: subprocess.Popen[bytes], name: str):
    keys = list((demo / "temporary").glob("cutlayer-*/**/*.key"))
    assert [(one.parent.name, one.stat().st_mode & 0o777) for one in sorted(keys)] == [
        ("hospital", 0o600),
        ("server", 0o600),
    ]
    assert len(parties(demo / "many")) == 2
    held = call("resume", "many")
    assert (held.code, held.err[0]) == (2, "E248 another process works in this folder")
    again = call("run", *ALL, "--folder", "many", "--processes")
    assert (again.code, again.err[0]) == (2, "E248 another process works in this folder")
    os.kill(begun.pid, getattr(signal, name))
    assert begun.wait(timeout=20) == ENDS[name]
    assert eventually(lambda: not parties(demo / "many"), 8)
    assert list((demo / "temporary").glob("cutlayer-*")) == []
    assert not list(demo.rglob("*.key"))
    assert call("run", *ALL, "--folder", "one", "-q").code == 0
    result = call("resume", "many")
    assert (result.code, result.out[-1]) == (0, "results: many/report.html"), result.err
    first, second = weights(demo / "one"), weights(demo / "many")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def in_terminal(folder: Path, more: str = "") -> tuple[subprocess.Popen[bytes], int]:
    """Begin a long run with processes in a terminal of its own; return its process and the terminal's other end."""
    contract = folder / "contract.toml"
    contract.write_text(contract.read_text().replace("epochs = 2", "epochs = 60"))
    terminal, inner = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    code = f"import fcntl, signal, termios\nfcntl.ioctl(0, termios.TIOCSCTTY, 0)\n{more}\n"
    words = ["run", *ALL, "--folder", str(folder / "many"), "--processes"]
    process = subprocess.Popen(
        [sys.executable, "-c", f"{code}from cutlayer.cli import main\nmain()", *words],
        stdin=inner, stdout=inner, stderr=inner, start_new_session=True,
    )  # fmt: skip
    os.close(inner)
    events = folder / "many" / "hospital" / "metrics.jsonl"

    def begun() -> bool:
        if select.select([terminal], [], [], 0)[0]:
            os.read(terminal, 65536)  # so that it can go on to draw
        return events.exists() and '"round":3' in events.read_text()

    assert eventually(begun, 120)
    return process, terminal


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("_again", range(3))
def test_a_terminal_that_is_closed_stops_a_run_as_ctrl_c_does(demo: Path, _again: int):
    """All processes in it get SIGHUP, and nothing can be printed any more: the bars cannot, nor "stopped"."""
    process, terminal = in_terminal(demo)
    os.close(terminal)
    assert process.wait(timeout=30) == 130
    assert eventually(lambda: not parties(demo / "many"), 8)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_run_that_ignores_sighup_goes_on_without_its_terminal(demo: Path):
    process, terminal = in_terminal(demo, "signal.signal(signal.SIGHUP, signal.SIG_IGN)")
    os.close(terminal)
    assert process.wait(timeout=200) == 0
    assert (demo / "many" / "summary.json").exists()
