"""`cutlayer cut`: a table of cuts for a model of one's own."""

from __future__ import annotations

import re
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

class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(6, 5), nn.Linear(3, 5)
    def forward(self, x, z):
        return self.one(x) + self.two(z)

class Pairs(nn.Module):
    def __init__(self):
        super().__init__()
        self.pair, self.last = Pair(), nn.Linear(5, 2)
    def forward(self, x, z):
        return self.last(self.pair(x, z))

class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.last = nn.Linear(6, 5), nn.Linear(5, 2)
    def forward(self, x, mask):
        return self.last(self.one(x) * mask)

class Keyed(Masked):
    def forward(self, sample):
        return super().forward(sample["x"], sample["a.mask"])

class Deciding(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
    def forward(self, x):
        return self.two(self.one(x)) if x.sum() > 0 else self.one(self.two(x))

def layer():
    return nn.Linear(6, 3)

def nothing():
    return None

def sized(width):
    return nn.Linear(width, 3)

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


def test_an_input_that_crosses_raw_is_named_and_counted(call: Call):
    inputs = ("--input", "x=float32[batch, 6]", "--input", "mask=int64[batch, 5]", "--batch", "10")
    result = call("cut", "model.py:Masked", *inputs)
    assert result.code == 0, result.err
    assert result.out[2].split()[:5] == ["one", "600", "B", "200", "B"]
    assert result.out[2].endswith("float32[batch, 5], RAW mask: int64[batch, 5]")
    assert result.out[3].strip().startswith("RAW: the server gets this input as it is")
    assert "release=" in result.out[3]
    (row,) = call("cut", "model.py:Masked", *inputs, "--json").json()["cuts"]
    assert (row["tensors"], row["raw"], row["up"]) == (["float32[batch, 5]"], {"mask": "int64[batch, 5]"}, 600)


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
    assert [(one["point"], one["code"]) for one in document["refused"]] == [("1", "E312")]


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
        ("model.py:no", "has no function 'no'\n.*expected def no\\(\\), got NoneType"),
        ("model.py:broken", "the function failed"),
        (
            "model.py:sized",
            "the function failed\n.*expected a model from a call without arguments, got TypeError: sized",
        ),
        ("none.py:net", "cannot be loaded"),
    ],
)
def test_a_function_that_cannot_be_called(call: Call, text: str, words: str):
    result = call("cut", text, "--input", "float32[batch, 6]")
    assert result.code == 2
    assert result.err[0].startswith("E204")
    assert re.search(words, "\n".join(result.err), re.DOTALL)


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


@pytest.mark.provokes("E325")
def test_an_input_that_does_not_fit(call: Call):
    result = call("cut", "model.py:net", "--input", "float32[batch, 5]")
    assert result.err[0] == "E325 the example does not fit the model's forward"
    assert "float32[3, 5]" in result.err[2]


def test_each_refusal_has_its_reason_in_the_document(call: Call):
    document = call("cut", "model.py:net", "--input", "float32[batch, 6]", "--refused", "--json").json()
    (one,) = document["refused"]
    assert (one["point"], one["code"], one["kind"]) == ("2", "E312", "StageError")
    assert one["what"] == "nothing is computed after '2' before the output"
    assert one["where"] == "at='2'"
    assert one["remedy"].startswith("leave this cut point out")


@pytest.mark.provokes("E328")
@pytest.mark.parametrize(
    ("function", "why"),
    [("layer", "a model without submodules"), ("Deciding", "E3\\d\\d .* \\(2 such\\)")],
)
def test_a_model_that_can_be_cut_nowhere_is_an_error_with_the_reasons(call: Call, function: str, why: str):
    words = ("cut", f"model.py:{function}", "--input", "float32[batch, 6]")
    result = call(*words)
    assert (result.code, result.out) == (3, [])
    assert result.err[0] == "E328 the model can be cut nowhere"
    assert re.search(f"got {why}", result.err[2]), result.err[2]
    told = call(*words, "--refused")
    assert len([line for line in told.out if line.startswith("  not after")]) == (2 if function == "Deciding" else 0)
    document = call(*words, "--json").json()
    assert (document["cuts"], document["error"]["code"]) == ([], "E328")
    assert len(document["refused"]) == (2 if function == "Deciding" else 0)


@pytest.mark.parametrize(
    "inputs", [("float32[batch, 6]", "float32[batch, 3]"), ("z=float32[batch, 3]", "x=float32[batch, 6]")]
)
def test_several_inputs_in_order_or_by_name(call: Call, inputs: tuple[str, str]):
    result = call("cut", "model.py:Pairs", "--input", inputs[0], "--input", inputs[1], "--json")
    assert result.code == 0, result.err
    assert "pair" in [one["point"] for one in result.json()["cuts"]]


def test_a_forward_that_takes_one_dictionary(call: Call):
    inputs = ("--input", "sample.x=float32[batch, 6]", "--input", "sample.a.mask=int64[batch, 5]", "--batch", "10")
    result = call("cut", "model.py:Keyed", *inputs, "--json")
    assert result.code == 0, result.err
    plain = call("cut", "model.py:Masked", *[one.replace("sample.", "").replace("a.", "") for one in inputs], "--json")
    (row,), (expected,) = result.json()["cuts"], plain.json()["cuts"]
    assert row["raw"] == {"a.mask": "int64[batch, 5]"}
    assert {**row, "raw": {}} == {**expected, "raw": {}}


@pytest.mark.provokes("E325")
def test_a_dictionary_given_as_arguments_says_how_to_give_it(call: Call):
    result = call("cut", "model.py:Keyed", "--input", "x=float32[batch, 6]", "--input", "mask=int64[batch, 5]")
    assert (result.code, result.err[0]) == (3, "E325 the example does not fit the model's forward")
    assert "or --input ARGUMENT.KEY=SPEC" in result.err[3]


@pytest.mark.provokes("E210")
@pytest.mark.parametrize("other", ["sample", "sample.x", ""])
def test_an_argument_and_its_entry_do_not_go_together(call: Call, other: str):
    spec = f"{other}=float32[batch, 6]".removeprefix("=")
    result = call("cut", "model.py:Keyed", "--input", "sample.x=float32[batch, 6]", "--input", spec)
    assert (result.code, result.err[0]) == (2, "E210 inputs that do not go together")
    assert result.err[2].endswith(f"got sample.x, {other or 'no name'}")
    assert "--input ARGUMENT.KEY=SPEC" in result.err[3]


@pytest.mark.provokes("E325")
def test_an_input_too_many_is_not_left_out(call: Call):
    result = call("cut", "model.py:net", "--input", "float32[batch, 9]", "--input", "float32[batch, 6]")
    assert (result.code, result.err[0]) == (3, "E325 the example does not fit the model's forward")


@pytest.mark.provokes("E210")
@pytest.mark.parametrize("first", ["x=float32[batch, 6]", "float32[batch, 6]"])
def test_inputs_that_do_not_go_together(call: Call, first: str):
    result = call("cut", "model.py:Pairs", "--input", first, "--input", "x=float32[batch, 3]")
    assert (result.code, result.err[0]) == (2, "E210 inputs that do not go together")
    assert result.err[2].endswith("got x, x" if first[0] == "x" else "got no name, x")
