"""What a run gives back to its caller."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from torch import Tensor

from cutlayer.core.plan import Plan
from cutlayer.core.program import Mode
from cutlayer.engine.agree import Agreed
from cutlayer.engine.ledger import Ledger
from cutlayer.engine.worker import Worker
from cutlayer.errors import ConfigError

__all__ = ["Result", "history_rows"]

_MEASURED: Final[tuple[Mode, ...]] = ("train", "evaluate")


@dataclass(frozen=True, kw_only=True, repr=False)
class Result:
    """What a run gives.

    Attributes:
        plan: The plan that was run.
        history: A row per round, mode and loss, with its metrics; "own": those of each lane
            counted there, by its "client", if there are several lanes.
        ledgers: Party -> what it sent, received and computed.
        workers: Party -> its worker, with the trained stages (in one process only).
        predictions: Stage -> tensor of shape (samples, ...), after a prediction.
        seconds: Wall-clock time.
        samples: Mode -> party -> number of samples.
    """

    plan: Plan
    history: list[dict[str, Any]]
    ledgers: Mapping[str, Ledger]
    workers: Mapping[str, Worker] = field(default_factory=dict)
    predictions: Mapping[str, Tensor] = field(default_factory=dict)
    seconds: float = 0.0
    samples: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Return one short line: what is in it may be large, and a value of the data."""
        return f"<Result of {self.plan.name}: {', '.join(self.ledgers)}; {self.seconds:.1f} s; see summary()>"

    @property
    def agreed(self) -> dict[str, dict[str, Agreed]]:
        """Return party -> field -> what it agreed on about preprocessing: `Party(agreed=...)` of a prediction."""
        return {name: dict(w.site.preprocess.agreed) for name, w in self.workers.items() if w.site.preprocess.agreed}

    def metrics(self, mode: Mode = "evaluate") -> dict[str, Any]:
        """Return the metrics of the last round of a mode, by loss; of a replicated loss, those over all replicas.

        Args:
            mode: "train" or "evaluate"; nothing is returned if there was no such round.

        Raises:
            ConfigError: E239, another mode.
        """
        if mode not in _MEASURED:
            raise ConfigError(
                f"a run has no metrics of the mode {mode!r}",
                where="Result.metrics",
                expected=f"one of {', '.join(_MEASURED)}",
                got=repr(mode),
                remedy="choose one of these",
                code="E239",
            )
        found: dict[str, Any] = {}
        for row in self.history:
            if row["mode"] == mode:
                found[row["loss"]] = row["metrics"]
        return found

    def summary(self) -> str:
        """Return the end of a run in a few lines: metrics and bytes by party."""
        lines = [f"{self.plan.name}: {self.seconds:.1f} s"]
        for mode in _MEASURED:
            for loss, values in self.metrics(mode).items():
                shown = ", ".join(f"{k} {v:.4f}" for k, v in values.items() if isinstance(v, float))
                lines.append(f"  {mode:<9} {loss}: {shown}")
        for party, ledger in self.ledgers.items():
            lines.append(
                f"  {party}: sent {ledger.total('sent'):,} B, received {ledger.total('received'):,} B, "
                f"{sum(ledger.flops.values()) / 1e9:.3f} GFLOP"
            )
            if ledger.undone.messages:
                lines.append(f"  {party}: sent {ledger.undone.payload:,} B more in steps that a restart undid")
        return "\n".join(lines)


def history_rows(workers: Mapping[str, Worker]) -> list[dict[str, Any]]:
    """Return all workers' metrics in the order of rounds, each row with its party's name."""
    rows = [{**row, "party": name} for name, worker in workers.items() for row in worker.history]
    return sorted(rows, key=lambda row: (row["round"], row["mode"] == "evaluate"))
