"""Doctor: does this party reach those that it dials, do they accept it, and how fast is the way?"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from datetime import UTC, datetime
from functools import partial
from typing import Final

from cutlayer.errors import CutlayerError
from cutlayer.run.config import Contract
from cutlayer.run.doctor_rows import Row, in_time, of_error, size
from cutlayer.run.launch import leaving, network_settings
from cutlayer.run.partyfile import PartyFile
from cutlayer.transport.addresses import host_port
from cutlayer.transport.contact import Target, contact
from cutlayer.transport.handshake import release
from cutlayer.transport.listening import reason_of, way_out, why_not_listen
from cutlayer.transport.probe import Measured, measure
from cutlayer.transport.proxy import find_proxy
from cutlayer.transport.settings import NetworkSettings, proxy_to, route
from cutlayer.transport.tls import Credentials

__all__ = ["address_rows", "listening_row", "network_rows"]

_TITLES: Final = {
    "name": "name",
    "connection": "connection",
    "proxy": "proxy",
    "tunnel": "way through the proxy",
    "server": "certificate",
    "certificate": "accepts ours",
    "plaintext": "plaintext",
}
_STEPS: Final = 8  # on the way to one party; the measurement is one
_ASK: Final = ("E601", "E609", "E621")  # nobody is there, or nobody answers
_FAR: Final = 0.25  # seconds
_SLOW: Final = 5e6 / 8  # bytes a second
_OFF, _FAR_OFF = 60.0, 300.0  # seconds between clocks


def network_rows(contract: Contract, file: PartyFile, *, each: float) -> Iterator[Row]:
    """Yield what is found on the way to each party that this one dials; each step takes at most `each` seconds."""
    try:
        settings = network_settings(contract, file)
    except CutlayerError as error:
        yield of_error("network", error)
        return
    for name in settings.others:
        if route(settings, name) == "dial":
            yield from _bounded(name, partial(_dialled, contract, file, settings, name, each), each)
        else:
            yield _not_dialled(settings, name)
    if settings.port:
        late = Row("listening", "problem", f"{settings.port}: no answer in time", "look at this machine's name service")
        yield from in_time(
            "listening", lambda: [listening_row(settings.port, coordinates=settings.coordinates)], each, late
        )


def address_rows(contract: Contract, *, each: float) -> Iterator[Row]:
    """Yield what is found on the way to the contract's addresses, for a site that has no party file yet."""
    yield Row("contract", "ok", f"digest {contract.digest()}")
    for name, address in contract.addresses.items():
        yield from _bounded(name, partial(_address, name, address, each), each)
        yield Row(f"{name}: certificate", "skipped", "give --party FILE, whose certificate is then shown to the server")


def _bounded(name: str, look: Callable[[], Iterator[Row]], each: float) -> Iterator[Row]:
    """Look at the way to one party, which has an end and never keeps the others from being looked at."""
    seconds = _STEPS * each
    late = Row(f"{name}: way", "problem", f"no end within {seconds:g} seconds", "look at this machine's network")
    yield from in_time(f"{name}: way", look, seconds, late)


def _address(name: str, address: str, each: float) -> Iterator[Row]:
    host, port = host_port(address)
    yield from _way(Target(party=name, host=host, port=port, proxy=find_proxy("", host, port)), None, "", each)


def _dialled(contract: Contract, file: PartyFile, settings: NetworkSettings, name: str, each: float) -> Iterator[Row]:
    host, port = host_port(settings.addresses[name])
    target = Target(party=name, host=host, port=port, proxy=proxy_to(settings, name))
    reached = yield from _way(target, settings.credentials, file.name, each)
    if settings.credentials is None:
        yield Row(f"{name}: certificate", "skipped", "this party has no certificates (insecure = true)")
    elif reached:
        yield from _measured(contract, file, target, settings.credentials, each)
    else:
        yield _own_clock(name)


def _not_dialled(settings: NetworkSettings, name: str) -> Row:
    if route(settings, name) == "await":
        seen = f"{name} dials this party: start `--serve` here, and let {name} run its doctor"
    else:
        seen = f"neither has an address: {settings.coordinator} passes on, sealed, what the two send"
    return Row(f"{name}: way", "skipped", seen)


def _measured(
    contract: Contract, file: PartyFile, target: Target, credentials: Credentials, each: float
) -> Iterator[Row]:
    """Yield round trip, speed, clocks, contract and release of a server that has accepted our certificate."""
    name = target.party
    try:
        found = measure(target, credentials, digest=contract.digest(), seconds=each)
    except CutlayerError as error:
        yield Row(f"{name}: speed", "warning", f"{error.what} ({error.why()})", error.remedy, error.code)
        yield _own_clock(name)
        return
    yield _round_trip(name, found.round_trip)
    yield _speed(name, found, leaving(contract.plan, file.name, {}).nbytes)
    yield _clocks(name, found.ahead)
    yield _their_contract(name, found.plan)
    yield _their_release(name, found)


