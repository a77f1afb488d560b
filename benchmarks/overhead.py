"""What does cutting a network cost? The time of a step, uncut, against the same step cut between two parties.

    python benchmarks/overhead.py                        all four networks, in one process and in two
    python benchmarks/overhead.py --models a --ways process
    python benchmarks/overhead.py --quick                a few steps: shows that it runs, measures nothing

Every round runs each way once, between two runs of a plain PyTorch loop over the same batches with the same weights,
and gives one ratio a way: uncut time / cut time. The table has their medians and ranges; the times are of one machine
and of no interest. `hand`, `socket`, `grpc`, `socket-tls` and `grpc-tls` are bounds: a cut by hand with nothing around
it, in one process, and in two over a raw TCP connection or a bare gRPC stream, plain or with TLS (byhand.py). No engine
can be faster. `kept`, `grpc-kept` and `grpc-kept-tls` also keep what cutlayer promises, written out by hand: no engine
that promises the same can be faster. All ways end with the same weights to the last bit, or the script stops.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import byhand
import torch
from parties import WARM, Clock, Pair, digest, pair, party_of, train
from torch import nn
from workloads import WORKLOADS, Workload, optimizer

import cutlayer as cl

WAYS = {
    "hand": "cut by hand, one process",
    "kept": "cut by hand with what is promised, one process",
    "process": "cutlayer, one process",
    "socket": "cut by hand, two processes, raw TCP",
    "grpc": "cut by hand, two processes, bare gRPC",
    "grpc-kept": "cut by hand with what is promised, two processes, gRPC",
    "plain": "cutlayer, two processes, plaintext",
    "socket-tls": "cut by hand, two processes, TLS",
    "grpc-tls": "cut by hand, two processes, bare gRPC with TLS",
    "grpc-kept-tls": "cut by hand with what is promised, two processes, gRPC with TLS",
    "mtls": "cutlayer, two processes, mutual TLS",
}
BOUNDS = {"process": "kept", "plain": "grpc-kept", "mtls": "grpc-kept-tls"}
FLOORS = {
    "process": {"a": 0.78, "b": 0.82, "c": 0.94, "d": 0.94},
    "plain": {"a": 0.40, "b": 0.68, "d": 0.90},
    "mtls": {"a": 0.37, "b": 0.64},
}
COMPUTE = ("forward", "backward", "step")
PAYLOAD = ("send", "recv")


@dataclass
class Timing:
    """One run: seconds of its measured steps, what the ledgers say of each party, and the weights' digests."""

    seconds: float
    weights: list[str]
    spent: dict[str, dict[str, float]] = field(default_factory=dict)


def uncut(workload: Workload, steps: int) -> Timing:
    """Train the network in one piece, as one writes it without this library."""
    head, body = workload.parts()
    model = nn.Sequential(head, body)
    trainer = optimizer(list(model.parameters()))
    loss_sum = torch.zeros(())

    def step(x: torch.Tensor, y: torch.Tensor) -> None:
        nonlocal loss_sum
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        trainer.step()
        trainer.zero_grad()
        loss_sum += loss.detach()

    return Timing(byhand.timed(workload, steps, step), digest(head, body))


def by_hand(workload: Workload, steps: int) -> Timing:
    """Train it cut, with the least that a cut needs."""
    return Timing(*byhand.whole(workload, steps))


def in_process(letter: str, steps: int) -> Timing:
    """Train it with cutlayer, both parties in this process."""
    made = {name: party_of(name, letter, WARM + steps) for name in ("client", "server")}
    clocks = {name: Clock(name) for name in made}

    def notify(event: str, details: Any) -> None:  # noqa: ANN401 - what an event has
        if event == "step":
            clocks[details["party"]](event, details)

    cl.simulate(WORKLOADS[letter].plan(), [party for party, _ in made.values()], notify=notify)
    spent = {name: dict(clock.spent) for name, clock in clocks.items()}
    return Timing(clocks["client"].seconds, digest(*(module for _, module in made.values())), spent)


def in_two(work: Callable[..., Any], letter: str, steps: int, parties: Pair, *, secure: bool) -> Timing:
    """Train it with each party in a process of its own: `parties.train` or `byhand.half`."""
    found = parties.call(work, letter=letter, steps=steps, folder=parties.folder, secure=secure)
    spent = {name: answer["spent"] for name, answer in found.items() if answer["spent"]}
    weights = [*found["client"]["digest"], *found["server"]["digest"]]
    return Timing(found["client"]["seconds"], weights, spent)


@dataclass
class Rounds:
    """What all rounds of one network gave: by way, the ratio and the times, in milliseconds a step, of each."""

    letter: str
    uncut: list[float] = field(default_factory=list)
    ratios: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    shares: dict[str, list[dict[str, float]]] = field(default_factory=lambda: defaultdict(list))

    def add(self, way: str, steps: int, whole: float, timing: Timing) -> None:
        """Take note of a run; `whole` is the uncut loop's seconds in this round."""
        self.ratios[way].append(whole / timing.seconds)
        if timing.spent:
            self.shares[way].append(_parts(way, steps, timing))

    def rows(self) -> list[dict[str, Any]]:
        """Return a row a way, of plain values. "bound": this way's time to its bound's, the median over rounds."""
        return [self._row(way, ratios) for way, ratios in self.ratios.items()]

    def _to_bound(self, way: str) -> float | None:
        bound = self.ratios.get(BOUNDS.get(way, ""))
        return statistics.median(b / r for b, r in zip(bound, self.ratios[way], strict=True)) if bound else None

    def _row(self, way: str, ratios: list[float]) -> dict[str, Any]:
        floor, ratio = FLOORS.get(way, {}).get(self.letter), statistics.median(ratios)
        parts = self.shares.get(way, [])
        return {
            "model": self.letter,
            "way": way,
            "ratio": ratio,
            "least": min(ratios),
            "most": max(ratios),
            "rounds": len(ratios),
            "to_bound": self._to_bound(way),
            "floor": floor,
            "passed": None if floor is None else ratio >= floor,
            "uncut_ms": statistics.median(self.uncut),
            "parts_ms": {key: statistics.median(part[key] for part in parts) for key in parts[0]} if parts else {},
        }


