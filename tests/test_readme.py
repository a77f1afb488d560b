"""The README's block runs as it stands, and is short."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import cutlayer as cl

ROOT = Path(__file__).parents[1]


def test_block_runs_and_is_short(capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(blocks) == 1
    assert len(blocks[0].splitlines()) <= 25
    names: dict[str, object] = {}
    exec(compile(blocks[0], "README.md", "exec"), names)  # noqa: S102 - our own README
    shown = capsys.readouterr().out
    assert "activations of head to cloud" in shown
    assert "evaluate" in shown
    result = names["result"]
    assert isinstance(result, cl.Result)
    assert result.metrics("evaluate")["grade"]["loss"] < 1.65  # below ln 5: it has learnt


def test_the_tutorials_plan_runs_and_learns(capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "tutorial" / "first-run.md").read_text(), re.S)
    names: dict[str, object] = {}
    exec(compile("\n".join(blocks), "first-run.md", "exec"), names)  # noqa: S102 - our own page
    assert "registry" in capsys.readouterr().out
    assert names["result"].metrics("evaluate")["loss"]["loss"] < 0.1


def test_an_own_model_is_split_in_ten_lines():
    text = (ROOT / "docs" / "tutorial" / "own-model.md").read_text()
    given, new = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(new.splitlines()) <= 10
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    short = new.replace("mnist_5k()", "(part[::5] for part in mnist_5k())")
    exec(compile(given + short, "own-model.md", "exec"), names)  # noqa: S102 - our own page
    assert names["run"].result.metrics("train")["loss"]["loss"] < 2.1


@pytest.mark.parametrize("evaluated", [False, True])
def test_the_page_on_loops_runs_as_it_stands(evaluated: bool):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "how-to" / "own-loop.md").read_text(), re.S)
    block = block.replace("data=table,", "data=table, evaluation=table,") if evaluated else block
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(compile(block, "own-loop.md", "exec"), names)  # noqa: S102 - our own page
    history = names["session"].result().history
    assert [row["mode"] for row in history] == ["train"] * 3 + ["evaluate"] * evaluated
    losses = [row["metrics"]["loss"] for row in history]
    assert losses[2] < 0.8 * losses[0]


def test_two_processes_train_a_split_model_and_one_of_them_by_its_own_loop(tmp_path: Path):
    """The weights are those of `simulate`, bit for bit."""
    text = (ROOT / "docs" / "how-to" / "own-loop.md").read_text()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, code in re.findall(r'```python title="(\w+\.py)"\n(.*?)```', text, re.S):
        (tmp_path / name).write_text(code.replace("7443", str(port)))
    path = {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]), "PRIVATE_SEED": "5"}
    running = [
        subprocess.Popen(
            [sys.executable, f"{party}.py"],
            cwd=tmp_path,
            env={**os.environ, **path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for party in ("cloud", "hospital")
    ]
    try:
        said = [one.communicate(timeout=60)[0] for one in running]
    finally:
        for one in running:
            one.kill()
    assert [one.returncode for one in running] == [0, 0], said
    assert said[1].startswith("split: ")
    here: dict[str, Any] = {}
    exec(compile((tmp_path / "study.py").read_text(), "study.py", "exec"), here)  # noqa: S102 - our own page
    split, x = here["split"], torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    table = cl.TensorTable(input=x, y=x[:, :3].argmax(1))
    modules = {**split.modules("client"), "loss": nn.CrossEntropyLoss()}
    known = here["model"][4].weight.clone()
    torch.manual_seed(5)
    here["model"][4].reset_parameters()
    assert not torch.equal(here["model"][4].weight, known)
    hospital = cl.Party("hospital", modules=modules, data=table, optimizer=here["sgd"], seed=1)
    cloud = cl.Party("cloud", modules=split.modules("server"), optimizer=here["sgd"], seed=2)
    cl.simulate(here["plan"], [hospital, cloud])
    trained = load_file(tmp_path / "hospital.safetensors")
    body = load_file(tmp_path / "cloud.safetensors")
    trained |= {name: value for name, value in body.items() if name.startswith("2.")}
    assert all(torch.equal(value, trained[name]) for name, value in here["model"].state_dict().items())
    assert len(trained) == len(here["model"].state_dict()) == 6


def test_the_page_on_extending_runs_as_it_stands(capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "how-to" / "extend.md").read_text(), re.S)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "extend.md", "exec"), names)  # noqa: S102 - our own page
    shown = capsys.readouterr().out
    assert (
        "activations of head (after gaussian(clip=10.0, deviation=0.1), as int8) to server: uint8[batch, 16]" in shown
    )
    assert isinstance(names["hospital"], cl.Party)
    crossing, told = names["crossing"], names["told"]
    made = cl.Plan(names["plan"].stages, releases=names["plan"].releases, extras=[crossing, told])
    own = {"codecs": {"half": names["Half"]}, "exchanges": {"least": names["least"]}}
    x = torch.randn(16, 5, generator=torch.Generator().manual_seed(1))
    table = cl.TensorTable(x=x, y=(x[:, 0] > 0).long())
    modules = {"head": nn.Linear(5, 8)}, {"body": nn.Linear(8, 2), "loss": nn.CrossEntropyLoss()}
    parties = [
        cl.Party("hospital", modules=modules[0], data=table, optimizer=torch.optim.SGD, **own),
        cl.Party("server", modules=modules[1], optimizer=torch.optim.SGD, **own),
    ]
    assert cl.simulate(made, parties).metrics("train")["loss"]["loss"] < 2


def test_links_lead_somewhere():
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
    broken = [
        f"{page.relative_to(ROOT)}: {link}"
        for page in pages
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
        if not (page.parent / link).exists()
    ]
    assert not broken, "\n".join(broken)
