"""Checkpoints: whole or not there; damaged ones are refused by name and the one before is used."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time

import pytest
import torch

from cutlayer.errors import CheckpointError
from cutlayer.run.checkpoint import Position, Store, write_atomic

DIGEST = "d" * 64


def _store(tmp_path, **changes):
    return Store(tmp_path / "checkpoints", **{"party": "a", "digest": DIGEST, **changes})


def _save(store, identifier):
    tensors = {"p.weight": torch.full((3, 2), float(identifier)), "empty": torch.zeros(0), "scalar": torch.tensor(1)}
    store.save(identifier, Position(1, identifier, identifier % 2 == 0), tensors, {"history": [identifier]})


def test_round_trip_and_two_are_kept(tmp_path):
    store = _store(tmp_path)
    for identifier in range(5):
        _save(store, identifier)
    assert store.identifiers() == [3, 4]
    loaded = store.load(4)
    assert loaded.position == Position(1, 4, True)
    assert loaded.document == {"history": [4]}
    assert torch.equal(loaded.tensors["p.weight"], torch.full((3, 2), 4.0))
    assert loaded.tensors["empty"].shape == (0,)
    assert sorted(path.suffix for path in store.folder.iterdir()) == [".json", ".json", ".safetensors", ".safetensors"]


@pytest.mark.parametrize("suffix", ["safetensors", "json"])
def test_every_flipped_byte_and_every_truncation_is_refused(tmp_path, suffix):
    store = _store(tmp_path)
    _save(store, 1)
    _save(store, 2)
    path = store.folder / f"2.{suffix}"
    good = path.read_bytes()
    draw = random.Random(0)
    cases = [good[:length] for length in sorted(draw.sample(range(len(good)), 25))]
    for place in draw.sample(range(len(good)), min(120, len(good))):
        flipped = bytearray(good)
        flipped[place] ^= 1 << draw.randrange(8)
        cases.append(bytes(flipped))
    for bad in cases:
        path.write_bytes(bad)
        with pytest.raises(CheckpointError) as caught:
            assert store.load(2).tensors is None, "a damaged file was accepted"
        assert caught.value.code == "E802"
        assert "2.safetensors" in caught.value.where
        assert "delete it" in caught.value.remedy
        assert store.identifiers() == [1]
    path.write_bytes(good)
    assert store.identifiers() == [1, 2]


def test_going_back_drops_what_came_after(tmp_path):
    """Else new checkpoints would be taken for old ones, and be dropped."""
    store = _store(tmp_path)
    _save(store, 5)
    _save(store, 6)
    store.drop_after(5)
    assert store.identifiers() == [5]
    store.drop_after(-1)
    assert store.identifiers() == []
    _save(store, 0)
    _save(store, 1)
    assert store.identifiers() == [0, 1]


def test_what_is_put_aside_stays_until_a_new_checkpoint_is_written(tmp_path):
    store = _store(tmp_path)
    _save(store, 5)
    _save(store, 6)
    store.set_aside()
    assert not list(store.folder.glob("*.*"))
    assert store.identifiers() == [5, 6]  # nothing was written in between
    store.set_aside()
    _save(store, 0)
    assert sorted(path.name for path in store.folder.iterdir()) == ["0.json", "0.safetensors"]
    _save(store, 1)
    store.set_aside()  # 0 is not kept: another party may have that of the new course by now
    assert store.identifiers() == [1]


@pytest.mark.provokes("E804")
def test_of_another_run_is_refused(tmp_path):
    _save(_store(tmp_path), 1)
    with pytest.raises(CheckpointError, match="another run") as caught:
        _store(tmp_path, digest="e" * 64).load(1)
    assert caught.value.code == "E804"
    with pytest.raises(CheckpointError, match="another run"):
        _store(tmp_path, party="b").load(1)


@pytest.mark.provokes("E802")
def test_missing_names_the_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"7\.safetensors"):
        _store(tmp_path).load(7)


@pytest.mark.provokes("E801")
def test_disk_full_keeps_the_one_before(tmp_path, monkeypatch):
    store = _store(tmp_path)
    _save(store, 1)

    def full(_file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left") as caught:
        _save(store, 2)
    assert caught.value.code == "E801"
    monkeypatch.undo()
    assert store.identifiers() == [1]
    assert not [path for path in store.folder.iterdir() if path.suffix == ".tmp"]
    _save(store, 2)
    assert store.identifiers() == [1, 2]


WRITER = """
import sys
from pathlib import Path
from cutlayer.run.checkpoint import write_atomic
path = Path(sys.argv[1])
print("ready", flush=True)
for number in range(10**9):
    write_atomic(path, bytes([number % 256]) * 2_000_000)
"""


def test_kill_while_writing_never_tears(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, b"\0" * 2_000_000)
    for attempt in range(8):
        with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(0.02 + 0.013 * attempt)
            process.kill()
        data = path.read_bytes()
        assert len(data) == 2_000_000
        assert len(set(data)) == 1
