"""What the site's own code raises without a number, from each place where a run calls it: the class's code, its words.

Builders, data sets, modules and exchanges may raise cutlayer's classes; `cutlayer run` prints them as its own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cutlayer import errors
from cutlayer.cli.catalogue import catalogue
from cutlayer.cli.console import exit_code

Call = Callable[..., Any]
EXCHANGE = """
[[exchange]]
name = "own"
group = ["hospital", "server"]
says = "that it is there"

[training]
"""
OWN = """
from cutlayer import errors
from cutlayer.engine.exchange import Hear, Say

def check(place):
    if place == {place!r}:
        raise errors.{kind}("the study's rule is broken", where=place, remedy="ask the study office")

class Head(nn.Linear):
    def forward(self, x):
        check("module")
        return super().forward(x)

class Table(torch.utils.data.Dataset):
    def __init__(self, x, y):
        self.x, self.y = x, y
    def __len__(self):
        return len(self.x)
    def __getitem__(self, index):
        check("data set")
        return {{"x": self.x[index], "y": self.y[index]}}

def say(job, me, local):
    check("exchange")
    for party in job.group:
        if party != me:
            yield Say(party, b"x")
    for party in job.group:
        if party != me:
            yield Hear(party)

def table(count, seed):
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
    return Table(x, (x[:, 0] > 0).long())

MORE = {{"optimizer": adam, "exchanges": {{"own": say}}}}

def hospital(name):
    check("builder")
    return Party(name, modules={{"head": Head(4, 8), "loss": nn.functional.cross_entropy}}, data=table(40, 1), **MORE)

def server(name):
    return Party(name, modules={{"body": linear(8, 2)}}, **MORE)
"""
CASES = {
    "E100": "builder",
    "E200": "builder",
    "E250": "data set",
    "E300": "module",
    "E350": "module",
    "E400": "exchange",
    "E500": "exchange",
    "E520": "exchange",
    "E600": "builder",
    "E620": "exchange",
    "E640": "exchange",
    "E660": "builder",
    "E700": "exchange",
    "E800": "builder",
}
WITHIN = {
    "E250": "party hospital, train round 1, batch 0: ",
    "E300": "party hospital, train round 1, microbatch 0: ",
}
KINDS = {kind.default_code: kind for name in errors.__all__ if (kind := getattr(errors, name))}


def write(folder: Path, place: str, kind: str) -> None:
    """Let the site's code raise such an error at this place."""
    contract, code = folder / "contract.toml", folder / "parties.py"
    contract.write_text(contract.read_text().replace("\n[training]\n", EXCHANGE))
    code.write_text(code.read_text() + OWN.format(place=place, kind=kind))


@pytest.mark.provokes(by="code")
@pytest.mark.parametrize(("code", "place"), CASES.items(), ids=list(CASES))
def test_an_error_without_a_number_has_its_classs(call: Call, demo: Path, code: str, place: str):
    kind = KINDS[code]
    write(demo, place, kind.__name__)
    result = call("run", "contract.toml", "hospital.toml", "server.toml", "--folder", "out")
    assert result.code == exit_code(kind(""))
    assert result.err[-4:] == [
        f"{code} the study's rule is broken",
        f"  where: {WITHIN.get(code, '')}{place}",
        "  why:   see above",
        f"  do:    ask the study office (more: cutlayer explain {code})",
    ]
    assert catalogue()[code].kind == kind.__name__


def test_the_same_code_runs_if_it_raises_nothing(call: Call, demo: Path):
    write(demo, "nowhere", "PlanError")
    result = call("run", "contract.toml", "hospital.toml", "server.toml", "--folder", "out")
    assert result.code == 0, result.err


def test_each_class_is_here():
    assert set(CASES) == set(KINDS) - {"E000"}  # what is not foreseen: tests/cli/test_console.py
