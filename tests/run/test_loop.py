"""One's own training loop: the bits, bytes and metrics of `simulate`, in process and over the network."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import cutlayer as cl
from cutlayer.engine.ledger import Ledger
from cutlayer.errors import ConfigError, NonFiniteError, PeerError, PlanError, ProgramError, StageError
from tests.provoking import saw
from tests.run import plans
from tests.run.trial import Trial

pytestmark = pytest.mark.timeout(60)
Loop = Callable[[Any, cl.Party], None]


def called(modules: Any, names: list[str]) -> Any:
    return [modules[name] for name in names]


def learn(session: Any, round: Any, part: Any, loss: Tensor) -> None:
    if round.training:
        (loss * part.scale).backward()
        if part.last:
            session.optimizer.step()
            session.optimizer.zero_grad()


def u_shaped(session: Any, party: cl.Party) -> None:
    head, tail, criterion = called(party.modules, ["head", "tail", "loss"])
    for round in session.rounds():
        for part in round:
            with torch.set_grad_enabled(round.training):
                learn(session, round, part, criterion(tail(session.remote(head(part["x"]))), part["y"]))


def middle(session: Any, party: cl.Party) -> None:
    body = party.modules["body"]
    for round in session.rounds():
        for part in round:
            with torch.set_grad_enabled(round.training):
                learn(session, round, part, session.remote(body(session.remote())))


def first(session: Any, party: cl.Party) -> None:
    (head,) = party.modules.values()
    for round in session.rounds():
        for part in round:
            with torch.set_grad_enabled(round.training):
                learn(session, round, part, session.remote(head(part["x"])))


def merged(session: Any, party: cl.Party) -> None:
    """The server of a vertical plan: two values come, the labels are its own."""
    merge, criterion = party.modules["body"], party.modules["loss"]
    for round in session.rounds():
        for part in round:
            with torch.set_grad_enabled(round.training):
                learn(session, round, part, criterion(merge(*session.remote()), part["y"]))


def middle_hop(session: Any, party: cl.Party) -> None:
    (hop,) = party.modules.values()
    for round in session.rounds():
        for part in round:
            with torch.set_grad_enabled(round.training):
                learn(session, round, part, session.remote(hop(session.remote())))


def with_raw(session: Any, party: cl.Party) -> None:
    """The server gets raw inputs and labels, which the plan releases."""
    body, criterion = party.modules["body"], party.modules["loss"]
    for round in session.rounds():
        for part in round:
            with torch.set_grad_enabled(round.training):
                learn(session, round, part, criterion(body(session.remote(), part["x"]), part["y"]))


def ends(result: cl.Result) -> dict[str, dict[str, Tensor]]:
    return {
        f"{party}/{name}": stage.module.state_dict()
        for party, worker in result.workers.items()
        for (name, _), stage in worker.site.stages.items()
    }


def same(one: cl.Result, other: cl.Result, party: str) -> None:
    mine, theirs = ends(one), ends(other)
    for key, state in mine.items():
        assert all(torch.equal(state[name], theirs[key][name]) for name in state), key
    for name, ledger in one.ledgers.items():
        assert {k: (f.payload, f.messages) for k, f in ledger.flows.items()} == {
            k: (f.payload, f.messages) for k, f in other.ledgers[name].flows.items()
        }
    for name, ledger in one.ledgers.items():
        assert ledger.flops == other.ledgers[name].flops
    for row in one.history:
        assert row in other.history


CASES: dict[str, tuple[Callable[..., plans.Case], str, Loop]] = {
    "u-shaped client": (plans.u_shaped, "alpha", u_shaped),
    "u-shaped server": (plans.u_shaped, "server", middle),
    "relay client": (plans.relay, "beta", u_shaped),
    "parallel client": (plans.parallel, "gamma", u_shaped),
    "relay server": (plans.relay, "server", middle),
    "parallel server": (plans.parallel, "server", middle),
    "vertical client": (plans.vertical, "clinic", first),
    "vertical server": (plans.vertical, "registry", merged),
    "hop one": (plans.hops, "one", first),
    "hop two": (plans.hops, "two", middle_hop),
    "raw client": (plans.raw, "alpha", first),
    "raw server": (plans.raw, "server", with_raw),
}


@pytest.mark.parametrize(
    "settings",
    [{"microbatches": 1}, {"microbatches": 2, "batch_size": 6}, {"evaluate_every": 1, "microbatches": 1}],
    ids=["", "micro", "evaluate"],
)
@pytest.mark.parametrize("name", CASES)
def test_equals_simulate(name: str, settings: dict[str, Any]):
    make, party, loop = CASES[name]
    case = make(**{"epochs": 2, "schedule": "sequential", **settings})
    expected = cl.simulate(case.plan, case.parties())
    mine, others = case.build(party), [case.build(one) for one in case.plan.parties if one != party]
    with cl.session(case.plan, mine, others=others) as session:
        loop(session, mine)
    same(session.result(), expected, party)


class Few(nn.Module):
    """Logits that a metric may take for probabilities: in some batches all are within 0..1."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0].abs().clamp(max=0.9) * (x[:, 0] > 0)


