"""What a run leaves behind: a folder with summary, metrics, contract and weights."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import msgspec
import safetensors.torch
import torch
from torch import Tensor

from cutlayer.core.plan import Plan
from cutlayer.core.program import Mode
from cutlayer.engine.ledger import Ledger
from cutlayer.engine.site import Site
from cutlayer.run.checkpoint import write_atomic
from cutlayer.run.outcome import Result

__all__ = ["EventLog", "new_run_folder", "summary_document", "weights", "write_results"]

SUMMARY_VERSION = 1


def new_run_folder(base: Path, name: str) -> Path:
    """Create and return `base/<UTC time>-<name>`, with a number behind it if that is taken."""
    stem = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{name}"
    for place in range(1000):
        folder = base / (f"{stem}-{place}" if place else stem)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise FileExistsError(str(base / stem))


class EventLog:
    """Writes events as JSON lines while a run goes on. Use as `notify`, and as a context manager."""

    def __init__(self, path: Path) -> None:
        """Open the file for appending: a resumed run goes on in it."""
        self._file: IO[bytes] = path.open("ab")

    def __call__(self, event: str, details: Mapping[str, Any]) -> None:
        """Write one event."""
        self._file.write(msgspec.json.encode({"event": event, **details}) + b"\n")
        self._file.flush()

    def __enter__(self) -> EventLog:
        """Return self."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        self._file.close()


def weights(site: Site) -> dict[str, Tensor]:
    """Return a party's parameters and buffers: "stage.name" (or "stage@lane.name") -> tensor."""
    found: dict[str, Tensor] = {}
    several = {stage for stage, lane in site.stages if sum(name == stage for name, _ in site.stages) > 1}
    for (stage, lane), part in site.stages.items():
        prefix = f"{stage}@{lane}" if stage in several else stage
        for name, tensor in part.module.state_dict().items():
            if isinstance(tensor, Tensor):
                found[f"{prefix}.{name}"] = tensor.detach().cpu().contiguous().clone()
    return found


def write_results(
    folder: Path, result: Result, *, contract_text: str | None = None, digest: str = ""
) -> dict[str, Any]:
    """Write `<party>.safetensors` per party here, `contract.toml` and `summary.json`; return the summary."""
    hashes: dict[str, str] = {}
    for party, worker in result.workers.items():
        data = safetensors.torch.save(weights(worker.site))
        write_atomic(folder / f"{party}.safetensors", data)
        hashes[party] = hashlib.sha256(data).hexdigest()
    if contract_text is not None:
        write_atomic(folder / "contract.toml", contract_text.encode())
    document = summary_document(result, hashes, digest)
    write_atomic(folder / "summary.json", msgspec.json.format(msgspec.json.encode(document), indent=2))
    return document


def summary_document(result: Result, hashes: Mapping[str, str], digest: str = "") -> dict[str, Any]:
    """Return the summary as plain values: metrics, ledger totals by cut and party, digests, versions.

    `digest` is that of the accepted contract, if there was one.
    """
    return {
        "version": SUMMARY_VERSION,
        "plan": {"name": result.plan.name, "digest": result.plan.digest()},
        "contract": digest,
        "seconds": round(result.seconds, 3),
        "metrics": {mode: result.metrics(mode) for mode in _MODES if result.metrics(mode)},
        "history": result.history,
        "cuts": cut_totals(result.plan, result.ledgers),
        "ledgers": {party: ledger.document() for party, ledger in result.ledgers.items()},
        "weights_sha256": dict(hashes),
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            **{name: importlib.metadata.version(name) for name in ("cutlayer", "grpcio", "numpy", "safetensors")},
        },
    }


_MODES: tuple[Mode, ...] = ("train", "evaluate")


def cut_totals(plan: Plan, ledgers: Mapping[str, Ledger]) -> list[dict[str, Any]]:
    """Return bytes and frames by cut and direction, as the receivers counted them."""
    edges, found = plan.graph.edges, dict[tuple[str, str, str, str], dict[str, Any]]()
    for party, ledger in ledgers.items():
        for (way, peer, _mode, direction, edge), row in ledger.flows.items():
            if way == "received" and direction in ("up", "down"):
                key = (edges[edge].label, direction, peer, party)
                total = found.setdefault(
                    key,
                    {"cut": key[0], "direction": direction, "from": peer, "to": party, "payload": 0, "framing": 0,
                     "messages": 0},
                )  # fmt: skip
                total["payload"] += row.payload
                total["framing"] += row.framing
                total["messages"] += row.messages
    return [found[key] for key in sorted(found)]
