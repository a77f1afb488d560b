"""How many clients can one served stage answer, and how long does each wait? With and without joint forwards.

    python benchmarks/serving.py                 1, 4, 16 and 32 clients, three rounds
    python benchmarks/serving.py --quick         a few requests: shows that it runs, measures nothing

A U-shaped network: head and tail at the client, a body of four wide layers at the server, in a process of its own with
one torch thread, over mutual TLS on loopback. Two sizes: a light body, where what a request costs besides its forward
is all that counts, and a heavy one, where the forward does. A third one is a chain: the light body in two halves, at a
hub and at the server, each in a process of its own; answers go from the server to the client directly. A request is one
sample, as a ward asks for one patient at a time. Two servers (or chains) stand side by side, which differ in `batch`
only; each round asks both, so that what else the machine does falls on both. Clients are threads of one process, each
with its own certificate and session, and each asks again as soon as it has its answer. A latency is the time from one
answer to the next at the client, head and tail included. "samples" is how many samples a forward of the server had in
the mean. All answers are compared with a prediction in one process: exactly without joint forwards, to 1e-5 with them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import platform
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn

import cutlayer as cl
from cutlayer.run.serving import Service
from cutlayer.transport.pki import create_authority, issue

CLIENTS = (1, 4, 16, 32)
LEAST = 240  # requests of all clients together, so that the 99th percentile is more than the slowest one
WAYS = {"alone": 1, "joint": 64}
"""Way -> the most samples of several requests in one forward."""
BODIES = {"light": 128, "heavy": 2048, "chain": 128}
"""Body -> its width; its four layers have four times the square of that as weights."""
SERVERS = {"light": ("server",), "heavy": ("server",), "chain": ("hub", "server")}
"""Body -> who serves it, in order."""
NUMBERS = ("rate", "p50_ms", "p95_ms", "p99_ms", "samples")
_BOUNDS = {"alone": 0.0, "joint": 1e-5}


def free_port() -> int:
    """Return a port that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def plan_of(body: str) -> cl.Plan:
    """Return the plan of a body; a batch is one sample."""
    cut = f"float32[batch, {BODIES[body]}]"
    if body == "chain":
        stages = [
            cl.Stage("head", at="hospital", inputs=["data.x"], output=cut),
            cl.Stage("near", at="hub", inputs=["head"], output=cut),
            cl.Stage("body", at="server", inputs=["near"], output=cut),
            cl.Stage("tail", at="hospital", inputs=["body"], output="float32[batch, 10]"),
            cl.Loss("loss", at="hospital", inputs=["tail", "data.y"]),
        ]
        return cl.Plan(stages, training=cl.Training(batch_size=1), name="chain")
    return cl.u_shaped("hospital", "server", cut=cut, back=cut, output="float32[batch, 10]", batch_size=1)


