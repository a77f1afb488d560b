"""Wrong usage becomes an error like all others: four lines, an exit code, and JSON where it was asked for.

| code | error | meaning |
| --- | --- | --- |
| E210 | ConfigError | the command line is wrong |
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import typer
from typer.core import TyperGroup

from cutlayer.cli.console import Output, exit_code
from cutlayer.errors import ConfigError

__all__ = ["Commands"]

_Usage: type[Exception] = typer.BadParameter.__mro__[1]  # UsageError has no name of its own in typer


class Commands(TyperGroup):
    """The group of all commands, which reports wrong usage as `ConfigError` E210."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,  # noqa: ANN401 - passed on
    ) -> Any:  # noqa: ANN401 - as in typer
        """Run a command and end the process with its exit code."""
        words = sys.argv[1:] if args is None else list(args)
        try:
            code = (
                _version()
                if set(words) == {"--version", "--json"}
                else super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
            )
        except _Usage as error:
            code = _report(error, words)
        except typer.Abort:
            code = Output(json="--json" in words, quiet=False, verbose=False).stopped()
        if standalone_mode:
            sys.exit(code or 0)
        return code


def _version() -> int:
    """Print the version as JSON: --json is otherwise an option of the commands only."""
    Output(json=True, quiet=False, verbose=False).document({"version": metadata.version("cutlayer")})
    return 0


def _report(error: Exception, words: Sequence[str]) -> int:
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":  # a group without a command: its help, not an error
        error.show()  # type: ignore[attr-defined]
        return 2
    command = context.command_path if context else "cutlayer"
    wrong = ConfigError(
        _sentence(error.format_message()),  # type: ignore[attr-defined]
        where=command,
        expected=context.get_usage().removeprefix("Usage: ").strip() if context else "",
        remedy=f"read `{command} --help`",
        code="E210",
    )
    Output(json="--json" in words, quiet=False, verbose=False).fail(wrong)
    return exit_code(wrong)


def _sentence(text: str) -> str:
    """Return typer's message as one line that begins in lower case and has no full stop, like all others."""
    text = " ".join(text.split()).rstrip(".")
    return text[:1].lower() + text[1:]
