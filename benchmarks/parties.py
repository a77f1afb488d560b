"""The two parties of a benchmark as processes of their own, which stay for all rounds and sleep between them."""

from __future__ import annotations

import hashlib
import multiprocessing
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from torch import nn
from workloads import WORKLOADS, optimizer

import cutlayer as cl
from cutlayer.transport.pki import create_authority, issue

__all__ = ["WARM", "Clock", "Pair", "digest", "pair", "party_of"]

_PATIENCE = 300.0
WARM = 2
"""Steps at the start of each run that are not measured: FLOPs are counted in the first, buffers are made."""


@dataclass
class Clock:
    """Listens to a run's events, and adds up what one party's measured steps took, in seconds.

    Attributes:
        seconds: Of all measured steps together, by the wall.
        spent: What the ledger says of them, by the kind of instruction ("forward", "wait"...).
    """

    party: str
    seconds: float = 0.0
    spent: Counter[str] = field(default_factory=Counter)
    _begin: float = 0.0

    def __call__(self, event: str, details: Mapping[str, Any]) -> None:
        """Take note of an event."""
        if event != "step" or details["party"] != self.party or details["mode"] != "train":
            return
        now = time.perf_counter()
        if details["step"] < WARM:
            self._begin = now
            return
        self.seconds = now - self._begin
        for kind, seconds in details["seconds"].items():
            self.spent[kind.partition(" ")[0]] += seconds


def digest(*modules: nn.Module) -> list[str]:
    """Return the SHA-256 of each module's weights."""
    return [
        hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in module.state_dict().values())).hexdigest()
        for module in modules
    ]


def party_of(name: str, letter: str, steps: int) -> tuple[cl.Party, nn.Module]:
    """Return the "client" or the "server" of a workload, with data for some steps, and its module."""
    workload = WORKLOADS[letter]
    head, body = workload.parts()
    if name == "client":
        return cl.Party(name, modules={"head": head}, data=workload.data(steps), optimizer=optimizer, seed=1), head
    modules = {"body": body, "loss": nn.functional.cross_entropy}
    return cl.Party(name, modules=modules, optimizer=optimizer, seed=2), body


class Pair:
    """A client's and a server's process. `credentials`: the folder of their certificates."""

    def __init__(self, folder: Path) -> None:
        """Start both."""
        self.folder, self._runs = folder, 0
        create_authority(folder / "ca", name="benchmark")
        context = multiprocessing.get_context("spawn")
        self._ends: dict[str, Connection] = {}
        self._processes = []
        for name in ("client", "server"):
            issue(folder / "ca", name, folder / "certificates")
            self._ends[name], other = context.Pipe()
            process = context.Process(target=_serve, args=(name, other, folder), daemon=True)
            process.start()
            self._processes.append(process)

    def call(self, work: Callable[..., Any], **details: Any) -> dict[str, Any]:  # noqa: ANN401 - the work's arguments
        """Let both do `work(name, network, **details)`; return what each gave. `secure` in details: with mutual TLS."""
        self._runs += 1
        port = _free_port()
        for end in self._ends.values():
            end.send((work, self._runs, port, details))
        answers: dict[str, Any] = {}
        while len(answers) < len(self._ends):
            left = {end: name for name, end in self._ends.items() if name not in answers}
            for end in wait(list(left), _PATIENCE) or [None]:
                if end is None:
                    raise TimeoutError(f"{', '.join(left.values())} gave no answer within {_PATIENCE} seconds")
                answers[left[end]] = answer = end.recv()
                if isinstance(answer, BaseException):
                    raise answer  # the other may wait for it
        return answers

    def stop(self) -> None:
        """End both."""
        for end in self._ends.values():
            end.close()
        for process in self._processes:
            process.join(5)
            process.kill()


@contextmanager
def pair() -> Iterator[Pair]:
    """Start a pair; stop it at the end."""
    with tempfile.TemporaryDirectory() as folder:
        made = Pair(Path(folder))
        try:
            yield made
        finally:
            made.stop()


def train(name: str, network: cl.NetworkSettings, *, letter: str, steps: int, folder: Path) -> dict[str, Any]:
    """Be one party of a workload; return what its clock and its weights say."""
    party, module = party_of(name, letter, WARM + steps)
    clock = Clock(name)
    cl.join(WORKLOADS[letter].plan(), party, network=network, folder=folder / network.run / name, notify=clock)
    return {"seconds": clock.seconds, "spent": dict(clock.spent), "digest": digest(module)}


def _serve(name: str, end: Connection, folder: Path) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            work, number, port, details = end.recv()
        except EOFError:
            return
        secure = details.pop("secure")
        network = cl.NetworkSettings(
            party=name,
            parties=("client", "server"),
            coordinator="server",
            addresses={"server": f"127.0.0.1:{port}"},
            credentials=cl.load_credentials(folder / "certificates" / name, name) if secure else None,
            run=f"benchmark-{number}",
            digest=f"{number}",
        )
        try:
            end.send(work(name, network, **details))
        except Exception as error:
            end.send(RuntimeError(f"{name}: {error}"))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
