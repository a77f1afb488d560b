"""`cutlayer predict`: the outputs of a trained plan for new samples.

| code | error | meaning |
| --- | --- | --- |
| E210 | ConfigError | options that do not go together |
| E249 | ConfigError | the folder holds a prediction and is not overwritten |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from cutlayer.cli.console import Output, shown_path
from cutlayer.cli.processes import in_processes
from cutlayer.cli.progress import LOST_IN_PREDICTION, RunProgress
from cutlayer.cli.running import both, built, check_names, consent
from cutlayer.core.inference import describe_prediction, prediction_bytes
from cutlayer.core.serving import served_plan, server_of
from cutlayer.errors import ConfigError
from cutlayer.run.config import Contract, load_contract
from cutlayer.run.launch import accept, checked_network
from cutlayer.run.partyfile import PartyFile, load_party_file

if TYPE_CHECKING:
    from torch import Tensor

    from cutlayer.run.outcome import Result

__all__ = ["How", "predict_command"]


@dataclass(frozen=True, kw_only=True)
class How:
    """Where the parties are: by default all in this process.

    Attributes:
        processes: All here, each in a process of its own.
        join: One here, the others predict from where they are.
        served: One here, which asks a server that runs `cutlayer serve`.
        accept: The digest of the contract that this site has accepted; for `join` and `served`.
        wait: Seconds that a lost party has to come back, and a server to answer; for `join` and `served`.
    """

    processes: bool = False
    join: bool = False
    served: bool = False
    accept: str = ""
    wait: float


def predict_command(
    path: Path, party_files: Sequence[Path], weights: Path | None, folder: Path | None, output: Output, how: How
) -> None:
    """Predict, write the outputs that this side holds, and say where they are."""
    contract = load_contract(path)
    files = [load_party_file(file) for file in party_files]
    single = how.join or how.served
    if how.processes + how.join + how.served > 1 or (single and len(files) != 1):
        raise ConfigError(
            "these options do not go together",
            where="cutlayer predict",
            expected="one of --processes, --join and --served; the last two with one party file",
            got=f"{len(files)} party files",
            remedy="choose where the parties are: all here, or one here and the others elsewhere",
            code="E210",
        )
    if single:
        _from_here(contract, files[0], weights, folder, output, how)
    else:
        check_names(contract, files, "--join, all at one time, or asks a server with --served")
        _tell_untrained(weights, output)
        _all_here(contract, files, weights, folder, output, processes=how.processes)


def _all_here(
    contract: Contract,
    files: Sequence[PartyFile],
    weights: Path | None,
    folder: Path | None,
    output: Output,
    *,
    processes: bool,
) -> None:
    from cutlayer.run.prediction import classes_of, predict_here
    from cutlayer.run.results import EventLog, results_folder
    from cutlayer.run.trained import agreed_in

    _check_new(folder)
    with results_folder(folder, Path("runs"), f"{contract.plan.name}-prediction") as home:
        output.note(f"folder: {shown_path(home)}")
        if processes:
            _, homes, seconds = in_processes(contract, files, home, output, ["predict", "--join", *_given(weights)])
            classes = classes_of(contract.plan, agreed_in(weights, homes) if weights else {})
            found = gather(contract, homes)
            finish(home, found, output, about=About(contract, classes, seconds, _samples(homes)))
            return
        parties = [file.party() for file in files]
        progress = RunProgress(output, epochs=contract.plan.training.epochs)
        with progress, EventLog(home / "metrics.jsonl") as log:
            result = predict_here(contract.plan, parties, weights=weights, notify=both(progress, log))
        finish(home, result.predictions, output, about=_about(contract, result))


def _from_here(
    contract: Contract, file: PartyFile, weights: Path | None, folder: Path | None, output: Output, how: How
) -> None:
    from cutlayer.run.prediction import ask, predict_with_others, predicting
    from cutlayer.run.results import EventLog, results_folder

    network = checked_network(contract, file)  # what is wrong is said before anybody is asked anything
    plan = served_plan(contract.plan) if how.served else contract.plan
    if how.served:
        server_of(contract.plan, file.name)
    told = predicting(network, how.wait) if how.join and accept(contract, file, how.accept) else None
    party, own = built(file, told)
    samples = own.get("predict", 0)
    text = describe_prediction(plan, file.name)
    if samples:
        most = prediction_bytes(plan, file.name, samples)
        text += f"\n  total   at most {most:,} bytes over cuts for its {samples:,} samples"
    consent(contract, file, output, how.accept, f"{text}\nprediction of {contract.plan.name}")
    _tell_untrained(weights, output)
    _check_new(folder)
    with results_folder(folder, file.folder, f"{contract.plan.name}-prediction") as home:
        output.note(f"folder: {shown_path(home)}")
        progress = RunProgress(output, epochs=contract.plan.training.epochs, lost=LOST_IN_PREDICTION)
        with progress, EventLog(home / "metrics.jsonl") as log:
            way, notify = ask if how.served else predict_with_others, both(progress, log)
            result = way(contract.plan, party, network=network, weights=weights, notify=notify, wait=how.wait)
        finish(home, result.predictions, output, about=_about(contract, result))


def _tell_untrained(weights: Path | None, output: Output) -> None:
    if weights is None:
        output.note("no --weights: modules are as their builder makes them, untrained unless it loads weights itself")


def _check_new(folder: Path | None) -> None:
    """Raise `ConfigError` E249 if the folder holds a prediction."""
    path = folder / "prediction.json" if folder else None
    if path is not None and path.exists():
        raise ConfigError(
            f"{path.parent.name} holds a prediction already, which is not overwritten",
            where=str(path.absolute()),
            expected="a new folder, or one without a prediction",
            remedy="give another with --folder, or move this one away",
            code="E249",
        )


@dataclass(frozen=True)
class About:
    """What is told beside the outputs of a prediction.

    `classes` is output -> its classes; `samples` is party -> how many it gave; `flows` is party -> bytes it moved.
    """

    contract: Contract
    classes: Mapping[str, Sequence[int | str]]
    seconds: float
    samples: Mapping[str, int]
    flows: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


def _about(contract: Contract, result: Result) -> About:
    from cutlayer.run.prediction import classes_of

    classes = classes_of(contract.plan, result.agreed)
    return About(contract, classes, result.seconds, result.samples.get("predict", {}), moved(result))


def _samples(homes: Mapping[str, Path]) -> dict[str, int]:
    """Return party -> samples, as one of those that hold outputs has written it."""
    for home in homes.values():
        if (home / "prediction.json").exists():
            return dict(msgspec.json.decode((home / "prediction.json").read_bytes()).get("samples", {}))
    return {}


def moved(result: Result) -> dict[str, dict[str, int]]:
    """Return party -> bytes that it sent and received."""
    return {party: {way: ledger.total(way) for way in ("sent", "received")} for party, ledger in result.ledgers.items()}


def gather(contract: Contract, homes: Mapping[str, Path]) -> dict[str, Tensor]:
    """Return the outputs that the parties have written, replica after replica."""
    import safetensors.torch
    import torch

    held = {
        party: safetensors.torch.load_file(home / "predictions.safetensors")
        for party, home in homes.items()
        if (home / "predictions.safetensors").exists()
    }
    found: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for outputs in held.values() for name in outputs):
        places = dict.fromkeys(contract.plan.stage(name.partition(".")[0]).places)
        found[name] = torch.cat([held[party][name] for party in places if name in held.get(party, {})])
    return found


def finish(folder: Path, predictions: Mapping[str, Tensor], output: Output, *, about: About) -> None:
    """Write the outputs, with the classes that are known, and say where they are in the last line."""
    from cutlayer.run.prediction import rows_of, write_predictions

    plan, seconds, flows = about.contract.plan, about.seconds, about.flows
    outputs = write_predictions(folder, predictions, about.classes, rows_of(plan, about.samples))
    output.say(f"{plan.name}: prediction in {seconds:.1f} s")
    for name, shape in outputs.items():
        output.say(f"  {name}: {shape['dtype']}{shape['shape']}")
    if not outputs:
        output.say("  this party holds no outputs")
    for party, ways in flows.items():
        output.say(f"  {party}: sent {ways['sent']:,} B, received {ways['received']:,} B")
    document: dict[str, Any] = {"outputs": outputs, "seconds": round(seconds, 3), "bytes": flows}
    output.document({**document, "results": str(folder.absolute())})
    output.last(f"results: {shown_path(folder)}")


def _given(weights: Path | None) -> list[str]:
    return ["--weights", str(weights.absolute())] if weights is not None else []
