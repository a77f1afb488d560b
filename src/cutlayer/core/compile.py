"""Compile a plan into programs: project the schedule's total order on each party and put sends and receives in.

A value is sent as soon as it exists and received just before it is used. A send never waits for the receiver's
program, so there is no deadlock by construction; parties with blocking tagged reads form a Kahn network, so the
interleaving cannot change the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cutlayer.core.batching import StepSizes, lane_batches, round_steps
from cutlayer.core.emit import Blocks, Emitter, add_credits, held_fields
from cutlayer.core.graph import Graph
from cutlayer.core.parts import Loss
from cutlayer.core.plan import Plan
from cutlayer.core.program import (
    MODES,
    Block,
    Checkpoint,
    Exchange,
    Load,
    Mode,
    Program,
    Step,
)
from cutlayer.core.schedules import Action, forwards_only, schedule
from cutlayer.errors import DataError, PlanError

__all__ = ["Roster", "agenda", "compile_plan", "stages_of"]

BARRIER = 0  # the number of all barriers: their steps tell them apart
AGREED_BYTES = 256  # most bytes of an entry of shared preprocessing
_ARGUMENTS = {"train": "data", "evaluate": "evaluation", "predict": "prediction"}
_SMALL = 64 * 1024  # most bytes of a message of scalars: norms, metric sums


@dataclass(frozen=True)
class Roster:
    """How many samples each party holds, by mode ("train", "evaluate", "predict"). Counts are seen by all parties."""

    samples: Mapping[str, Mapping[str, int]]

    def lane_counts(self, graph: Graph, mode: str) -> tuple[int, ...]:
        """Return the samples of each lane; 0 everywhere if no party has data for the mode.

        Raises:
            DataError: parties of one lane hold different numbers of samples, or one that must hold data has none.
            PlanError: one party would have to hold the data of several lanes.
        """
        held = self.samples.get(mode, {})
        counts: list[int] = []
        owners: dict[str, int] = {}
        for lane in range(graph.lanes):
            parties = tuple(held_fields(graph, lane, stages_of(graph, mode)))
            for party in parties:
                if owners.setdefault(party, lane) != lane:
                    raise PlanError(
                        f"{party!r} would hold the data of several replicas",
                        where=f"party {party}, mode {mode}",
                        expected="each replica's data at a party of its own",
                        remedy="replicate the stages that take data over different parties",
                        code="E111",
                    )
            found = {party: held.get(party, 0) for party in parties}
            if len(set(found.values())) > 1:
                raise DataError(
                    "parties of one replica hold different numbers of samples",
                    where=f"mode {mode}, lane {lane}",
                    expected="the same samples, in the same order, at each",
                    got=", ".join(f"{party}: {count}" for party, count in found.items()),
                    remedy=_all_or_none(mode, found, held) or "align the data by identifier first",
                    code="E251",
                )
            counts.append(next(iter(found.values())))
        return tuple(counts)


def _all_or_none(mode: str, found: Mapping[str, int], held: Mapping[str, int]) -> str:
    """Return which parties of a lane miss an argument that others of it have, or give an empty one, and what to do."""
    names = [party for party, count in found.items() if not count]
    if not names:
        return ""
    if empty := [party for party in names if party in held]:
        return f"0 samples are given at {', '.join(empty)}: look at what they are read from, and what is filtered out"
    alone = "" if mode == "train" else ", or give it at no party: a training does not need it"
    return f"nothing is given at {', '.join(names)}: give Party({_ARGUMENTS[mode]}=...) there too{alone}"


def agenda(plan: Plan, roster: Roster) -> list[tuple[Mode, int]]:
    """Return the modes and rounds of a training run in order, such as [("start", 0), ("train", 1), ("evaluate", 1)].

    Raises:
        DataError: no party has data to train on, or one gave an empty data set.
    """
    held = roster.samples.get("train", {})
    empty = [party for party in plan.graph.data_holders if held.get(party) == 0]
    if empty and any(held.values()):
        raise DataError(
            f"the training data of {', '.join(empty)} are empty",
            where=f"plan {plan.name!r}, data of {', '.join(plan.graph.data_holders)}",
            expected="at least one sample at each party that gives a data set",
            got=", ".join(f"{party}: {count}" for party, count in sorted(held.items())),
            remedy="look at the file that they are read from and at what is filtered out; or leave the party out",
            code="E252",
        )
    if not any(held.values()):
        raise DataError(
            "no party has data to train on",
            where=f"plan {plan.name!r}, data of {', '.join(plan.graph.data_holders)}",
            remedy="give the parties of the plan their data: Party(data=...)",
            code="E252",
        )
    evaluate = any(roster.samples.get("evaluate", {}).values())
    every, last = plan.training.evaluate_every, plan.training.epochs
    phases: list[tuple[Mode, int]] = [("start", 0)]
    for number in range(1, last + 1):
        phases.append(("train", number))
        if evaluate and every and number % every == 0 and number < last:
            phases.append(("evaluate", number))
    if evaluate:
        phases.append(("evaluate", last))
    if not evaluate or plan.assemble_at or any(extra.when == "finish" for extra in plan.exchanges):
        phases.append(("finish", last))
    return phases


def compile_plan(plan: Plan, roster: Roster) -> dict[str, dict[Mode, Program]]:
    """Return each party's programs. A pure function: every party computes it, and digests are compared.

    Raises:
        DataError, PlanError: the roster does not fit the plan.
    """
    compiler = _Compiler(plan, plan.graph, roster)
    makers: dict[Mode, Callable[[], list[Blocks]]] = {
        "start": compiler.start,
        "train": compiler.train,
        "evaluate": lambda: compiler.forward_only("evaluate"),
        "predict": lambda: compiler.forward_only("predict"),
        "finish": compiler.finish,
    }
    rounds = {mode: makers[mode]() for mode in MODES}
    return {
        party: {
            mode: Program(
                party, mode, tuple(Block(b.name, tuple(b.per_party.get(party, ())), b.repeat) for b in blocks)
            )
            for mode, blocks in rounds.items()
        }
        for party in plan.parties
    }


class _Compiler:
    """Builds the blocks of each mode. `number` counts exchanges, so that each has its own address."""

    def __init__(self, plan: Plan, graph: Graph, roster: Roster) -> None:
        self.plan, self.graph, self.roster = plan, graph, roster
        self.replicated = [stage for stage in graph.stages if stage.replicated and graph.lanes > 1]
        self.shared = [stage for stage in self.replicated if not isinstance(stage, Loss)]
        self.number = BARRIER + 1
        self.checkpoints = 0

    @property
    def relay(self) -> bool:
        return self.plan.training.order == "relay" and bool(self.replicated)

    def start(self) -> list[Blocks]:
        block = Blocks("preprocessing and equal replicas" if self.plan.preprocessing else "equal replicas")
        for shared in self.plan.preprocessing:
            group = self.graph.holders(shared.at)
            self._exchange(block, "agree", f"data.{shared.field}", group, limit=shared.limit * AGREED_BYTES)
        if self.replicated and not self.relay:
            for stage in self.shared:
                self._exchange(block, "broadcast", stage.name, stage.places, limit=stage.state_limit)
        _planned(self, block, "start")
        return [block, self._checkpoint(last=True)]

    def train(self) -> list[Blocks]:
        counts = self.roster.lane_counts(self.graph, "train")
        training = self.plan.training
        turns = round_steps(counts, training, relay=self.relay, drop_last=training.drop_last)
        if any(counts) and not any(turns):
            raise DataError(
                "no party has enough samples for one batch, and smaller ones are dropped",
                where="training, the samples of each replica",
                expected=f"at least {training.batch_size}",
                got=", ".join(str(count) for count in counts),
                remedy="lower training.batch_size, or set drop_last to false",
                code="E259",
            )
        blocks: list[Blocks] = []
        for place, turn in enumerate(turns):
            for group in turn:
                blocks.extend(self._split(self._training_step(group.sizes), group.repeat))
            if self.relay:
                blocks.append(self._hand_on(place, (place + 1) % len(turns)))
                blocks.append(self._checkpoint())
        blocks.append(self._metrics("train"))
        _planned(self, blocks[-1], "round")
        return [*blocks, self._checkpoint(last=True)]

    def forward_only(self, mode: Mode) -> list[Blocks]:
        counts = self.roster.lane_counts(self.graph, mode)
        if not any(counts):
            return []
        stages = stages_of(self.graph, mode)
        turns = round_steps(counts, self.plan.training, relay=self.relay, drop_last=False)
        blocks: list[Blocks] = []
        for place, turn in enumerate(turns):
            for group in turn:
                actions = forwards_only(self.graph, group.sizes, stages)
                block = self._step(_label(group.sizes), group.sizes, actions, group.repeat)
                add_credits(block, self.plan.training.window)
                blocks.append(block)
            if self.relay and mode == "evaluate" and place + 1 < len(turns):
                blocks.append(self._hand_on(place, place + 1))
        if mode == "evaluate":
            blocks.append(self._metrics("evaluate"))
        return [*blocks, self._checkpoint(last=True)]

    def finish(self) -> list[Blocks]:
        lanes = range(self.graph.lanes - 1 if self.relay else 0)
        blocks = [self._hand_on(lane, lane + 1) for lane in lanes]
        if self.plan.assemble_at:
            blocks.append(self._gather())
        if any(extra.when == "finish" for extra in self.plan.exchanges):
            blocks.append(Blocks("exchanges of the plan"))
            _planned(self, blocks[-1], "finish")
        return [*blocks, self._checkpoint(last=True)]

    def _split(self, block: Blocks, repeat: int) -> list[Blocks]:
        every = self.plan.training.checkpoint_every
        if not every:
            return [Blocks(block.name, repeat, block.per_party)]
        blocks: list[Blocks] = []
        while repeat:
            part = min(every, repeat)
            blocks += [Blocks(block.name, part, block.per_party), self._checkpoint()]
            repeat -= part
        return blocks

    def _training_step(self, sizes: StepSizes) -> Blocks:
        graph, training = self.graph, self.plan.training
        block = self._step(_label(sizes), sizes, schedule(graph, sizes, training.schedule), 1)
        lanes = tuple(lane for lane, parts in enumerate(sizes) if parts)
        stepping = lanes if self.relay else tuple(range(graph.lanes))
        if self.replicated and not self.relay:
            for stage in self.shared:
                if graph.trained[stage.name] and not stage.frozen:
                    self._exchange(
                        block, "add_gradients", stage.name, stage.places, lanes=lanes, limit=stage.state_limit
                    )
        _planned(self, block, "step")
        parties = _stepping(graph, stepping)
        if training.clip_norm is not None and training.clip == "global":
            group = tuple(dict.fromkeys([*parties, self.plan.hub]))
            self._exchange(block, "global_norm", "", group, lanes=stepping, limit=_SMALL)
        for party in parties:
            block.add(party, Step(stepping))
        add_credits(block, training.window)
        return block

    def _step(self, name: str, sizes: StepSizes, actions: Sequence[Action], repeat: int) -> Blocks:
        block = Blocks(name, repeat)
        active = {action.stage for action in actions}
        for lane, parts in enumerate(sizes):
            if parts:
                for party, names in held_fields(self.graph, lane, active).items():
                    block.add(party, Load(lane, parts, names))
        emitter = Emitter(self.graph, sizes, block, active)
        for action in actions:
            emitter.emit(action)
        return block

    def _hand_on(self, lane: int, following: int) -> Blocks:
        block = Blocks(f"hand on from lane {lane} to {following}")
        for stage in self.shared:
            group = (stage.places[lane], stage.places[following])
            self._exchange(block, "hand_on", stage.name, group, lanes=(lane, following), limit=stage.state_limit)
        return block

    def _gather(self) -> Blocks:
        block = Blocks("gather the weights")
        for stage in self.graph.stages:
            for target in self.plan.assemble_at:
                if not isinstance(stage, Loss) and target not in stage.places:
                    group = (stage.places[0], target)
                    self._exchange(block, "gather", stage.name, group, lanes=(0,), limit=stage.state_limit)
        return block

    def _metrics(self, mode: Mode) -> Blocks:
        block = Blocks("metric sums")
        for stage in self.replicated:
            if isinstance(stage, Loss):
                _check_told(self.plan, stage, mode, self.roster.lane_counts(self.graph, mode))
                self._exchange(block, "add_metrics", stage.name, stage.places, limit=stage.state_limit)
        return block

    def _exchange(
        self, block: Blocks, name: str, stage: str, group: tuple[str, ...], *, limit: int, lanes: tuple[int, ...] = ()
    ) -> None:
        hub = self.plan.hub_of("" if stage.startswith("data.") else stage)
        if name == "agree" and len(group) == 1:
            hub = group[0]
        lanes = lanes or tuple(range(len(group)))
        instruction = Exchange(name, self.number, group, stage, lanes, limit, messages=len(group), hub=hub)
        self.number += 1
        members = (*group, hub) if name in ("add_gradients", "add_metrics", "agree") else group
        for party in dict.fromkeys(members):
            block.add(party, instruction)

    def _checkpoint(self, *, last: bool = False) -> Blocks:
        """All meet, then each saves: so whoever holds a checkpoint, every other party holds it or the one before."""
        block, parties = Blocks("checkpoint"), self.plan.parties
        for party in parties:
            if len(parties) > 1:
                block.add(
                    party, Exchange("barrier", BARRIER, parties, "", (), 0, messages=len(parties), hub=self.plan.hub)
                )
            block.add(party, Checkpoint(self.checkpoints, last))
        self.checkpoints += 1
        return block


def _check_told(plan: Plan, loss: Loss, mode: Mode, counts: Sequence[int]) -> None:
    """Raise `DataError` E264 for sums over so few samples of a party that they would tell others of each of them."""
    training, few = plan.training, list[str]()
    for party, count in zip(loss.places, counts, strict=True):
        samples = sum(lane_batches(count, training.batch_size, drop_last=mode == "train" and training.drop_last))
        if 0 < samples < training.metrics_least and len(set(loss.places)) > 1:
            few.append(f"{samples} of {party}")
    if few:
        raise DataError(
            f"the sums behind the loss {loss.name!r} would be over very few samples, and tell others of each of them",
            where=f"{mode} rounds, loss {loss.name}, at {', '.join(dict.fromkeys(loss.places))}",
            expected=f"at least {training.metrics_least} samples at each{'' if mode == 'train' else ', or none'}",
            got=", ".join(few),
            remedy=f"give more there (Party({_ARGUMENTS[mode]}=...)); or lower training.metrics_least at all parties, "
            "if these may be told of",
            code="E264",
        )


def _planned(compiler: _Compiler, block: Blocks, when: str) -> None:
    """Add the plan's own exchanges of this point."""
    for extra in compiler.plan.exchanges:
        if extra.when == when:
            lanes, hub = tuple(range(len(extra.members))), extra.hub or extra.members[0]
            number, compiler.number = compiler.number, compiler.number + 1
            job = Exchange(
                extra.name, number, extra.members, extra.stage, lanes, extra.limit, messages=extra.messages, hub=hub
            )
            for party in extra.members:
                block.add(party, job)


def _stepping(graph: Graph, lanes: tuple[int, ...]) -> tuple[str, ...]:
    """Return the parties whose optimizers step after these lanes' batches."""
    trained = (stage for stage in graph.stages if not isinstance(stage, Loss) and not stage.frozen)
    return tuple(dict.fromkeys(graph.place(stage.name, lane) for stage in trained for lane in lanes))


def stages_of(graph: Graph, mode: str) -> set[str]:
    """Return the stages that run in a mode: a prediction ends before the losses."""
    return graph.ancestors(graph.outputs if mode == "predict" else tuple(graph.by_name))


def _label(sizes: StepSizes) -> str:
    return ", ".join(f"lane {lane}: {sum(parts)} samples" for lane, parts in enumerate(sizes) if parts)
