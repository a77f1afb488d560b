"""A party's sessions: what ends a run from within, and what a checkpoint must still fit."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

import cutlayer as cl
from cutlayer.core.compile import agenda
from cutlayer.core.program import Mode
from cutlayer.engine.ledger import Ledger
from cutlayer.engine.party import EndStep
from cutlayer.errors import CheckpointError, DataError, PeerError
from cutlayer.run import meeting, session
from cutlayer.run.checkpoint import Store
from cutlayer.run.launch import RECORD, has_checkpoint
from cutlayer.run.party import counts
from cutlayer.run.session import Task, _Observer, _Run, take_part
from cutlayer.transport.network import SessionReset
from tests.provoking import saw
from tests.run import plans
from tests.run.trial import Trial

pytestmark = pytest.mark.timeout(60)


def halves(case: plans.Case, party: cl.Party) -> cl.Party:
    """Return the party with half of its samples."""
    data = {name: field[: len(field) // 2] for name, field in party.data.fields.items()}
    return replace(party, data=cl.TensorTable(**data))


@pytest.mark.provokes("E805")
def test_a_checkpoint_of_other_numbers_of_samples_is_refused(tmp_path: Path):
    case = plans.u_shaped(epochs=1)
    trial = Trial(case.plan, tmp_path)

    def part(name: str, party: cl.Party) -> Any:
        return lambda: cl.join(case.plan, party, network=trial.settings(name), folder=tmp_path / "run" / name)

    first = trial.play({name: part(name, case.build(name)) for name in case.plan.parties})
    assert [type(one) for one in first.values()] == [cl.Result] * len(case.plan.parties)
    for name in case.plan.parties:
        for folder in (tmp_path / "run" / name, tmp_path / "run" / name / "checkpoints"):
            assert folder.stat().st_mode & 0o777 == 0o700
    fewer = {name: case.build(name) for name in case.plan.parties}
    fewer |= {name: halves(case, party) for name, party in fewer.items() if party.data is not None}
    second = trial.play({name: part(name, party) for name, party in fewer.items()})
    own = [error for error in second.values() if isinstance(error, CheckpointError)]
    assert own, second
    assert {error.code for error in own} == {"E805"}
    assert "the numbers of samples changed since the checkpoint" in str(own[0])
    assert all(isinstance(error, CheckpointError | PeerError) for error in second.values())


def newest(folder: Path) -> Path:
    """Return the file of a party's newest checkpoint."""
    return max((folder / "checkpoints").glob("*.safetensors"), key=lambda path: int(path.stem))


def spoil(folder: Path, *, newest_only: bool) -> Path:
    """Cut the tensors of a party's checkpoints short; return the file of the newest."""
    files = sorted((folder / "checkpoints").glob("*.safetensors"), key=lambda path: int(path.stem))
    for path in files[-1:] if newest_only else files:
        path.write_bytes(path.read_bytes()[:500])
    return files[-1]


