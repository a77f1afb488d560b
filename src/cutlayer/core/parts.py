"""The parts of a plan: stages, losses, releases of raw data, answers to clients, and how it is trained."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from cutlayer.core.spec import TensorSpec
from cutlayer.errors import PlanError

__all__ = ["Answer", "Loss", "Release", "Shared", "Source", "Stage", "Training", "check_name"]

_NAME = re.compile(r"[a-z0-9]([a-z0-9_-]{0,61}[a-z0-9])?")
_PORT = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_DATA = re.compile(r"data\.([A-Za-z_][A-Za-z0-9_]{0,63})(?:@([a-z0-9_-]+))?")
STATE_LIMIT = 64 * 2**20


@dataclass(frozen=True)
class Source:
    """Where one input of a stage comes from: another stage's output, or a field of a party's data.

    `port` names one of several outputs, and is empty where there is one. `owner` is empty for the data of the stage's
    own party; else it names the party, or the stage at whose party (in the same replica) the field is held.
    """

    stage: str = ""
    field: str = ""
    owner: str = ""
    port: str = ""

    @classmethod
    def parse(cls, text: str) -> Source:
        """Read `stage`, `stage.port`, `data.field` or `data.field@owner`."""
        match = _DATA.fullmatch(text)
        if match:
            return cls(field=match.group(1), owner=match.group(2) or "")
        stage, dot, port = text.partition(".")
        if _NAME.fullmatch(stage) and (_PORT.fullmatch(port) if dot else True) and stage != "data":
            return cls(stage=stage, port=port)
        raise PlanError(
            f"cannot read the input {text!r}",
            where=f"input {text!r}",
            expected="'STAGE', 'STAGE.PORT', 'data.FIELD' or 'data.FIELD@OWNER'",
            remedy="correct it",
            code="E102",
        )


@dataclass(frozen=True)
class Stage:
    """A part of the network at one party, or replicas of it at several.

    With several outputs, `output` maps each *port* to its spec; others take "stage.port" as input, and the module
    returns a dictionary by port, or a tuple in the order of the ports. Each port that is taken elsewhere is a cut.

    Args:
        name: Unique in the plan, also against party names.
        at: The party that runs it, or a list of parties: one replica each (a *lane*).
        inputs: In the order of the module's arguments; see `Source`.
        output: Spec of the tensor that it gives, such as "float32[batch, 64, 16, 16]", or port -> spec.
        detached: Ports at which no gradient is wanted (masks, positions); `[""]` for the one output of a stage.
        frozen: Its parameters are not trained. Where nothing before it is trained either, no gradient is sent to it.
        state_limit: Upper bound, in bytes, of its state (parameters, buffers, optimizer, generator) when it is handed
            on or synchronised between replicas. `cl.split` raises it for large pieces.
    """

    name: str
    at: str | tuple[str, ...]
    inputs: tuple[str, ...]
    output: TensorSpec | tuple[tuple[str, TensorSpec], ...]
    detached: tuple[str, ...] = ()
    frozen: bool = False
    state_limit: int = STATE_LIMIT

    def __init__(
        self,
        name: str,
        *,
        at: str | Sequence[str],
        inputs: Sequence[str],
        output: TensorSpec | str | Mapping[str, TensorSpec | str],
        detached: Sequence[str] = (),
        frozen: bool = False,
        state_limit: int = STATE_LIMIT,
    ) -> None:
        """Accept lists and texts, keep tuples and specs."""
        keep = object.__setattr__
        keep(self, "name", name)
        keep(self, "at", at if isinstance(at, str) else tuple(at))
        keep(self, "inputs", _listed(name, inputs))
        keep(
            self,
            "output",
            _ports(name, output) if isinstance(output, Mapping) else _spec(output, f"output of {name!r}"),
        )
        keep(self, "detached", _listed(name, detached, "detached ports"))
        keep(self, "frozen", frozen)
        keep(self, "state_limit", state_limit)

    @property
    def places(self) -> tuple[str, ...]:
        """Return the parties, one per replica."""
        return (self.at,) if isinstance(self.at, str) else self.at

    @property
    def replicated(self) -> bool:
        """Whether this stage has a replica per lane."""
        return not isinstance(self.at, str)

    @property
    def ports(self) -> dict[str, TensorSpec]:
        """Return port -> spec; the one output of a stage without ports is that of port ""."""
        return {"": self.output} if isinstance(self.output, TensorSpec) else dict(self.output)


@dataclass(frozen=True)
class Loss:
    """A loss: the end of a path through the plan. Gives a scalar, the mean over its samples unless told.

    Args:
        name: Unique in the plan.
        at: The party (or parties, one per lane) that computes it.
        inputs: Arguments of the loss module, in order; the last is usually a label, "data.label".
        weight: Factor of this loss in the sum that is minimised.
        reduction: What the loss module does over its samples, "mean" or "sum".
    """

    name: str
    at: str | tuple[str, ...]
    inputs: tuple[str, ...]
    weight: float = 1.0
    reduction: str = "mean"

    def __init__(
        self, name: str, *, at: str | Sequence[str], inputs: Sequence[str], weight: float = 1.0, reduction: str = "mean"
    ) -> None:
        """Accept lists, keep tuples."""
        keep = object.__setattr__
        keep(self, "name", name)
        keep(self, "at", at if isinstance(at, str) else tuple(at))
        keep(self, "inputs", _listed(name, inputs))
        keep(self, "weight", float(weight))
        keep(self, "reduction", reduction)

    ports: ClassVar[Mapping[str, TensorSpec]] = {"": TensorSpec("float32", ())}
    detached: ClassVar[tuple[str, ...]] = ()
    frozen: ClassVar[bool] = False
    state_limit: ClassVar[int] = STATE_LIMIT

    @property
    def places(self) -> tuple[str, ...]:
        """Return the parties, one per replica."""
        return (self.at,) if isinstance(self.at, str) else self.at

    @property
    def replicated(self) -> bool:
        """Whether this loss has a replica per lane."""
        return not isinstance(self.at, str)


@dataclass(frozen=True)
class Release:
    """Permission for one field of raw data to leave its party, such as labels in a vanilla plan.

    Args:
        field: Name of the data field.
        at: The party that holds it, or the stage at whose party it is held.
        to: The party that may receive it.
        spec: Its dtype and shape, such as "int64[batch]".
    """

    field: str
    at: str
    to: str
    spec: TensorSpec

    def __init__(self, field: str, *, at: str, to: str, spec: TensorSpec | str) -> None:
        """Accept a text for the spec."""
        keep = object.__setattr__
        keep(self, "field", field)
        keep(self, "at", at)
        keep(self, "to", to)
        keep(self, "spec", _spec(spec, f"release of {field!r}"))


@dataclass(frozen=True)
class Answer:
    """Permission for a stage's outputs to go to a client, where the stage is served; nobody gets them otherwise.

    Only `cutlayer serve` uses it: a training, and a prediction of all parties, send nothing of this.

    Args:
        of: The stage that feeds a loss, such as the last one of a vanilla plan.
        to: The party that gets the outputs, or the stage at whose party (in the same replica).
    """

    of: str
    to: str


@dataclass(frozen=True)
class Shared:
    """Preprocessing of one field that its holders agree on before round 0, and then apply to what they load.

    Each tells the hub, of each column, count, mean and deviation over all its training samples (also those that
    `drop_last` leaves out), and gets those of all together; lists hold the values themselves. What fewer than `least`
    of its samples have, a party leaves out. Where all its samples have one value, the mean is that value. A field with
    one holder is told to nobody.

    Args:
        field: Name of the data field.
        at: The party that holds it, or the stage at whose parties it is held.
        kind: "scale": to mean 0 and deviation 1, each column of (batch, columns) or channel of (batch, channels, ...);
            a missing value (NaN) does not count and becomes 0. "categories": texts or whole numbers become 1, 2, ... in
            sorted order, all others 0. "classes": they become 0, 1, ...; an unknown one is an error.
        limit: Most columns, or entries of the list.
        least: A party tells of a column, or an entry of a list, only if at least so many of its samples have a value
            there; its others do not count. 1 and 2 tell the values themselves. 5 is a common smallest cell in
            published tables of patients. A column or class that some have, but nobody so often, is an error (E261);
            such a category becomes 0.
    """

    field: str
    at: str
    kind: str = "scale"
    limit: int = 1024
    least: int = 5


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a plan is trained.

    Attributes:
        epochs: Rounds; in each, every sample is used once.
        batch_size: Samples a step (of each lane, if lanes run in parallel).
        microbatches: Parts of a batch that are in flight together; gradients are added over them.
        schedule: "sequential", "gpipe" or "1f1b".
        order: What lanes do: "relay" (one after another, state handed on) or "parallel" (all in each step,
            gradients of replicas added: one large batch).
        seed: Public seed; it orders samples and nothing else.
        shuffle: New order of samples in every epoch.
        drop_last: Leave out a last batch that is smaller than the others.
        clip_norm: Largest gradient norm, or None.
        clip: Whose norm: "party" (each party its own) or "global" (one scalar a party is released to a hub).
        checkpoint_every: Steps between checkpoints within a round; 0: only at the end of a round.
        evaluate_every: Rounds between evaluations; 0: only at the end.
        metrics_least: Where the replicas of a loss are at several parties, each tells the sums behind its loss and
            metrics of a round over at least so many of its samples, or the run does not begin (E264). 5 is a common
            smallest cell in published tables of patients; of one sample, the sums are its label.
        window: Steps that a sender may be ahead of a receiver that sends nothing back.
        hub: Party that adds gradients, norms and metric sums up; empty: the party of the first loss.
    """

    epochs: int = 1
    batch_size: int = 32
    microbatches: int = 1
    schedule: str = "sequential"
    order: str = "relay"
    seed: int = 0
    shuffle: bool = True
    drop_last: bool = False
    clip_norm: float | None = None
    clip: str = "party"
    checkpoint_every: int = 0
    evaluate_every: int = 0
    metrics_least: int = 5
    window: int = 4
    hub: str = ""

    def __post_init__(self) -> None:
        """Make an integer clip_norm a float, so that 1 and 1.0 are one contract."""
        value: object = self.clip_norm
        if isinstance(value, int):
            object.__setattr__(self, "clip_norm", float(value))


