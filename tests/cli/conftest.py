"""A contract of two parties with their files and code, in a folder of its own that is the current one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cutlayer.cli.app import app
from tests.provoking import saw

CONTRACT = """
[contract]
name = "demo"
coordinator = "server"

[[stage]]
name = "head"
at = "hospital"
inputs = ["data.x"]
output = "float32[batch, 8]"

[[stage]]
name = "body"
at = "server"
inputs = ["head"]
output = "float32[batch, 2]"

[[loss]]
name = "loss"
at = "hospital"
inputs = ["body", "data.y"]

[[release]]  # there is no tail: the server can read the labels in the gradient at the loss
field = "y"
at = "hospital"
to = "server"
spec = "int64[batch]"

[training]
epochs = 2
batch_size = 16

[addresses]
server = "127.0.0.1:7443"

[deadlines]
join = 60
patience = 60
receive = 60
"""

CODE = """
import torch
from torch import nn

from cutlayer import Party, TensorTable


def table(count, seed):
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
    return TensorTable(x=x, y=(x[:, 0] > 0).long())


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.05)


def linear(*sizes):
    layer = nn.Linear(*sizes)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.linspace(-0.5, 0.5, parameter.numel()).reshape(parameter.shape))
    return layer


def small():
    return nn.Sequential(linear(4, 8), linear(8, 2))


def hospital(name):
    modules = {"head": linear(4, 8), "loss": nn.functional.cross_entropy}
    return Party(name, modules=modules, data=table(40, 1), evaluation=table(20, 2), optimizer=adam, seed=1)


def server(name):
    return Party(name, modules={"body": linear(8, 2)}, optimizer=adam, seed=2)
"""


class Result:
    """What a command did: exit code, lines of stdout and stderr. A test that looks at these has read them."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self._out, self._err = code, out, err

    @property
    def out(self) -> list[str]:
        return saw(self._out).splitlines()

    @property
    def err(self) -> list[str]:
        return saw(self._err).splitlines()

    def json(self) -> Any:
        """Return stdout as one JSON document."""
        return json.loads(saw(self._out))


Call = Callable[..., Result]


@pytest.fixture
def call() -> Call:
    """Run a command in this process. stdin is no terminal."""

    def run(*words: str, stdin: str = "") -> Result:
        done = CliRunner().invoke(app, list(words), input=stdin, prog_name="cutlayer")
        return Result(done.exit_code, done.stdout, done.stderr)

    return run


def write_site(folder: Path, name: str, network: str = "insecure = true", more: str = "") -> None:
    """Write a party file whose code is in `parties.py` beside it."""
    (folder / f"{name}.toml").write_text(
        f'party = "{name}"\n[code]\nbuilder = "parties.py:{name}"\n[network]\n{network}\n{more}'
    )


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder, now the current one."""
    (tmp_path / "contract.toml").write_text(CONTRACT)
    (tmp_path / "parties.py").write_text(CODE)
    for name in ("hospital", "server"):
        write_site(tmp_path, name)
    monkeypatch.chdir(tmp_path)
    return tmp_path
