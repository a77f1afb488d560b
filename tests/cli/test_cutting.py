"""`cutlayer cut`: a table of cuts for a model of one's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Call = Callable[..., Any]
CODE = """
import torch
from torch import nn

def net():
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))

def words():
    return nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2)), torch.zeros(2, 7, dtype=torch.int64)

class Named(nn.Sequential):
    def forward(self, x):
        return {"pred": super().forward(x), "x": x}

def named():
    return Named(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))

def nothing():
    return None

def broken():
    raise ValueError("no weights here")
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)


def test_a_table_with_a_row_for_each_cut(call: Call):
    result = call("cut", "model.py:net", "--input", "float32[batch, 6]", "--batch", "10")
    assert result.code == 0, result.err
    assert result.out[0] == "Sequential: a step of 10 samples, forwards and backwards"
    rows = [line.split() for line in result.out[2:-1]]
    assert [row[0] for row in rows] == ["0", "1"]
    assert rows[0][1:5] == ["200", "B", "200", "B"]
    assert result.out[-1] == "2 places to cut; 1 more cannot be: --refused says why"


@pytest.mark.provokes("E101")
def test_a_spec_that_cannot_be_read_is_named(call: Call):
    result = call("cut", "model.py:net", "--input", "x=float32[6, batch]")
    assert (result.code, result.err[0]) == (2, "E101 'batch' is not the first dimension of 'float32[6, batch]'")
    assert result.err[1] == "  where: --input 'x=float32[6, batch]'"


def test_why_not(call: Call):
    result = call("cut", "model.py:net", "--input", "float32[batch, 6]", "--refused")
    assert any(line.startswith("  not after 2: E312 nothing is computed after") for line in result.out)


def test_the_document(call: Call):
    document = call("cut", "model.py:words", "--json").json()
    (one,) = document["cuts"]
    assert (one["point"], one["tensors"], one["up"]) == ("0", ["float32[batch, 7, 4]"], 32 * 7 * 4 * 4)
    assert one["client"]["parameters"] == 36
    assert document["refused"] == [{"point": "1", "code": "E312"}]


def test_inputs_may_be_named(call: Call):
    result = call("cut", "model.py:net", "--input", "input=float32[batch, 6]")
    assert result.code == 0, result.err


@pytest.mark.provokes("E237")
@pytest.mark.parametrize("words", [("model.py:net",), ("model.py:nothing", "--input", "float32[batch, 6]")])
def test_there_must_be_a_model_and_an_example(call: Call, words: tuple[str, ...]):
    result = call("cut", *words)
    assert result.code == 2
    assert result.err[0] == "E237 there is no model to cut, or no example of its inputs"
    assert "--input NAME=SPEC" in result.err[3]


@pytest.mark.provokes("E204")
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model.py", "the function cannot be read"),
        ("model.py:no", "has no function 'no'"),
        ("model.py:broken", "the function failed"),
        ("none.py:net", "cannot be loaded"),
    ],
)
def test_a_function_that_cannot_be_called(call: Call, text: str, words: str):
    result = call("cut", text, "--input", "float32[batch, 6]")
    assert result.code == 2
    assert result.err[0].startswith("E204")
    assert words in result.err[0]


@pytest.mark.provokes("E317")
def test_one_of_several_outputs_is_chosen(call: Call):
    words = ("cut", "model.py:named", "--input", "float32[batch, 6]")
    result = call(*words)
    assert result.code != 0
    assert result.err[0].startswith("E317")
    assert "output='pred'" in result.err[3]
    assert "--output" in result.err[3]
    chosen = call(*words, "--output", "pred")
    assert chosen.code == 0, chosen.err
    assert chosen.out[-1].startswith("2 places to cut")
