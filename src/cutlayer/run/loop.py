"""One's own training loop: a party's modules, losses and optimizers in the user's hands, the rest by the plan.

| code | error | meaning |
| --- | --- | --- |
| E441 | ProgramError | the loop ended before the rounds of the plan |
| E133 | PlanError | the plan cannot be driven by a loop |
| E244 | ConfigError | the other parties are neither here nor on a network |
| E711 | PeerError | a party has started again, and a loop cannot go back |
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from cutlayer.core.compile import agenda
from cutlayer.core.parts import Loss
from cutlayer.core.plan import Plan
from cutlayer.core.program import Mode
from cutlayer.engine.worker import Worker
from cutlayer.errors import ConfigError, PeerError, PlanError, ProgramError
from cutlayer.run.company import Company, Here, There
from cutlayer.run.hooks import Hooks
from cutlayer.run.missteps import again, closure, no_round, no_tensor, outside
from cutlayer.run.outcome import Result, history_rows
from cutlayer.run.party import Party
from cutlayer.run.scaling import check_scale, check_stepper, scale_of, unscaled
from cutlayer.run.walk import Leg, Walk, spread
from cutlayer.transport.session import SessionReset
from cutlayer.transport.settings import NetworkSettings

__all__ = ["Part", "Round", "Session", "session"]


def session(
    plan: Plan, party: Party, *, others: Party | Sequence[Party] = (), network: NetworkSettings | None = None
) -> Session:
    """Take part in a plan with a training loop of one's own.

    ```python
    with cl.session(plan, hospital, others=[cloud]) as session:  # or network=..., and cl.join at the others
        for round in session.rounds():
            for part in round:
                prediction = tail(session.remote(head(part["x"])))
                loss = criterion(prediction, part["y"])
                if round.training:
                    (loss * part.scale).backward()
                    if part.last:
                        session.optimizer.step()
                        session.optimizer.zero_grad()
    ```

    `remote` sends what this party has computed and gives what it needs next; it takes part in autograd, so the gradient
    at what it gave leaves, and that at what was sent comes back, within `backward`. The loop drives the programs that
    `simulate` and `join` run, and with the same settings gives the same bits. Modules must be those given to `Party`.

    Args:
        plan: The plan.
        party: This party; its `optimizer` makes the optimizers, which the loop steps. Clipping, autocast, schedulers
            and gradient scaling are the loop's own.
        others: The other parties, or the one other, to run in this process; or
        network: Where they are; each runs `cutlayer.join`, or a loop of its own.

    Raises:
        PlanError: E133, several replicas of a stage at this party, or a schedule that mixes microbatches.
        ConfigError: E244, neither `others` nor `network`, or both.
    """
    return Session(plan, party, [others] if isinstance(others, Party) else others, network)


class _Remote(torch.autograd.Function):
    """Sends in forward and gets; the other way round in backward.

    Takes a value once for each edge on which a gradient may come back: autograd then adds these one after another to
    what it has of the loop itself, as it does in the uncut model.
    """

    @staticmethod
    def forward(ctx: Any, hold: _Hold, *sent: Tensor) -> Any:  # noqa: ANN401 - what autograd gives
        ctx.hold = hold
        hold.leg, found = hold.walk.forward(dict(zip(hold.names, sent[1:], strict=True)))
        if not found:
            found = [torch.zeros(())]
        else:
            ctx.mark_non_differentiable(*(v for e, v in zip(hold.leg.got, found, strict=True) if not e.trained))
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:  # noqa: ANN401
        hold, session = ctx.hold, ctx.hold.session
        scale = scale_of(session.scaler)
        if not hold.leg.got and scale == 1:
            check_scale(session.scaler, gradients[0], 1.0, session.place, session.factors)
        finite = session.worker.parts.finite
        known = unscaled(gradients, scale, session.place, finite=finite) if hold.leg.got else ()
        heard = hold.walk.backward(hold.leg, known)
        if scale != 1:
            heard = {edge: gradient * scale for edge, gradient in heard.items()}
        return (None, None, *(heard.get(edge) for edge in hold.edges))


@dataclass
class _Hold:
    """What a call of `remote` keeps for its way back."""

    session: Session
    walk: Walk
    names: tuple[str, ...]  # of each tensor that is sent, its origin
    edges: tuple[int, ...]  # and an edge on which its gradient may come back
    leg: Leg


class Session:
    """A party's part of a run, driven by the user's loop. Made by `cutlayer.session`; use it in a `with`.

    Attributes:
        scaler: The `GradScaler` with which the loop scales its loss, if it does. What leaves is divided by its scale,
            and what comes in is multiplied by it: the scale is this party's own matter.
        factors: Powers of two by which the loop has multiplied its loss itself; see `check_scale`.
    """

    def __init__(self, plan: Plan, party: Party, others: Sequence[Party], network: NetworkSettings | None) -> None:
        """Check that the plan can be driven so; nothing runs yet."""
        _check(plan, party.name)
        if bool(others) == (network is not None):
            raise ConfigError(
                "a loop needs the other parties",
                where=f"party {party.name}",
                expected="others=[...], to run them here, or network=..., to meet them",
                got="both" if others else "neither",
                remedy="give one of the two",
                code="E244",
            )
        self.plan, self.party = plan, party
        self.scaler: GradScaler | None = None
        self.factors = set[int]()
        self._company: Company = There(plan, party, network) if network else Here(plan, party, others)
        self._walk: Walk | None = None
        self._hooks: Hooks | None = None
        self._done, self._given, self._begin = False, False, 0.0
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        """Meet the other parties."""
        self._company.meet()
        self._begin = time.perf_counter()
        modules = {name for name, module in self.party.modules.items() if isinstance(module, nn.Module)}
        self._hooks = Hooks(self.worker, modules, self._check_loss)
        for one in self.optimizers:
            self._handles.append(one.register_step_pre_hook(self._before_step))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End: well, or with an error that all other parties are told of.

        Raises:
            ProgramError: E441, the loop has left before the last round's end.
        """
        early = None
        if error is None and not self._done:
            early = ProgramError(
                "the loop ended before the rounds of the plan",
                where=f"party {self.party.name}",
                expected="all of session.rounds(), each to its end",
                remedy="go through all batches, as all parties do; for fewer rounds lower training.epochs, and to keep "
                "an early round's weights copy them there",
                code="E441",
            )
        if self._hooks is not None:
            self._hooks.remove()
        for handle in self._handles:
            handle.remove()
        self._company.leave(error or early)
        if isinstance(error, SessionReset):
            raise PeerError(
                "a party has started again, and a loop cannot go back",
                where=f"party {self.party.name}",
                got=str(error),
                remedy="start this loop again, and the other parties; cutlayer join goes on by itself",
                code="E711",
            ) from error
        if early is not None:
            raise early

    @property
    def worker(self) -> Worker:
        """Return the engine's worker of this party, which most users never need."""
        if not self._begin:
            raise outside(self.party.name)
        return self._company.worker

    @property
    def optimizers(self) -> list[Optimizer]:
        """Return the optimizers that `Party(optimizer=...)` made: one, or two where some stages have replicas."""
        return [one.optimizer for one in self.worker.site.bundles.values() if one.optimizer is not None]

    @property
    def optimizer(self) -> Optimizer:
        """Return the one optimizer. Raises `ConfigError` E244 if there is none, or another number."""
        found = self.optimizers
        if len(found) != 1:
            raise ConfigError(
                f"this party has {len(found)} optimizers",
                where=f"party {self.party.name}",
                remedy="use session.optimizers: replicas of a stage step apart from other stages",
                code="E244",
            )
        return found[0]

    def rounds(self) -> Iterator[Round]:
        """Give each round of training and of evaluation, in the plan's order; do what comes before and after.

        Raises:
            ProgramError: E440, it was called before, or outside of the `with`; E441, a round was left before its end.
        """
        if not self._begin:
            raise outside(self.party.name)
        if self._given:
            raise again(self.party.name)
        self._given = True
        return self._rounds()

    def _rounds(self) -> Iterator[Round]:
        for mode, number in agenda(self.plan, self._company.roster):
            self._company.begin(mode, number)
            if self._hooks is not None:
                self._hooks.forget()
            walk = self._walk = self._company.walk(mode, number, self._hooks)
            if mode in ("train", "evaluate"):
                yield Round(self, walk, mode, number)
            while walk.part() is not None:
                raise ProgramError(
                    "a round was left before its end",
                    where=f"party {self.party.name}, {mode} round {number}",
                    expected="all batches of the round",
                    remedy="go through all of them: for part in round",
                    code="E441",
                )
            self._company.end()
        self._company.finish()
        self._done = True

    def remote(self, *values: Tensor, **named: Tensor) -> Any:  # noqa: ANN401 - one tensor or several
        """Send what this party has computed, and return what it needs to go on.

        Args:
            values: The outputs that cross now, in the plan's order, each of shape (microbatch, ...); or
            named: by origin: a stage's name, with `_` for `-` and `.` ("head", "head_mask").

        Returns:
            The tensor that comes; several as a tuple, in the order of the next stage's inputs. If none comes, a zero:
            its `backward` gets the gradients at what was sent.

        Raises:
            ProgramError: E440, it is not the turn of such a call.
            StageError, ContractError, NonFiniteError, PeerError, DeadlineError: as in any run.
        """
        walk = self._walking()
        origins = walk.course.leaving(walk.key("remote"))
        names = tuple(origins[: len(values)])
        given = list(values)
        for origin in origins:
            key = origin.replace("-", "_").replace(".", "_")
            if key in named:
                names, given = (*names, origin), [*given, named.pop(key)]
        if named or len(values) > len(origins):
            names = (*names, *named, *(f"value {n}" for n in range(len(origins), len(values))))
            given += list(named.values())
        if not all(isinstance(one, Tensor) for one in given):
            raise no_tensor(walk.hands.place, given)
        names, given, edges = spread(walk, names, given)
        handle = torch.zeros((), requires_grad=walk.training and torch.is_grad_enabled())
        found = _Remote.apply(_Hold(self, walk, names, edges, Leg()), handle, *given)  # type: ignore[no-untyped-call]
        return found[0] if len(found) == 1 else found

    def result(self) -> Result:
        """Return the run's result, as `simulate` (others here) or `join` (others elsewhere) gives it."""
        workers = self._company.workers
        return Result(
            plan=self.plan,
            history=history_rows(workers),
            ledgers={name: worker.ledger for name, worker in workers.items()},
            workers=workers,
            predictions={},
            seconds=time.perf_counter() - self._begin,
            samples=self._company.roster.samples,
        )

    @property
    def place(self) -> str:
        """Return party, mode and round, for errors."""
        return f"party {self.party.name}, {self.worker.mode} round {self.worker.round}"

    def _check_loss(self, name: str, gradient: Tensor) -> None:
        walk = self._walking()
        scales, _ = walk.course.outlook(walk.key("backward"))
        check_scale(self.scaler, gradient, scales.get(name, 0.0), self.place, self.factors)

    def _before_step(self, _: object, given: tuple[object, ...], named: Mapping[str, object]) -> None:
        check_stepper(self.scaler, self.place)
        try:
            self._walking().before_step()
        except ProgramError as error:
            runs = any(callable(one) for one in (*given[1:], named.get("closure")))
            raise (closure(self.place) if runs else error) from None

    def _walking(self) -> Walk:
        if self._walk is None:
            raise no_round(self.party.name) if self._begin else outside(self.party.name)
        return self._walk


