"""Wrong usage becomes an error like all others: four lines, an exit code, and JSON where it was asked for.

| code | error | meaning |
| --- | --- | --- |
| E210 | ConfigError | the command line is wrong |
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from importlib import metadata
from io import StringIO
from itertools import takewhile
from typing import Any, Final

import typer
from typer.core import TyperGroup

from cutlayer.cli.console import Output, exit_code
from cutlayer.errors import ConfigError

__all__ = ["Commands"]

_Usage: type[Exception] = typer.BadParameter.__mro__[1]  # UsageError has no name of its own in typer
_SHARED: Final = frozenset({"--json", "--quiet", "-q", "--verbose", "-v"})  # see `spread.Told`


class Commands(TyperGroup):
    """A group of commands, whose help shows flags as such. That of all reports wrong usage as `ConfigError` E210."""

    def get_params(self, ctx: Any) -> list[Any]:  # noqa: ANN401 - typer has no public name for it
        """Return the group's own options."""
        return _plain(super().get_params(ctx))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ANN401
        """Return the command of this name, or None."""
        found = super().get_command(ctx, cmd_name)
        if found is not None:
            _plain(found.get_params(ctx))
        return found

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
        given = sys.argv[1:] if args is None else list(args)
        words = _in_order(given)

        def run(words: list[str]) -> Any:  # noqa: ANN401
            return super(Commands, self).main(words, prog_name, complete_var, False, windows_expand_args, **extra)

        try:
            code = (
                _version()
                if {"--version", "--json"} <= set(words) <= {"--version", "--json", "--help"}
                else _no_command(group)
                if "--json" in given and (group := self._lacks_command(words)) is not None
                else _help(run, words)
                if {"--json", "--help"} <= _options(given)
                else run(words)
            )
        except _Usage as error:
            code = _report(error, given)
        except typer.Abort:
            code = Output(json="--json" in words, quiet=False, verbose=False).stopped()
        if standalone_mode:
            sys.exit(code or 0)
        return code

    def _lacks_command(self, words: Sequence[str]) -> str | None:
        """Return the path of what is called without a command, though it needs one; None if it has one."""
        rest = [word for word in words if word not in _SHARED]
        if rest and not (len(rest) == 1 and isinstance(self.commands.get(rest[0]), Commands)):
            return None
        return " ".join(["cutlayer", *rest])


def _plain(options: list[Any]) -> list[Any]:
    """Let the help show no type beside options that take no value; return them all."""
    for one in options:
        if getattr(one, "is_flag", False):
            one.metavar = ""
    return options


def _in_order(words: Sequence[str]) -> list[str]:
    """Put options that all commands share behind the command, if they stand before it; without one, leave them out."""
    first = list(takewhile(_SHARED.__contains__, words))
    rest = list(words[len(first) :])
    if set(rest) - _SHARED <= {"--help"}:
        return [word for word in rest if word not in _SHARED]
    end = rest.index("--") if "--" in rest else len(rest)
    return [*rest[:end], *first, *rest[end:]]


def _version() -> int:
    """Print the version as JSON: --json is otherwise an option of the commands only."""
    Output(json=True, quiet=False, verbose=False).document({"version": metadata.version("cutlayer")})
    return 0


def _help(run: Callable[[list[str]], Any], words: Sequence[str]) -> Any:  # noqa: ANN401
    """Print the help as JSON, for which `--help` alone is looked at."""
    end = list(words).index("--") if "--" in words else len(words)
    with redirect_stdout(StringIO()) as shown:
        code = run([*(word for word in words[:end] if word not in _SHARED), *words[end:]])
    Output(json=True, quiet=False, verbose=False).document(
        {"help": "\n".join(line.rstrip() for line in shown.getvalue().strip().splitlines())}
    )
    return code


def _options(words: Sequence[str]) -> set[str]:
    return set(takewhile("--".__ne__, words))


def _no_command(path: str) -> int:
    """Say as JSON that there is no command; people see the help instead."""
    wrong = ConfigError(
        "no command is given",
        where=path,
        expected=f"{path} COMMAND",
        remedy=f"read `{path} --help`",
        code="E210",
    )
    Output(json=True, quiet=False, verbose=False).fail(wrong)
    return exit_code(wrong)


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
