"""Who may come in to a served stage now: places, sessions and quotas of identities. Pure: the caller gives the time.

A refusal says when to ask again; `retry_after` reads it, at whichever end of the link.

| code | error | meaning |
| --- | --- | --- |
| E612 | LinkError | all places are taken |
| E613 | LinkError | the identity has as many sessions as it may have |
| E614 | LinkError | the identity has used up what it may ask for, or asks for more than it ever may |
| E615 | LinkError | the server closes |
"""

from __future__ import annotations

import re
from collections import Counter, deque
from math import ceil
from typing import Final

from cutlayer.core.quota import Serving
from cutlayer.errors import CutlayerError, LinkError

__all__ = ["Gate", "closing", "retry_after"]

_AGAIN: Final = 5  # seconds after which a place may be free
_AFTER: Final = re.compile(r"ask again in (\d+) s\b")


class _Used:
    """What an identity has asked for within the window: each time, and the sums, which are not added up anew."""

    def __init__(self) -> None:
        self.entries: deque[tuple[float, tuple[int, int]]] = deque()  # when, (requests, samples)
        self.sums = (0, 0)

    def note(self, now: float, asked: tuple[int, int]) -> None:
        self.entries.append((now, asked))
        self.sums = (self.sums[0] + asked[0], self.sums[1] + asked[1])

    def forget(self, since: float) -> None:
        """Drop what counts no more."""
        while self.entries and self.entries[0][0] <= since:
            _, gone = self.entries.popleft()
            self.sums = (self.sums[0] - gone[0], self.sums[1] - gone[1])

    def until_free(self, asked: tuple[int, int], most: tuple[int, int], since: float) -> float:
        """Return the seconds until what is asked fits; with nothing asked for, until anything fits at all."""
        over = [
            limit and total + max(amount, 1) - limit
            for total, amount, limit in zip(self.sums, asked, most, strict=True)
        ]
        wait = 0.0
        for when, gone in self.entries:
            if max(over) <= 0:
                break
            over, wait = [left - number for left, number in zip(over, gone, strict=True)], when - since
        return wait


class Gate:
    """Counts sessions, requests and samples by identity.

    Args:
        serving: The limits.
        server: Name of the party that serves; for messages.
    """

    def __init__(self, serving: Serving, server: str) -> None:
        """Begin with nobody inside."""
        self._serving, self._server = serving, server
        self._inside: Counter[str] = Counter()
        self._used: dict[str, _Used] = {}  # of identities with a limit

    @property
    def inside(self) -> int:
        """Return how many sessions there are."""
        return self._inside.total()

    def sessions(self, identity: str) -> int:
        """Return how many sessions an identity has."""
        return self._inside[identity]

    def enter(self, identity: str, now: float) -> None:
        """Take a place for one session. Raises `LinkError` E612, E613 or E614."""
        quota = self._serving.quota_of(identity)
        if not quota.sessions:
            raise self._refused(
                f"{self._server} serves nothing to {identity!r}",
                expected="an identity with a quota",
                got=identity,
                remedy=f"ask {self._server}'s people for a quota",
                code="E613",
            )
        if self._inside[identity] >= quota.sessions:
            raise self._refused(
                f"{identity!r} has as many sessions as it may have",
                expected=f"at most {quota.sessions} at one time",
                remedy=f"ask again in {_AGAIN} s, or when one has ended",
                code="E613",
            )
        if self.inside >= self._serving.places:
            raise self._refused(
                f"all places at {self._server} are taken",
                expected=f"at most {self._serving.places} sessions at one time",
                remedy=f"ask again in {_AGAIN} s",
                code="E612",
            )
        self.check(identity, 0, 0, now)  # who has used up all gets no place to say that it wants more
        self._inside[identity] += 1

    def leave(self, identity: str) -> None:
        """Give a place back."""
        self._inside[identity] -= 1
        if self._inside[identity] <= 0:
            del self._inside[identity]

    def measure(self, identity: str, samples: int) -> None:
        """Check the length of a prediction, before its programs are made. Raises `LinkError` E614."""
        longest = self._serving.longest
        if samples > longest:
            raise self._too_much(identity, "samples", samples, longest, "in one prediction")

    def charge(self, identity: str, requests: int, samples: int, now: float) -> None:
        """Count what a prediction asks for, all of it before it begins. Raises what `check` raises."""
        self.check(identity, requests, samples, now)
        quota = self._serving.quota_of(identity)
        if quota.requests or quota.samples:
            self._used.setdefault(identity, _Used()).note(now, (requests, samples))

    def check(self, identity: str, requests: int, samples: int, now: float) -> None:
        """Say whether so much could be charged now.

        Raises:
            LinkError: E614, it is more than the identity may ask for now, or ever.
        """
        quota, window = self._serving.quota_of(identity), self._serving.window
        for what, amount, most in (("requests", requests, quota.requests), ("samples", samples, quota.samples)):
            if most and amount > most:
                raise self._too_much(identity, what, amount, most, f"in {window:g} s")
        used = self._used.get(identity)
        if used is None:
            return
        used.forget(now - window)
        wait = used.until_free((requests, samples), (quota.requests, quota.samples), now - window)
        if wait > 0:
            raise self._refused(
                f"{identity!r} has used up its quota",
                expected=_allowance(quota.requests, quota.samples, window),
                got=f"{used.sums[0]} requests and {used.sums[1]} samples so far",
                remedy=f"ask again in {ceil(wait)} s",
                code="E614",
            )
        if not used.entries:
            self._used.pop(identity, None)

    def _too_much(self, identity: str, what: str, amount: int, most: int, span: str) -> LinkError:
        return self._refused(
            f"{identity!r} asks for more than it ever may",
            expected=f"at most {most} {what} {span}",
            got=f"{amount} {what}",
            remedy="predict for fewer samples at once, a part after the other",
            code="E614",
        )

    def _refused(self, what: str, *, expected: str, got: str = "one more", remedy: str, code: str) -> LinkError:
        where = f"party {self._server}"
        return LinkError(what, where=where, expected=expected, got=got, remedy=remedy, code=code)


def closing(server: str) -> LinkError:
    """Return the error for whoever comes, or is still there, when the server closes."""
    return LinkError(
        f"{server} closes its service",
        where=f"party {server}",
        remedy=f"ask {server}'s people when it will be back",
        code="E615",
    )


def retry_after(error: CutlayerError) -> int | None:
    """Return the seconds after which a refused client may ask again; None: asking again the same way does not help."""
    found = _AFTER.search(error.remedy)
    return int(found[1]) if found is not None and error.code in ("E612", "E613", "E614") else None


def _allowance(requests: int, samples: int, window: float) -> str:
    parts = [f"{most} {what}" for what, most in (("requests", requests), ("samples", samples)) if most]
    return f"at most {' and '.join(parts)} in {window:g} s"
