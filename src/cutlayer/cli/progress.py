"""The progress of a run, fed by its events: bars on a terminal, a line a round elsewhere. All of it on stderr."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import IO, Any, TextIO, cast

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from cutlayer.cli.console import Output

__all__ = ["LOST_IN_PREDICTION", "LOST_IN_TRAINING", "RunProgress", "metrics_text"]

Steps = Mapping[tuple[str, str], int]  # (party, mode) -> steps of a round

LOST_IN_TRAINING = (
    "E701 {party} is lost. Waiting for it; if its process has ended, start it again with `cutlayer resume`"
)
LOST_IN_PREDICTION = "E701 {party} is lost. Waiting for it; if it does not come back, run the prediction again"
_NEWS = {
    "returned": "{party} is back",
    "waiting": "waiting for {parties}",
    "unreached": "{party} does not answer yet: {cause}. Trying again",
    "rollback": "{reason}: going back to the last checkpoint that all parties have",
    "second": "{code} {what}: waiting for its end. Or {remedy}",
    "damaged": "E802 a checkpoint is damaged and not used: {file} ({got})",
    "anew": "the parties have no checkpoint in common: the run begins anew, from the first round",
    "aborted": "stopped by {party}: {code} {what}",
    "warned": "{text}",
    "blocked": "cannot reach {party}: {code} {what} ({got}). Trying again. {remedy}",
}


class _Words(dict[str, object]):
    """What an event says, as words; `...` for what it leaves out."""

    def __init__(self, details: Mapping[str, Any]) -> None:
        super().__init__({k: ", ".join(v) if isinstance(v, tuple | list) else v for k, v in details.items()})

    def __missing__(self, key: str) -> str:
        return "..."


class _Screen:
    """What is printed on a stream; nothing, once that is a terminal that has been closed."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.encoding = stream.encoding

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def write(self, text: str) -> int:
        with _open_or_not():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with _open_or_not():
            self._stream.flush()


@contextmanager
def _open_or_not() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno.EIO:
            raise


class RunProgress:
    """Shows events of one or more parties. Use as `notify`, and as a context manager.

    Args:
        output: Quiet or JSON: nothing is shown.
        epochs: Rounds of training.
        steps: Steps of a round by party and mode, where events do not say.
        lost: What is said when a party is lost; `{party}` stands for it.
    """

    def __init__(
        self, output: Output, *, epochs: int, steps: Steps | None = None, lost: str = LOST_IN_TRAINING
    ) -> None:
        """Bars are drawn only where stderr is a terminal."""
        self._output, self._epochs, self._steps = output, epochs, steps or {}
        self._told = {**_NEWS, "lost": lost}
        self._shown = not (output.quiet or output.json)
        self._console = Console(file=cast("IO[str]", _Screen(sys.stderr)), highlight=False)
        self._bars = self._console.is_terminal and self._shown
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[traffic]}"),
            TimeElapsedColumn(),
            console=self._console,
            disable=not self._bars,
        )
        self._tasks: dict[str, TaskID] = {}
        self._moved: dict[str, dict[str, int]] = {}
        self._rounds: set[str] = set()
        self._last_news = ""

    def __enter__(self) -> RunProgress:
        """Begin to draw."""
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop drawing; what is drawn stays."""
        self._progress.stop()

    def __call__(self, event: str, details: Mapping[str, Any]) -> None:
        """Show one event."""
        if event == "step":
            self._step(details)
        elif event == "round":
            self._round(details)
        elif event in self._told and not self._output.quiet:
            self._news(self._told[event].format_map(_Words(details)))
        elif self._output.verbose and self._shown:
            words = " ".join(f"{key}={value}" for key, value in details.items())
            self._print(f"{event} {words}")

    def _news(self, text: str) -> None:
        """Print what all parties' people should know; of several parties here that say the same, one does."""
        if text != self._last_news:
            self._last_news = text
            self._print(text)

    def _step(self, details: Mapping[str, Any]) -> None:
        party, mode = str(details["party"]), str(details["mode"])
        moved = self._moved.setdefault(party, {"sent": 0, "received": 0})
        for flow, size in details["bytes"].items():
            way = str(flow).split(" ", 1)[0]
            moved[way] = moved.get(way, 0) + int(size)
        if not self._bars:
            return
        if party not in self._tasks:
            self._tasks[party] = self._progress.add_task(party, total=None, traffic="")
        self._progress.update(
            self._tasks[party],
            description=f"{party}  {self._title(mode, int(details['round']))}",
            completed=int(details["step"]) + 1,
            total=details.get("steps") or self._steps.get((party, mode)),
            traffic=f"sent {decimal(moved['sent'])}, received {decimal(moved['received'])}",
        )

    def _round(self, details: Mapping[str, Any]) -> None:
        """Print a line for each loss of a round that is over; rounds before it were printed when they ended."""
        mode, number = str(details["mode"]), int(details["round"])
        for row in details["history"]:
            text = f"{self._title(mode, number):<14} {row['loss']}: {metrics_text(row['metrics'])}"
            if self._shown and (row["mode"], row["round"]) == (mode, number) and text not in self._rounds:
                self._rounds.add(text)  # replicas of a loss all tell the same sums
                self._print(text)

    def _title(self, mode: str, number: int) -> str:
        return f"{mode} {number}/{self._epochs}" if mode in ("train", "evaluate") else mode

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)


def metrics_text(metrics: Mapping[str, Any]) -> str:
    """Return "loss 0.4321, accuracy 0.8100"; values that are no numbers are left out."""
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if isinstance(value, float))