def listening_row(address: str, *, coordinates: bool) -> Row:
    """Try to listen at this party's own address, and stop at once."""
    reason = why_not_listen(address)
    if reason is None:
        return Row("listening", "ok", f"this party can listen at {address}; the others must reach it there")
    do = way_out(reason, coordinates=coordinates)
    return Row("listening", "problem", f"{address}: {reason_of(reason)}", do, "E604")


def _way(target: Target, credentials: Credentials | None, party: str, each: float) -> Generator[Row, None, bool]:
    """Yield a row a step; return whether the last one was reached."""
    name = target.party
    if target.proxy is not None:
        yield Row(f"{name}: dialled through", "ok", f"the proxy {target.proxy} ({target.proxy.origin})")
    for step in contact(target, credentials, each=each, party=party):
        title = f"{name}: {_TITLES.get(step.name, step.name)}"
        if step.error is not None:
            yield of_error(title, step.error, _ask(target, party, step.name, step.error.code))
            yield Row(f"{name}: all else", "skipped", f"not looked at, as {title!r} failed")
            return False
        if step.name != "files":  # `cutlayer check` has told that
            yield Row(title, "ok", f"{step.seen} in {step.seconds * 1000:.0f} ms")
    return True


def _ask(target: Target, party: str, step: str, code: str) -> str:
    """Return whom to ask what, where nobody answers; empty for what has a remedy of its own."""
    if code not in _ASK:
        return ""
    if step == "name":
        return f"ask your network's people why this machine's name service (DNS) does not answer for {target.host}"
    own = f" of {party}" if party else ""
    return (
        f"ask the people of {target.party} to start `cutlayer doctor CONTRACT --party FILE --serve`, or the run, and "
        f"whether their firewall lets this site{own} in at port {target.port}; ask your own network's people whether "
        f"you may connect to {target.host} port {target.port}"
    )


def _round_trip(name: str, seconds: float) -> Row:
    seen = f"{seconds * 1000:.1f} ms"
    if seconds > _FAR:
        do = "each step waits for it: use larger batches, or more microbatches with a schedule that overlaps them"
        return Row(f"{name}: round trip", "warning", seen, do)
    return Row(f"{name}: round trip", "ok", seen)


def _speed(name: str, found: Measured, nbytes: int) -> Row:
    """Tell both speeds, and what the party's own sending costs at that; `nbytes` are those of 1,000 samples."""
    ways = {"up": found.up, "down": found.down}
    seen = ", ".join(f"{way} {_bits(speed)}" for way, speed in ways.items())
    if found.up and nbytes:
        seen += f"; {size(nbytes)} up for every 1,000 samples an epoch take {nbytes / found.up:.1f} s"
    if any(speed is None or speed < _SLOW for speed in ways.values()):
        do = "a deeper cut or a smaller dtype on it sends less; `cutlayer plan` says how much each cut sends"
        return Row(f"{name}: speed", "warning", seen, do)
    return Row(f"{name}: speed", "ok", seen)


def _bits(speed: float | None) -> str:
    return "too slow to measure" if speed is None else f"{speed * 8 / 1e6:.1f} Mbit/s"


def _clocks(name: str, ahead: float) -> Row:
    seen = f"the clock of {name} is {abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} this machine's"
    if abs(ahead) <= _OFF:
        return Row(f"{name}: clock", "ok", seen)
    do = "set the clock that is wrong (time service, NTP): certificates are valid by the clock"
    return Row(f"{name}: clock", "problem" if abs(ahead) > _FAR_OFF else "warning", seen, do)


def _own_clock(name: str) -> Row:
    now = datetime.now(UTC)
    return Row(f"{name}: clock", "skipped", f"no server to compare with; this machine says {now:%Y-%m-%d %H:%M:%S} UTC")


def _their_contract(name: str, plan: str) -> Row:
    if plan == "other":
        do = "compare what `cutlayer plan CONTRACT --json` prints at both sites; one has an older file"
        return Row(f"{name}: contract", "problem", f"{name} has another contract than this one", do, "E642")
    return Row(f"{name}: contract", "ok", f"{name} has the same contract")


def _their_release(name: str, found: Measured) -> Row:
    own, seen = release(), f"cutlayer {found.release}"
    if not found.protocol_same:
        return Row(
            f"{name}: release", "problem", f"{seen}, here {own}", "install the same release at all parties", "E641"
        )
    if found.release != own:
        return Row(f"{name}: release", "warning", f"{seen}, here {own}", "install the same release at all parties")
    return Row(f"{name}: release", "ok", seen)
