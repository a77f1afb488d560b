"""`cutlayer predict`: all parties here, in one process or several, and one party with others elsewhere."""

from __future__ import annotations

import csv
import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from cutlayer.cli import running
from cutlayer.run.config import load_contract

Call = Callable[..., Any]
ALL = ("contract.toml", "hospital.toml", "server.toml")


@pytest.fixture
def asking(demo: Path, call: Call) -> Path:
    """The demo after a training run in `out`, whose hospital has samples to predict for, and one more output."""
    code = (demo / "parties.py").read_text()
    old = "evaluation=table(20, 2), "
    assert old in code
    fresh = 'TensorTable(x=table(37, 3).fields["x"])'
    (demo / "parties.py").write_text(code.replace(old, f"{old}prediction={fresh}, "))
    result = call("run", *ALL, "--folder", "out", "-q")
    assert result.code == 0, result.err
    return demo


def expected(folder: Path) -> torch.Tensor:
    """The two layers in one piece, on the same samples."""
    held = safetensors.torch.load_file(folder / "hospital.safetensors")
    held |= safetensors.torch.load_file(folder / "server.safetensors")
    x = torch.randn(37, 4, generator=torch.Generator().manual_seed(3))
    linear = torch.nn.functional.linear
    parts = x.split(16)
    return torch.cat(
        [
            linear(linear(part, held["head.weight"], held["head.bias"]), held["body.weight"], held["body.bias"])
            for part in parts
        ]
    )


def found(folder: Path) -> torch.Tensor:
    return safetensors.torch.load_file(folder / "predictions.safetensors")["body"]


def test_all_parties_here(asking: Path, call: Call):
    result = call("predict", *ALL, "--weights", "out")
    assert result.code == 0, result.err
    (folder,) = (asking / "runs").iterdir()
    assert folder.name.endswith("-demo-prediction")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert torch.equal(found(folder), expected(asking / "out"))
    assert result.out[1] == "  body: float32[37, 2]"
    assert result.out[-1] == f"results: runs/{folder.name}/"
    assert (folder / "predictions.csv").read_text().startswith("sample,body.0,body.1\n0,")


@pytest.mark.provokes("E249")
def test_a_folder_with_a_prediction_is_not_written_over(asking: Path, call: Call):
    assert call("predict", *ALL, "--weights", "out", "--folder", "asked").code == 0
    before = (asking / "asked" / "predictions.csv").read_bytes()
    for how in ((), ("--processes",)):
        result = call("predict", *ALL, "--folder", "asked", *how)
        assert (result.code, result.err[1]) == (2, "E249 asked holds a prediction already, which is not overwritten")
    assert (asking / "asked" / "predictions.csv").read_bytes() == before


def test_a_prediction_without_weights_says_so(asking: Path, call: Call):
    said = "no --weights: modules are as their builder makes them, untrained unless it loads weights itself"
    assert said in call("predict", *ALL).err
    assert said not in call("predict", *ALL, "--weights", "out").err


def test_in_processes_gives_the_same_bits(asking: Path, call: Call):
    result = call("predict", *ALL, "--weights", "out", "--processes", "--folder", "asked", "--json")
    assert result.code == 0, result.err
    assert result.json()["outputs"] == {"body": {"dtype": "float32", "shape": [37, 2]}}
    assert torch.equal(found(asking / "asked"), expected(asking / "out"))
    assert torch.equal(found(asking / "asked" / "server"), expected(asking / "out"))
    assert not (asking / "asked" / "hospital" / "predictions.safetensors").exists()  # the server's alone
    told = json.loads((asking / "asked" / "hospital" / "output.json").read_text())
    assert told["outputs"] == {}
    assert told["bytes"]["hospital"]["sent"] == 37 * 8 * 4


