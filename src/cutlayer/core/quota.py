"""The limits of a served stage: how requests are put together, and what each identity may ask for.

| code | error | meaning |
| --- | --- | --- |
| E202 | ConfigError | a limit is outside its range |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite

from cutlayer.errors import ConfigError

__all__ = ["Quota", "Serving"]

_COUNT_MAX = 10**9
_SECONDS_MAX = 7 * 86_400.0


def _check(name: str, value: float, least: float, most: float) -> None:
    whole = isinstance(least, int)
    fits = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if not (fits and isfinite(value) and least <= value <= most):
        raise ConfigError(
            f"the value of {name!r} is wrong",
            where="the limits of a service",
            expected=f"{'a whole number' if whole else 'seconds'} from {least:g} to {most:g}",
            got=str(value)[:80],
            remedy="correct it",
            code="E202",
        )


@dataclass(frozen=True, kw_only=True)
class Quota:
    """What one identity may ask for. An identity is the name of a client's certificate.

    Attributes:
        sessions: Sessions at one time; a connection is one, whatever it asks for. 0: none at all.
        requests: Forwards of a served stage within `Serving.window` seconds; 0: any number.
        samples: Samples within `Serving.window` seconds; 0: any number.
    """

    sessions: int = 4
    requests: int = 0
    samples: int = 0

    def __post_init__(self) -> None:
        """Raise `ConfigError` E202 for a number outside its range."""
        for name in ("sessions", "requests", "samples"):
            _check(f"quota.{name}", getattr(self, name), 0, _COUNT_MAX)


@dataclass(frozen=True, kw_only=True)
class Serving:
    """How a stage is served, and to whom.

    Attributes:
        batch: Most samples in one forward of a stage; requests that wait are put together up to it. A request that
            is larger runs alone. 1: each request runs alone.
        wait: Seconds that a request waits for others to be put together with. It waits for nobody once all sessions
            wait.
        places: Sessions at one time, of all identities.
        longest: Most samples of one prediction.
        deadline: Seconds that a request may wait for the stage.
        idle: Seconds in which a client must send its next request.
        patience: Seconds that a lost client has to come back; then its place is free. In a chain also what a server
            that this one asks has to answer, and the other links of a request to come.
        drain: Seconds that predictions under way have to end when the server closes. A connection that asks for
            nothing is ended at once.
        window: Seconds over which quotas count.
        quota: Of each identity that is not in `quotas`.
        quotas: Identity -> its own quota.
    """

    batch: int = 64
    wait: float = 0.002
    places: int = 64
    longest: int = 1_000_000
    deadline: float = 30.0
    idle: float = 60.0
    patience: float = 10.0
    drain: float = 30.0
    window: float = 60.0
    quota: Quota = Quota()
    quotas: Mapping[str, Quota] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise `ConfigError` E202 for a number outside its range."""
        for name in ("batch", "places", "longest"):
            _check(name, getattr(self, name), 1, _COUNT_MAX)
        for name in ("wait", "drain"):
            _check(name, getattr(self, name), 0.0, _SECONDS_MAX)
        for name in ("deadline", "idle", "patience", "window"):
            _check(name, getattr(self, name), 0.001, _SECONDS_MAX)

    def quota_of(self, identity: str) -> Quota:
        """Return what an identity may ask for."""
        return self.quotas.get(identity, self.quota)
