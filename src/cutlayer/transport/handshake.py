"""The first message of each side of a stream, what it must say, and errors as others see them. Pure.

| code | error | meaning |
| --- | --- | --- |
| E434 | ProgramError | something in a thread of the network failed that no check foresaw |
| E513 | WireError | a hello that is none |
| E514 | WireError | a hello whose frame is of another run |
| E605 | LinkError | there is no memory for a frame |
| E612 | LinkError | no place in a service; E613 to E615 are refusals of one too |
| E613 | LinkError | a quota of a service |
| E614 | LinkError | a request that a service does not take |
| E615 | LinkError | a service that closes |
| E641 | HandshakeError | another protocol version |
| E642 | HandshakeError | another contract |
| E643 | HandshakeError | another run |
| E644 | HandshakeError | another process runs as this party |
| E645 | HandshakeError | the stream does not begin as it must, or with a party that is not of this plan |
| E649 | HandshakeError | another process runs as this party, and is alive |
| E665 | CertificateError | the certificate is not that of the party that speaks |
| E703 | PeerError | another party failed; its own code and remedy are in it |
| E704 | PeerError | another party stopped |
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import metadata
from typing import Final

from cutlayer.engine.wire import HEADER, Header, parse_header
from cutlayer.engine.wire import VERSION as FRAME_VERSION
from cutlayer.errors import (
    CertificateError,
    CutlayerError,
    HandshakeError,
    LinkError,
    PeerError,
    ProgramError,
    WireError,
)
from cutlayer.transport import control
from cutlayer.transport.control import Abort, LinkHello, Message
from cutlayer.transport.frames import messages, run_number
from cutlayer.transport.remedies import when_left
from cutlayer.transport.settings import NetworkSettings

__all__ = ["SECOND", "abort_of", "check_hello", "error_of", "hello_of", "read_hello", "single", "tidy", "typed"]

SECOND: Final = "E649"
"""The code of a refusal that may pass: another process of the party is alive now."""
_AS_IS: Final[Mapping[str, type[CutlayerError]]] = {
    "E64": HandshakeError,
    "E66": CertificateError,
    "E70": PeerError,
    **dict.fromkeys(("E612", "E613", "E614", "E615"), LinkError),  # refusals of a service
}
_EXPECTED_TOO: Final = frozenset(f"E{number}" for number in (646, 701, 702))
"""Codes of errors made here whose `got` is why this party reaches nobody, which may name an address or a proxy."""
_WHY_TOO: Final = _EXPECTED_TOO | frozenset(
    f"E{number}" for number in (*range(612, 615), *range(641, 650), *range(661, 670), 703, 709)
)
"""Codes of errors made here, of numbers, names, versions, digests and dates: what was expected and got crosses too."""
_WHY: Final = re.compile(
    r"(?P<what>.+?): (?=expected |got )(expected (?P<expected>.+?)(, (?=got )|$))?(got (?P<got>.+))?"
)
_VERSION_AT: Final = 4  # the frame's version byte
_FIRST: Final = "first message of a stream"


def single(message: Message, run: str, *, sequence: int = 0) -> bytes:
    """Return a message without payload as the one message of a stream that carries it."""
    part = control.encode(message)
    header = Header(control.kind_of(message), len(part), 0, sequence, run_number(run))
    return next(messages(header, part, b""))


def hello_of(settings: NetworkSettings, incarnation: int, known: int, wanted: int) -> LinkHello:
    """Return this party's hello; `wanted` counts for the peer's incarnation `known`."""
    return LinkHello(
        control.PROTOCOL,
        release(),
        settings.party,
        settings.digest,
        settings.run,
        incarnation,
        known,
        wanted,
    )


def read_hello(data: bytes) -> LinkHello | Abort:
    """Read the first message of a stream: a hello, or the peer's refusal.

    Raises:
        HandshakeError: E641 for another version of frames, E643 for another run.
        WireError: it is neither.
    """
    if len(data) > _VERSION_AT and data[:_VERSION_AT] == b"CUTL" and data[_VERSION_AT] != FRAME_VERSION:
        raise _version(_FIRST, f"frames of version {FRAME_VERSION}", f"version {data[_VERSION_AT]}")
    header = parse_hello_header(data)
    message = control.decode(header.kind, data[HEADER.size :])
    if isinstance(message, Abort):
        return message
    if not isinstance(message, LinkHello):
        raise WireError(
            "a stream must begin with a hello",
            where=_FIRST,
            got=type(message).__name__,
            remedy="install the same release of cutlayer at all parties",
            code="E513",
        )
    if header.run != run_number(message.run):
        raise WireError(
            "a hello's frame is of another run than the hello",
            where=_FIRST,
            remedy="give all parties the same contract",
            code="E514",
        )
    return message


def check_hello(hello: LinkHello, settings: NetworkSettings, names: tuple[str, ...] | None) -> None:
    """Check that a peer takes part in the same run. `names` are those of its certificate, None without one.

    Raises:
        HandshakeError: E641, E642, E643 or E645.
        CertificateError: E665.
    """
    where = f"party {settings.party}, link with {tidy(hello.party)}"
    if hello.party not in settings.others:
        raise HandshakeError(
            "a party that is not of this plan",
            where=where,
            expected=f"one of {', '.join(settings.others)}",
            got=tidy(hello.party),
            remedy="compare the party's name with the contract",
            code="E645",
        )
    if names is not None and names != (hello.party,):
        raise CertificateError(
            "a party speaks with another's certificate",
            where=where,
            expected=f"a certificate of {hello.party}",
            got=", ".join(tidy(name) for name in names) or "no name",
            remedy=f"ask the authority of this run for a certificate in the name {hello.party}; "
            "only a served stage takes others (`identity` in the party file)",
            code="E665",
        )
    if hello.protocol != control.PROTOCOL:
        raise _version(
            where,
            f"protocol {control.PROTOCOL} (cutlayer {release()}, {settings.party})",
            f"protocol {hello.protocol} (cutlayer {tidy(hello.package)}, {hello.party})",
        )
    if hello.run != settings.run:
        raise HandshakeError(
            "two parties take part in different runs",
            where=where,
            expected=f"run {settings.run!r} ({settings.party})",
            got=f"run {tidy(hello.run)!r} ({hello.party})",
            remedy="start all parties with the same name of the run",
            code="E643",
        )
    if hello.digest != settings.digest:
        raise HandshakeError(
            "two parties have different contracts",
            where=where,
            expected=f"contract {settings.digest[:16]} ({settings.party})",
            got=f"contract {tidy(hello.digest)[:16]} ({hello.party})",
            remedy="take one file for all parties; what differs is in `cutlayer plan CONTRACT --json` of both",
            code="E642",
        )


def abort_of(error: BaseException, party: str) -> Abort:
    """Return what others learn of an error at `party`: code, sentence and remedy, never values of data or paths.

    Of an error of the network itself, and of a refusal of a service, they also learn what was expected and got:
    versions, digests, names, dates, numbers. It ends the sentence, since an ABORT has no fields for it. Why this party
    reaches another stays here: the way out of a site, with its addresses and proxies, is its own affair. An error that
    another party has reported is handed on as that party's.
    """
    if not isinstance(error, CutlayerError):
        kind = "Ctrl-C" if isinstance(error, KeyboardInterrupt) else type(error).__name__
        return Abort(party, "E704", f"{party} stopped: {kind}", f"look at {party}'s terminal")
    what, party = error.what, error.origin or party
    if error.code in _EXPECTED_TOO:
        what += f": expected {error.expected}" if error.expected else ""
    elif error.code in _WHY_TOO and error.why():
        what = f"{what}: {error.why()}"
    return Abort(party, error.code, tidy(what), tidy(error.remedy))


def error_of(abort: Abort, via: str, settings: NetworkSettings) -> CutlayerError:
    """Return the error to raise where an ABORT arrives; `via` is the party that it came from.

    Errors of the network itself (E64x, E66x, E70x) and refusals of a service (E612 to E615) keep their class and
    code, and what was expected and got; others become `PeerError` E703. What to do when a party stopped is known here.
    In the name of a party that `via` has no link with, it is `via`'s own word.
    """
    what, remedy, party = tidy(abort.what), tidy(abort.remedy), via
    if abort.party in {*settings.others, *settings.behind}:
        party = abort.party
    remedy = when_left(settings, party) if abort.code == "E704" else remedy
    kind = _kind_of(abort.code)
    if kind is not None:
        told = "" if via == party else f", told by {tidy(via)}"
        found = _WHY.fullmatch(what) if abort.code in _WHY_TOO else None
        parts = found.groupdict("") if found else {"what": what}
        error = kind(parts.pop("what"), where=f"reported by {party}{told}", **parts, remedy=remedy, code=abort.code)
        error.origin = party
        return error
    failed = PeerError(
        f"{party} failed: {what}",
        where=f"told by {via}",
        got=f"{abort.code} at {party}",
        remedy=f"at {party}: {remedy}" if remedy else f"look at {party}'s terminal",
        code="E703",
    )
    failed.origin = party
    return failed


def _kind_of(code: str) -> type[CutlayerError] | None:
    """Return the class of an error that is the same at all parties."""
    return _AS_IS.get(code) or _AS_IS.get(code[:3])


def typed(error: BaseException, where: str) -> CutlayerError:
    """Return what to raise for whatever a thread of the network met; `where` is used if the error has no place."""
    if isinstance(error, MemoryError):
        return LinkError(
            "this party has no memory for a frame",
            where=where,
            remedy="end what else uses memory, or use smaller microbatches",
            code="E605",
        )
    if not isinstance(error, CutlayerError):
        return ProgramError(
            "the network failed in a way that no check foresaw",
            where=where,
            got=f"{type(error).__name__}: {tidy(str(error))}",
            remedy="report it, with the release of cutlayer",
            code="E434",
        )
    if error.where:
        return error
    return type(error)(
        error.what, where=where, expected=error.expected, got=error.got, remedy=error.remedy, code=error.code
    )


def tidy(text: str) -> str:
    """Return a text of another party, fit for a terminal: bounded, one line, no control characters."""
    return "".join(sign if sign.isprintable() else "?" for sign in text)[: control.TEXT_MAX]


def parse_hello_header(data: bytes) -> Header:
    """Read the header of a stream's first message, which has no payload and no number. Raises `WireError`."""
    header = parse_header(data)
    sizes = header.control_length == len(data) - HEADER.size and header.payload_length == 0
    if header.kind not in (control.LINK_HELLO, control.ABORT) or header.sequence or not sizes:
        raise WireError(
            "a stream must begin with a hello",
            where=_FIRST,
            got=f"kind {header.kind}",
            remedy="install the same release of cutlayer at all parties",
            code="E513",
        )
    return header


def release() -> str:
    """Return the installed version of cutlayer."""
    try:
        return metadata.version("cutlayer")
    except metadata.PackageNotFoundError:
        return "not installed"


def _version(where: str, expected: str, got: str) -> HandshakeError:
    return HandshakeError(
        "two parties have releases that do not understand each other",
        where=where,
        expected=expected,
        got=got,
        remedy="install the same release of cutlayer at all parties",
        code="E641",
    )
