"""One party as a process of its own, for tests.

Writes `<party>.json` (weights' hash, ledger, history) and `<party>.safetensors`; events go to stderr, a line each.
With "crash" set it kills itself with SIGKILL right after that event for the n-th time (only once per folder).
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from cutlayer.errors import CutlayerError
from cutlayer.run.results import weights
from cutlayer.run.session import join
from cutlayer.transport.network import Deadlines, NetworkSettings
from cutlayer.transport.tls import load_credentials
from tests.run import plans


def main(job: dict[str, Any]) -> int:
    torch.set_num_threads(1)
    case = plans.CASES[job["case"]](**job.get("training", {}))
    name, folder = job["party"], Path(job["folder"])
    credentials = load_credentials(Path(job["credentials"]), name) if job.get("credentials") else None
    settings = NetworkSettings(
        party=name,
        parties=case.plan.parties,
        coordinator=case.coordinator,
        addresses=job["addresses"],
        credentials=credentials,
        proxy=job.get("proxy", ""),
        run="test",
        digest=job.get("digest") or case.plan.digest(),
        deadlines=Deadlines(**job.get("deadlines", {})),
    )
    crash, seen = job.get("crash"), [0]

    def notify(event: str, details: dict[str, Any]) -> None:
        row = {"event": event, **{k: v for k, v in details.items() if k != "history"}}
        sys.stderr.write(json.dumps(row) + "\n")  # one call: events come from several threads
        if crash and event == crash["event"] and details.get("mode", "train") == crash.get("mode", "train"):
            seen[0] += 1
            marker = folder / f"{name}.crashed"
            if seen[0] == crash["count"] and not marker.exists():
                marker.write_text("")
                os.kill(os.getpid(), signal.SIGKILL)

    try:
        result = join(case.plan, case.build(name), network=settings, folder=folder / name, notify=notify)
    except CutlayerError as error:
        print("\n".join(error.lines()), file=sys.stderr)
        print(json.dumps({"event": "error", "code": error.code, "text": str(error)}), file=sys.stderr)
        return 1
    data = safetensors.torch.save(weights(result.workers[name].site))
    (folder / f"{name}.safetensors").write_bytes(data)
    document = {
        "sha256": hashlib.sha256(data).hexdigest(),
        "ledger": result.ledgers[name].document(),
        "undone": vars(result.ledgers[name].undone),
        "history": result.history,
    }
    (folder / f"{name}.json").write_text(json.dumps(document))
    return 0
