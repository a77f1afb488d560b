"""Codecs, defences and exchanges of a party: cutlayer's own, the party's, and those of installed packages.

A package offers them as entry points of the groups `cutlayer.codecs`, `cutlayer.defences` and `cutlayer.exchanges`.
Only what the plan names is loaded, and only by that name: what is installed beside it is not imported.

| code | error | meaning |
| --- | --- | --- |
| E290 | ConfigError | a name stands for two things, or for none |
| E291 | ConfigError | a plug-in cannot be loaded |
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from cutlayer.core.plan import Plan
from cutlayer.engine.codec import CODECS, CodecFactory
from cutlayer.engine.coder import Plugs
from cutlayer.engine.defence import DEFENCES, DefenceFactory
from cutlayer.engine.exchange import EXCHANGES, ExchangeFunction
from cutlayer.errors import ConfigError

__all__ = ["GROUPS", "plugs_of"]

GROUPS = {"codec": "cutlayer.codecs", "defence": "cutlayer.defences", "exchange": "cutlayer.exchanges"}


def plugs_of(
    plan: Plan,
    party: str,
    *,
    codecs: Mapping[str, CodecFactory],
    defences: Mapping[str, DefenceFactory],
    exchanges: Mapping[str, ExchangeFunction],
) -> Plugs:
    """Return what a party has for a plan: its own first, then cutlayer's, then installed plug-ins.

    Raises:
        ConfigError: E290, the party gives something under a name that is cutlayer's, or two packages offer one name;
            E291, a plug-in cannot be loaded.
    """
    ways = ("up", "down")
    wanted = {
        "codec": {coder.name for one in plan.crossings for way in ways if (coder := one.coder(way)) is not None},
        "defence": {guard.name for one in plan.crossings for way in ways for guard in one.guards(way)},
        "exchange": {one.name for one in plan.exchanges if party in one.group},
    }
    return Plugs(
        codecs=_together("codec", party, wanted["codec"], codecs, CODECS),
        defences=_together("defence", party, wanted["defence"], defences, DEFENCES),
        exchanges=_together("exchange", party, wanted["exchange"], exchanges, EXCHANGES),
    )


def _together(
    kind: str, party: str, wanted: Iterable[str], own: Mapping[str, Any], built_in: Mapping[str, Any]
) -> dict[str, Any]:
    for name in own:
        if name in built_in or not callable(own[name]):
            raise ConfigError(
                f"the {kind} {name!r} cannot be this party's",
                where=f"party {party}",
                expected=f"a function or class, under a name other than {', '.join(sorted(built_in))}",
                got=type(own[name]).__name__,
                remedy="give it another name, in the plan too",
                code="E290",
            )
    found = {**built_in, **own} if kind != "exchange" else dict(own)
    for name in sorted(set(wanted) - set(found)):
        offered = list(entry_points(group=GROUPS[kind], name=name))
        if len({one.value for one in offered}) > 1:
            raise ConfigError(
                f"several packages offer the {kind} {name!r}",
                where=f"party {party}",
                got=", ".join(sorted(one.value for one in offered)),
                remedy="uninstall all but one of them",
                code="E290",
            )
        if offered:
            found[name] = _loaded(kind, offered[0], party)
    return found


def _loaded(kind: str, point: EntryPoint, party: str) -> Any:  # noqa: ANN401 - whatever the package offers
    got = ""
    try:
        made = point.load()
    except Exception as error:
        made, got = None, f"{type(error).__name__}: {error}"[:200]
    if not callable(made):
        raise ConfigError(
            f"the plug-in {point.name!r} cannot be loaded",
            where=f"party {party}, {kind} of {point.value}",
            expected="a function or class",
            got=got or type(made).__name__,
            remedy="install its package again, or ask whoever wrote it",
            code="E291",
        )
    return made
