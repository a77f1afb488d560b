"""What is done to a value on its way over a cut, exchanges of one's own, and answers to clients: the plan's extras.

All are declared in the plan, so that all parties know the form of every frame beforehand, and the printed plan names
what a receiver sees.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from math import prod

from cutlayer.core.parts import Answer, check_name
from cutlayer.core.spec import TensorSpec
from cutlayer.errors import PlanError

__all__ = ["Crossing", "Extra", "PlannedExchange", "Setting", "Transform", "answers_in", "check_extras"]

Setting = str | int | float | bool
WHENS = ("start", "step", "round", "finish")
_LIMIT = 2**30


@dataclass(frozen=True)
class Transform:
    """A codec or defence by its name, with its settings: "gaussian", deviation=0.1."""

    name: str
    settings: tuple[tuple[str, Setting], ...] = ()

    @classmethod
    def of(cls, given: Transform | str | Mapping[str, Setting]) -> Transform:
        """Accept "NAME" or {"name": NAME, SETTING: VALUE, ...}."""
        if isinstance(given, Transform):
            return given
        if isinstance(given, str):
            return cls(given)
        rest = {key: value for key, value in given.items() if key != "name"}
        return cls(str(given.get("name", "")), tuple(sorted(rest.items())))

    def row(self) -> dict[str, Setting]:
        """Return it as plain values."""
        return {"name": self.name, **dict(self.settings)}

    def __str__(self) -> str:
        """Return "gaussian(deviation=0.1)"."""
        return f"{self.name}({', '.join(f'{key}={value}' for key, value in self.settings)})"


@dataclass(frozen=True)
class Crossing:
    """What happens to one stage's output, and to its gradient, where it crosses from one party to another.

    At the sender the value goes through the defences, in order, then through the codec; the receiver decodes it. The
    gradient goes the same way back through its own. Where the stage that takes the value is at the same party, nothing
    of this happens. Gradients pass a defence or codec as they are (straight through): the sender's stage gets the
    gradient at what the receiver saw.

    Args:
        of: The output that crosses, or that an `Answer` lets go to clients: "STAGE" or "STAGE.PORT".
        codec: How the value is written: "bfloat16", "float16" (casts), "int8" (256 levels for each sample), or the name
            of a codec of one's own, which all parties have. Empty: as it is.
        gradient_codec: The same for the gradient.
        defences: What is done to the value before it leaves: "gaussian", or names of one's own; with settings as
            {"name": "gaussian", "deviation": 0.1}. Only the sender must have them.
        gradient_defences: The same for the gradient.
        wire: Spec of the value as it is on the wire, for a codec of one's own; those named above know it.
        gradient_wire: The same for the gradient.
    """

    of: str
    codec: Transform | None = None
    gradient_codec: Transform | None = None
    defences: tuple[Transform, ...] = ()
    gradient_defences: tuple[Transform, ...] = ()
    wire: TensorSpec | None = None
    gradient_wire: TensorSpec | None = None

    def __init__(
        self,
        of: str,
        *,
        codec: Transform | str | Mapping[str, Setting] = "",
        gradient_codec: Transform | str | Mapping[str, Setting] = "",
        defences: Sequence[Transform | str | Mapping[str, Setting]] = (),
        gradient_defences: Sequence[Transform | str | Mapping[str, Setting]] = (),
        wire: TensorSpec | str = "",
        gradient_wire: TensorSpec | str = "",
    ) -> None:
        """Accept texts and tables; keep transforms and specs."""
        keep = object.__setattr__
        keep(self, "of", of)
        keep(self, "codec", Transform.of(codec) if codec else None)
        keep(self, "gradient_codec", Transform.of(gradient_codec) if gradient_codec else None)
        keep(self, "defences", tuple(Transform.of(one) for one in defences))
        keep(self, "gradient_defences", tuple(Transform.of(one) for one in gradient_defences))
        keep(self, "wire", _spec(wire, f"wire of the crossing of {of!r}"))
        keep(self, "gradient_wire", _spec(gradient_wire, f"gradient_wire of the crossing of {of!r}"))

    def coder(self, direction: str) -> Transform | None:
        """Return the codec of values ("up") or gradients ("down")."""
        return self.codec if direction == "up" else self.gradient_codec

    def guards(self, direction: str) -> tuple[Transform, ...]:
        """Return the defences of values ("up") or gradients ("down")."""
        return self.defences if direction == "up" else self.gradient_defences

    def on_wire(self, spec: TensorSpec, direction: str) -> TensorSpec:
        """Return the spec that a tensor of `spec` has on the wire. Raises `PlanError` E131 if that is not known."""
        coder, given = self.coder(direction), self.wire if direction == "up" else self.gradient_wire
        if coder is None:
            return spec
        made = _known_wire(coder.name, spec, self.of) if coder.name in _WIRES else given
        if made is None:
            raise _unfit(self.of, f"the codec {coder.name!r} has no spec on the wire", "wire=... in the plan", "none")
        if given is not None and given != made:
            raise _unfit(self.of, f"the codec {coder.name!r} writes another spec", str(made), str(given))
        return made

    def row(self) -> dict[str, object]:
        """Return it as plain values, without what is left out."""
        found: dict[str, object] = {"of": self.of}
        for key in ("codec", "gradient_codec"):
            one = getattr(self, key)
            found |= {key: one.row()} if one else {}
        for key in ("defences", "gradient_defences"):
            found |= {key: [one.row() for one in getattr(self, key)]} if getattr(self, key) else {}
        for key in ("wire", "gradient_wire"):
            found |= {key: str(getattr(self, key))} if getattr(self, key) else {}
        return found

    def words(self, direction: str) -> str:
        """Return what is done, for the printed plan; empty if nothing is."""
        parts = [f"after {one}" for one in self.guards(direction)]
        coder = self.coder(direction)
        return ", ".join([*parts, *([f"as {coder}" if coder.settings else f"as {coder.name}"] if coder else [])])


@dataclass(frozen=True)
class PlannedExchange:
    """An exchange of one's own: a function that all members have, run at fixed points of the plan.

    Args:
        name: As the members have it, in `Party(exchanges={...})` or as a plug-in.
        group: The parties that take part.
        when: "start" (before round 0), "step" (before each optimizer step), "round" (after each training round) or
            "finish".
        limit: Most bytes of a message.
        messages: Most messages that a member may send another in one exchange.
        says: What is told, for the printed plan: "the largest batch it can take".
        stage: The stage that it is about; empty: none.
        hub: The member that others report to, if the function has one; empty: the first.
    """

    name: str
    group: Sequence[str]
    _: KW_ONLY
    says: str
    when: str = "round"
    limit: int = 65_536
    messages: int = 2
    stage: str = ""
    hub: str = ""

    def __post_init__(self) -> None:
        """Accept a list, keep a tuple."""
        object.__setattr__(self, "group", tuple(self.group))

    @property
    def members(self) -> tuple[str, ...]:
        """Return the group."""
        return tuple(self.group)

    def row(self) -> dict[str, object]:
        """Return it as plain values."""
        return {key: list(item) if isinstance(item, tuple) else item for key, item in vars(self).items()}


Extra = Crossing | PlannedExchange | Answer


def answers_in(extras: Iterable[Extra]) -> tuple[Answer, ...]:
    """Return which outputs clients get, where their stage is served."""
    return tuple(extra for extra in extras if isinstance(extra, Answer))


def check_extras(extras: Iterable[Extra], outputs: Mapping[str, str], names: tuple[set[str], set[str]]) -> None:
    """Raise `PlanError` for the first extra that cannot be.

    Args:
        extras: Of the plan.
        outputs: "STAGE" or "STAGE.PORT" -> what it crosses as: "cut", "answer" (only where it is served), or "".
        names: The plan's parties, and its stages and losses.
    """
    seen = set[str]()
    for extra in extras:
        if isinstance(extra, PlannedExchange):
            _check_exchange(extra, *names)
        if not isinstance(extra, Crossing):
            continue
        if extra.of not in outputs or extra.of in seen:
            twice = "twice" if extra.of in seen else extra.of
            raise _unfit(extra.of, "a crossing names no output of its own", f"one of {', '.join(outputs)}", twice)
        if not outputs[extra.of]:
            raise _unfit(extra.of, "what a crossing names stays at its party", "an output that crosses", "none")
        if outputs[extra.of] == "answer" and (extra.coder("down") or extra.guards("down") or extra.gradient_wire):
            wanted = "codec, defences and wire only: nothing is trained by what a client gets"
            raise _unfit(extra.of, "a crossing gives an answer a gradient", wanted, "a key of the gradient")
        seen.add(extra.of)


def _check_exchange(extra: PlannedExchange, parties: set[str], stages: set[str]) -> None:
    check_name(extra.name.replace("_", "-"), "exchange")
    bad = set(extra.group) - parties
    wrong = (
        ("group", ", ".join(extra.group) or "none", bool(extra.group) and not bad and len(set(extra.group)) > 1),
        ("when", extra.when, extra.when in WHENS),
        ("limit", extra.limit, type(extra.limit) is int and 0 <= extra.limit <= _LIMIT),
        ("messages", extra.messages, type(extra.messages) is int and 1 <= extra.messages <= 1024),
        ("stage", extra.stage, not extra.stage or extra.stage in stages),
        ("hub", extra.hub, not extra.hub or extra.hub in extra.group),
        ("says", extra.says, bool(extra.says.strip())),
    )
    expected = {
        "group": f"two or more of {', '.join(sorted(parties))}, each once",
        "when": f"one of {', '.join(WHENS)}",
        "limit": f"0 to {_LIMIT} bytes",
        "messages": "1 to 1024",
        "stage": "a stage of the plan, or nothing",
        "hub": "a member of the group, or nothing",
        "says": "words for the printed plan: what is told",
    }
    for key, value, good in wrong:
        if not good or (key == "group" and len(set(extra.group)) != len(extra.group)):
            raise PlanError(
                f"{key} of the exchange {extra.name!r} is {value!r}",
                where=f"exchange {extra.name!r}",
                expected=expected[key],
                remedy="correct it",
                code="E132",
            )


def _cast(dtype: str, spec: TensorSpec) -> TensorSpec | None:
    return replace(spec, dtype=dtype) if spec.floating else None


def _levels(_name: str, spec: TensorSpec) -> TensorSpec | None:
    """8 bits a number; each sample's least value and step, two float32, stand before its row."""
    if not spec.floating or spec.free or not spec.per_sample:
        return None
    return TensorSpec.parse(f"uint8[batch, {8 + prod(spec.concrete(1))}]")


_WIRES = {"bfloat16": _cast, "float16": _cast, "int8": _levels}


def _known_wire(name: str, spec: TensorSpec, of: str) -> TensorSpec:
    found = _WIRES[name](name, spec)
    if found is None:
        raise _unfit(of, f"the codec {name!r} cannot write this", "a floating tensor of fixed size", str(spec))
    return found


def _spec(text: TensorSpec | str, where: str) -> TensorSpec | None:
    return TensorSpec.parse(text, where) if isinstance(text, str) and text else text or None


def _unfit(of: str, what: str, expected: str, got: str) -> PlanError:
    code = "E130" if what.startswith(("a crossing", "what a crossing")) else "E131"
    return PlanError(what, where=f"crossing of {of}", expected=expected, got=got, remedy="correct it", code=code)
