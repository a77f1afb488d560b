"""What carries frames between parties, as the rest of the package sees it."""

from __future__ import annotations

from typing import Protocol

from cutlayer.core.program import Tag
from cutlayer.engine.wire import Frame

__all__ = ["Transport"]


class Transport(Protocol):
    """Moves frames between this party and the others. Each frame arrives once, unchanged, and is taken by its tag.

    All methods may raise, besides what they list:

    - `PeerError` E7xx: another party failed, left, or stayed away; final.
    - `ContractError`, `WireError`, `HandshakeError`, `CertificateError`: a peer broke the protocol; final.
    - `session.SessionReset` (no error): a party restarted; roll back, and meet again with `rendezvous`.
    - `ProgramError` E43x: no session is open.
    """

    def send(self, to: str, *frames: Frame) -> None:
        """Queue frames for a party, to leave together if they are small; it waits only while too much is queued.

        Payloads are not copied: nobody may write to them from now on.

        Raises:
            DeadlineError: E622, no room in the queue within `deadlines.send` seconds.
            ProgramError: E432, there is no such party.
        """
        ...

    def flush(self) -> None:
        """Let what was sent leave, before the caller computes on and waits for nothing. Takes a moment at most."""
        ...

    def recv(self, source: str, tag: Tag) -> Frame:
        """Take the frame with this tag from a party; its payload is writable and belongs to the caller.

        Raises:
            DeadlineError: E621, it did not come within `deadlines.receive` seconds.
        """
        ...