@dataclass(frozen=True)
class Round:
    """A round: gives its microbatches, each as a `Part`."""

    session: Session
    walk: Walk
    mode: Mode
    number: int

    @property
    def training(self) -> bool:
        """Whether this is a round of training."""
        return self.mode == "train"

    def __iter__(self) -> Iterator[Part]:
        """Give all microbatches of the round, one after another."""
        while (found := self.walk.part()) is not None:
            scales, last = self.walk.course.outlook(self.walk.key("part"))
            yield Part(self.walk, found, scales, last)


@dataclass(frozen=True)
class Part:
    """A microbatch: `part["x"]` is a field of this party's data (or one released to it), of shape (size, ...).

    Attributes:
        size: Samples in it.
        scales: Loss -> what its gradient starts with, so that microbatches add up to the mean of the batch.
        last: Whether it is the last of its batch: the optimizer's turn comes after it.
    """

    walk: Walk
    size: int
    scales: Mapping[str, float]
    last: bool

    @property
    def scale(self) -> float:
        """Return the scale of this party's loss; 1 if it has none."""
        return next(iter(self.scales.values()), 1.0)

    def __getitem__(self, name: str) -> Tensor:
        """Return a field. Raises `ProgramError` E443, which lists the names, if there is none of this name here."""
        return self.walk.field(name)


def _check(plan: Plan, party: str) -> None:
    own = [stage for stage in plan.stages if party in stage.places]
    several = [stage.name for stage in own if stage.places.count(party) > 1]
    if several or (plan.training.microbatches > 1 and plan.training.schedule != "sequential"):
        raise PlanError(
            "a loop of one's own cannot drive this plan",
            where=f"party {party}",
            expected="one replica of each stage at a party, and schedule='sequential' with several microbatches",
            got=f"replicas of {', '.join(several)}" if several else f"schedule {plan.training.schedule!r}",
            remedy="change the plan, or use simulate and join",
            code="E133",
        )
    names = {stage.name: isinstance(stage, Loss) for stage in own}
    twice = [
        edge.origin
        for edge in plan.graph.edges
        if edge.trained
        and names.get(edge.target) is not None
        and plan.graph.is_cut(edge, 0)
        and sum(o.source == edge.source and o.target in names for o in plan.graph.edges) > 1
    ]
    if twice:
        raise PlanError(
            "a loop of one's own cannot drive this plan",
            where=f"party {party}",
            expected="each value that comes to be taken by one of its stages",
            got=f"{twice[0]} taken by several",
            remedy="let one stage take it, or use simulate and join",
            code="E133",
        )
