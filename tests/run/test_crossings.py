"""Codecs, defences and exchanges in a run: equal to a hand-written loop that does the same to the same tensors."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cutlayer as cl
from cutlayer.core.compile import Roster
from cutlayer.core.cost import by_key, cut_flows
from cutlayer.engine.exchange import Hear, Say
from cutlayer.engine.stage import Context, ModuleStage
from cutlayer.errors import ConfigError, ContractError, NonFiniteError
from cutlayer.run.preflight import try_party
from tests.run.trial import Trial

ROWS, SIZE, EPOCHS = 20, 8, 2
SEED = {"a": 5, "b": 6}
NOISE = {"name": "gaussian", "deviation": 0.5}


def rows() -> tuple[Tensor, Tensor]:
    dice = torch.Generator().manual_seed(1)
    return torch.randn(ROWS, 5, generator=dice), torch.randint(0, 2, (ROWS,), generator=dice)


def modules() -> dict[str, nn.Module]:
    torch.manual_seed(3)
    return {"head": nn.Linear(5, 6), "body": nn.Sequential(nn.ReLU(), nn.Linear(6, 4)), "tail": nn.Linear(4, 2)}


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def plan(*extras: cl.Crossing | cl.PlannedExchange) -> cl.Plan:
    stages = [
        cl.Stage("head", at="a", inputs=["data.x"], output="float32[batch, 6]"),
        cl.Stage("body", at="b", inputs=["head"], output="float32[batch, 4]"),
        cl.Stage("tail", at="a", inputs=["body"], output="float32[batch, 2]"),
        cl.Loss("loss", at="a", inputs=["tail", "data.y"]),
    ]
    return cl.Plan(stages, training=cl.Training(epochs=EPOCHS, batch_size=SIZE, shuffle=False), extras=extras)


def parties(**more: Any) -> list[cl.Party]:
    made, (x, y) = modules(), rows()
    own: dict[str, Any] = {
        "a": {"modules": {"head": made["head"], "tail": made["tail"], "loss": nn.CrossEntropyLoss()}},
        "b": {"modules": {"body": made["body"]}},
    }
    own["a"]["data"] = cl.TensorTable(x=x, y=y)
    return [cl.Party(name, optimizer=sgd, seed=SEED[name], **{**own[name], **more}) for name in "ab"]


class Through(torch.autograd.Function):
    """Does one thing to a value, and another to its gradient on the way back."""

    @staticmethod
    def forward(ctx, value, there, back):
        ctx.back = back
        return there(value)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.back(gradient), None, None


Way = Callable[[Tensor, str], Tensor]


def same(value: Tensor, _place: str) -> Tensor:
    return value.clone()


def by_hand(ways: Mapping[str, tuple[Way, Way]]) -> dict[str, nn.Module]:
    """Train the uncut model; `ways`: stage -> what is done to its output, and to the gradient there."""
    made, (x, y) = modules(), rows()
    optimizers = [sgd([*made["head"].parameters(), *made["tail"].parameters()]), sgd([*made["body"].parameters()])]
    for epoch in range(1, EPOCHS + 1):
        for step, begin in enumerate(range(0, ROWS, SIZE)):
            place, value = f"train:{epoch}:{step}:0:0", x[begin : begin + SIZE]
            for name in ("head", "body"):
                there, back = ways.get(name, (same, same))
                value = made[name](value)
                value = Through.apply(value, lambda v, f=there, p=place: f(v, p), lambda g, f=back, p=place: f(g, p))
            nn.functional.cross_entropy(made["tail"](value), y[begin : begin + SIZE]).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    return made


def difference(result: cl.Result, made: Mapping[str, nn.Module]) -> float:
    found = {name: stage.module for w in result.workers.values() for (name, _), stage in w.site.stages.items()}
    pairs = [(found[name].state_dict()[key], v) for name, m in made.items() for key, v in m.state_dict().items()]
    return max(float((mine - other).abs().max()) for mine, other in pairs)


def cast(dtype: torch.dtype) -> Way:
    return lambda value, _place: value.to(dtype).to(value.dtype)


def levels(value: Tensor, _place: str) -> Tensor:
    """256 levels for each sample, written down a second time, one sample after the other."""
    out = []
    for row in value:
        low, high = row.min(), row.max()
        step = (high - low) / 255
        out.append(low + torch.round((row - low) / (step if step > 0 else 1.0)) * step)
    return torch.stack(out)


def noise(party: str, what: str, deviation: float) -> Way:
    """The documented rule for the generator of a defence."""

    def add(value: Tensor, place: str) -> Tensor:
        stream = hashlib.shake_256(f"{SEED[party]}:{what}:{place}:0".encode()).digest(4 * 624)
        words = [int.from_bytes(stream[start : start + 4], "little") for start in range(0, len(stream), 4)]
        dice = torch.Generator().manual_seed(0)
        state = bytearray(dice.get_state().numpy().tobytes())
        state[24 : 24 + 8 * 624] = struct.pack("<624Q", *words)
        dice.set_state(torch.frombuffer(state, dtype=torch.uint8).clone())
        return value + torch.randn(value.shape, generator=dice) * deviation

    return add


B, H = torch.bfloat16, torch.float16
CASES = {
    "cast": ((cl.Crossing("head", codec="bfloat16"),), {"head": (cast(B), same)}),
    "gradient": ((cl.Crossing("body", gradient_codec="float16"),), {"body": (same, cast(H))}),
    "both": (
        (cl.Crossing("head", codec="float16", gradient_codec="bfloat16"), cl.Crossing("body", codec="bfloat16")),
        {"head": (cast(H), cast(B)), "body": (cast(B), same)},
    ),
    "int8": ((cl.Crossing("head", codec="int8", gradient_codec="int8"),), {"head": (levels, levels)}),
    "noise": ((cl.Crossing("head", defences=[NOISE]),), {"head": (noise("a", "head:up", 0.5), same)}),
    "noise, then cast": (
        (cl.Crossing("head", defences=[NOISE], codec="bfloat16"),),
        {"head": (lambda v, p: cast(B)(noise("a", "head:up", 0.5)(v, p), p), same)},
    ),
    "gradient noise": (
        (cl.Crossing("body", gradient_defences=[NOISE]),),
        {"body": (same, noise("a", "body->tail:down", 0.5))},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_loop_by_hand(case: str):
    extras, ways = CASES[case]
    result = cl.simulate(plan(*extras), parties())
    assert difference(result, by_hand(ways)) == 0.0
    assert difference(result, by_hand({})) > 0.0  # it is done at all


@pytest.mark.parametrize("case", ["both", "int8"])
def test_the_ledger_counts_what_is_on_the_wire(case: str):
    made = plan(*CASES[case][0])
    result = cl.simulate(made, parties())
    flows = by_key(cut_flows(made, Roster({"train": {"a": ROWS}})))
    for sender, ledger in result.ledgers.items():
        found: dict[tuple[str, str, str, str, int], tuple[int, int]] = {}
        for key, flow in ledger.flows.items():
            way, peer, mode, direction, number = key[:5]
            if way == "sent" and direction in ("up", "down"):
                found[sender, peer, mode, direction, number] = (flow.payload, flow.messages)
        assert found == {key: value for key, value in flows.items() if key[0] == sender}


def capacity(heard: list[tuple[str, int]]) -> Callable[..., Any]:
    """Members tell the hub a number; the hub tells all the least."""

    def talk(job, me, _local):
        numbers = {me: 10 * len(me) + ord(me[0])}
        if me == job.hub:
            for party in job.group:
                if party != me:
                    numbers[party] = struct.unpack("<q", bytes((yield Hear(party))))[0]
            least = min(numbers.values())
            for party in job.group:
                if party != me:
                    yield Say(party, struct.pack("<q", least))
        else:
            yield Say(job.hub, struct.pack("<q", numbers[me]))
            least = struct.unpack("<q", bytes((yield Hear(job.hub))))[0]
        heard.append((me, least))

    return talk


@pytest.mark.parametrize(("when", "times"), [("start", 1), ("step", 6), ("round", 2), ("finish", 1)])
def test_an_exchange_of_ones_own(when: str, times: int):
    heard: list[tuple[str, int]] = []
    extra = cl.PlannedExchange("capacity", ["a", "b"], says="how many", when=when, limit=8, messages=1)
    result = cl.simulate(plan(extra), parties(exchanges={"capacity": capacity(heard)}))
    assert heard.count(("a", 107)) == heard.count(("b", 107)) == times
    assert difference(result, by_hand({})) == 0.0


def test_an_exchange_that_says_too_much_is_stopped():
    extra = cl.PlannedExchange("capacity", ["a", "b"], says="how many", limit=7)
    with pytest.raises(ContractError, match=r"E531.*'capacity' would send more than the plan allows"):
        cl.simulate(plan(extra), parties(exchanges={"capacity": capacity([])}))


def test_over_the_network_it_is_the_same(tmp_path: Path):
    heard: list[tuple[str, int]] = []
    extra = cl.PlannedExchange("capacity", ["a", "b"], says="how many", limit=8, messages=1)
    made = plan(cl.Crossing("head", codec="int8", defences=[NOISE], gradient_codec="bfloat16"), extra)
    here = cl.simulate(made, parties(exchanges={"capacity": capacity([])}))
    trial = Trial(made, tmp_path)
    found = trial.play(
        {
            p.name: lambda p=p: cl.join(made, p, network=trial.settings(p.name), folder=tmp_path / "run" / p.name)
            for p in parties(exchanges={"capacity": capacity(heard)})
        }
    )
    assert sorted(heard) == [("a", 107)] * 2 + [("b", 107)] * 2
    for name, result in found.items():
        mine = {key[0]: stage.module for key, stage in here.workers[name].site.stages.items()}
        assert difference(result, {key: mine[key] for key in mine if key != "loss"}) == 0.0
        assert {k: f.payload for k, f in result.ledgers[name].flows.items() if k[3] in ("up", "down")} == {
            k: f.payload for k, f in here.ledgers[name].flows.items() if k[3] in ("up", "down")
        }


def test_a_check_before_the_run_knows_the_wire():
    made = plan(cl.Crossing("head", codec="int8", defences=[NOISE]), cl.Crossing("body", gradient_codec="int8"))
    for party in parties():
        try_party(made, party, Roster({"train": {"a": ROWS}}))


# --- what goes wrong -------------------------------------------------------------------------------------------------


class Half:
    """A codec of one's own: the first half of the numbers."""

    def encode(self, value: Tensor) -> Tensor:
        return value[:, :3]

    def decode(self, wire: Tensor, spec: cl.TensorSpec) -> Tensor:
        return torch.cat([wire, torch.zeros(wire.shape[0], spec.concrete(1)[1] - 3)], 1)


