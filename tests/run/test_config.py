"""The contract file: what it holds, that it reads back equal, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cutlayer.core.parts import Loss, Release, Stage, Training
from cutlayer.core.plan import Plan
from cutlayer.core.topologies import multitask, u_shaped, vanilla, vertical
from cutlayer.errors import ConfigError, CutlayerError, PlanError
from cutlayer.run.config import Contract, DeadlineTable, dump_contract, load_contract, parse_contract
from cutlayer.transport.settings import Deadlines

TEXT = """
[contract]
name = "study"
coordinator = "server"

[[stage]]
name = "head"
at = ["a", "b"]
inputs = ["data.x"]
output = "float32[batch, 8]"
state_limit = 4096

[[stage]]
name = "body"
at = "server"
inputs = ["head"]
output = "float32[batch, 2]"
frozen = true

[[loss]]
name = "loss"
at = "server"
inputs = ["body", "data.y@head"]
weight = 2
reduction = "sum"

[[release]]
field = "y"
at = "head"
to = "server"
spec = "int64[batch]"

[training]
epochs = 2
batch_size = 4
clip_norm = 1.5
clip = "global"

[addresses]
server = "server.example.org:7443"

[deadlines]
join = 30
"""


def wide(**training: Any) -> Contract:
    plan = vanilla(["a", "b"], "server", cut="float32[batch, 8]", output="float32[batch, 2]", **training)
    return Contract(plan=plan, coordinator="server", addresses={"server": "[::1]:7443"})


def test_contract_is_read(tmp_path: Path):
    path = tmp_path / "contract.toml"
    path.write_text(TEXT)
    contract = load_contract(path)
    assert contract.plan == Plan(
        [
            Stage("head", at=["a", "b"], inputs=["data.x"], output="float32[batch, 8]", state_limit=4096),
            Stage("body", at="server", inputs=["head"], output="float32[batch, 2]", frozen=True),
            Loss("loss", at="server", inputs=["body", "data.y@head"], weight=2.0, reduction="sum"),
        ],
        training=Training(epochs=2, batch_size=4, clip_norm=1.5, clip="global"),
        releases=[Release("y", at="head", to="server", spec="int64[batch]")],
        name="study",
    )
    assert contract.coordinator == "server"
    assert contract.addresses == {"server": "server.example.org:7443"}
    assert contract.deadlines.settings() == replace(Deadlines(), join=30.0)


def narrow(**changes: Any) -> Contract:
    plan = u_shaped("a", "b", cut="float32[batch, 4]", back="float16[batch, 2]", output="float32[batch, 2]")
    return Contract(plan=plan, coordinator="b", addresses={"a": "10.0.0.1:1", "b": "b:65535"}, **changes)


def tall() -> Contract:
    clients = {"a": "float32[batch, 4]", "b": "float32[batch, 1]"}
    plan = vertical(clients, "s", output="float32[batch, 2]", clip_norm=0.1, clip="global")
    return Contract(plan=plan, coordinator="s", addresses={"s": "localhost:1"})


def forked() -> Contract:
    plan = multitask({"a": "float32[batch, 4]"}, {"s": "float32[batch, 4]", "t": "float32[batch, 1]"})
    return Contract(plan=plan, coordinator="t", addresses={"t": "localhost:1"})


@pytest.mark.parametrize(
    "make",
    [
        lambda: parse_contract(TEXT),
        lambda: wide(epochs=3, schedule="1f1b", microbatches=4, order="parallel", hub="a", evaluate_every=2),
        lambda: narrow(deadlines=DeadlineTable(join=0.5, receive=3.25)),
        tall,
        forked,
    ],
    ids=["text", "replicas", "u-shaped", "vertical", "multitask"],
)
def test_dumped_contract_reads_back_equal(make: Callable[[], Contract]):
    contract = make()
    again = parse_contract(dump_contract(contract))
    assert again == contract
    assert again.digest() == contract.digest()
    assert again.plan.digest() == contract.plan.digest()


def test_digest_covers_every_key():
    """Each leaf of the file, changed alone, changes the digest; comments and the order of tables do not."""
    first = parse_contract(TEXT).digest()
    assert parse_contract("# a comment\n" + TEXT).digest() == first
    changes = [
        ('name = "study"', 'name = "other"'),
        ('at = ["a", "b"]', 'at = ["a", "c"]'),
        ("[batch, 8]", "[batch, 9]"),
        ("4096", "4097"),
        ("frozen = true", "frozen = false"),
        ("weight = 2", "weight = 3"),
        ('"sum"', '"mean"'),
        ("int64[batch]", "int32[batch]"),
        ("epochs = 2", "epochs = 3"),
        ("1.5", "1.25"),
        ("7443", "7444"),
        ("join = 30", "join = 31"),
    ]
    digests = [parse_contract(TEXT.replace(old, new)).digest() for old, new in changes]
    assert len({first, *digests}) == len(changes) + 1
    assert parse_contract(TEXT.replace("join = 30", "join = 30.0")).digest() == first
    moved = Contract(
        plan=(contract := parse_contract(TEXT)).plan,
        coordinator="a",
        addresses={**contract.addresses, "a": "a:1"},
        deadlines=contract.deadlines,
    )
    assert moved.digest() != replace(moved, coordinator="server").digest()


def test_training_table_has_every_field_of_training():
    shown = msgspec.toml.decode(dump_contract(tall()))["training"]
    assert shown == asdict(Training(clip_norm=0.1, clip="global"))


def test_digest_does_not_tell_whole_numbers_from_equal_ones():
    assert narrow(deadlines=DeadlineTable(join=30)).digest() == narrow(deadlines=DeadlineTable(join=30.0)).digest()


def test_deadlines_are_those_of_the_transport():
    assert DeadlineTable().settings() == Deadlines()


@pytest.mark.provokes(by="code")
@pytest.mark.parametrize(
    ("old", "new", "code", "message"),
    [
        ("epochs = 2", "epoch = 2", "E201", "did you mean 'epochs'"),
        ("state_limit", "statelimit", "E201", r"contract: stage\[0\].*did you mean 'state_limit'"),
        ("[deadlines]", "[deadline]", "E201", "did you mean 'deadlines'"),
        ("weight = 2", "weight = 'much'", "E202", r"loss\[0\].weight.*expected float, got text"),
        ("join = 30", "join = 0", "E202", "deadlines.join.*float > 0"),
        ("join = 30", "join = 1e9", "E202", "deadlines.join.*float <= 604800"),
        ("7443", "", "E212", "an address is not host:port"),
        ("server.example.org:7443", "https://server.example.org:7443", "E212", "without https://"),
        ('coordinator = "server"', 'coordinator = "a"', "E205", "the coordinator 'a' has no address"),
        ('coordinator = "server"', 'coordinator = "x"', "E205", "'x' is no party of the plan"),
        ("server = ", "sever = ", "E205", "'sever' is no party"),
        ('name = "study"', 'name = "../../study"', "E104", "cannot be the name of a contract"),
    ],
)
def test_wrong_contract_is_refused(old: str, new: str, code: str, message: str):
    with pytest.raises(CutlayerError, match=message) as caught:
        parse_contract(TEXT.replace(old, new))
    assert caught.value.code == code


def test_wrong_plan_is_a_plan_error():
    with pytest.raises(PlanError, match="E107"):
        parse_contract(TEXT.replace('to = "server"', 'to = "a"'))


def test_losses_stand_after_stages():
    plan = wide().plan
    head, body, loss = plan.stages
    mixed = Plan([head, loss, body], releases=plan.releases)
    with pytest.raises(ConfigError, match=r"E205.*a loss stands before a stage"):
        Contract(plan=mixed, coordinator="server", addresses={"server": "s:1"})