def test_metrics_get_probabilities_as_in_simulate():
    from torchmetrics.classification import BinaryAccuracy

    plan = cl.vanilla("alpha", "server", cut="float32[batch, 2]", output="float32[batch]", label="float32[batch]")
    plan = replace(plan, training=cl.Training(batch_size=4, epochs=1, schedule="sequential"))
    x = torch.randn(16, 2, generator=torch.Generator().manual_seed(1))

    def build(name: str) -> cl.Party:
        modules = (
            {"head": nn.Linear(2, 2, bias=False)}
            if name == "alpha"
            else {"body": Few(), "loss": nn.BCEWithLogitsLoss()}
        )
        torch.nn.init.eye_(modules["head"].weight) if name == "alpha" else None
        data = cl.TensorTable(x=x, y=(x[:, 0] > 0).float())
        metrics = {"loss": BinaryAccuracy} if name == "server" else {}
        return cl.Party(name, modules=modules, data=data if name == "alpha" else None, optimizer=sgd, metrics=metrics)

    expected = cl.simulate(plan, [build(name) for name in plan.parties])
    server = build("server")
    with cl.session(plan, server, others=[build("alpha")]) as session:
        for round in session.rounds():
            for part in round:
                loss = server.modules["loss"](server.modules["body"](session.remote()), part["y"])
                (loss * part.scale).backward()
    assert session.result().history == expected.history


# --- a loop with all that PyTorch has --------------------------------------------------------------------------------


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def cosine(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)


