"""The plan: a graph of stages placed at parties, and how it is trained. Everything that can leave a party is in it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from cutlayer.core.answers import check_answers
from cutlayer.core.crossing import Crossing, Extra, PlannedExchange, answers_in, check_extras
from cutlayer.core.describe import describe
from cutlayer.core.graph import Graph
from cutlayer.core.parts import Answer, Loss, Release, Shared, Stage, Training
from cutlayer.core.validate import check, check_assembly, check_shared
from cutlayer.errors import PlanError

__all__ = ["Plan", "settings"]

PLAN_VERSION = 1
_OWN = ("preprocessing", "training")  # keyword arguments of `Plan` that topologies take as they are


@dataclass(frozen=True)
class Plan:
    """Stages and losses at parties, releases of raw data, shared preprocessing, and the training. Checked when made.

    `extras` are what is done to values on their way over cuts (`Crossing`), exchanges of one's own
    (`PlannedExchange`), and outputs that clients of a served stage get (`Answer`).

    `assemble_at` names the parties that get all weights at the end, to put the whole model together; nobody unless
    said. `print(plan)` is the privacy review: who holds what, who sees what, and how many bytes.

    Raises:
        PlanError: the plan cannot be run; the message names the stage and the remedy.
    """

    stages: tuple[Stage | Loss, ...]
    training: Training = field(default_factory=Training)
    releases: tuple[Release, ...] = ()
    preprocessing: tuple[Shared, ...] = ()
    assemble_at: tuple[str, ...] = ()
    name: str = "plan"
    extras: tuple[Extra, ...] = ()

    def __init__(
        self,
        stages: Sequence[Stage | Loss],
        *,
        training: Training | None = None,
        releases: Sequence[Release] = (),
        preprocessing: Sequence[Shared] = (),
        assemble_at: Sequence[str] = (),
        name: str = "plan",
        extras: Sequence[Extra] = (),
    ) -> None:
        """Accept lists; check the whole plan."""
        keep = object.__setattr__
        keep(self, "stages", tuple(stages))
        keep(self, "training", _training(training))
        keep(self, "releases", tuple(releases))
        keep(self, "preprocessing", tuple(preprocessing))
        keep(self, "assemble_at", tuple(assemble_at))
        keep(self, "name", name)
        keep(self, "extras", tuple(extras))
        check(self.graph, self.training)
        check_shared(self.graph, self.preprocessing)
        check_assembly(self.graph, assemble_at)
        check_answers(self.graph, answers_in(self.extras))
        outputs = _outputs(self.graph, answers_in(self.extras))
        check_extras(self.extras, outputs, (set(self.parties), set(self.graph.by_name)))
        for edge in self.graph.edges if self.crossings else ():
            edge.wire("up")
            edge.wire("down")

    @property
    def graph(self) -> Graph:
        """Return the stages in order, with the edges and cuts derived from them."""
        return Graph(self.stages, self.releases, self.crossings)

    @property
    def crossings(self) -> tuple[Crossing, ...]:
        """Return what is done to values on their way over cuts."""
        return tuple(extra for extra in self.extras if isinstance(extra, Crossing))

    @property
    def exchanges(self) -> tuple[PlannedExchange, ...]:
        """Return the exchanges of one's own."""
        return tuple(extra for extra in self.extras if isinstance(extra, PlannedExchange))

    @property
    def parties(self) -> tuple[str, ...]:
        """Return all parties, in the order in which the plan names them."""
        seen: dict[str, None] = {}
        for stage in self.stages:
            seen.update(dict.fromkeys(stage.places))
        return tuple(seen)

    @property
    def lanes(self) -> int:
        """Return the number of replicas of the replicated stages; 1 without any."""
        return max(len(stage.places) for stage in self.stages)

    @property
    def hub(self) -> str:
        """Return the party that adds up norms, gradients and metric sums."""
        return self.training.hub or next(s for s in self.stages if isinstance(s, Loss)).places[0]

    def hub_of(self, stage: str) -> str:
        """Return the party that adds up gradients or metric sums of the replicas of a stage ("": what has no stage)."""
        return self.training.hub or (self.stage(stage).places[0] if stage else self.hub)

    def stage(self, name: str) -> Stage | Loss:
        """Return the stage or loss of that name."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise PlanError(
            f"the plan has no stage {name!r}",
            where=f"plan {self.name}",
            got=name,
            remedy="take a name from the printed plan",
            code="E103",
        )

    def with_training(self, **changes: object) -> Plan:
        """Return the same plan with some training settings changed."""
        return Plan(
            self.stages,
            training=replace(self.training, **changes),  # type: ignore[arg-type]
            releases=self.releases,
            preprocessing=self.preprocessing,
            assemble_at=self.assemble_at,
            name=self.name,
            extras=self.extras,
        )

    def with_extras(self, *extras: Extra) -> Plan:
        """Return the same plan with more extras. Raises `PlanError` for one that cannot be."""
        return Plan(
            self.stages,
            training=self.training,
            releases=self.releases,
            preprocessing=self.preprocessing,
            assemble_at=self.assemble_at,
            name=self.name,
            extras=(*self.extras, *extras),
        )

    def document(self) -> dict[str, object]:
        """Return the plan as plain values (dicts, lists, texts, numbers): what the contract file holds."""
        answers = answers_in(self.extras)
        return {
            "version": PLAN_VERSION,
            "name": self.name,
            "training": asdict(self.training),
            "stages": [_row(stage) for stage in self.stages],
            "releases": [{**_plain(release), "spec": str(release.spec)} for release in self.releases],
            "assemble_at": list(self.assemble_at),
            "preprocessing": [_plain(shared) for shared in self.preprocessing],
            **({"crossings": [one.row() for one in self.crossings]} if self.crossings else {}),
            **({"exchanges": [one.row() for one in self.exchanges]} if self.exchanges else {}),
            **({"answers": [_plain(one) for one in answers]} if answers else {}),
        }

    def digest(self) -> str:
        """Return the SHA-256, in hex, of the plan's canonical JSON: equal at all parties or nothing runs."""
        text = json.dumps(self.document(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def __str__(self) -> str:
        """Return the privacy review."""
        return describe(self)


def settings(given: Mapping[str, object]) -> dict[str, Any]:
    """Return what a plan gets of the keyword arguments of a topology: its training and preprocessing.

    Either `training=Training(...)`, or what is to be otherwise than in it, such as `epochs`; or both.
    """
    own: dict[str, Any] = {"training": Training(), **{n: v for n, v in given.items() if n in _OWN}}
    changes: dict[str, Any] = {name: value for name, value in given.items() if name not in _OWN}
    known = [one.name for one in fields(Training)]
    for name in changes:
        if name not in known:
            raise TypeError(f"no such argument: {name!r}; a plan's training has {', '.join(known)}")
    return {**own, "training": replace(_training(own["training"]), **changes)}


def _training(given: object) -> Training:
    """Return it, or the usual one for None. Raises `PlanError` E110 for what is none."""
    if given is not None and not isinstance(given, Training):
        raise PlanError(
            f"training is a {type(given).__name__}",
            where="training",
            expected="a cl.Training",
            remedy="write training=cl.Training(epochs=3), or the settings themselves: epochs=3",
            code="E110",
        )
    return given or Training()


def _outputs(graph: Graph, answers: Sequence[Answer]) -> dict[str, str]:
    """Return "STAGE" or "STAGE.PORT" -> what it crosses to another party as: "cut" or "answer"; empty: it does not."""
    found: dict[str, str] = {}
    for edge in graph.edges:
        if edge.source.stage:
            crosses = any(graph.is_cut(edge, lane) for lane in range(graph.lanes))
            found[edge.origin] = "cut" if crosses else found.get(edge.origin, "")
    for one in answers:
        for port in graph.output_ports[one.of]:
            name = f"{one.of}.{port}" if port else one.of
            found[name] = found[name] or "answer"
    return found


def _plain(value: Stage | Loss | Release | Shared | Answer) -> dict[str, object]:
    return {key: list(item) if isinstance(item, tuple) else item for key, item in vars(value).items()}


def _row(stage: Stage | Loss) -> dict[str, object]:
    row: Mapping[str, object] = _plain(stage)
    if isinstance(stage, Stage):
        ports = {port: str(spec) for port, spec in stage.ports.items()}
        return {"kind": "stage", **row, "output": ports.get("", ports)}
    return {"kind": "loss", **row}