def party_of(body: str, name: str) -> cl.Party:
    """Return a party with the same weights in every process."""
    torch.manual_seed(len(name))
    width = BODIES[body]
    if name in SERVERS[body]:
        layers = [layer for _ in range(4 // len(SERVERS[body])) for layer in (nn.Linear(width, width), nn.ReLU())]
        return cl.Party(name, modules={"near" if name == "hub" else "body": nn.Sequential(*layers)})
    ends = {"head": nn.Linear(64, width), "tail": nn.Linear(width, 10), "loss": nn.CrossEntropyLoss()}
    return cl.Party(name, modules=ends)


def network(plan: cl.Plan, folder: Path, addresses: Mapping[str, str], party: str, identity: str) -> cl.NetworkSettings:
    """Return the settings of a server or of a client."""
    return cl.NetworkSettings(
        party=party,
        parties=plan.parties,
        coordinator="server",
        addresses=addresses,
        run="benchmark",
        digest=plan.digest(),
        credentials=cl.load_credentials(folder / identity, identity),
        identity=identity,
    )


def serve(body: str, name: str, folder: Path, addresses: Mapping[str, str], batch: int, line: Connection) -> None:
    """Serve until the parent says that it is enough, and tell it how many forwards there were when it asks.

    A process of its own.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    limits = cl.Serving(batch=batch, quota=cl.Quota(sessions=64))
    plan = plan_of(body)
    settings = network(plan, folder, addresses, name, name)
    with Service(plan, party_of(body, name), network=settings, serving=limits) as service:
        line.send(None)
        while line.recv():
            line.send(service.served().forwards)


@dataclass(frozen=True)
class Server:
    """The processes of a body's servers, their addresses, and the lines to them."""

    processes: list[Any]
    addresses: dict[str, str]
    lines: list[Connection]

    @classmethod
    def start(cls, body: str, folder: Path, batch: int) -> Server:
        """Start them, and wait until they listen."""
        context, names = multiprocessing.get_context("spawn"), SERVERS[body]
        found = cls([], {name: f"127.0.0.1:{free_port()}" for name in names}, [])
        for name in names:
            line, far = context.Pipe()
            process = context.Process(target=serve, args=(body, name, folder, found.addresses, batch, far))
            process.start()
            far.close()
            found.processes.append(process)
            found.lines.append(line)
        for line in found.lines:
            line.recv()
        return found

    def forwards(self) -> int:
        """Return how many forwards there were so far, at the last server."""
        self.lines[-1].send(True)
        return int(self.lines[-1].recv())

    def stop(self) -> None:
        """End them."""
        for line, process in zip(self.lines, self.processes, strict=True):
            line.send(False)
            process.join(40)


@dataclass
class Asked:
    """What one client saw: the time of each answer in seconds, and its outputs."""

    times: list[float]
    outputs: torch.Tensor


class Waiting(torch.utils.data.Dataset[Mapping[str, torch.Tensor]]):
    """Samples; nobody gets the first one before all clients have a session. `begun` is when that was."""

    def __init__(self, x: torch.Tensor, start: threading.Barrier) -> None:
        """`start`: of all clients."""
        self.x, self.start, self.begun = x, start, 0.0

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.x)

    def __getitem__(self, place: int) -> Mapping[str, torch.Tensor]:
        """Return a sample."""
        if place == 0:
            self.start.wait(60)
            self.begun = time.perf_counter()
        return {"x": self.x[place]}


def ask(body: str, settings: list[cl.NetworkSettings], x: torch.Tensor) -> list[Asked]:
    """Let all clients ask at once, for all samples each."""
    start, plan = threading.Barrier(len(settings)), plan_of(body)
    data = [Waiting(x, start) for _ in settings]
    parties = [replace(party_of(body, "hospital"), prediction=one) for one in data]
    found: list[Asked | None] = [None] * len(settings)

    def run(place: int) -> None:
        times: list[float] = []

        def notify(event: str, _details: Mapping[str, Any]) -> None:
            if event == "step":
                times.append(time.perf_counter())

        outputs = cl.predict(plan, parties[place], network=settings[place], served=True, notify=notify)
        found[place] = Asked([data[place].begun, *times], outputs["tail"])

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(settings))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if any(one is None for one in found):
        raise SystemExit("a client failed")
    return [one for one in found if one is not None]


def row(way: str, asked: list[Asked], expected: torch.Tensor, forwards: int) -> dict[str, Any]:
    """Return rate, latencies and samples a forward of one measurement. Stops the benchmark if an answer is wrong."""
    for one in asked:
        difference = (one.outputs - expected).abs().max().item()
        if difference > _BOUNDS[way]:
            raise SystemExit(f"{way}: an answer differs by {difference:g} from a prediction in one process")
    begin, end = min(one.times[0] for one in asked), max(one.times[-1] for one in asked)
    waits = [after - before for one in asked for before, after in zip(one.times, one.times[1:], strict=False)]
    parts = statistics.quantiles(waits, n=100, method="inclusive")
    return {
        "way": way,
        "clients": len(asked),
        "rate": len(waits) / (end - begin),
        **{f"p{part}_ms": 1000 * parts[part - 1] for part in (50, 95, 99)},
        "samples": sum(len(one.outputs) for one in asked) / forwards,
    }


