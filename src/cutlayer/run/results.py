"""What a run leaves behind: a folder with summary, metrics, contract and weights.

| code | error | meaning |
| --- | --- | --- |
| E238 | ConfigError | the disk takes no results |
"""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import safetensors.torch
import torch
from torch import Tensor, nn

from cutlayer.core.plan import Plan
from cutlayer.core.program import Mode
from cutlayer.engine.ledger import Ledger
from cutlayer.engine.site import Site
from cutlayer.errors import ConfigError
from cutlayer.run.checkpoint import write_atomic
from cutlayer.run.export import write_joined
from cutlayer.run.lock import locked, own_folder
from cutlayer.run.outcome import Result

__all__ = [
    "SUMMARY_VERSION",
    "EventLog",
    "results_folder",
    "site_modules",
    "summary_document",
    "weights",
    "write_results",
]

NO_ROOM = "the results could not be written"  # begins what E238 says of a run's results
SUMMARY_VERSION = 2


@contextmanager
def results_folder(folder: Path | None, base: Path, name: str, *, notes: Collection[str] = ()) -> Iterator[Path]:
    """Give a folder for results, locked: `folder`, made if it is missing, or a new one in `base`.

    If what is within fails before it has written anything, the folders that were made here are removed again. `notes`
    are files that do not count as written, and neither do empty ones. Raises `ConfigError` E248 if another process
    works in the folder.
    """
    place = (folder or base).absolute()
    made = [one for one in (place, *place.parents) if not one.exists()]
    home = folder or _new_folder(base, name)
    own_folder(home)
    if folder is None:
        made.insert(0, home)
    before = set(home.iterdir())
    try:
        with locked(home):
            yield home
    except BaseException:
        new = set(home.iterdir()) - before
        if all(one.is_file() and (one.name in notes or not one.stat().st_size) for one in new):
            for one in new:
                one.unlink()
            with suppress(OSError):  # there is something else in it
                for one in made:
                    one.rmdir()
        raise


def _new_folder(base: Path, name: str) -> Path:
    """Create and return `base/<UTC time>-<name>`, with a number behind it if that is taken."""
    stem = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{name}"
    for place in range(1000):
        folder = base / (f"{stem}-{place}" if place else stem)
        try:
            folder.mkdir(0o700, parents=True)
        except FileExistsError:
            continue
        return folder
    raise FileExistsError(str(base / stem))


class EventLog:
    """Writes events as JSON lines while a run goes on. Use as `notify`, and as a context manager."""

    def __init__(self, path: Path) -> None:
        """Open the file for appending: a resumed run goes on in it."""
        self._path, self._file = path, path.open("ab", buffering=0)

    def __call__(self, event: str, details: Mapping[str, Any]) -> None:
        """Write one event. Raises OSError, which names the file, if the disk takes no more."""
        line = msgspec.json.encode({"event": event, **details}) + b"\n"
        try:
            written = self._file.write(line)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error
        if written < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))

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
    for prefix, module in site_modules(site):
        for name, tensor in module.state_dict().items():
            if isinstance(tensor, Tensor):
                found[f"{prefix}.{name}"] = tensor.detach().cpu().contiguous().clone()
    return found


def site_modules(site: Site) -> Iterator[tuple[str, nn.Module]]:
    """Yield a party's modules by name: "stage", or "stage@lane" where it has several replicas."""
    names = [stage for stage, _ in site.stages]
    for (stage, lane), part in site.stages.items():
        yield f"{stage}@{lane}" if names.count(stage) > 1 else stage, part.module


def parameter_counts(site: Site) -> dict[str, Any]:
    """Return a party's numbers of parameters: by "stages", and in "total", where a tied one counts once."""
    modules = dict(site_modules(site))
    sizes = {name: {id(p): p.numel() for p in module.parameters()} for name, module in modules.items()}
    once = {key: size for of_stage in sizes.values() for key, size in of_stage.items()}
    return {"stages": {name: sum(of_stage.values()) for name, of_stage in sizes.items()}, "total": sum(once.values())}


