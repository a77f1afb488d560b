"""The log of events on a disk that takes no more."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cutlayer.run.results import EventLog

FULL = Path("/dev/full")


def test_events_are_lines_of_json_and_a_resumed_run_goes_on(tmp_path):
    for number in range(2):
        with EventLog(tmp_path / "events.jsonl") as log:
            log("step", {"step": number})
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"event": "step", "step": number} for number in range(2)]


@pytest.mark.skipif(not FULL.exists(), reason="only Linux has a disk that is always full")
def test_a_full_disk_is_told_with_the_file():
    with pytest.raises(OSError, match="No space left") as caught, EventLog(FULL) as log:
        log("step", {})
    assert caught.value.filename == str(FULL)
