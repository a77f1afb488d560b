"""The benchmark of overhead runs, ends with the uncut network's weights every way, and says what bounds each way."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.scripts import importing

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmark() -> Iterator[Callable[[str], ModuleType]]:
    with importing(FOLDER) as load:
        yield load


@pytest.mark.parametrize("letter", ["a", "b", "d"])
def test_one_process_gives_the_uncut_networks_weights(letter, benchmark):
    rows = benchmark("overhead").measure(letter, ["hand", "kept", "process"], 1, 2, None).rows()
    assert [row["way"] for row in rows] == ["hand", "kept", "process"]
    assert all(row["ratio"] > 0 for row in rows)
    assert rows[2]["floor"] is not None
    assert rows[2]["to_bound"] == pytest.approx(rows[1]["ratio"] / rows[2]["ratio"])
    assert rows[2]["parts_ms"]["compute"] > 0


def test_other_weights_stop_the_benchmark(benchmark, monkeypatch):
    overhead = benchmark("overhead")
    monkeypatch.setattr(overhead, "by_hand", lambda *_: overhead.Timing(1.0, ["0", "0"]))
    with pytest.raises(SystemExit, match=r"\(a\) cut by hand, one process: the weights are not those"):
        overhead.measure("a", ["hand"], 1, 1, None)


@pytest.mark.slow
def test_all_ways_in_two_processes():
    words = [sys.executable, str(FOLDER / "overhead.py"), "--models", "a", "--quick", "--json"]
    rows = json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, timeout=110).stdout)
    assert [row["way"] for row in rows] == [
        *("hand", "kept", "process", "socket", "grpc", "grpc-kept", "plain"),
        *("socket-tls", "grpc-tls", "grpc-kept-tls", "mtls"),
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_serving_answers_right_and_says_what_it_found():
    script = Path(__file__).parents[1] / "benchmarks" / "serving.py"
    done = subprocess.run([sys.executable, script, "--quick"], capture_output=True, text=True, timeout=360, check=True)
    assert done.stdout.strip().splitlines()[-1].startswith("results: 4 clients: light body ")
