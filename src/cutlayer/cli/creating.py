"""`cutlayer new`: a project that runs as it is. Its files are those of `templates/`, with the project's name in them.

| code | error | meaning |
| --- | --- | --- |
| E245 | ConfigError | the name cannot be that of a project |
| E246 | ConfigError | a file or folder of this name is there |
| E247 | ConfigError | there is no such template |
"""

from __future__ import annotations

from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from cutlayer.cli.console import Output
from cutlayer.core.parts import check_name
from cutlayer.errors import ConfigError, PlanError

__all__ = ["new_project", "templates"]

_RENAMED = {"gitignore": ".gitignore"}  # a wheel leaves out files that begin with a dot


def templates() -> list[str]:
    """Return the names of the templates."""
    return sorted(one.name for one in _home().iterdir() if one.is_dir() and one.name != "__pycache__")


def new_project(name: str, template: str, output: Output) -> None:
    """Write a project into a new folder, and say what to do next.

    Raises:
        ConfigError: E245 to E247.
    """
    folder = Path(name)
    if template not in templates():
        raise ConfigError(
            f"there is no template {template!r}",
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
    folder.mkdir(parents=True)
    written = []
    for source in sorted(_home().joinpath(template).iterdir(), key=lambda one: one.name):
        if source.is_file():
            target = folder / _RENAMED.get(source.name, source.name)
            target.write_text(source.read_text(encoding="utf-8").replace("NAME", folder.name), encoding="utf-8")
            written.append(target)
    for target in written:
        output.say(f"  {target}")
    output.document({"folder": str(folder.absolute()), "files": [str(target.absolute()) for target in written]})
    output.last(f"project: {folder}/; go on with: cd {folder} && cutlayer run")


def _home() -> Traversable:
    return files("cutlayer.cli").joinpath("templates")