class Net(nn.Module):
    """What a user has, for `cl.split`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.stem = nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.GELU())
        self.deep = nn.Sequential(nn.Linear(16, 16), nn.SiLU(), nn.Linear(16, 8))
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.deep(self.stem(x)))


def rows(count: int = 46) -> TensorDataset:
    dice = torch.Generator().manual_seed(7)
    x, y = torch.randn(count, 6, generator=dice), torch.randint(0, 3, (count,), generator=dice)
    return TensorDataset(x, y)


SETTINGS = {"epochs": 3, "batch_size": 8, "microbatches": 2, "clip_norm": 0.5, "schedule": "sequential"}


def modern(session: Any, head: nn.Module, tail: nn.Module, criterion: nn.Module) -> None:
    """Autocast, gradient accumulation, clipping and a scheduler, as one writes them."""
    optimizer = session.optimizer
    scheduler = cosine(optimizer)
    parameters = [*head.parameters(), *tail.parameters()]
    for round in session.rounds():
        for part in round:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                sent = head(part["x"])
            with torch.autocast("cpu", dtype=torch.bfloat16):
                prediction = tail(session.remote(sent))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = criterion(prediction, part["label"])
            (loss * part.scale).backward()
            if part.last:
                nn.utils.clip_grad_norm_(parameters, 0.5)
                optimizer.step()
                optimizer.zero_grad()
        scheduler.step()


def fitted() -> tuple[Any, cl.Result]:
    made = cl.split(Net(), ("stem", "deep"), example=torch.zeros(2, 6), autocast="bfloat16")
    given = {"scheduler": cosine, "autocast": "bfloat16", "seed": 1}
    run = cl.fit(made, rows(), loss=nn.CrossEntropyLoss(), optimizer=sgd, party=given, **SETTINGS)
    return run.state_dict(), run.result


def halves() -> tuple[cl.Plan, cl.Party, cl.Party]:
    net = Net()
    made = cl.split(net, ("stem", "deep"), example=torch.zeros(2, 6), autocast="bfloat16")
    plan = made.plan("client", "server", training=cl.Training(**SETTINGS))
    own = {"optimizer": sgd, "autocast": "bfloat16", "seed": 1}
    client = cl.Party(
        "client",
        modules={**made.modules("client"), "loss": nn.CrossEntropyLoss()},
        data=rows(),
        fields=["x", "label"],
        **own,
    )
    return plan, client, cl.Party("server", modules=made.modules("server"), scheduler=cosine, **own)


def test_autocast_accumulation_clipping_and_a_scheduler_give_the_bits_of_fit():
    expected, _ = fitted()
    plan, client, server = halves()
    with cl.session(plan, client, others=[server]) as session:
        modern(session, *called(client.modules, ["head", "tail", "loss"]))
    found: dict[str, Tensor] = {}
    for worker in session.result().workers.values():
        for (name, _), stage in worker.site.stages.items():
            found |= stage.module.state_dict() if name != "loss" else {}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", ["u-shaped client", "vertical client"])
def test_a_loss_that_is_scaled_gives_the_bits_of_one_that_is_not(name: str, monkeypatch: pytest.MonkeyPatch):
    """Scales are powers of two: dividing by them is exact. A party without a loss may have a scaler too."""
    make, party, loop = CASES[name]
    case = make(schedule="sequential")
    expected = cl.simulate(case.plan, case.parties())
    scaler, scaled = torch.amp.GradScaler("cpu", init_scale=2.0**16), list[float]()

    def learn_scaled(session: Any, round: Any, part: Any, loss: Tensor) -> None:
        session.scaler = scaler
        if not round.training:
            return
        (scaler.scale(loss * part.scale) if loop is u_shaped else loss).backward()
        if part.last:
            scaler.scale(loss)  # a party without a loss makes its scale so
            scaler.unscale_(session.optimizer)
            scaled.append(scaler.get_scale())
            scaler.step(session.optimizer)
            scaler.update()
            session.optimizer.zero_grad()

    monkeypatch.setitem(globals(), "learn", learn_scaled)
    mine, others = case.build(party), [case.build(one) for one in case.plan.parties if one != party]
    with cl.session(case.plan, mine, others=others) as session:
        loop(session, mine)
    assert set(scaled) == {2.0**16}
    same(session.result(), expected, party)


def test_the_same_over_the_network(tmp_path: Path):
    expected, result = fitted()
    plan, client, server = halves()
    trial = Trial(plan, tmp_path)
    ledgers: dict[str, Any] = {}

    def mine() -> None:
        with cl.session(plan, client, network=trial.settings("client")) as session:
            modern(session, *called(client.modules, ["head", "tail", "loss"]))
        ledgers["client"] = session.result().ledgers["client"]

    def theirs() -> None:
        joined = cl.join(plan, server, network=trial.settings("server"), folder=tmp_path / "run")
        ledgers["server"] = joined.ledgers["server"]

    assert trial.play({"client": mine, "server": theirs}) == {"client": None, "server": None}
    found = {**client.modules["head"].state_dict(), **client.modules["tail"].state_dict()}
    found |= server.modules["body"].state_dict()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    for name, ledger in ledgers.items():
        assert {key: flow.payload for key, flow in ledger.flows.items()} == {
            key: flow.payload for key, flow in result.ledgers[name].flows.items()
        }


def test_two_loops_of_ones_own_meet(tmp_path: Path):
    case = plans.u_shaped(schedule="sequential")
    expected = cl.simulate(case.plan, case.parties())
    trial = Trial(case.plan, tmp_path)
    results: dict[str, cl.Result] = {}

    def part(name: str, loop: Loop) -> Callable[[], None]:
        party = case.build(name)  # here: threads share the generator that initialises weights

        def run() -> None:
            with cl.session(case.plan, party, network=trial.settings(name)) as session:
                loop(session, party)
            results[name] = session.result()

        return run

    found = trial.play({"alpha": part("alpha", u_shaped), "server": part("server", middle)})
    assert found == {"alpha": None, "server": None}
    for result in results.values():
        same(result, expected, "")


def test_the_ledger_notes_the_same_waits_and_moves_as_that_of_join(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    case, notes = plans.u_shaped(schedule="sequential"), Counter[str]()
    spend = Ledger.spend

    def noted(ledger: Ledger, kind: str, stage: str, seconds: float) -> None:
        if ledger.party == "alpha":
            notes[kind] += 1
        spend(ledger, kind, stage, seconds)

    monkeypatch.setattr(Ledger, "spend", noted)

    def joined(name: str, folder: Path, trial: Trial) -> Callable[[], None]:
        def run() -> None:
            cl.join(case.plan, case.build(name), network=trial.settings(name), folder=folder / f"run-{name}")

        return run

    def looped(trial: Trial) -> None:
        party = case.build("alpha")
        with cl.session(case.plan, party, network=trial.settings("alpha")) as session:
            u_shaped(session, party)

    found = []
    for own in (False, True):
        folder = tmp_path / str(own)
        trial = Trial(case.plan, folder)
        alpha = partial(looped, trial) if own else joined("alpha", folder, trial)
        assert not any(trial.play({"alpha": alpha, "server": joined("server", folder, trial)}).values())
        found.append({kind: notes.pop(kind) for kind in ("wait", "send", "recv", "load", "checkpoint")})
        notes.clear()
    assert found[0] == found[1]
    assert all(found[0].values())


def test_a_loop_in_a_process_of_its_own_uses_the_partys_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    case, calls = plans.u_shaped(schedule="sequential", epochs=1), list[int]()
    alpha, trial = replace(case.build("alpha"), threads=3), Trial(case.plan, tmp_path)
    server, before = replace(case.build("server"), threads=2), torch.get_num_threads()
    monkeypatch.setattr(torch, "set_num_threads", calls.append)

    def looped() -> None:
        with cl.session(case.plan, alpha, network=trial.settings("alpha")) as session:
            u_shaped(session, alpha)

    def joined() -> None:
        cl.join(case.plan, server, network=trial.settings("server"), folder=tmp_path / "run")

    assert trial.play({"alpha": looped, "server": joined}) == {"alpha": None, "server": None}
    assert sorted(calls) == sorted([2, 3, before, before])


def test_global_clipping_and_sums_of_replicas_come_before_the_step():
    case = plans.parallel(clip_norm=0.1, clip="global")
    expected = cl.simulate(case.plan, case.parties())
    party = case.build("alpha")
    others = [case.build(name) for name in case.plan.parties if name != "alpha"]
    with cl.session(case.plan, party, others=others) as session:
        u_shaped(session, party)
    same(session.result(), expected, "alpha")


# --- what goes wrong -------------------------------------------------------------------------------------------------


def opened(settings: dict[str, Any] | None = None) -> tuple[Any, dict[str, nn.Module], cl.Party]:
    case = plans.u_shaped(**{"schedule": "sequential", "microbatches": 1, "epochs": 1, **(settings or {})})
    party = case.build("alpha")
    return cl.session(case.plan, party, others=[case.build("server")]), dict(party.modules), party


def misstep(session: Any, modules: dict[str, Any], kind: str) -> None:
    for round in session.rounds():
        for part in round:
            head = modules["head"](part["x"])
            if kind == "no remote":
                continue
            if kind == "two values":
                session.remote(head, head)
            if kind == "a wrong name":
                session.remote(hed=head)
            if kind == "an array":
                session.remote(head.detach().numpy())
            if kind == "early step":
                session.optimizer.step()
            back = session.remote(head)
            if kind == "twice":
                session.remote(head)
            if kind == "another module":
                loss = modules["loss"](nn.Linear(5, 3)(back), part["y"])
            else:
                loss = modules["loss"](modules["tail"](back), part["y"])
            if kind == "no backward":
                continue
            loss.backward()
            if kind == "no step":
                continue
            if kind == "own optimizer":
                torch.optim.SGD(modules["tail"].parameters(), lr=0.1).step()
                continue
            session.optimizer.step()
            session.optimizer.zero_grad()


def again_and_again(session: Any, modules: dict[str, nn.Module], kind: str) -> None:
    part = next(iter(next(session.rounds())))

    def scored() -> Tensor:
        return modules["loss"](modules["tail"](session.remote(modules["head"](part["x"]))), part["y"])

    def closure() -> Tensor:
        loss = scored()
        loss.backward()
        return loss

    if kind == "closure":
        session.optimizer.step(closure)
    if kind == "named closure":
        session.optimizer.step(closure=closure)
    loss = scored()
    if kind == "retain_graph":
        loss.backward(retain_graph=True)
        loss.backward()
    (gradient,) = torch.autograd.grad(loss, [next(modules["head"].parameters())], create_graph=True)
    (loss + gradient.square().sum()).backward()


@pytest.mark.provokes("E440")
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (
            "closure",
            r"closure cannot run.*party alpha, train round 1.*step\(closure\) before it.*without a closure",
        ),
        ("named closure", r"closure cannot run the model across a cut.*step\(closure\) before it.*LBFGS"),
        ("retain_graph", r"a second time through one microbatch.*got backward.*add up the losses.*retain_graph"),
        ("create_graph", r"a second time through one microbatch.*got backward.*gradient penalty"),
    ],
)
def test_a_microbatch_crosses_once_each_way(kind: str, words: str):
    session, modules, _ = opened()
    with pytest.raises(ProgramError, match=rf"E440.*{words}"), session:
        again_and_again(session, modules, kind)


@pytest.mark.provokes("E440")
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("no remote", r"expected remote\(...\) with the value of head, got the next batch"),
        ("two values", r"expected .*, got remote\(head, value 1\)"),
        ("a wrong name", r"expected remote\(...\) with the value of head, got remote\(hed\)"),
        ("an array", r"expected the outputs of this party's stages, as they are, got ndarray.*not detached"),
        ("early step", r"expected remote\(...\) with the value of head, got optimizer.step\(\)"),
        ("twice", r"expected backward\(\) of the loss|stage 'tail' to be run"),
        ("another module", r"expected stage 'tail' to be run: call the module that was given to Party"),
        ("no backward", r"expected backward\(\) of the loss, or of what remote gave, got the next batch"),
        ("no step", r"expected session.optimizer.step\(\), got the next.*training.microbatches.*a lower init_scale"),
        ("own optimizer", r"expected session.optimizer.step\(\), got the next.*Party\(optimizer=lambda _: mine\)"),
    ],
)
def test_a_call_out_of_order_names_the_one_that_is_due(kind: str, words: str):
    session, modules, _ = opened()
    with pytest.raises(ProgramError, match=rf"E440.*party alpha, train round 1, step \d.*{words}"), session:
        misstep(session, modules, kind)


@pytest.mark.provokes("E440")
def test_a_scaler_that_skips_a_step_needs_a_lower_scale():
    session, modules, _ = opened({"epochs": 3})
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)

    def overflow(session: Any) -> None:
        session.scaler = scaler
        for round in session.rounds():
            for part in round:
                loss = modules["loss"](modules["tail"](session.remote(modules["head"](part["x"]))), part["y"])
                scaler.scale(loss * part.scale).backward()
                modules["tail"].weight.grad.fill_(float("inf"))
                scaler.step(session.optimizer)
                scaler.update()

    with pytest.raises(ProgramError, match=r"E440.*got the next batch.*skipped the step.*lower init_scale"), session:
        overflow(session)


def ask(session: Any, name: str) -> None:
    for round in session.rounds():
        for part in round:
            part[name]


@pytest.mark.provokes("E443")
@pytest.mark.parametrize(
    ("make", "name", "words"),
    [
        (plans.u_shaped, "alpha", "party alpha, train round 1.*expected one of x, y, got 'foo'"),
        (plans.raw, "server", "party server.*expected one of x, y, got 'foo'"),
        (plans.u_shaped, "server", "no stage of this party takes a field"),
    ],
)
def test_a_field_that_is_not_there_names_those_that_are(make: Callable[..., plans.Case], name: str, words: str):
    case = make(schedule="sequential", microbatches=1)
    others = [case.build(one) for one in case.plan.parties if one != name]
    session = cl.session(case.plan, case.build(name), others=others)
    with pytest.raises(ProgramError, match=f"E443.*no field 'foo' here.*{words}"), session:
        ask(session, "foo")


def training_always(session: Any, party: cl.Party, kind: str) -> None:
    head, tail, criterion = called(party.modules, ["head", "tail", "loss"])
    for round in session.rounds():
        for part in round:
            loss = criterion(tail(session.remote(head(part["x"]))), part["y"])
            if round.training or kind == "backward":
                (loss * part.scale).backward()
            if part.last:
                session.optimizer.step()
                session.optimizer.zero_grad()


@pytest.mark.provokes("E440")
@pytest.mark.parametrize("kind", ["backward", "optimizer.step()"])
def test_nothing_is_trained_in_a_round_of_evaluation(kind: str):
    case = plans.u_shaped(schedule="sequential", microbatches=1, epochs=1)
    party = case.build("alpha")
    party = replace(party, evaluation=party.data)
    session = cl.session(case.plan, party, others=[case.build("server")])
    words = rf"E440.*evaluate round \d.*, got {re.escape(kind)}\. .*if round.training:"
    with pytest.raises(ProgramError, match=words), session:
        training_always(session, party, kind)


@pytest.mark.provokes("E440")
def test_a_session_needs_a_with():
    session, _, _ = opened()
    for use in (session.rounds, lambda: session.optimizer, lambda: session.remote(torch.zeros(1))):
        with pytest.raises(ProgramError, match=r"E440.*has not begun.*in a `with`"):
            use()


@pytest.mark.provokes("E221")
def test_an_optimizer_of_ones_own_is_over_the_own_parameters():
    case = plans.u_shaped(schedule="sequential")
    hospital, server = case.build("alpha"), case.build("server")
    every = [p for party in (hospital, server) for module in party.modules.values() for p in module.parameters()]
    mine = torch.optim.SGD(every, lr=0.1)
    words = "E221.*the optimizer of party 'alpha' holds parameters of 'server'.*take the argument"
    with (
        pytest.raises(ConfigError, match=words),
        cl.session(case.plan, replace(hospital, optimizer=lambda _: mine), others=[server]) as session,
    ):
        next(iter(session.rounds()))


@pytest.mark.provokes("E440")
def test_rounds_are_given_once():
    """All rounds of the plan are in one call: a loop over epochs around it would train on, past the plan."""
    session, _, party = opened()
    with session:
        u_shaped(session, party)
        before = {name: value.clone() for name, value in party.modules["head"].state_dict().items()}
        with pytest.raises(ProgramError, match=r"E440.*called again.*leave out the loop over epochs"):
            u_shaped(session, party)
    assert all(torch.equal(value, before[name]) for name, value in party.modules["head"].state_dict().items())


@pytest.mark.provokes("E440")
def test_rounds_are_given_once_over_the_network(tmp_path: Path):
    case = plans.u_shaped(schedule="sequential")
    trial, party = Trial(case.plan, tmp_path), case.build("alpha")

    def mine() -> None:
        with cl.session(case.plan, party, network=trial.settings("alpha")) as session:
            for _ in range(2):
                u_shaped(session, party)

    def theirs() -> None:
        cl.join(case.plan, case.build("server"), network=trial.settings("server"), folder=str(tmp_path / "run"))

    found = trial.play({"alpha": mine, "server": theirs})
    assert found["server"] is None
    assert "[E440] session.rounds() was called again" in saw(str(found["alpha"]))


@pytest.mark.provokes("E440")
def test_remote_outside_of_a_round():
    session, _, _ = opened()
    with pytest.raises(ProgramError, match=r"E440.*no round has begun"), session:
        session.remote(torch.zeros(1))


def left_in_a_round(session: Any, modules: dict[str, nn.Module]) -> None:
    with session:
        for round in session.rounds():
            for part in round:
                session.remote(modules["head"](part["x"]))
                return


def left_between_batches(session: Any, _modules: dict[str, nn.Module]) -> None:
    with session:
        for _ in session.rounds():
            continue


@pytest.mark.provokes("E441")
@pytest.mark.parametrize(
    ("leave", "words"),
    [
        (left_in_a_round, r"ended before the rounds of the plan.*lower training.epochs, and to keep an early round's"),
        (left_between_batches, "a round was left before its end.*train round 1"),
    ],
)
def test_a_loop_that_leaves_early(leave: Any, words: str):
    session, modules, _ = opened()
    with pytest.raises(ProgramError, match=rf"E441.*{words}"):
        leave(session, modules)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules.values())


@pytest.mark.provokes("E133")
@pytest.mark.parametrize(
    "settings", [{"schedule": "1f1b", "microbatches": 2}, {"schedule": "gpipe", "microbatches": 3}]
)
def test_schedules_that_mix_microbatches(settings: dict[str, Any]):
    with pytest.raises(PlanError, match=r"E133.*cannot drive this plan.*schedule='sequential'.*simulate and join"):
        opened(settings)


@pytest.mark.provokes("E244")
def test_the_other_parties_must_be_somewhere(tmp_path: Path):
    case = plans.u_shaped(schedule="sequential")
    with pytest.raises(ConfigError, match=r"E244.*needs the other parties.*got neither"):
        cl.session(case.plan, case.build("alpha"))


def dividing(session: Any, _party: cl.Party) -> None:
    for _ in session.rounds():
        print(1 / 0)


def test_an_error_of_the_users_is_the_users_and_a_stages_is_the_stages():
    session, _, party = opened()
    with pytest.raises(ZeroDivisionError), session:
        dividing(session, party)
    case = plans.u_shaped(schedule="sequential", microbatches=1)
    party, server = case.build("alpha"), replace(case.build("server"), modules={"body": nn.Linear(9, 9)})
    session = cl.session(case.plan, party, others=[server])
    with pytest.raises(StageError, match=r"E304.*stage 'body' failed"), session:
        u_shaped(session, party)


@pytest.mark.provokes("E390")
def test_the_others_are_told_of_an_error_in_the_loop(tmp_path: Path):
    case = plans.u_shaped(schedule="sequential")
    trial = Trial(case.plan, tmp_path)

    def mine() -> None:
        with cl.session(case.plan, case.build("alpha"), network=trial.settings("alpha")) as session:
            for _ in session.rounds():
                raise KeyError("a secret")

    def theirs() -> None:
        cl.join(case.plan, case.build("server"), network=trial.settings("server"), folder=tmp_path / "run")

    found = trial.play({"alpha": mine, "server": theirs})
    assert isinstance(found["alpha"], KeyError)
    assert isinstance(found["server"], PeerError)
    told = saw(str(found["server"]))
    assert "the loop of party 'alpha' failed" in told
    assert "E390" in told
    assert "secret" not in told


@pytest.mark.provokes("E351")
def test_a_loss_that_is_not_finite_ends_the_loop():
    session, modules, party = opened()
    with torch.no_grad():
        modules["tail"].weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=r"E351.*the loss 'loss' is a NaN.*party alpha, train round 1"), session:
        u_shaped(session, party)


@pytest.mark.provokes("E711")
def test_a_restart_of_another_ends_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from cutlayer.transport.session import SessionReset

    session, _, _ = opened()
    with pytest.raises(PeerError, match=r"E711.*started again.*got server restarted.*start this loop again"), session:
        raise SessionReset("server restarted")
