"""Messages that parties exchange besides tensors: numbered, bounded msgpack arrays. Pure: bytes in, objects out.

Each message is the control part of a frame. Its first item is the frame's kind, the others are the fields in the order
in which the classes below list them; there are no optional and no unknown fields. Messages of kinds 2 to 5 belong to
one stream and carry no sequence number; all others are numbered, kept until acknowledged, and resent.

| code | error | meaning |
| --- | --- | --- |
| E509 | WireError | the control part is no message of its frame's kind |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Final, Literal

import msgspec

from cutlayer.engine.wire import CONTROL_MAX, KIND_DATA
from cutlayer.errors import WireError

__all__ = [
    "ABORT",
    "ACK",
    "BYE",
    "HEARTBEAT",
    "KINDS",
    "LEAVE",
    "LINK_HELLO",
    "NOTICE",
    "PROTOCOL",
    "READY",
    "RELAY",
    "RESET",
    "SEAL_OFFER",
    "START",
    "TEXT_MAX",
    "UNNUMBERED",
    "Abort",
    "Ack",
    "Bye",
    "Heartbeat",
    "Leave",
    "LinkHello",
    "Message",
    "Notice",
    "Ready",
    "Relay",
    "Reset",
    "SealOffer",
    "Start",
    "decode",
    "encode",
    "kind_of",
]

PROTOCOL: Final = 2
"""Version of the conversation: kinds, fields and their order, and how frames share messages (one each in version 1).

The frame's own version is `engine.wire.VERSION`.
"""
LINK_HELLO: Final = 2
ACK: Final = 3
HEARTBEAT: Final = 4
LEAVE: Final = 5
RELAY: Final = 6
SEAL_OFFER: Final = 7
READY: Final = 8
START: Final = 9
RESET: Final = 10
NOTICE: Final = 11
ABORT: Final = 12
BYE: Final = 13
UNNUMBERED: Final = frozenset({LINK_HELLO, ACK, HEARTBEAT, LEAVE})
TEXT_MAX: Final = 1000
"""Longest text of a message, in characters."""

_NAME_MAX: Final = 255
_PARTIES_MAX: Final = 4096
_CHECKPOINTS_MAX: Final = 4096
_MODES_MAX: Final = 16

Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Identity = Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]
Place = Annotated[int, msgspec.Meta(ge=-1, le=2**63 - 1)]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=_NAME_MAX)]
Text = Annotated[str, msgspec.Meta(max_length=TEXT_MAX)]
Parties = Annotated[tuple[Name, ...], msgspec.Meta(max_length=_PARTIES_MAX)]
Counts = Annotated[dict[Name, Count], msgspec.Meta(max_length=_PARTIES_MAX)]


class LinkHello(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=LINK_HELLO):
    """First message of each side of a stream.

    Attributes:
        protocol, package: Versions of the protocol and of the sender's release.
        party, digest, run: Who speaks, the plan's digest, the run's name.
        incarnation: Random number of the sender's process; a restart has another.
        known: The receiver's incarnation that `wanted` counts for; 0: none is known.
        wanted: The sequence number that the sender wants next; 0: this process takes no part, but tells of an error.
    """

    protocol: Count
    package: Name
    party: Name
    digest: Name
    run: Name
    incarnation: Identity
    known: Count
    wanted: Count


class Ack(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=ACK):
    """All frames up to `received` have arrived, and what was relayed has arrived at its end."""

    received: Count


class Heartbeat(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=HEARTBEAT):
    """The sender lives and has nothing to say."""


class Leave(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=LEAVE):
    """The sender closes this stream on purpose and does not come back."""


class Relay(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=RELAY):
    """The payload is one stream message for `target`, sealed or (without certificates) plain; `counter` from 0."""

    session: Count
    source: Name
    target: Name
    sealed: bool
    counter: Count


class SealOffer(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=SEAL_OFFER):
    """The payload is `source`'s half of the key exchange with `target`."""

    session: Count
    source: Name
    target: Name


