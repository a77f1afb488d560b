"""Doctor: is this machine fit? Python, packages, torch, processors, memory, and a folder for results."""

from __future__ import annotations

import errno
import platform
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Final

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from cutlayer.run.doctor_rows import Row, Status, one_line, size
from cutlayer.run.machine import free_memory, installed_memory, memory_limit, room_in, usable_processors

__all__ = ["folder_row", "machine_rows", "package_row", "python_row", "torch_row"]

_LITTLE_MEMORY: Final = 2 * 10**9  # bytes: torch alone takes a quarter of it
_LITTLE_FREE: Final = 10**9
_LITTLE_DISK: Final = 10**9
_NO_DISK: Final = 10**8
_NOT_OURS: Final = "dev"  # the extra of those who change cutlayer
_SHOWN: Final = ("torch", "grpcio", "cryptography")


def machine_rows() -> Iterator[Row]:
    """Yield what is found of Python, packages, processors and memory."""
    try:
        about = metadata.metadata("cutlayer")
    except metadata.PackageNotFoundError:
        seen = f"Python {platform.python_version()}; cutlayer is not installed, so that its needs are not known"
        yield Row("packages", "problem", seen, "python -m pip install cutlayer")
    else:
        yield python_row(platform.python_version(), str(about.json.get("requires_python") or ""))
        yield package_row(metadata.requires("cutlayer") or ())
    yield _memory_row()


def python_row(version: str, wanted: str) -> Row:
    """Compare a version of Python with the range that cutlayer says it needs."""
    if version in SpecifierSet(wanted, prereleases=True):
        return Row("python", "ok", f"{version}, wanted {wanted or 'any'}")
    do = f"install a Python {wanted} and make a new environment with it"
    return Row("python", "problem", f"{version}, wanted {wanted}", do)


def package_row(requirements: Sequence[str]) -> Row:
    """Compare installed packages with their ranges; those of extras only if they are installed."""
    wrong: list[str] = []
    found: list[str] = []
    names: list[str] = []
    for wanted in map(Requirement, requirements):
        extra = wanted.marker is not None and not wanted.marker.evaluate({"extra": ""})
        if extra and _NOT_OURS in str(wanted.marker):
            continue
        version = _installed(wanted.name)
        fits = version is not None and wanted.specifier.contains(version, prereleases=True)
        if fits and wanted.name in _SHOWN:
            found.append(f"{wanted.name} {version}")
        if not fits and not (extra and version is None):
            wrong.append(f"{wanted.name} {version or 'is not installed'}, wanted {wanted.specifier or 'any'}")
            names.append(f'"{wanted.name}{wanted.specifier}"')
    if wrong:
        return Row("packages", "problem", "; ".join(wrong), f"python -m pip install {' '.join(names)}")
    return Row("packages", "ok", f"{', '.join(found)}; all are of versions that cutlayer works with")


def torch_row() -> Row:
    """Load torch, which a damaged installation prevents, and say where it computes."""
    begin = time.monotonic()
    try:
        import torch

        devices = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    except Exception as error:
        seen = one_line(f"torch cannot be used: {type(error).__name__}: {error}")
        do = "install torch anew, the build for this machine's processor and drivers: see pytorch.org, `Get started`"
        return Row("torch", "problem", seen, do)
    where = ", ".join(["processor", *(f"GPU {name}" for name in devices)])
    return Row("torch", "ok", f"{torch.__version__}, loaded in {time.monotonic() - begin:.1f} s; computes on: {where}")


def folder_row(folder: Path) -> Row:
    """Try to write where a run's results go, and look at the room there."""
    name = "run folder"
    try:
        place, free = room_in(folder)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        do = (
            "make room on this disk"
            if full
            else "let this user write there, or set `folder` in [run] of the party file"
        )
        return Row(name, "problem", f"{folder}: {error.strerror or type(error).__name__}", do)
    seen = f"{folder}: can be written, {size(free)} free" + ("" if place == folder.absolute() else ", made when needed")
    if free < _LITTLE_DISK:
        status: Status = "problem" if free < _NO_DISK else "warning"
        return Row(name, status, seen, "make room, or set `folder` in [run] of the party file to another disk")
    return Row(name, "ok", seen)


def _memory_row() -> Row:
    present = [amount for amount in (installed_memory(), memory_limit()) if amount is not None]
    free = free_memory()
    memory = size(min(present)) if present else "memory not known"
    seen = f"{usable_processors()} processors, {memory} of memory" + (
        f", {size(free)} free" if free is not None else ""
    )
    if present and min(present) < _LITTLE_MEMORY:
        return Row("machine", "warning", seen, "small models only; or ask for a machine or container with more memory")
    if free is not None and free < _LITTLE_FREE:
        return Row(
            "machine", "warning", seen, "end other programs on this machine before the run, or ask for more memory"
        )
    return Row("machine", "ok", seen)


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
