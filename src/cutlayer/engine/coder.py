"""What a party does at its cuts: defends and encodes what leaves, decodes what comes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from cutlayer.core.crossing import Crossing, Transform
from cutlayer.core.graph import Edge, Graph
from cutlayer.core.program import Direction
from cutlayer.core.spec import TensorSpec
from cutlayer.engine.codec import CODECS, Codec, CodecFactory
from cutlayer.engine.defence import DEFENCES, Defence, DefenceFactory
from cutlayer.engine.tensors import check_spec
from cutlayer.errors import ConfigError, ContractError

if TYPE_CHECKING:
    from cutlayer.engine.exchange import ExchangeFunction

__all__ = ["Coder", "Plugs", "generator_of"]

_T = TypeVar("_T")
_Directions: tuple[Direction, Direction] = ("up", "down")
_STATE, _WORDS = 24, 624  # the words of a Mersenne Twister in a CPU generator's state: where they begin, how many


@dataclass(frozen=True, kw_only=True)
class Plugs:
    """Codecs, defences and exchanges that this party has, by the names that the plan uses."""

    codecs: Mapping[str, CodecFactory] = field(default_factory=lambda: CODECS)
    defences: Mapping[str, DefenceFactory] = field(default_factory=lambda: DEFENCES)
    exchanges: Mapping[str, ExchangeFunction] = field(default_factory=dict)


class Coder:
    """The codecs and defences of one party's cuts.

    Args:
        graph: Of the plan.
        party: This party.
        plugs: What it has.
        seed: Its private seed.

    Raises:
        ConfigError: E290, the plan names a codec or defence that this party has not; E292, its settings are wrong.
    """

    def __init__(self, graph: Graph, party: str, plugs: Plugs, seed: int) -> None:
        """Make each codec and defence that is needed here, once."""
        self._party, self._seed = party, seed
        self._codecs: dict[tuple[str, str], Codec] = {}
        self._defences: dict[tuple[str, str], list[Defence]] = {}
        for edge in graph.edges:
            if edge.crossing is not None:
                for lane in range(graph.lanes):
                    self._prepare(edge, edge.crossing, graph, lane, plugs)

    def _prepare(self, edge: Edge, crossing: Crossing, graph: Graph, lane: int, plugs: Plugs) -> None:
        ends = graph.origin(edge, lane), graph.place(edge.target, lane)
        if self._party not in ends or ends[0] == ends[1]:
            return
        for direction in _Directions:
            if direction == "down" and not edge.trained:
                continue
            key, sender = (edge.origin, direction), ends[0 if direction == "up" else 1]
            coder = crossing.coder(direction)
            if coder is not None and key not in self._codecs:
                self._codecs[key] = _made("codec", coder, plugs.codecs, self._party)
            if sender == self._party and key not in self._defences:
                guards = crossing.guards(direction)
                self._defences[key] = [_made("defence", one, plugs.defences, self._party) for one in guards]

    def leaving(self, edge: Edge, direction: Direction, value: Tensor, place: str) -> Tensor:
        """Return what is sent for a value or gradient of an edge. `place`: where in the run it is, for the generator.

        Raises:
            ConfigError: E292, a defence gives something else than it got.
        """
        for number, defence in enumerate(self._defences.get((edge.origin, direction), ())):
            text = f"{self._seed}:{edge.origin if direction == 'up' else edge.label}:{direction}:{place}:{number}"
            given: object = _ours(partial(defence, value, generator_of(text)), edge, self._party)
            if not isinstance(given, Tensor) or given.shape != value.shape or given.dtype != value.dtype:
                raise _unfit(
                    "a defence gives something else than it got",
                    f"party {self._party}, crossing of {edge.origin}",
                    f"{value.dtype}{list(value.shape)}",
                    _shown(given),
                )
            value = given
        return self.encoded(edge, direction, value)

    def encoded(self, edge: Edge, direction: Direction, value: Tensor) -> Tensor:
        """Return a value or gradient as it is written on the wire; what a codec has written crosses in C order."""
        codec = self._codecs.get((edge.origin, direction))
        return value if codec is None else _ours(partial(codec.encode, value), edge, self._party).contiguous()

    def coming(self, edge: Edge, direction: Direction, wire: Tensor, size: int) -> Tensor:
        """Return the value or gradient for what came over an edge.

        Raises:
            ContractError: E540, it cannot be read.
            ConfigError: E292, the codec gives something else than the plan says.
        """
        codec = self._codecs.get((edge.origin, direction))
        if codec is None or edge.spec is None:
            return wire
        where = f"party {self._party}, crossing of {edge.origin}"
        try:
            value = codec.decode(wire, edge.spec)
        except Exception as error:
            raise ContractError(
                "what came over a cut cannot be decoded",
                where=where,
                got=type(error).__name__,
                remedy="use the same release of the codec at both parties, with the plan's settings",
                code="E540",
            ) from error
        wrong = _wrong(value, edge.spec, size)
        if wrong:
            raise _unfit("a codec gives something else than the plan says", where, str(edge.spec), wrong)
        return value


def generator_of(text: str) -> torch.Generator:
    """Return a generator whose whole state, 19,937 bits of a Mersenne Twister, is drawn from a text by SHAKE-256.

    `manual_seed` takes only 32 bits of a seed, which can be tried one after the other, and which come twice in a run.
    """
    dice = torch.Generator().manual_seed(0)
    state = dice.get_state()
    words = np.frombuffer(hashlib.shake_256(text.encode()).digest(4 * _WORDS), "<u4").astype(np.uint64)
    state[_STATE : _STATE + 8 * _WORDS] = torch.from_numpy(words.view(np.uint8))
    dice.set_state(state)
    return dice


def _made(kind: str, wanted: Transform, known: Mapping[str, Callable[..., _T]], party: str) -> _T:
    if wanted.name not in known:
        raise ConfigError(
            f"this party has no {kind} {wanted.name!r}",
            where=f"party {party}",
            expected=f"one of {', '.join(sorted(known))}",
            remedy=f"give it in Party({kind}s={{...}}), or install the package that has it as a plug-in",
            code="E290",
        )
    try:
        return known[wanted.name](**dict(wanted.settings))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"the {kind} {wanted.name!r} does not take these settings",
            where=f"party {party}",
            got=f"{wanted}: {error}",
            remedy="correct them in the plan, at all parties",
            code="E292",
        ) from error


def _ours(call: Callable[[], _T], edge: Edge, party: str) -> _T:
    try:
        return call()
    except Exception as error:
        raise ConfigError(
            "a codec or defence of this party failed",
            where=f"party {party}, crossing of {edge.origin}",
            got=type(error).__name__,
            remedy="try it with cutlayer.testing; the error is its own",
            code="E292",
        ) from error


def _wrong(value: Any, spec: TensorSpec, size: int) -> str:  # noqa: ANN401 - whatever a codec gives
    return check_spec(value, spec, size) if isinstance(value, Tensor) else type(value).__name__


def _shown(value: object) -> str:
    return f"{value.dtype}{list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _unfit(what: str, where: str, expected: str, got: str) -> ConfigError:
    return ConfigError(
        what,
        where=where,
        expected=expected,
        got=got,
        remedy="try it with cutlayer.testing, and correct it",
        code="E292",
    )