class Ready(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=READY):
    """The sender waits for a session: the last one that it saw, its samples by mode, its checkpoints."""

    session: Count
    counts: Annotated[dict[Name, Count], msgspec.Meta(max_length=_MODES_MAX)]
    checkpoints: Annotated[tuple[Count, ...], msgspec.Meta(max_length=_CHECKPOINTS_MAX)]


class Start(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=START):
    """The coordinator starts a session: samples by mode and party, checkpoint or -1, incarnations that take part."""

    session: Identity
    counts: Annotated[dict[Name, Counts], msgspec.Meta(max_length=_MODES_MAX)]
    checkpoint: Place
    incarnations: Annotated[dict[Name, Identity], msgspec.Meta(max_length=_PARTIES_MAX)]


class Reset(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=RESET):
    """The session is over because `party` restarted or asked for it; a new rendezvous follows."""

    session: Count
    party: Name


class Notice(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=NOTICE):
    """The coordinator has lost or got back parties, or still waits for them; to it: the sender rests.

    Who rests has all that it wanted of the session. Its next READY, if there is one, asks for another.
    """

    event: Literal["lost", "returned", "waiting", "resting"]
    parties: Parties


class Abort(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=ABORT):
    """`party` failed: an error's code, its sentence and its remedy. As first answer to a hello: the link is refused.

    A refusal has sequence number 0, any other ABORT is numbered.
    """

    party: Name
    code: Annotated[str, msgspec.Meta(min_length=4, max_length=4, pattern="^E[0-9]{3}$")]
    what: Text
    remedy: Text


class Bye(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=BYE):
    """The sender has nothing left to do in this session; from the coordinator: all have said so."""

    session: Count


Message = LinkHello | Ack | Heartbeat | Leave | Relay | SealOffer | Ready | Start | Reset | Notice | Abort | Bye
KINDS: Final[Mapping[int, type]] = {
    LINK_HELLO: LinkHello,
    ACK: Ack,
    HEARTBEAT: Heartbeat,
    LEAVE: Leave,
    RELAY: Relay,
    SEAL_OFFER: SealOffer,
    READY: Ready,
    START: Start,
    RESET: Reset,
    NOTICE: Notice,
    ABORT: Abort,
    BYE: Bye,
}
_NUMBERS: Final = {structure: kind for kind, structure in KINDS.items()}
_ENCODE: Final = msgspec.msgpack.Encoder().encode
_DECODE: Final = msgspec.msgpack.Decoder(Message).decode


def kind_of(message: Message) -> int:
    """Return the number of the frame that carries this message."""
    return _NUMBERS[type(message)]


def encode(message: Message) -> bytes:
    """Return the control part of a frame.

    Raises:
        WireError: E509, the message is longer than a control part may be.
    """
    data = _ENCODE(message)
    if len(data) > CONTROL_MAX:
        raise _unreadable(type(message).__name__, f"at most {CONTROL_MAX} bytes", f"{len(data)} bytes")
    return data


def decode(kind: int, data: bytes | bytearray | memoryview) -> Message:
    """Read the control part of a frame of this kind.

    Raises:
        WireError: E509, it is no message of this kind. Nothing else is raised, whatever the bytes.
    """
    if kind == KIND_DATA or kind not in KINDS:
        raise _unreadable(f"kind {kind}", f"a kind from {LINK_HELLO} to {BYE}", str(kind))
    if len(data) > CONTROL_MAX:
        raise _unreadable(KINDS[kind].__name__, f"at most {CONTROL_MAX} bytes", f"{len(data)} bytes")
    try:
        message: Message = _DECODE(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        text = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise _unreadable(KINDS[kind].__name__, "its fields, and no others", text) from None
    if kind_of(message) != kind:
        raise _unreadable(KINDS[kind].__name__, f"kind {kind}", f"kind {kind_of(message)}")
    return message


def _unreadable(name: str, expected: str, got: str) -> WireError:
    return WireError(
        f"a {name} message cannot be read",
        expected=expected,
        got=got,
        remedy="install the same release of cutlayer at all parties",
        code="E509",
    )