class Wrong(Half):
    """Reads another shape."""

    def decode(self, wire: Tensor, spec: cl.TensorSpec) -> Tensor:
        return wire


class Fails(Half):
    """Cannot read."""

    def decode(self, wire: Tensor, spec: cl.TensorSpec) -> Tensor:
        raise ValueError("what is this")


HALF = cl.Crossing("head", codec="half", wire="float32[batch, 3]")


def test_a_codec_of_ones_own():
    def there(value: Tensor, _place: str) -> Tensor:
        return torch.cat([value[:, :3], torch.zeros(len(value), 3)], 1)

    result = cl.simulate(plan(HALF), parties(codecs={"half": Half}))
    assert difference(result, by_hand({"head": (there, same)})) == 0.0


@pytest.mark.provokes(by="code")
@pytest.mark.parametrize(
    ("extra", "more", "code", "words"),
    [
        (HALF, {}, "E290", r"this party has no codec 'half'.*expected one of bfloat16, float16, int8.*plug-in"),
        (cl.Crossing("head", defences=["veil"]), {}, "E290", "no defence 'veil'.*expected one of gaussian"),
        (cl.PlannedExchange("capacity", ["a", "b"], says="x"), {}, "E290", "no exchange 'capacity'"),
        (cl.Crossing("head", defences=["gaussian"]), {}, "E292", "does not take these settings.*deviation"),
        (cl.Crossing("head", defences=[{**NOISE, "deviation": -1.0}]), {}, "E292", "must be finite and at least 0"),
        (cl.Crossing("head", codec={"name": "int8", "x": 1}), {}, "E292", "'int8' does not take these settings"),
        (cl.Crossing("head", codec={"name": "bfloat16", "x": 1}), {}, "E292", "no settings are known, but x"),
        (HALF, {"codecs": {"half": Wrong}}, "E292", r"something else than the plan says.*float32\[batch, 6\]"),
        (
            cl.Crossing("head", defences=["cut"]),
            {"defences": {"cut": lambda: lambda value, dice: value[:1]}},
            "E292",
            "a defence gives something else than it got",
        ),
        (
            cl.Crossing("head", defences=["cut"]),
            {"defences": {"cut": lambda: lambda value, dice: 1 / 0}},
            "E292",
            "a codec or defence of this party failed.*ZeroDivisionError",
        ),
    ],
)
def test_what_a_party_has_must_fit(extra, more: dict[str, Any], code: str, words: str):
    with pytest.raises(ConfigError, match=words) as caught:
        cl.simulate(plan(extra), parties(**more))
    assert caught.value.code == code


