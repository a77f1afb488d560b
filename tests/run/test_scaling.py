"""A GradScaler in a loop of one's own: what crosses is not scaled, and a scaler that was not told of is refused."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.utils.data import TensorDataset

import cutlayer as cl
from cutlayer.errors import NonFiniteError, ProgramError

pytestmark = pytest.mark.timeout(60)
TRAINING = {"epochs": 2, "batch_size": 8, "microbatches": 2, "schedule": "sequential", "clip_norm": 0.5}


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def rows() -> TensorDataset:
    dice = torch.Generator().manual_seed(7)
    return TensorDataset(torch.randn(22, 6, generator=dice), torch.randint(0, 3, (22,), generator=dice))


def made(labels: str = "client") -> Any:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    return cl.split(net, 1, example=torch.zeros(2, 6), labels=labels)


def halves(
    labels: str, name: str, loss: Any = None, optimizer: Any = sgd, **training: Any
) -> tuple[Any, cl.Plan, cl.Party, cl.Party]:
    """Return the split, the plan, the party called `name` and the other."""
    split = made(labels)
    plan = split.plan(label_spec="int64[batch]", training=cl.Training(**{**TRAINING, **training}))
    criterion = {"loss": loss or nn.CrossEntropyLoss()}
    both = [
        cl.Party(
            place,
            modules={**split.modules(place), **(criterion if labels == place else {})},
            optimizer=optimizer,
            seed=1,
            **({"data": rows(), "fields": ["input", "label"]} if place == "client" else {}),
        )
        for place in ("client", "server")
    ]
    return split, plan, *(both if name == "client" else both[::-1])


def output(session: Any, party: cl.Party, part: Any, labels: str) -> Tensor:
    """Return what the party's backward begins with."""
    modules: Any = party.modules
    if party.name == "client":
        back = session.remote(modules["head"](part["input"]))
        return back if labels == "server" else modules["loss"](modules["tail"](back), part["label"])
    if labels == "client":
        return session.remote(modules["body"](session.remote()))
    return modules["loss"](modules["body"](session.remote()), part["label"])


def loop(
    session: Any, party: cl.Party, labels: str, scaler: GradScaler, *, told: GradScaler | None, forgot: bool = False
) -> None:
    """Train; the session is told of the scaler `told`, and the loss is scaled by `scaler` unless it is forgotten."""
    session.scaler = told
    own = [p for m in party.modules.values() if isinstance(m, nn.Module) for p in m.parameters()]
    for round in session.rounds():
        for part in round:
            loss = output(session, party, part, labels) * part.scale
            (loss if forgot else scaler.scale(loss)).backward()
            if part.last:
                scaler.unscale_(session.optimizer)
                nn.utils.clip_grad_norm_(own, 0.5)
                scaler.step(session.optimizer)
                scaler.update()
                session.optimizer.zero_grad()


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("labels", ["client", "server"])
@pytest.mark.parametrize("name", ["client", "server"])
def test_with_the_scaler_told_the_bits_are_those_of_fit(labels: str, name: str):
    party = {"seed": 1}
    run = cl.fit(made(labels), rows(), loss=nn.CrossEntropyLoss(), optimizer=sgd, party=party, **TRAINING)
    split, plan, mine, other = halves(labels, name)
    scaler = GradScaler("cpu", init_scale=2.0**16, growth_interval=3)
    with cl.session(plan, mine, others=[other]) as session:
        loop(session, mine, labels, scaler, told=scaler)
    assert scaler.get_scale() > 2.0**16
    assert same(split.model.state_dict(), run.state_dict())


@pytest.mark.provokes("E442")
@pytest.mark.parametrize(
    ("labels", "name"), [("client", "client"), ("server", "client"), ("server", "server"), ("client", "server")]
)
def test_a_scaler_that_was_not_told_of_is_refused_before_a_weight_moved(labels: str, name: str):
    split, plan, mine, other = halves(labels, name)
    before = {key: value.clone() for key, value in split.model.state_dict().items()}
    words = f"E442.*party {name}, train round 1.*got 65536 times that.*session.scaler = scaler"
    with pytest.raises(ProgramError, match=words), cl.session(plan, mine, others=[other]) as session:
        loop(session, mine, labels, GradScaler("cpu", init_scale=2.0**16), told=None)
    assert same(split.model.state_dict(), before)