def _parts(way: str, steps: int, timing: Timing) -> dict[str, float]:
    """Return what a step consists of, in milliseconds: arithmetic, data, checks and copies, and all the rest."""
    spent = {
        part: sum(seconds.get(kind, 0.0) for seconds in timing.spent.values() for kind in kinds)
        for part, kinds in {"compute": COMPUTE, "load": ("load",), "payload": PAYLOAD}.items()
    }
    rest = "engine" if way == "process" else "link"
    spent[rest] = timing.seconds - sum(spent.values())
    return {part: 1000 * seconds / steps for part, seconds in spent.items()}


def measure(letter: str, ways: list[str], rounds: int, steps: int, parties: Pair | None) -> Rounds:
    """Run all rounds of one network. Raises `SystemExit` if a way ends with other weights than the uncut network."""
    workload, found = WORKLOADS[letter], Rounds(letter)
    runs: dict[str, Callable[[], Timing]] = {
        "hand": lambda: by_hand(workload, steps),
        "kept": lambda: Timing(*byhand.kept(workload, steps)),
        "process": lambda: in_process(letter, steps),
        "socket": lambda: in_two(byhand.half, letter, steps, _given(parties), secure=False),
        "grpc": lambda: in_two(byhand.bare, letter, steps, _given(parties), secure=False),
        "grpc-kept": lambda: in_two(byhand.promised, letter, steps, _given(parties), secure=False),
        "plain": lambda: in_two(train, letter, steps, _given(parties), secure=False),
        "socket-tls": lambda: in_two(byhand.half, letter, steps, _given(parties), secure=True),
        "grpc-tls": lambda: in_two(byhand.bare, letter, steps, _given(parties), secure=True),
        "grpc-kept-tls": lambda: in_two(byhand.promised, letter, steps, _given(parties), secure=True),
        "mtls": lambda: in_two(train, letter, steps, _given(parties), secure=True),
    }
    for _ in range(rounds):
        before = uncut(workload, steps)
        timings = {way: runs[way]() for way in ways}
        after = uncut(workload, steps)
        whole = (before.seconds + after.seconds) / 2
        found.uncut.append(1000 * whole / steps)
        for way, timing in timings.items():
            if timing.weights != before.weights:
                raise SystemExit(f"({letter}) {WAYS[way]}: the weights are not those of the uncut network")
            found.add(way, steps, whole, timing)
    return found


def _given(parties: Pair | None) -> Pair:
    if parties is None:
        raise SystemExit("the two processes were not started")
    return parties


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table, and what each step consists of."""
    lines = [
        f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}, Python {platform.python_version()}, torch "
        f"{torch.__version__}, one thread a party. Ratios are uncut / cut, median [least..most] of the rounds.",
        "",
        "| network | way | ratio | floor | | to its bound | a step: ms uncut -> ms cut (share of the cut step) |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        floor = "" if row["floor"] is None else f"{row['floor']:.2f}"
        verdict = {None: "", True: "pass", False: "below"}[row["passed"]]
        spread = f"{row['ratio']:.2f} [{row['least']:.2f}..{row['most']:.2f}]"
        bound = "" if row["to_bound"] is None else f"x{row['to_bound']:.2f}"
        cells = (f"({row['model']})", WAYS[row["way"]], spread, floor, verdict, bound, _consists(row))
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *(f"({letter}) {WORKLOADS[letter].title}" for letter in dict.fromkeys(row["model"] for row in rows))]
    return "\n".join(lines)


def _consists(row: dict[str, Any]) -> str:
    parts, whole = row["parts_ms"], row["uncut_ms"]
    cut = sum(parts.values()) or whole / row["ratio"]
    text = f"{whole:.3g} -> {cut:.3g}"
    return text + (": " + ", ".join(f"{part} {ms:.3g} ({ms / cut:.0%})" for part, ms in parts.items()) if parts else "")


def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", default="abcd", help="which networks, such as ab")
    parser.add_argument("--ways", default=",".join(WAYS), help=f"which of {','.join(WAYS)}")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="one round of three steps")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    ways = options.ways.split(",")
    rows: list[dict[str, Any]] = []
    started = pair() if set(ways) - {"hand", "kept", "process"} else None
    try:
        parties = started.__enter__() if started else None
        for letter in options.models:
            steps = 3 if options.quick else WORKLOADS[letter].steps
            found = measure(letter, ways, 1 if options.quick else options.rounds, steps, parties)
            rows += found.rows()
            sys.stderr.write(f"({letter}) measured\n")
    finally:
        if started:
            started.__exit__(None, None, None)
    sys.stdout.write((json.dumps(rows, indent=1) if options.json else table(rows)) + "\n")


if __name__ == "__main__":
    main()