def _listed(name: str, inputs: Sequence[str], what: str = "inputs") -> tuple[str, ...]:
    if isinstance(inputs, str):
        raise PlanError(
            f"the {what} of {name!r} are one text",
            where=f"{name}, {what}",
            expected="a list",
            remedy=f"write [{inputs!r}]",
            code="E102",
        )
    return tuple(inputs)


def _spec(output: TensorSpec | str, where: str) -> TensorSpec:
    return TensorSpec.parse(output, where) if isinstance(output, str) else output


def _ports(name: str, output: Mapping[str, TensorSpec | str]) -> tuple[tuple[str, TensorSpec], ...]:
    wrong = [port for port in output if not _PORT.fullmatch(port)]
    if wrong or not output:
        raise PlanError(
            f"the outputs of {name!r} have no usable names",
            where=f"stage {name}",
            expected="a letter or _, then up to 63 letters, digits or _",
            got=", ".join(repr(port) for port in wrong) or "none",
            remedy="rename the outputs",
            code="E102",
        )
    return tuple((port, _spec(spec, f"output {port!r} of {name!r}")) for port, spec in output.items())


def check_name(name: str, what: str) -> None:
    """Raise `PlanError` unless a party's or stage's name can be a certificate name and a file name."""
    if not _NAME.fullmatch(name) or name == "data":
        raise PlanError(
            f"{name!r} cannot be the name of a {what}",
            where=f"name of a {what}",
            expected="1 to 63 of a-z 0-9 - _, starting and ending with a letter or digit, and not 'data'",
            remedy="choose such a name",
            code="E104",
        )