@pytest.mark.parametrize("common", [True, False])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(tmp_path: Path, common: bool):
    case, run = plans.u_shaped(epochs=1, checkpoint_every=1), tmp_path / "run"
    trial, told = Trial(case.plan, tmp_path), dict[str, list[tuple[str, Mapping[str, Any]]]]()

    def part(name: str) -> Any:
        tell = lambda event, details: told.setdefault(name, []).append((event, details))  # noqa: E731
        return lambda: cl.join(
            case.plan, case.build(name), network=trial.settings(name), folder=run / name, notify=tell
        )

    first = trial.play({name: part(name) for name in case.plan.parties})
    assert not [event for events in told.values() for event, _ in events if event in ("damaged", "anew")]
    whole = newest(run / "alpha").read_bytes()
    file = spoil(run / "alpha", newest_only=True)
    if not common:  # the others have the newest only
        for path in run.glob(f"*/checkpoints/{int(file.stem) - 1}.*"):
            if "alpha" not in path.parts:
                path.unlink()
        shutil.copytree(run / "alpha" / "checkpoints", tmp_path / "copy")
        (tmp_path / "copy" / file.name).write_bytes(whole)
    told.clear()
    second = trial.play({name: part(name) for name in case.plan.parties})
    (row,) = [details for event, details in told["alpha"] if event == "damaged"]
    assert row == {"party": "alpha", "file": str(file), "got": "another SHA-256 than its manifest says"}
    assert "damaged" not in [event for name in set(told) - {"alpha"} for event, _ in told[name]]
    if common:
        for name, result in first.items():
            assert second[name].history == result.history
            assert second[name].ledgers[name].flows == result.ledgers[name].flows
        return
    error = second["alpha"]
    assert isinstance(error, CheckpointError)
    assert (error.code, error.where) == ("E802", str(file))
    assert "there is no other to go on from" in str(error)
    assert all(isinstance(one, PeerError) for name, one in second.items() if name != "alpha"), second
    for name in set(case.plan.parties) - {"alpha"}:  # what the remedy needs: the others keep theirs
        assert has_checkpoint(run / name)
        store = Store(run / name / "checkpoints", party=name, digest=trial.settings(name).digest)
        assert store.identifiers() == [int(file.stem)]
    shutil.rmtree(run / "alpha" / "checkpoints")
    shutil.copytree(tmp_path / "copy", run / "alpha" / "checkpoints")
    told.clear()
    third = trial.play({name: part(name) for name in case.plan.parties})
    assert {name: one.history for name, one in third.items()} == {name: one.history for name, one in first.items()}
    assert not [event for events in told.values() for event, _ in events if event in ("anew", "step")]


def test_damaged_checkpoints_do_not_begin_the_run_anew(tmp_path: Path):
    case = plans.u_shaped(epochs=1)
    trial, run = Trial(case.plan, tmp_path), tmp_path / "run"
    work = {
        name: lambda name=name: cl.join(case.plan, case.build(name), network=trial.settings(name), folder=run / name)
        for name in case.plan.parties
    }
    trial.play(work)
    file = spoil(run / "alpha", newest_only=False)
    with pytest.raises(CheckpointError, match="put a copy of the folder `checkpoints` back") as caught:
        work["alpha"]()  # before it meets anybody
    assert (caught.value.code, caught.value.where) == ("E802", str(file))


def test_parties_without_a_common_checkpoint_say_that_they_begin_anew(tmp_path: Path):
    case = plans.u_shaped(epochs=1)
    trial, run = Trial(case.plan, tmp_path), tmp_path / "run"
    told = list[tuple[str, Any]]()

    def part(name: str, folder: str) -> Any:
        tell = lambda event, details: told.append((event, details.get("party")))  # noqa: E731
        return lambda: cl.join(
            case.plan, case.build(name), network=trial.settings(name), folder=run / folder, notify=tell
        )

    first = trial.play({name: part(name, name) for name in case.plan.parties})
    assert "anew" not in [event for event, _ in told]
    second = trial.play({name: part(name, "new" if name == "alpha" else name) for name in case.plan.parties})
    assert {party for event, party in told if event == "anew"} == set(case.plan.parties) - {"alpha"}
    rounds = [  # of the same number: the parties are threads here, which share a generator, so dropout differs
        {name: [(row["mode"], row["round"]) for row in one.history] for name, one in found.items()}
        for found in (first, second)
    ]
    assert rounds[0] == rounds[1] == {"alpha": [("train", 1), ("evaluate", 1)], "server": []}


@pytest.mark.provokes("E390")
def test_a_bug_at_one_party_reaches_the_others_without_its_words(tmp_path: Path):
    case = plans.u_shaped(epochs=1)
    trial = Trial(case.plan, tmp_path)

    def breaks(_worker: object) -> None:
        raise KeyError("a secret of alpha")

    def part(name: str) -> Any:
        party = case.build(name)
        task = Task(agenda, counts(party), None, breaks if name == "alpha" else None)
        return lambda: take_part(case.plan, party, task, network=trial.settings(name))

    found = trial.play({name: part(name) for name in case.plan.parties})
    assert isinstance(found["alpha"], KeyError)
    told = saw("\n".join(found["server"].lines()))
    assert isinstance(found["server"], PeerError)
    assert "party 'alpha' failed" in told
    assert "got E390 at alpha" in told
    assert "look at its terminal" in told
    assert "secret" not in told


