"""A cut by hand, for scale: what two halves cost with nothing of cutlayer around them, in one process and in two.

In two processes they talk over one TCP connection, plain or with mutual TLS by Python's `ssl`: raw bytes, sizes known
beforehand, received into the same memory each time. No checks, no names, no recovery: no engine can be faster. `bare`
does the same over a bidirectional gRPC stream and nothing else, in messages of 1 MiB: no engine on gRPC's Python
package can be faster. `kept` and `promised` keep what cutlayer promises, in the least Python: what crosses is bytes of
its own and is finite at both ends, the loss is finite and may be anybody's, and in two processes each wait has a
deadline, and links are served while a party computes, so by other threads. No engine that promises this can be faster.
"""

from __future__ import annotations

import queue
import socket
import ssl
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from math import isfinite, prod
from pathlib import Path
from typing import Any, Protocol

import grpc
import torch
from parties import WARM, digest
from torch import Tensor, nn
from workloads import WORKLOADS, Workload, optimizer

import cutlayer as cl
from cutlayer.core.batching import batch_slice, permutation
from cutlayer.transport.frames import PIECE
from cutlayer.transport.grpc_common import channel_to, server_credentials, server_options

__all__ = ["bare", "half", "kept", "promised", "timed", "whole"]

_PATIENCE = 60.0


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


def kept(workload: Workload, steps: int) -> tuple[float, list[str]]:
    """Train the cut network in this process, with what cutlayer promises of it."""
    head, body = workload.parts()
    trainers = [optimizer(list(head.parameters())), optimizer(list(body.parameters()))]

    def step(x: Tensor, y: Tensor) -> None:
        activation = head(x)
        received = _finite(_moved(_finite(activation))).requires_grad_()
        gradient = _back(body, received, y)
        trainers[1].step()
        trainers[1].zero_grad()
        activation.backward(_finite(_moved(_finite(gradient))))
        trainers[0].step()
        trainers[0].zero_grad()

    return timed(workload, steps, step), digest(head, body)


def _back(body: nn.Module, received: Tensor, y: Tensor) -> Tensor:
    """Run the rest of the network and a loss that may be at another party; return the gradient at `received`."""
    output = body(received)
    entered = output.detach().requires_grad_()
    loss = _finite(nn.functional.cross_entropy(entered, y))
    loss.backward()
    output.backward(entered.grad)
    if received.grad is None:
        raise RuntimeError("no gradient came back")
    return received.grad


def _finite(value: Tensor) -> Tensor:
    if not isfinite(value.sum().item()):
        raise FloatingPointError("not finite")
    return value


def _moved(value: Tensor) -> Tensor:
    """Return the same numbers in memory of their own, by way of bytes."""
    return torch.frombuffer(bytearray(_bytes(value.detach())), dtype=value.dtype).reshape(value.shape)


class Lines(Protocol):
    """What carries bytes between the two halves."""

    def send(self, *parts: memoryview) -> None:
        """Send these bytes."""

    def receive(self, *parts: memoryview) -> None:
        """Fill this memory with what comes."""


def half(name: str, network: cl.NetworkSettings, *, letter: str, steps: int, folder: Path) -> dict[str, Any]:
    """Be the client or the server of a cut by hand in two processes; `network` says where, and whether with TLS."""
    port = int(network.addresses["server"].rpartition(":")[2])
    with _connected(name, port, folder if network.credentials else None) as link:
        return (_client if name == "client" else _server)(_Socket(link), WORKLOADS[letter], steps)


def promised(name: str, network: cl.NetworkSettings, *, letter: str, steps: int, folder: Path) -> dict[str, Any]:  # noqa: ARG001
    """Be the client or the server over a gRPC stream, with what cutlayer promises: compute in this thread alone."""
    workload, address = WORKLOADS[letter], network.addresses["server"]
    outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    incoming: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    lines = _Stream(outgoing.put, iter(lambda: incoming.get(timeout=_PATIENCE), b""))
    if name == "client":
        with channel_to("server", address, network.credentials) as channel, ThreadPoolExecutor(1) as pool:
            call = channel.stream_stream("/bare/Stream")(iter(outgoing.get, None), wait_for_ready=True)
            pool.submit(lambda: [incoming.put(message) for message in call])
            found = _client(lines, workload, steps, check=_finite)
            outgoing.put(None)
        return found

    def serve(messages: Iterator[bytes], _context: object) -> Iterator[bytes]:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(lambda: [incoming.put(message) for message in messages])
            yield from iter(outgoing.get, None)

    with _listening(serve, network):
        *_, answer = _steps(lines, workload, steps, check=_finite)
        outgoing.put(None)
    return answer