def measure(body: str, requests: int, rounds: int, clients: tuple[int, ...], least: int = 0) -> list[dict[str, Any]]:
    """Return a row for each way and number of clients: the medians of the rounds. `least`: requests of all clients."""
    x = torch.randn(max(requests, least), 64, generator=torch.Generator().manual_seed(1))
    plan = plan_of(body)
    alone = replace(party_of(body, "hospital"), prediction=cl.TensorTable(x=x))
    expected = cl.predict(plan, [alone, *(party_of(body, name) for name in SERVERS[body])])["tail"]
    found: dict[tuple[int, str], list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder, authority = Path(name), create_authority(Path(name) / "ca", name="benchmark")
        for identity in (*SERVERS[body], *(f"client-{number}" for number in range(max(clients)))):
            issue(authority, identity, folder)
        servers: dict[str, Server] = {}
        try:
            for way, batch in WAYS.items():
                servers[way] = Server.start(body, folder, batch)
            for turn in range(rounds + 1):
                for count, (way, server) in itertools.product(clients, servers.items()):
                    who = [network(plan, folder, server.addresses, "hospital", f"client-{n}") for n in range(count)]
                    each, before = x[: max(requests, least // count)], server.forwards()
                    asked = ask(body, who, each)
                    measured = row(way, asked, expected[: len(each)], server.forwards() - before)
                    if turn:  # the first one only warms up
                        found.setdefault((count, way), []).append(measured)
        finally:
            for server in servers.values():
                server.stop()
    return [
        {"body": body, **rows[0], **{number: statistics.median(one[number] for one in rows) for number in NUMBERS}}
        for rows in found.values()
    ]


def table(rows: list[dict[str, Any]], busy: float) -> str:
    """Return the rows as a Markdown table, with the ratios of the two ways; `busy`: the load before."""
    lines = [
        f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}, Python {platform.python_version()}, torch "
        f"{torch.__version__}; load average before {busy:.1f}; one sample a request; medians of the "
        "rounds.",
        "",
        "| body | clients | forwards | samples | requests/s | p50 ms | p95 ms | p99 ms | requests/s, joint / alone "
        "| p95, joint / alone |",
        f"|{' --- |' * 10}",
    ]
    for one in rows:
        same = [r for r in rows if (r["body"], r["clients"]) == (one["body"], one["clients"])]
        base = next(r for r in same if r["way"] == "alone")
        ratios = [f"{one[key] / base[key]:.2f}" if one is not base else "" for key in ("rate", "p95_ms")]
        cells = [
            one["body"],
            one["clients"],
            one["way"],
            f"{one['samples']:.1f}",
            f"{one['rate']:.0f}",
            *(f"{one[key]:.1f}" for key in ("p50_ms", "p95_ms", "p99_ms")),
        ]
        lines.append(f"| {' | '.join(map(str, [*cells, *ratios]))} |")
    return "\n".join(lines)


def summary(rows: list[dict[str, Any]]) -> str:
    """Return the last line: what joint forwards bring with the most clients."""
    most = max(one["clients"] for one in rows)
    parts = []
    for body in dict.fromkeys(one["body"] for one in rows):
        rates = {one["way"]: one["rate"] for one in rows if (one["body"], one["clients"]) == (body, most)}
        ratio = rates["joint"] / rates["alone"]
        parts.append(
            f"{body} body {rates['joint']:.0f} requests/s joint, {rates['alone']:.0f} alone, ratio {ratio:.2f}"
        )
    return f"results: {most} clients: {'; '.join(parts)}"


def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--requests", type=int, default=60, help="of each client in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round of five requests, 1 and 4 clients")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, busy = list[dict[str, Any]](), os.getloadavg()[0]
    for body in BODIES:
        requests, rounds, clients = (5, 1, (1, 4)) if options.quick else (options.requests, options.rounds, CLIENTS)
        rows += measure(body, requests, rounds, clients, 0 if options.quick else LEAST)
    sys.stdout.write((json.dumps(rows, indent=1) if options.json else f"{table(rows, busy)}\n{summary(rows)}") + "\n")


if __name__ == "__main__":
    main()
