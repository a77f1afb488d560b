"""`cutlayer serve`: a trained stage for many clients, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cutlayer.cli.console import Output
from cutlayer.cli.running import consent
from cutlayer.core.inference import describe_prediction
from cutlayer.core.serving import clients_of, served_plan, ways_of
from cutlayer.run.config import load_contract
from cutlayer.run.launch import checked_network
from cutlayer.run.partyfile import load_party_file

if TYPE_CHECKING:
    from cutlayer.run.serving import Served

__all__ = ["serve_party"]


def serve_party(path: Path, party_file: Path, weights: Path | None, output: Output, *, accepted: str) -> None:
    """Serve, say who comes and goes on stderr, and at the end what was done."""
    contract, file = load_contract(path), load_party_file(party_file)
    network = checked_network(contract, file)  # what is wrong is said before anybody is asked anything
    clients = clients_of(contract.plan, file.name)
    text = describe_prediction(served_plan(contract.plan), file.name)
    text += f"\nserved to clients in the role of {' or '.join(clients)}"
    asked = dict.fromkeys(server for way in ways_of(contract.plan) for server in way.asked_by(file.name))
    text += f"\nasks {', '.join(asked)} with each request, under its own certificate" if asked else ""
    consent(contract, file, output, accepted, text)
    from cutlayer.run.serving import serve

    party = file.party()
    stop = threading.Event()
    with _terminated(stop):
        served = serve(
            contract.plan,
            party,
            network=network,
            weights=weights,
            serving=file.serving,
            notify=_telling(output),
            stop=stop,
        )
    _finish(served, output)


@contextmanager
def _terminated(stop: threading.Event) -> Iterator[None]:
    """Let SIGTERM do what Ctrl-C does: end the service in good order."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda _number, _frame: stop.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _telling(output: Output) -> Callable[[str, Mapping[str, Any]], None]:
    """Return a callback that says a line for each event."""

    def notify(event: str, facts: Mapping[str, Any]) -> None:
        if event == "serving":
            output.note(f"serving at {facts['address']} to {', '.join(facts['roles'])}; Ctrl-C ends it")
        elif event == "closing":
            output.note(f"closing: predictions under way have {facts['seconds']:g} s to end")
        elif event == "refused":
            output.note(f"{facts['identity']}: refused, {facts['code']} {facts['what']}")
        elif event == "came" and output.verbose:
            output.note(f"{facts['identity']}: session {facts['session']} for {facts['samples']:,} samples")
        elif event == "went":
            how = f"{facts['code']} after" if facts["code"] else "done in"
            why = f": {facts['what']}" if facts["what"] else ""
            output.note(
                f"{facts['identity']}: session {facts['session']}, {facts['samples']:,} samples, "
                f"{how} {facts['seconds']:.2f} s{why}"
            )

    return notify


def _finish(served: Served, output: Output) -> None:
    for name, tally in served.identities.items():
        output.say(
            f"  {name}: {tally.sessions} sessions, {tally.requests:,} requests, {tally.samples:,} samples, "
            f"sent {tally.sent:,} B, received {tally.received:,} B; {tally.failed} failed, {tally.refused} refused"
        )
    sessions = sum(tally.sessions for tally in served.identities.values())
    output.document(asdict(served))
    output.last(
        f"served {sessions} sessions of {len(served.identities)} identities in {served.seconds:.0f} s: "
        f"{served.requests:,} requests in {served.forwards:,} forwards, at most {served.largest} samples each"
    )
