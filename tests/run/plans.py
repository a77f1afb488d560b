"""Small plans with all their parties, used in one process and as separate processes alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

import cutlayer as cl

ROWS = 46


def _adam(parameters):
    return torch.optim.Adam(parameters, 1e-2)


def _block(inputs: int, outputs: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU(), nn.Dropout(0.2))


class Merge(nn.Module):
    """Concatenates its inputs, then a block."""

    def __init__(self, inputs: int, outputs: int, seed: int) -> None:
        super().__init__()
        self.block = _block(inputs, outputs, seed)

    def forward(self, *parts: torch.Tensor) -> torch.Tensor:
        return self.block(torch.cat(parts, 1))


def _table(rows: slice, features: slice = slice(None)) -> cl.TensorTable:
    generator = torch.Generator().manual_seed(7)
    x, y = torch.randn(ROWS, 6, generator=generator), torch.randint(0, 3, (ROWS,), generator=generator)
    return cl.TensorTable(x=x[rows, features], y=y[rows])


def _party(name: str, modules: dict[str, nn.Module], data: cl.TensorTable | None = None) -> cl.Party:
    return cl.Party(name, modules=modules, data=data, evaluation=data, optimizer=_adam, seed=len(name))


@dataclass(frozen=True)
class Case:
    """A plan, a function that builds each of its parties, and its coordinator."""

    plan: cl.Plan
    build: Callable[[str], cl.Party]
    coordinator: str

    def parties(self) -> list[cl.Party]:
        return [self.build(name) for name in self.plan.parties]


U = {"cut": "float32[batch, 8]", "back": "float32[batch, 5]", "output": "float32[batch, 3]"}
HOSPITALS = {"alpha": slice(0, 18), "beta": slice(18, 28), "gamma": slice(28, ROWS)}


def _u(names: Sequence[str], **training: object) -> Case:
    def build(name: str) -> cl.Party:
        if name == "server":
            return _party("server", {"body": _block(8, 5, 2)})
        rows = HOSPITALS[name] if len(names) > 1 else slice(None)
        ends = {"head": _block(6, 8, 1), "tail": nn.Linear(5, 3), "loss": nn.CrossEntropyLoss()}
        torch.manual_seed(3)
        ends["tail"].reset_parameters()
        return _party(name, ends, _table(rows))

    client = names[0] if len(names) == 1 else list(names)
    return Case(cl.u_shaped(client, "server", **U, **training), build, "server")


def u_shaped(**training: object) -> Case:
    return _u(["alpha"], **{"batch_size": 8, "microbatches": 2, "schedule": "1f1b", "epochs": 2, **training})


def relay(**training: object) -> Case:
    return _u(list(HOSPITALS), **{"batch_size": 5, "epochs": 2, "drop_last": True, **training})


def parallel(**training: object) -> Case:
    return _u(list(HOSPITALS), **{"batch_size": 6, "epochs": 2, "drop_last": True, "order": "parallel", **training})


def vertical(**training: object) -> Case:
    """Three parties: clinic and laboratory hold features, the registry holds labels."""
    settings = {
        "batch_size": 8,
        "microbatches": 2,
        "schedule": "gpipe",
        "epochs": 2,
        "clip_norm": 1.0,
        "clip": "global",
    }
    cuts = {"clinic": "float32[batch, 4]", "laboratory": "float32[batch, 3]"}
    plan = cl.vertical(cuts, "registry", output="float32[batch, 3]", **{**settings, **training})

    def build(name: str) -> cl.Party:
        if name == "registry":
            modules = {"body": Merge(7, 3, 2), "loss": nn.CrossEntropyLoss()}
            return _party(name, modules, _table(slice(None)))
        features, width = {"clinic": (slice(0, 4), 4), "laboratory": (slice(4, 6), 3)}[name]
        inputs = len(range(6)[features])
        return _party(name, {f"head-{name}": _block(inputs, width, 1)}, _table(slice(None), features))

    return Case(plan, build, "registry")


def hops(**training: object) -> Case:
    """Four parties in a chain."""
    widths = {"one": 6, "two": 7, "three": 8, "four": 3}
    settings = {"batch_size": 8, "microbatches": 2, "schedule": "1f1b", "epochs": 2, **training}
    plan = cl.multihop({name: f"float32[batch, {width}]" for name, width in widths.items()}, **settings)
    names, sizes = list(widths), [6, *widths.values()]

    def build(name: str) -> cl.Party:
        place = names.index(name)
        modules = {f"hop-{name}": _block(sizes[place], sizes[place + 1], place)}
        if name == "four":
            modules["loss"] = nn.CrossEntropyLoss()
        return _party(name, modules, _table(slice(None)) if name in ("one", "four") else None)

    return Case(plan, build, "one")


def raw(**training: object) -> Case:
    """The raw inputs are released to the server: what a leak looks like on the wire."""
    stages = [
        cl.Stage("head", at="alpha", inputs=["data.x"], output="float32[batch, 8]"),
        cl.Stage("body", at="server", inputs=["head", "data.x@alpha"], output="float32[batch, 3]"),
        cl.Loss("loss", at="server", inputs=["body", "data.y@alpha"]),
    ]
    releases = [
        cl.Release("x", at="alpha", to="server", spec="float32[batch, 6]"),
        cl.Release("y", at="alpha", to="server", spec="int64[batch]"),
    ]
    plan = cl.Plan(stages, training=cl.Training(**{"batch_size": 8, "epochs": 1, **training}), releases=releases)

    def build(name: str) -> cl.Party:
        if name == "server":
            return _party(name, {"body": Merge(14, 3, 2), "loss": nn.CrossEntropyLoss()})
        return _party(name, {"head": _block(6, 8, 1)}, _table(slice(None)))

    return Case(plan, build, "server")


class Mean(nn.Module):
    """The mean over an image, which adds in the order of memory."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3))


def pixels(**training: object) -> Case:
    """Images with channels last at both ends of a cut: what crosses is transposed in memory, both ways."""
    grown = "float32[batch, 4, 3, 13]"
    plan = cl.vanilla("alpha", "server", cut=grown, output="float32[batch, 3]", batch_size=8, **training)

    def build(name: str) -> cl.Party:
        torch.manual_seed(5)
        grow = nn.Sequential(nn.Unflatten(1, (2, 1, 3)), nn.Upsample(scale_factor=5), nn.Conv2d(2, 4, 3))
        if name == "alpha":
            return _party(name, {"head": grow.to(memory_format=torch.channels_last)}, _table(slice(None)))
        body = nn.Sequential(nn.ReLU(), nn.Conv2d(4, 5, 3), Mean(), nn.Linear(5, 3))
        modules = {"body": body.to(memory_format=torch.channels_last), "loss": nn.CrossEntropyLoss()}
        return _party(name, modules, _table(slice(None)))

    return Case(plan, build, "server")


CASES: dict[str, Callable[..., Case]] = {
    "hops": hops,
    "parallel": parallel,
    "pixels": pixels,
    "raw": raw,
    "relay": relay,
    "u_shaped": u_shaped,
    "vertical": vertical,
}