def peak_memory() -> int:
    """Return the most bytes of memory that this process has held: all of it, Python and libraries included.

    Linux passes getrusage's figure on from the process that started this one, so there the kernel's own is read.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def write_results(
    folder: Path, result: Result, *, contract_text: str | None = None, digest: str = ""
) -> dict[str, Any]:
    """Write `<party>.safetensors` per party here, `contract.toml` and `summary.json`; return the summary.

    The weights come first. Where the folder takes no more, all goes into a new folder for temporary files, which this
    user alone may enter.

    Raises:
        ConfigError: E238, the folder takes no more; says where the results or the weights are.
    """
    try:
        return _write(folder, result, contract_text, digest)
    except OSError as error:
        raise _refused(error, folder, _elsewhere(result, contract_text, digest), result) from error


def _elsewhere(result: Result, contract_text: str | None, digest: str) -> Path | None:
    """Write the results into a new folder for temporary files; None if that takes them neither."""
    try:
        place = Path(tempfile.mkdtemp(prefix="cutlayer-results-"))
    except OSError:
        return None
    try:
        _write(place, result, contract_text, digest)
    except OSError:
        shutil.rmtree(place, ignore_errors=True)
        return None
    return place


def _refused(error: OSError, folder: Path, place: Path | None, result: Result) -> ConfigError:
    kept = ", ".join(f"{party}.safetensors" for party in result.workers if (folder / f"{party}.safetensors").exists())
    what = f"{NO_ROOM} into the run's folder; all of them are in {place}"
    if place is None:
        what = f"{NO_ROOM}; the weights that are: {kept or 'none'}"
    return ConfigError(
        what,
        where=str(error.filename),
        got=error.strerror or type(error).__name__,
        remedy=f"make room, copy them into {folder}, then: cutlayer report {folder}"
        if place
        else f"make room on the disk and start the run again{f'; keep what is in {folder}' if kept else ''}",
        code="E238",
    )


def _write(folder: Path, result: Result, contract_text: str | None, digest: str) -> dict[str, Any]:
    """Write the results, the weights first. Raises OSError, which names the file."""
    hashes: dict[str, str] = {}
    for party, worker in result.workers.items():
        data = safetensors.torch.save(weights(worker.site))
        write_atomic(folder / f"{party}.safetensors", data)
        hashes[party] = hashlib.sha256(data).hexdigest()
    for party, worker in result.workers.items():
        if worker.site.preprocess.agreed:
            write_atomic(folder / f"{party}.preprocessing.json", worker.site.preprocess.document())
        write_joined(folder, result.plan, worker.site)
    if contract_text is not None:
        write_atomic(folder / "contract.toml", contract_text.encode())
    document = summary_document(result, hashes, digest)
    write_atomic(folder / "summary.json", msgspec.json.format(msgspec.json.encode(document), indent=2))
    return document


def summary_document(
    result: Result, hashes: Mapping[str, str], digest: str = "", *, parts: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """Return the summary as plain values: the plan, metrics, ledgers, cost, digests, versions.

    `digest` is that of the accepted contract, if there was one. `parts` are the summaries of the processes that ran
    the parties; without any, this process ran them. "undone" is what a party sent in steps that a restart undid.
    """
    parts = parts or [_part(result)]
    return {
        "version": SUMMARY_VERSION,
        "plan": {"name": result.plan.name, "digest": result.plan.digest(), "document": result.plan.document()},
        "contract": digest,
        "ended": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(result.seconds, 3),
        "samples": {mode: dict(held) for mode, held in result.samples.items()},
        "metrics": {mode: result.metrics(mode) for mode in _MODES if result.metrics(mode)},
        "history": result.history,
        "cuts": cut_totals(result.plan, result.ledgers),
        "ledgers": {party: ledger.document() for party, ledger in result.ledgers.items()},
        "undone": {party: vars(ledger.undone) for party, ledger in result.ledgers.items() if ledger.undone.messages},
        "processes": [process for part in parts for process in part["processes"]],
        "parameters": {party: counts for part in parts for party, counts in part["parameters"].items()},
        "weights_sha256": dict(hashes),
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            **{name: importlib.metadata.version(name) for name in ("cutlayer", "grpcio", "numpy", "safetensors")},
        },
    }


_MODES: tuple[Mode, ...] = ("train", "evaluate")


def _part(result: Result) -> dict[str, Any]:
    """Return what only the process that ran the parties can say. Units: seconds, bytes, parameters."""
    process = {"parties": list(result.ledgers), "seconds": round(result.seconds, 3), "memory": peak_memory()}
    counts = {party: parameter_counts(worker.site) for party, worker in result.workers.items()}
    return {"processes": [process], "parameters": counts}


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