def bare(name: str, network: cl.NetworkSettings, *, letter: str, steps: int, folder: Path) -> dict[str, Any]:  # noqa: ARG001
    """Be the client or the server of a cut by hand over a gRPC stream."""
    workload, address = WORKLOADS[letter], network.addresses["server"]
    outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    if name == "client":
        with channel_to("server", address, network.credentials) as channel:
            incoming = channel.stream_stream("/bare/Stream")(iter(outgoing.get, None), wait_for_ready=True)
            found = _client(_Stream(outgoing.put, incoming), workload, steps)
            outgoing.put(None)
            next(incoming, None)
        return found
    answers: queue.SimpleQueue[dict[str, Any] | Exception] = queue.SimpleQueue()

    def serve(incoming: Iterator[bytes], _context: object) -> Iterator[bytes]:
        sent: list[bytes] = []
        try:
            found = yield from _served(_Stream(sent.append, incoming), sent, workload, steps)
            answers.put(found)
        except Exception as error:
            answers.put(error)
            raise

    with _listening(serve, network):
        answer = answers.get()
    if isinstance(answer, Exception):
        raise answer
    return answer


@contextmanager
def _listening(
    serve: Callable[[Iterator[bytes], object], Iterator[bytes]], network: cl.NetworkSettings
) -> Iterator[None]:
    server = grpc.server(ThreadPoolExecutor(2), options=server_options())
    handlers = {"Stream": grpc.stream_stream_rpc_method_handler(serve)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare", handlers),))
    if network.credentials is None:
        server.add_insecure_port(network.addresses["server"])
    else:
        server.add_secure_port(network.addresses["server"], server_credentials(network.credentials))
    server.start()
    try:
        yield
    finally:
        server.stop(5).wait()


class _Socket:
    def __init__(self, line: socket.socket) -> None:
        self._line = line

    def send(self, *parts: memoryview) -> None:
        for part in parts:
            self._line.sendall(part)

    def receive(self, *parts: memoryview) -> None:
        for part in parts:
            left = part
            while left.nbytes:
                left = left[self._line.recv_into(left) :]


class _Stream:
    """Messages of at most `PIECE` bytes of the first part; the first of them has the other parts with it."""

    def __init__(self, put: Callable[[bytes], None], incoming: Iterator[bytes]) -> None:
        self._put, self._incoming = put, incoming

    def send(self, *parts: memoryview) -> None:
        first, *rest = parts
        self._put(b"".join((*rest, first[:PIECE])))
        for start in range(PIECE, first.nbytes, PIECE):
            self._put(bytes(first[start : start + PIECE]))

    def receive(self, *parts: memoryview) -> None:
        first, *rest = parts
        message = memoryview(next(self._incoming))
        for part in rest:
            part[:], message = message[: part.nbytes], message[part.nbytes :]
        filled = len(message)
        first[:filled] = message
        while filled < first.nbytes:
            piece = next(self._incoming)
            first[filled : filled + len(piece)] = piece
            filled += len(piece)


def _client(
    lines: Lines, workload: Workload, steps: int, check: Callable[[Tensor], Tensor] | None = None
) -> dict[str, Any]:
    head, _ = workload.parts()
    trainer = optimizer(list(head.parameters()))
    gradient = torch.empty(workload.batch, *workload.cut)

    def step(x: Tensor, y: Tensor) -> None:
        activation = head(x)
        if check:
            check(activation)
        lines.send(_bytes(activation.detach()), _bytes(y))
        lines.receive(_bytes(gradient))
        if check:
            check(gradient)
        activation.backward(gradient)
        trainer.step()
        trainer.zero_grad()

    return {"seconds": timed(workload, steps, step), "digest": digest(head), "spent": {}}


def _server(lines: Lines, workload: Workload, steps: int) -> dict[str, Any]:
    *_, answer = _steps(lines, workload, steps)
    return answer


def _served(lines: Lines, sent: list[bytes], workload: Workload, steps: int) -> Generator[bytes, None, dict[str, Any]]:
    """Be the server within a gRPC handler, which sends by yielding."""
    answer: dict[str, Any] = {}
    for found in _steps(lines, workload, steps):
        answer = found
        yield from sent
        sent.clear()
    return answer


def _steps(
    lines: Lines, workload: Workload, steps: int, check: Callable[[Tensor], Tensor] | None = None
) -> Iterator[dict[str, Any]]:
    """Do the server's steps; stop each time that something was sent, and at the end with what is to be answered.

    `check` looks at what crosses and at the loss, which then is no part of the network's own graph.
    """
    _, body = workload.parts()
    trainer = optimizer(list(body.parameters()))
    received, y = torch.empty(workload.batch, *workload.cut), torch.empty(workload.batch, dtype=torch.int64)
    loss_sum = torch.zeros(())
    for _ in range(WARM + steps):
        lines.receive(_bytes(received), _bytes(y))
        entered = received.detach().requires_grad_()
        if check:
            gradient = check(_back(body, check(entered), y))
        else:
            loss = nn.functional.cross_entropy(body(entered), y)
            loss.backward()
            gradient, loss_sum = entered.grad, loss_sum + loss.detach()
        lines.send(_bytes(gradient))
        yield {}
        trainer.step()
        trainer.zero_grad()
    yield {"seconds": 0.0, "digest": digest(body), "spent": {}}


def _bytes(tensor: Tensor) -> memoryview:
    """Return a contiguous tensor's memory."""
    return tensor.reshape(prod(tensor.shape)).view(torch.uint8).numpy().data


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
