"""A cut by hand, for scale: what two halves cost with nothing of cutlayer around them, in one process and in two.

In two processes they talk over one TCP connection, plain or with mutual TLS by Python's `ssl`: raw bytes, sizes known
beforehand, received into the same memory each time. No checks, no names, no recovery: no engine can be faster.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from parties import WARM, digest
from torch import Tensor, nn
from workloads import WORKLOADS, Workload, optimizer

import cutlayer as cl
from cutlayer.core.batching import batch_slice, permutation

__all__ = ["batches", "half", "whole"]


def batches(workload: Workload, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Give each batch, input and label, in the plan's order."""
    plan, data = workload.plan(), workload.data(steps)
    rows = permutation(plan.training.seed, 1, 0, len(data))
    for number in range(steps):
        batch = data.batch(rows[batch_slice(number, len(rows), workload.batch)])
        yield batch["x"], batch["y"]


def timed(workload: Workload, steps: int, step: Callable[[Tensor, Tensor], None]) -> float:
    """Run a step on each batch; return the seconds of all but the first `WARM`."""
    begin = 0.0
    for number, (x, y) in enumerate(batches(workload, WARM + steps)):
        if number == WARM:
            begin = time.perf_counter()
        step(x, y)
    return time.perf_counter() - begin


def whole(workload: Workload, steps: int) -> tuple[float, list[str]]:
    """Train the cut network in this process: two optimizers, two backwards, a copy of what crosses."""
    head, body = workload.parts()
    trainers = [optimizer(list(head.parameters())), optimizer(list(body.parameters()))]
    loss_sum = torch.zeros(())

    def step(x: Tensor, y: Tensor) -> None:
        nonlocal loss_sum
        activation = head(x)
        received = activation.detach().clone().requires_grad_()
        loss = nn.functional.cross_entropy(body(received), y)
        loss.backward()
        activation.backward(received.grad.clone())
        for trainer in trainers:
            trainer.step()
            trainer.zero_grad()
        loss_sum += loss.detach()

    return timed(workload, steps, step), digest(head, body)


def half(name: str, network: cl.NetworkSettings, *, letter: str, steps: int, folder: Path) -> dict[str, Any]:
    """Be the client or the server of a cut by hand in two processes; `network` says where, and whether with TLS."""
    port = int(network.addresses["server"].rpartition(":")[2])
    with _connected(name, port, folder if network.credentials else None) as link:
        return (_client if name == "client" else _server)(link, WORKLOADS[letter], steps)


def _client(link: socket.socket, workload: Workload, steps: int) -> dict[str, Any]:
    head, _ = workload.parts()
    trainer = optimizer(list(head.parameters()))
    gradient = torch.empty(workload.batch, *workload.cut)

    def step(x: Tensor, y: Tensor) -> None:
        activation = head(x)
        link.sendall(_bytes(activation.detach()))
        link.sendall(_bytes(y))
        _fill(link, _bytes(gradient))
        activation.backward(gradient)
        trainer.step()
        trainer.zero_grad()

    return {"seconds": timed(workload, steps, step), "digest": digest(head), "spent": {}}


def _server(link: socket.socket, workload: Workload, steps: int) -> dict[str, Any]:
    _, body = workload.parts()
    trainer = optimizer(list(body.parameters()))
    received, y = torch.empty(workload.batch, *workload.cut), torch.empty(workload.batch, dtype=torch.int64)
    loss_sum = torch.zeros(())
    for _ in range(WARM + steps):
        _fill(link, _bytes(received))
        _fill(link, _bytes(y))
        entered = received.detach().requires_grad_()
        loss = nn.functional.cross_entropy(body(entered), y)
        loss.backward()
        link.sendall(_bytes(entered.grad))
        trainer.step()
        trainer.zero_grad()
        loss_sum += loss.detach()
    return {"seconds": 0.0, "digest": digest(body), "spent": {}}


def _bytes(tensor: Tensor) -> memoryview:
    """Return a contiguous tensor's memory."""
    return tensor.reshape(prod(tensor.shape)).view(torch.uint8).numpy().data


def _fill(link: socket.socket, memory: memoryview) -> None:
    while memory.nbytes:
        memory = memory[link.recv_into(memory) :]


@contextmanager
def _connected(name: str, port: int, certificates: Path | None) -> Iterator[socket.socket]:
    """Connect the two; with certificates, each shows its own and asks for the other's."""
    if name == "server":
        with socket.create_server(("127.0.0.1", port)) as listening:
            listening.settimeout(30)
            line, _ = listening.accept()
    else:
        line = _dialled(port)
    with line:
        line.settimeout(None)
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if certificates is None:
            yield line
            return
        own = certificates / "certificates" / name
        role = ssl.PROTOCOL_TLS_SERVER if name == "server" else ssl.PROTOCOL_TLS_CLIENT
        context = ssl.SSLContext(role)
        context.check_hostname, context.verify_mode = False, ssl.CERT_REQUIRED
        context.load_verify_locations(own / "ca.pem")
        context.load_cert_chain(own / "party.pem", own / "party.key")
        with context.wrap_socket(line, server_side=name == "server") as secured:
            yield secured


def _dialled(port: int) -> socket.socket:
    deadline = time.monotonic() + 30
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port))
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