@pytest.mark.provokes("E540")
def test_what_cannot_be_decoded_is_refused():
    with pytest.raises(ContractError, match=r"E540.*cannot be decoded.*crossing of head.*got ValueError"):
        cl.simulate(plan(HALF), parties(codecs={"half": Fails}))


def test_what_a_codec_writes_must_be_what_the_plan_says():
    other = cl.Crossing("head", codec="half", wire="float32[batch, 4]")
    with pytest.raises(ContractError, match=r"E522.*about to leave.*expected float32\[batch, 4\]"):
        cl.simulate(plan(other), parties(codecs={"half": Half}))


def test_a_number_that_float16_cannot_hold_does_not_cross():
    made = modules()
    with torch.no_grad():
        made["head"].weight.fill_(1e6)
    first, second = parties()
    first = replace(first, modules={**first.modules, "head": made["head"]})
    with pytest.raises(NonFiniteError, match=r"E351"):
        cl.simulate(plan(cl.Crossing("head", codec="float16")), [first, second])


# --- a stage of one's own --------------------------------------------------------------------------------------------


class Counted(ModuleStage):
    """A stage object instead of a module: it counts its calls."""

    calls = 0

    def forward(self, inputs, context: Context):
        self.calls += 1
        return super().forward(inputs, context)


def test_a_stage_object_in_place_of_a_module():
    first, second = parties()
    ports = {"": cl.TensorSpec.parse("float32[batch, 4]")}
    own = Counted("body", modules()["body"], ports=ports, seed=1, device=torch.device("cpu"))
    result = cl.simulate(plan(), [first, replace(second, modules={"body": own})])
    assert own.calls == 3 * EPOCHS
    assert difference(result, by_hand({})) == 0.0
