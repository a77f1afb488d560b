"""`cutlayer run --processes`: a `cutlayer join` for each party, over mutual TLS on loopback.

Certificates are made for this run, kept in a temporary folder, and thrown away with it: by this process, by those of
the parties if it is killed, or by the next one in the run's folder if all are. The contract is that of the user but for
its addresses, which become free ports of this machine.
"""

from __future__ import annotations

import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import msgspec

from cutlayer import errors
from cutlayer.cli.console import INTERRUPTED, Output
from cutlayer.cli.progress import LOST_IN_PREDICTION, LOST_IN_TRAINING, RunProgress
from cutlayer.errors import CutlayerError, PeerError
from cutlayer.run.config import Contract, dump_contract, load_contract
from cutlayer.run.disk import named
from cutlayer.run.launch import RECORD
from cutlayer.run.lock import locked, own_folder
from cutlayer.run.partyfile import PartyFile, write_party_file
from cutlayer.transport.pki import create_authority, issue
from cutlayer.transport.proxy import NO_PROXY

__all__ = ["in_processes", "run_processes"]

_POLL = 0.1  # seconds between two looks at the processes
_GRACE = 10.0  # seconds that the others have to end by themselves once one has failed
_LOCAL = "loopback.toml"
_KEYS = ".keys"  # says where the keys of the run are, while it runs
_PREFIX = "cutlayer-"
_WARNING = re.compile(rb": UserWarning: ((?:party|spread:) .+)$")  # of data, in a log as Python prints it


@dataclass
class _Child:
    """One party's process, what it prints, and how far its events were read.

    `copied` is the party file that the process was given, and the user's of which it is a copy; `logged` how far its
    log was read.
    """

    party: str
    folder: Path
    process: subprocess.Popen[bytes]
    copied: tuple[str, str]
    read: int = 0
    rest: bytes = field(default=b"", repr=False)
    logged: int = 0

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield the events that came since the last call."""
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return
        with path.open("rb") as file:
            file.seek(self.read)
            data = self.rest + file.read()
            self.read = file.tell()
        *lines, self.rest = data.split(b"\n")
        for line in lines:
            yield msgspec.json.decode(line)

    def warnings(self) -> Iterator[str]:
        """Yield what the party was warned of since the last call, as in its log: those are about its own data."""
        with (self.folder / "log.txt").open("rb") as file:
            file.seek(self.logged)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self.logged += len(line)
                if found := _WARNING.search(line.rstrip()):
                    text = found[1].decode(errors="replace")
                    yield text if text.startswith("party ") else f"party {self.party}: {text}"


def run_processes(
    contract: Contract, files: Sequence[PartyFile], folder: Path, output: Output
) -> tuple[str, dict[str, Any]]:
    """Run all parties, each in a process; return the summary as text and as document, which is written as well.

    A folder that holds a run begun before is gone on with. Raises what `in_processes` raises.
    """
    summaries = [folder / file.name / "summary.json" for file in files]
    if not all(path.exists() for path in summaries):  # who has ended comes again, as those who have not need it
        for path in summaries:
            path.unlink(missing_ok=True)
    local, homes, seconds = in_processes(contract, files, folder, output, ["join"])
    return _gather(local, homes, folder, seconds)


def in_processes(
    contract: Contract, files: Sequence[PartyFile], folder: Path, output: Output, command: Sequence[str]
) -> tuple[Contract, dict[str, Path], float]:
    """Let all parties carry out a command, such as ["join"], each in a process and a folder of its own.

    All processes have ended when this returns or raises.

    Returns:
        The contract with this machine's addresses, party -> its folder, and seconds.

    Raises:
        CutlayerError: a party failed; the error is that of the party that failed first by itself.
    """
    local = _local_contract(contract, folder)
    begin = time.perf_counter()
    with ExitStack() as stack:
        stack.enter_context(_stopped_by_signals())
        temporary = stack.enter_context(_place_for_keys(folder))
        create_authority(temporary / "ca", name="one run on this machine", days=30)
        lost = LOST_IN_PREDICTION if command[0] == "predict" else LOST_IN_TRAINING
        progress = stack.enter_context(RunProgress(output, epochs=contract.plan.training.epochs, lost=lost))
        children = stack.enter_context(_children(local, files, folder, temporary, command))
        _watch(children, progress, output)
    return local, {child.party: child.folder for child in children}, time.perf_counter() - begin


@contextmanager
def _place_for_keys(folder: Path) -> Iterator[Path]:
    """Give a temporary folder. One that a killed run of this folder has left is removed first."""
    note = folder / _KEYS
    if note.exists():
        old = Path(note.read_text(encoding="utf-8"))
        if old.name.startswith(_PREFIX):
            shutil.rmtree(old, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=_PREFIX) as place:
        try:
            with named(note):
                note.write_text(place, encoding="utf-8")
            yield Path(place)
        finally:
            shutil.rmtree(place, ignore_errors=True)  # before the note of it
            note.unlink(missing_ok=True)


def _local_contract(contract: Contract, folder: Path) -> Contract:
    """Return the contract with ports of this machine; the same ones when a run is gone on with: they are digested."""
    path = folder / _LOCAL
    if not path.exists():
        ports = _free_ports(len(contract.addresses))
        addresses = {party: f"127.0.0.1:{port}" for party, port in zip(contract.addresses, ports, strict=True)}
        with named(path):
            path.write_text(dump_contract(replace(contract, addresses=addresses)), encoding="utf-8")
    return load_contract(path)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


@contextmanager
def _children(
    contract: Contract, files: Sequence[PartyFile], folder: Path, temporary: Path, command: Sequence[str]
) -> Iterator[list[_Child]]:
    """Start a process for each party; at the end, none is left, come what may."""
    children: list[_Child] = []
    with ExitStack() as ends:
        try:
            lines = [_words(contract, file, folder, temporary, command) for file in files]
            shutil.rmtree(temporary / "ca")  # nobody needs another certificate
            for file, words in zip(files, lines, strict=True):
                children.append(_start(file, folder / file.name, [str(temporary), *words], ends))
            yield children
        finally:
            _stop(children)


def _words(contract: Contract, file: PartyFile, folder: Path, temporary: Path, command: Sequence[str]) -> list[str]:
    """Write a party's files for this machine; return what its process is called with."""
    credentials = issue(temporary / "ca", file.name, temporary / "credentials", days=29)
    own = replace(file, listen="", credentials=credentials, insecure=False, accept="ask", proxy=NO_PROXY)
    party_file = temporary / f"{file.name}.toml"
    party_file.write_text(write_party_file(own), encoding="utf-8")
    given = ["--accept", contract.digest(), "--folder", str(folder / file.name), "--json", "--verbose"]
    return [command[0], str(folder / _LOCAL), str(party_file), *command[1:], *given]


