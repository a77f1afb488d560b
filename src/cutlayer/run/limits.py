"""[serving] of a party file: the limits of a served stage."""

from __future__ import annotations

from typing import Annotated

import msgspec

from cutlayer.core.quota import Quota, Serving

__all__ = ["ServingTable"]

_DAY = 86_400.0
Count = Annotated[int, msgspec.Meta(ge=0, le=10**9)]
Some = Annotated[int, msgspec.Meta(ge=1, le=10**9)]
Seconds = Annotated[float, msgspec.Meta(ge=0.001, le=7 * _DAY)]
Pause = Annotated[float, msgspec.Meta(ge=0, le=7 * _DAY)]


class QuotaTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The fields of `cutlayer.Quota`; a test holds both side by side."""

    sessions: Count = 4
    requests: Count = 0
    samples: Count = 0


class ServingTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The fields of `cutlayer.Serving`; a test holds both side by side."""

    batch: Some = 64
    wait: Pause = 0.002
    places: Some = 64
    longest: Some = 1_000_000
    deadline: Seconds = 30.0
    idle: Seconds = 60.0
    patience: Seconds = 10.0
    drain: Pause = 30.0
    window: Seconds = 60.0
    quota: QuotaTable = QuotaTable()
    quotas: dict[str, QuotaTable] = {}

    def limits(self) -> Serving:
        """Return them as the service takes them."""
        plain = {info.name: getattr(self, info.name) for info in msgspec.structs.fields(self)}
        quotas = {name: Quota(**msgspec.structs.asdict(quota)) for name, quota in self.quotas.items()}
        return Serving(**{**plain, "quota": Quota(**msgspec.structs.asdict(self.quota)), "quotas": quotas})

    @classmethod
    def of(cls, limits: Serving) -> ServingTable:
        """Return limits as they stand in a file."""
        return msgspec.convert(limits, cls, from_attributes=True)
