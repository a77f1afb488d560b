"""Options that commands have in common, as one argument of the function behind a command."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from typing import Any, TypeVar, get_type_hints

from cutlayer.cli.console import JsonOption, Output, QuietOption, VerboseOption

__all__ = ["Told", "spread"]

_R = TypeVar("_R")


@dataclass(frozen=True)
class Told:
    """How a command talks: what every command has."""

    json: JsonOption = False
    quiet: QuietOption = False
    verbose: VerboseOption = False

    def output(self) -> Output:
        """Return where the command writes."""
        return Output(self.json, self.quiet, self.verbose)


def spread(function: Callable[..., _R]) -> Callable[..., _R]:
    """Make one option of each field of the dataclasses among a function's parameters, in their order."""
    hints = get_type_hints(function, include_extras=True)
    hints.pop("return", None)
    parameters: list[inspect.Parameter] = []
    groups: dict[str, tuple[type[Any], list[str]]] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        kind = hints[name]
        if not (isinstance(kind, type) and is_dataclass(kind)):
            parameters.append(parameter.replace(annotation=kind, kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        inner = get_type_hints(kind, include_extras=True)
        groups[name] = kind, [one.name for one in fields(kind)]
        parameters += [
            inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=one.default, annotation=inner[one.name])
            for one in fields(kind)
        ]

    @wraps(function)
    def command(**given: Any) -> _R:  # noqa: ANN401 - typer has checked them
        together = {name: kind(**{key: given.pop(key) for key in keys}) for name, (kind, keys) in groups.items()}
        return function(**given, **together)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {one.name: one.annotation for one in parameters}
    return command