def _start(file: PartyFile, home: Path, words: Sequence[str], ends: ExitStack) -> _Child:
    """Start a process that ends with this one; see `cutlayer.cli.child`. One of a killed run has time to end first."""
    own_folder(home)
    with locked(home, wait=_GRACE):
        printed: IO[bytes] = ends.enter_context((home / "output.json").open("wb"))
    log: IO[bytes] = ends.enter_context((home / "log.txt").open("ab"))
    before = log.tell()
    process = subprocess.Popen(  # noqa: S603 - this program itself
        [sys.executable, "-m", "cutlayer.cli.child", *words], stdin=subprocess.PIPE, stdout=printed, stderr=log
    )
    if process.stdin is not None:
        ends.enter_context(process.stdin)
    seen = home / "metrics.jsonl"
    copied = words[3], str(file.path)  # after the folder of keys, the command and the contract
    read = seen.stat().st_size if seen.exists() else 0
    return _Child(file.name, home, process, copied, read=read, logged=before)


def _stop(children: Sequence[_Child]) -> None:
    running = [child for child in children if child.process.poll() is None]
    for child in running:
        child.process.terminate()
    for child in running:
        try:
            child.process.wait(timeout=5.0)
        except subprocess.TimeoutExpired:
            child.process.kill()
            child.process.wait()


def _watch(children: Sequence[_Child], progress: RunProgress, output: Output) -> None:
    """Show the parties' events until all have ended. Each party's own deadlines bound how long that takes."""
    failed_at, told = 0.0, set[str]()
    while True:
        codes = [child.process.poll() for child in children]
        for child in children:
            for event in child.events():
                progress(str(event.pop("event")), event)
            for text in child.warnings():
                if text not in told:  # several parties may run the same code
                    progress("warned", {"text": text})
                told.add(text)
        if all(code == 0 for code in codes):
            return
        failed_at = failed_at or (time.monotonic() if any(codes) else 0.0)
        if failed_at and (None not in codes or time.monotonic() > failed_at + _GRACE):
            raise _failure(children, output)
        time.sleep(_POLL)


