"""`cutlayer export`: a new file, readable as the umask says; one that is there is written over only if told."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

Call = Callable[..., Any]


@pytest.fixture
def out(demo: Path, call: Call) -> Iterator[Path]:
    """The demo's run in `out`, which the hospital may put together. The umask is 022."""
    contract = demo / "contract.toml"
    contract.write_text(contract.read_text().replace("[contract]", '[contract]\nassemble_at = ["hospital"]'))
    before = os.umask(0o022)
    assert call("run", "contract.toml", "hospital.toml", "server.toml", "--folder", "out", "-q").code == 0
    yield demo / "out"
    os.umask(before)


def test_export_is_a_file_to_hand_out(call: Call, out: Path):
    result = call("export", "out")
    model = out.parent / "model.safetensors"
    assert (result.code, result.out[-1]) == (0, f"model.safetensors: 4 tensors, {model.stat().st_size} bytes")
    assert model.stat().st_mode & 0o777 == 0o644
    assert len(safetensors.torch.load_file(model)) == 4


@pytest.mark.provokes("E249")
def test_file_that_is_there_is_written_over_with_force_only(call: Call, out: Path):
    model = out.parent / "mine.safetensors"
    model.write_text("mine")
    result = call("export", "out", "--out", "mine.safetensors")
    assert (result.code, result.err[0]) == (2, "E249 mine.safetensors is there already and is not overwritten")
    assert model.read_text() == "mine"
    assert call("export", "out", "--out", "mine.safetensors", "--force").code == 0
    assert len(safetensors.torch.load_file(model)) == 4