def test_two_parties_join_from_where_they_are(asking: Path):
    port = free_port()
    contract = asking / "contract.toml"
    contract.write_text(contract.read_text().replace("127.0.0.1:7443", f"127.0.0.1:{port}"))
    digest = load_contract(contract).digest()
    words = [sys.executable, "-m", "cutlayer", "predict", "contract.toml"]
    parties = {
        name: subprocess.Popen(
            [*words, f"{name}.toml", "--join", "--weights", "out", "--accept", digest, "--folder", f"p-{name}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in ("hospital", "server")
    }
    said = {name: process.communicate(timeout=60) for name, process in parties.items()}
    assert {name: process.returncode for name, process in parties.items()} == {"hospital": 0, "server": 0}, said
    assert torch.equal(found(asking / "p-server"), expected(asking / "out"))
    assert "this party holds no outputs" in said["hospital"][0]
    assert said["server"][0].splitlines()[-1] == "results: p-server/"


def test_what_leaves_is_shown_and_asked_once(asking: Path, call: Call, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(running, "interactive", lambda: True)
    result = call("predict", "contract.toml", "hospital.toml", "--join", "--weights", "out", stdin="n\n")
    assert result.code == 2
    shown = "\n".join(result.err)
    assert "sends   activations of head to server: float32[batch, 8], 512 bytes a batch" in shown
    assert "sends   its number of samples, once, to all parties" in shown
    assert "keeps   data.x, its weights; no gradients are sent" in shown
    assert "total   at most 1,184 bytes over cuts for its 37 samples" in shown
    assert "prediction of demo" in shown
    assert shown.count("May this leave?") == 1
    assert "gradient at" not in shown
    assert result.err[-4].endswith("E207 this site has not accepted the contract")


def test_options_that_contradict_each_other(asking: Path, call: Call):
    for words in ((*ALL, "--join"), ("contract.toml", "hospital.toml", "--join", "--served"), (*ALL, "--served")):
        result = call("predict", *words)
        assert (result.code, result.err[0][:4]) == (2, "E210"), words
    result = call("predict", "contract.toml", "hospital.toml")
    assert (result.code, result.err[0][:4]) == (2, "E225")
    assert "--join, all at one time, or asks a server with --served" in result.err[3]


def test_weights_of_another_run(asking: Path, call: Call):
    result = call("predict", *ALL, "--weights", "runs")
    assert result.code == 6
    assert result.err[-4].startswith("E811")
    assert "hospital.safetensors" in result.err[-3]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


ROWS = """
def rows(table):
    return [{"x": x, "y": ("mild", "severe")[y]} for x, y in zip(table.fields["x"], table.fields["y"].tolist())]
"""


@pytest.fixture
def named(demo: Path, call: Call) -> Path:
    """The demo after a training run in `named` with labels that are texts, and samples to predict for."""
    code = (demo / "parties.py").read_text()
    for old, new in (
        ("data=table(40, 1), ", "data=rows(table(40, 1)), "),
        ("evaluation=table(20, 2), ", 'prediction=TensorTable(x=table(37, 3).fields["x"]), '),
    ):
        assert old in code
        code = code.replace(old, new)
    (demo / "parties.py").write_text(code + ROWS)
    contract = (demo / "contract.toml").read_text()
    listed = '[[preprocessing]]\nfield = "y"\nat = "hospital"\nkind = "classes"\nleast = 1\n\n[training]'
    (demo / "contract.toml").write_text(contract.replace("[training]", listed))
    assert call("run", *ALL, "--folder", "named", "-q").code == 0
    return demo


@pytest.mark.parametrize("how", [(), pytest.param(("--processes",), marks=pytest.mark.slow)], ids=["one", "processes"])
def test_classes_have_their_names(named: Path, call: Call, how: tuple[str, ...]):
    result = call("predict", *ALL, "--weights", "named", "--folder", "found", "--json", *how)
    assert result.code == 0, result.err
    assert result.json()["outputs"]["body"]["classes"] == ["mild", "severe"]
    with (named / "found" / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["sample", "body.0", "body.1", "body.class"]
    places = found(named / "found").argmax(1).tolist()
    assert {row["body.class"] for row in rows} == {"mild", "severe"}
    assert [row["body.class"] for row in rows] == [["mild", "severe"][place] for place in places]
