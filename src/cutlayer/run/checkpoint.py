"""Checkpoints: safetensors files with a manifest of their SHA-256, written so that a crash leaves the last one whole.

A folder `checkpoints/` holds, for each of the last two checkpoints, `<id>.safetensors` and `<id>.json`. The manifest is
written last, atomically, its own SHA-256 in its first line; a checkpoint without a manifest, or with another hash,
does not exist. `before/` holds those of a course that was given up, until the new one has a checkpoint of its own.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import safetensors
import safetensors.torch
from torch import Tensor

from cutlayer.errors import CheckpointError
from cutlayer.run.disk import named
from cutlayer.run.lock import own_folder

__all__ = ["Position", "Store", "none_whole", "write_atomic"]

VERSION = 1
_MANIFEST_MAX = 64 * 2**20


class Position(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where in a run a checkpoint is: the place in the agenda, and the checkpoint's number in that mode's program."""

    phase: int
    number: int
    last: bool


class _Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: int
    digest: str
    party: str
    identifier: int
    position: Position
    sha256: str
    document: dict[str, Any]


@dataclass(frozen=True)
class Loaded:
    """A checkpoint that was read and checked."""

    position: Position
    tensors: Mapping[str, Tensor]
    document: Mapping[str, Any]


class Store:
    """The checkpoints of one party in one run.

    Args:
        folder: Created if missing.
        party: Name of the party.
        digest: Of the contract; checkpoints of another contract are refused.
        keep: How many to keep.
    """

    def __init__(self, folder: Path, *, party: str, digest: str, keep: int = 2) -> None:
        """Create the folder."""
        self.folder, self.party, self.digest, self.keep = folder, party, digest, keep
        own_folder(folder)

    def save(
        self, identifier: int, position: Position, tensors: Mapping[str, Tensor], document: dict[str, Any]
    ) -> None:
        """Write a checkpoint, then drop those beyond `keep` and those put aside.

        Raises `CheckpointError` E801 if the disk refuses.
        """
        try:
            data = safetensors.torch.save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
            write_atomic(self._path(identifier, "safetensors"), data)
            manifest = _Manifest(
                VERSION, self.digest, self.party, identifier, position, hashlib.sha256(data).hexdigest(), document
            )
            text = msgspec.json.encode(manifest)
            write_atomic(self._path(identifier, "json"), hashlib.sha256(text).hexdigest().encode() + b"\n" + text)
        except OSError as error:
            raise CheckpointError(
                "a checkpoint cannot be written",
                where=f"party {self.party}, {self._path(identifier, 'safetensors')}",
                got=error.strerror or type(error).__name__,
                remedy="free space on the disk and resume: the checkpoint before it is whole",
                code="E801",
            ) from error
        for old in self._names()[: -self.keep]:
            self._path(old, "json").unlink(missing_ok=True)
            self._path(old, "safetensors").unlink(missing_ok=True)
        shutil.rmtree(self._before, ignore_errors=True)

    def identifiers(self) -> list[int]:
        """Return the checkpoints that are whole, oldest first. Reads them all; damaged ones are left out."""
        return self.look()[0]

    def look(self) -> tuple[list[int], list[CheckpointError]]:
        """Return the checkpoints that are whole, oldest first, and what is wrong with each other one. Reads them all.

        Those put aside count again where no newer one was written. Raises `CheckpointError` E804: of another run.
        """
        if not self._names():
            for path in self._before.glob("*"):
                path.replace(self.folder / path.name)
        whole, damaged = list[int](), list[CheckpointError]()
        for identifier in self._names():
            try:
                self._read(identifier)
                whole.append(identifier)
            except CheckpointError as error:
                if error.code == "E804":
                    raise
                damaged.append(error)
        return whole, damaged

    def check(self) -> None:
        """Raise `CheckpointError` E802 if there are checkpoints, and all of them are damaged."""
        whole, damaged = self.look()
        if damaged and not whole:
            raise none_whole(damaged[-1])

    def load(self, identifier: int) -> Loaded:
        """Read a checkpoint. Raises `CheckpointError` naming the file if it is missing, damaged or of another run."""
        manifest, data = self._read(identifier)
        try:
            tensors = safetensors.torch.load(data)
        except safetensors.SafetensorError as error:
            raise self._damaged(identifier, str(error)) from error
        return Loaded(manifest.position, tensors, manifest.document)

    def drop_after(self, identifier: int) -> None:
        """Delete the checkpoints after this one (-1: all): they belong to a course of the run that was given up."""
        for later in self._names():
            if later > identifier:
                self._path(later, "json").unlink(missing_ok=True)
                self._path(later, "safetensors").unlink(missing_ok=True)
        _sync(self.folder)

    def set_aside(self) -> None:
        """Move all checkpoints away from those of a run that begins anew; the first that it writes deletes them.

        Number 0 is deleted now: the new one of that number may be at one party sooner than at another, and the two
        would be taken for one.
        """
        names = self._names()
        if names:
            shutil.rmtree(self._before, ignore_errors=True)
            own_folder(self._before)
        for identifier in names:
            for suffix in ("json", "safetensors"):
                path = self._path(identifier, suffix)
                if identifier == 0:
                    path.unlink(missing_ok=True)
                elif path.exists():
                    path.replace(self._before / path.name)
        _sync(self.folder)

    @property
    def _before(self) -> Path:
        return self.folder / "before"

    def _names(self) -> list[int]:
        return sorted(int(path.stem) for path in self.folder.glob("*.json") if path.stem.isdecimal())

    def _read(self, identifier: int) -> tuple[_Manifest, bytes]:
        path = self._path(identifier, "json")
        try:
            if path.stat().st_size > _MANIFEST_MAX:
                raise self._damaged(identifier, "the manifest is too large")
            mark, _, text = path.read_bytes().partition(b"\n")
            if hashlib.sha256(text).hexdigest().encode() != mark:
                raise self._damaged(identifier, "the manifest has another SHA-256 than its first line says")
            manifest = msgspec.json.decode(text, type=_Manifest)
            data = self._path(identifier, "safetensors").read_bytes()
        except (OSError, msgspec.DecodeError) as error:
            raise self._damaged(identifier, type(error).__name__) from error
        expected = (VERSION, self.digest, self.party, identifier)
        if (manifest.version, manifest.digest, manifest.party, manifest.identifier) != expected:
            raise CheckpointError(
                "the checkpoint is of another run, party or version",
                where=str(path),
                expected=f"version {VERSION}, party {self.party}, contract {self.digest[:16]}",
                got=f"version {manifest.version}, party {manifest.party}, contract {manifest.digest[:16]}",
                remedy="resume with the contract that the run was started with, or start a new run",
                code="E804",
            )
        if hashlib.sha256(data).hexdigest() != manifest.sha256:
            raise self._damaged(identifier, "another SHA-256 than its manifest says")
        return manifest, data

    def _damaged(self, identifier: int, got: str) -> CheckpointError:
        return CheckpointError(
            "the checkpoint is missing or damaged",
            where=str(self._path(identifier, "safetensors")),
            got=got,
            remedy="delete it: the run goes on from the checkpoint before it",
            code="E802",
        )

    def _path(self, identifier: int, suffix: str) -> Path:
        return self.folder / f"{identifier}.{suffix}"


def none_whole(damaged: CheckpointError) -> CheckpointError:
    """Return the error for a run that a damaged checkpoint leaves without one to go on from."""
    return CheckpointError(
        "the checkpoint is damaged, and there is no other to go on from",
        where=damaged.where,
        got=damaged.got,
        remedy="put a copy of the folder `checkpoints` back, then resume; without one, delete it, then resume: all "
        "parties train from the beginning",
        code="E802",
    )


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that after a crash at any moment it holds all of the old or all of the new bytes.

    Raises OSError, which names the file, if the disk refuses.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with named(path):
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync(path.parent)


def _sync(folder: Path) -> None:
    """Let the disk know which files are in a folder."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
