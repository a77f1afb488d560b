"""One party in a process of its own: does what its argument, a JSON object, says, and prints what happens.

It stands for a training run: a value that each step changes by what all others sent, saved every few steps.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from cutlayer.core.program import Tag
from cutlayer.engine.wire import Frame
from cutlayer.errors import CutlayerError
from cutlayer.transport.network import Deadlines, Network, NetworkSettings, Ready, SessionReset
from cutlayer.transport.settings import Rhythm
from cutlayer.transport.tls import load_credentials

EVERY = 5  # steps between two checkpoints


class Everything:
    def check(self, source: str, tag: Tag, dtype: str, shape: tuple[int, ...]) -> None:
        """Allow it."""


def say(what: str, **facts: Any) -> None:
    os.write(1, (json.dumps({"what": what, **facts}) + "\n").encode())  # one write, as threads say things too


def settings_of(job: dict[str, Any]) -> NetworkSettings:
    folder = job.get("certificates", "")
    return NetworkSettings(
        party=job["party"],
        parties=tuple(job["names"]),
        coordinator="server",
        addresses=job["addresses"],
        run=job.get("run", "test"),
        digest="0123456789abcdef" * 4,
        credentials=load_credentials(Path(folder, job["party"]), job["party"]) if folder else None,
        deadlines=Deadlines(**job.get("deadlines", {})),
        rhythm=Rhythm(**job.get("rhythm", {})),
    )


def tag_of(session: int, step: int, micro: int = 0) -> Tag:
    return Tag(session, "train", 0, step, 0, 0, micro, "up")


def word(session: int, step: int, micro: int) -> Frame:
    return Frame(tag_of(session, step, micro), "uint8", (0,), b"")


def saved(job: dict[str, Any]) -> dict[int, str]:
    path = Path(job["folder"], f"{job['party']}.json")
    return {int(step): value for step, value in json.loads(path.read_text()).items()} if path.exists() else {}


def save(job: dict[str, Any], step: int, value: str) -> None:
    path = Path(job["folder"], f"{job['party']}.json")
    everything = {**saved(job), step: value}
    path.with_suffix(".part").write_text(json.dumps(everything))
    os.replace(path.with_suffix(".part"), path)


def train(job: dict[str, Any], network: Network) -> None:
    """One session after the other, until all steps are done."""
    others = [name for name in job["names"] if name != job["party"]]
    while True:
        try:
            start = network.rendezvous(Ready({"train": 1}, tuple(saved(job))))
            network.open(Everything(), dict.fromkeys(others, 50))  # type: ignore[arg-type]
            value = saved(job)[start.checkpoint] if start.checkpoint >= 0 else job["party"]
            say("start", session=start.session, checkpoint=start.checkpoint)
            for step in range(max(0, start.checkpoint), job["steps"]):
                value = one_step(network, others, (start.session, step), value)
                if (step + 1) % EVERY == 0:
                    save(job, step + 1, value)
                say("step", step=step)
                time.sleep(job.get("pause", 0))
            time.sleep(job.get("linger", 0))
            network.finish()
        except SessionReset as reset:
            say("reset", reason=str(reset))
            continue
        say("done", value=value)
        return


def one_step(network: Network, others: list[str], at: tuple[int, int], value: str) -> str:
    tag = tag_of(*at)
    data = value.encode() * 1000
    for other in others:
        network.send(other, Frame(tag, "uint8", (len(data),), data))
    got = [bytes(network.recv(other, tag).payload) for other in others]
    return hashlib.sha256(b"".join([value.encode(), *got])).hexdigest()


def receive_large(job: dict[str, Any], network: Network) -> None:
    """Take tensors of one size and say how much memory that took at most."""
    session = network.rendezvous(Ready({}, ())).session
    source = job["source"]
    network.open(Everything(), {source: 100})  # type: ignore[arg-type]
    network.recv(source, tag_of(session, 0))
    for step in range(1, job["steps"]):
        base = begin()
        network.send(source, word(session, step, 1))  # only now may it come
        frame = network.recv(source, tag_of(session, step))
        grown = peak() - base
        say("grown", bytes=grown, size=frame.nbytes, good=bool((np.frombuffer(frame.payload, np.uint8) == step).all()))
        del frame
        network.send(source, word(session, step, 0))
    network.finish()


def send_large(job: dict[str, Any], network: Network) -> None:
    """Send tensors of one size, one after the other, and say how much memory that took at most."""
    session = network.rendezvous(Ready({}, ())).session
    target = job["target"]
    network.open(Everything(), {target: 100})  # type: ignore[arg-type]
    network.send(target, word(session, 0, 0))
    for step in range(1, job["steps"]):
        network.recv(target, tag_of(session, step, 1))
        data = np.full(job["size"], step, np.uint8)
        base = begin()
        network.send(target, Frame(tag_of(session, step), "uint8", (job["size"],), data.data))
        network.recv(target, tag_of(session, step))
        say("grown", bytes=peak() - base, size=job["size"])
        del data
    network.finish()


def stand_by(job: dict[str, Any], network: Network) -> None:
    network.rendezvous(Ready({}, ()))
    network.open(Everything(), {})  # type: ignore[arg-type]
    network.finish()


def begin() -> int:
    """Make the system forget the peak of this process's memory, where it can; return its size now, in bytes."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return psutil.Process().memory_info().rss


def peak() -> int:
    """Return the peak since `begin`, where the system keeps it, else the size now."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return psutil.Process().memory_info().rss
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def main() -> None:
    job = json.loads(sys.argv[1])
    play = {"train": train, "receive": receive_large, "send": send_large, "stand by": stand_by}[job["play"]]
    try:
        with Network(settings_of(job), lambda name, facts: say(name, **facts)) as network:
            say("entered")
            play(job, network)
    except CutlayerError as error:
        say("error", kind=type(error).__name__, code=error.code, text=str(error))
        sys.exit(1)


if __name__ == "__main__":
    main()