@pytest.mark.provokes("E442")
@pytest.mark.parametrize(
    ("told", "scale", "loss", "got"),
    [
        (None, 2.0**16, nn.functional.cross_entropy, "a step of a scaler, and session.scaler is none"),
        (
            GradScaler("cpu", init_scale=2.0**16),
            2.0**16,
            nn.CrossEntropyLoss(),
            "a step of a scaler, and session.scaler is another",
        ),
        (None, 1000.0, nn.CrossEntropyLoss(), "a step of a scaler, and session.scaler is none"),
    ],
    ids=["a loss that is a function", "another scaler of the same scale", "no power of two"],
)
def test_a_scaler_that_only_its_step_shows_moves_no_weight_of_its_party(
    told: GradScaler | None, scale: float, loss: Any, got: str
):
    _, plan, mine, other = halves("client", "client", loss)
    head: Any = mine.modules["head"]
    before = {key: value.clone() for key, value in head.state_dict().items()}
    with pytest.raises(ProgramError, match=f"E442.*{got}"), cl.session(plan, mine, others=[other]) as session:
        loop(session, mine, "client", GradScaler("cpu", init_scale=scale), told=told)
    assert same(head.state_dict(), before)


@pytest.mark.provokes("E442")
def test_a_loss_that_the_sessions_scaler_did_not_scale_is_refused():
    _, plan, mine, other = halves("client", "client")
    words = r"E442.*not scaled by it.*begins with 32768, got 0.5.*session.scaler.scale\(loss\)"
    scaler = GradScaler("cpu", init_scale=2.0**16)
    with pytest.raises(ProgramError, match=words), cl.session(plan, mine, others=[other]) as session:
        loop(session, mine, "client", scaler, told=scaler, forgot=True)


def overflow(session: Any, party: cl.Party) -> None:
    session.scaler = GradScaler("cpu", init_scale=2.0**127)
    for round in session.rounds():
        for part in round:
            session.scaler.scale(output(session, party, part, "client") * 64.0).backward()


@pytest.mark.provokes("E351")
def test_a_scaled_gradient_that_overflows_at_a_cut_says_what_helps():
    _, plan, mine, other = halves("client", "client")
    session = cl.session(plan, mine, others=[other])
    words = r"E351.*a scaled gradient at a cut.*party client, train round 1.*lower init_scale, or use bfloat16"
    with pytest.raises(NonFiniteError, match=words), session:
        overflow(session, mine)


@pytest.mark.parametrize("told", [True, False])
def test_a_disabled_scaler_is_none(told: bool):
    split, plan, mine, other = halves("client", "client")
    run = cl.fit(made(), rows(), loss=nn.CrossEntropyLoss(), optimizer=sgd, party={"seed": 1}, **TRAINING)
    scaler = GradScaler("cpu", enabled=False)
    with cl.session(plan, mine, others=[other]) as session:
        loop(session, mine, "client", scaler, told=scaler if told else None)
    assert same(split.model.state_dict(), run.state_dict())


@pytest.mark.parametrize("labels", ["client", "server"])
@pytest.mark.parametrize("factor", [1 / 512, 256.0])
def test_a_factor_of_the_loops_own_reaches_all_parties(factor: float, labels: str):
    found = []
    for times in (1.0, factor):
        rate = partial(torch.optim.SGD, lr=0.1 / times)
        split, plan, mine, other = halves(labels, labels, optimizer=rate, clip_norm=None)
        with cl.session(plan, mine, others=[other]) as session:
            for round in session.rounds():
                for part in round:
                    (output(session, mine, part, labels) * part.scale * times).backward()
                    if part.last:
                        session.optimizer.step()
                        session.optimizer.zero_grad()
        found.append(split.model.state_dict())
    torch.testing.assert_close(*found)
    start = made().model.state_dict()
    assert not any(torch.equal(start[name], value) for name, value in found[0].items())


def test_a_factor_beside_the_sessions_scaler_is_no_missing_scale():
    """The scaler's 2^16 and the factor of 1/512 are powers of two: the bits are those of the factor alone."""
    found = []
    for scaler in (GradScaler("cpu", enabled=False), GradScaler("cpu", init_scale=2.0**16)):
        split, plan, mine, other = halves("client", "client", clip_norm=None)
        with cl.session(plan, mine, others=[other]) as session:
            session.scaler = scaler
            for round in session.rounds():
                for part in round:
                    scaler.scale(output(session, mine, part, "client") * part.scale / 512).backward()
                    if part.last:
                        scaler.step(session.optimizer)
                        scaler.update()
                        session.optimizer.zero_grad()
        found.append(split.model.state_dict())
    assert same(*found)
    assert not same(found[0], made().model.state_dict())