@pytest.mark.parametrize("by_command", [True, False])
def test_after_ctrl_c_elsewhere_a_party_with_a_checkpoint_is_told_how_to_go_on(tmp_path: Path, by_command: bool):
    case = plans.u_shaped(epochs=3)
    trial = Trial(case.plan, tmp_path)
    here = tmp_path / "run" / "server"
    here.mkdir(parents=True)
    if by_command:
        (here / RECORD).write_text("{}")  # as `cutlayer join` leaves it

    def alpha() -> None:
        def stop(event: str, details: Mapping[str, Any]) -> None:
            if (event, details.get("mode"), details.get("round")) == ("step", "train", 2):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            cl.join(case.plan, case.build("alpha"), network=trial.settings("alpha"), folder=tmp_path / "a", notify=stop)

    def server() -> cl.Result:
        return cl.join(case.plan, case.build("server"), network=trial.settings("server"), folder=here)

    error = trial.play({"alpha": alpha, "server": server})["server"]
    assert (type(error), error.code, error.what) == (PeerError, "E704", "alpha stopped: Ctrl-C")
    go_on = f"; from the last checkpoint on, here: cutlayer resume {here}" if by_command else ""
    assert error.remedy == f"look at alpha's terminal; then start all parties with resume{go_on}"
    assert error.remedy in str(error)


def test_an_error_before_a_run_is_raised_whatever_happens_while_the_others_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def broken(*_: object) -> None:
        raise RuntimeError("no thread can be started")

    monkeypatch.setattr(meeting, "Network", broken)
    settings = Trial(plans.u_shaped().plan, tmp_path).settings("alpha")
    with pytest.raises(DataError, match="the scans are not here"), meeting.telling(settings, "party 'alpha'"):
        raise DataError("the scans are not here", code="E250")


def test_a_listener_that_stops_in_the_middle_gets_each_step_once_and_none_of_another():
    """Steps are told when there is time, several at once; Ctrl-C may come between two."""
    case = plans.u_shaped(epochs=1)
    worker = cast("Any", SimpleNamespace(ledger=Ledger("alpha"), end_step=lambda: None))
    told = list[tuple[int, Mapping[str, float]]]()

    def tell(_event: str, details: Mapping[str, Any]) -> None:
        told.append((details["step"], details["flops"]))
        if details["step"] == 1:
            raise KeyboardInterrupt

    run = _Run(case.plan, case.build("alpha"), Task(agenda, {}), cast("Any", None), tell, cast("Any", None))
    observer = _Observer(run, worker, "train", 1, 4, lambda _job: None)
    for step in range(4):
        worker.ledger.compute("forward", "head", step)
        observer.handle(EndStep(step, ""))
    with pytest.raises(KeyboardInterrupt):
        observer.tell()
    observer.tell()  # what the session's end does
    assert told == [(step, {"forward head": step}) for step in range(4)]


class Restless:
    """A link on which a party restarts whenever all have met."""

    def __init__(self, *_: object) -> None:
        self.aborted: list[Exception] = []

    def __enter__(self) -> Restless:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def rendezvous(self, _ready: object) -> Iterator[object]:
        raise SessionReset("server restarted")

    def abort(self, error: Exception) -> None:
        self.aborted.append(error)


@pytest.mark.provokes("E709")
def test_parties_that_restart_without_end_are_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    case, told = plans.u_shaped(), []
    party = case.build("alpha")

    def notify(event: str, details: Mapping[str, Any]) -> None:
        told.append((event, details["reason"]))

    monkeypatch.setattr(session, "Network", Restless)
    monkeypatch.setattr(session, "_RESETS_MAX", 3)
    task = Task(lambda _plan, _roster: [(Mode.TRAIN, 1)], counts(party), None)
    with pytest.raises(PeerError, match=r"E709.*restarted too often.*party alpha.*at most 3 restarts"):
        take_part(case.plan, party, task, network=Trial(case.plan, tmp_path).settings("alpha"), notify=notify)
    assert told == [("rollback", "server restarted")] * 3