def _failure(children: Sequence[_Child], output: Output) -> CutlayerError:
    """Return the error that began it: not a party's complaint of another, if there is any other error."""
    from cutlayer.run.results import NO_ROOM

    failed = [(child.party, _error(child)) for child in children if child.process.poll()]
    for party, error in failed:
        output.note(f"{party}: {error.code} {error.what}")
        if output.verbose:
            output.note((_folder(children, party) / "log.txt").read_text(encoding="utf-8", errors="replace"))
    own = [pair for pair in failed if not isinstance(pair[1], PeerError | errors.LinkError | errors.DeadlineError)]
    party, error = (own or failed)[0]
    remedy, home = error.remedy, _folder(children, party).parent
    if error.what.startswith(NO_ROOM) and (home / RECORD).exists():  # the party knows of its own folder only
        remedy = f"make room, then `cutlayer resume {home}` writes all results; what lies elsewhere can then be deleted"
    return type(error)(
        error.what,
        where=f"process of {party}{f': {error.where}' if error.where else ''}",
        expected=error.expected,
        got=error.got,
        remedy=remedy,
        code=error.code,
    )


def _folder(children: Sequence[_Child], party: str) -> Path:
    return next(child.folder for child in children if child.party == party)


def _error(child: _Child) -> CutlayerError:
    """Return the error that a party's process printed, as the class it was there."""
    code = child.process.returncode
    try:
        if code == INTERRUPTED:  # what it says is meant for whoever stopped it
            raise LookupError
        document = msgspec.json.decode((child.folder / "output.json").read_bytes(), type=dict[str, dict[str, str]])
        told = document["error"]
        kind = told.pop("kind")
        found = getattr(errors, kind) if kind in errors.__all__ else CutlayerError
        told["where"] = told["where"].replace(*child.copied)
        error: CutlayerError = found(told.pop("what"), **told)
    except (OSError, msgspec.MsgspecError, LookupError, TypeError):
        home = child.folder.parent
        then = f"`cutlayer resume {home}`" if (home / RECORD).exists() else "run the prediction again"
        return PeerError(
            f"the process of {child.party!r} ended without a word",
            where=f"party {child.party}, folder {child.folder}",
            got="interrupted" if code == INTERRUPTED else f"signal {-code}" if code < 0 else f"exit code {code}",
            remedy=f"read {child.folder / 'log.txt'}; then {then}",
            code="E710",
        )
    return error


def _gather(contract: Contract, homes: Mapping[str, Path], folder: Path, seconds: float) -> tuple[str, dict[str, Any]]:
    """Return one summary from those of all parties, and write it."""
    from cutlayer.engine.ledger import Ledger, Row
    from cutlayer.run.checkpoint import write_atomic
    from cutlayer.run.outcome import Result
    from cutlayer.run.results import summary_document

    ledgers: dict[str, Ledger] = {}
    history: list[dict[str, Any]] = []
    hashes: dict[str, str] = {}
    parts: list[Mapping[str, Any]] = []
    for party, home in homes.items():
        part: Mapping[str, Any] = msgspec.json.decode((home / "summary.json").read_bytes())
        ledgers[party] = Ledger(party)
        ledgers[party].restore(part["ledgers"][party])
        ledgers[party].undone = Row(**part["undone"].get(party, {}))
        history += part["history"]
        hashes |= part["weights_sha256"]
        parts.append(part)
        for name in (f"{party}.safetensors", f"{party}.preprocessing.json"):
            if (home / name).exists():
                with named(folder / name):
                    shutil.copyfile(home / name, folder / name)
    history.sort(key=lambda row: (row["round"], row["mode"] == "evaluate"))
    samples = parts[0]["samples"]  # all parties are told the same
    result = Result(plan=contract.plan, history=history, ledgers=ledgers, seconds=seconds, samples=samples)
    document = summary_document(result, hashes, contract.digest(), parts=parts)
    write_atomic(folder / "summary.json", msgspec.json.format(msgspec.json.encode(document), indent=2))
    with named(folder / "metrics.jsonl"), (folder / "metrics.jsonl").open("wb") as merged:
        for home in homes.values():
            merged.write((home / "metrics.jsonl").read_bytes())
    return result.summary(), document


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Let SIGTERM, and SIGHUP unless it is ignored (`nohup`), end this program as Ctrl-C does: in good order."""
    wanted = [one for one in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(one) != signal.SIG_IGN]

    def stop(_number: int, _frame: object) -> None:
        for one in wanted:
            signal.signal(one, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {one: signal.signal(one, stop) for one in wanted}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
