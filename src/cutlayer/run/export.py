"""The whole model, put together from its stages again, where the plan allows it.

| code | error | meaning |
| --- | --- | --- |
| E229 | ConfigError | the contract does not allow the whole model to be put together here, or weights are missing |
| E806 | CheckpointError | a file of weights cannot be read |
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from cutlayer.core.parts import Loss
from cutlayer.core.plan import Plan
from cutlayer.engine.site import Site
from cutlayer.errors import CheckpointError, ConfigError
from cutlayer.run.checkpoint import write_atomic
from cutlayer.run.config import load_contract
from cutlayer.run.launch import unfinished
from cutlayer.run.outcome import Result

__all__ = ["JOINED", "Ended", "assemble", "export", "write_joined"]

JOINED = "joined.safetensors"


@runtime_checkable
class Ended(Protocol):
    """What `cutlayer.fit` gives: it holds a result."""

    @property
    def result(self) -> Result:
        """Return the result."""


def assemble(source: Result | Ended | str | Path) -> dict[str, Tensor]:
    """Return the weights of the uncut model, for its `load_state_dict(strict=True)`.

    Stages made by `cutlayer.split` keep the names of the model that they were cut from. Where stages have names in
    common, as stages written by hand may, each name is "stage.name". Replicas are those of the first lane.

    Args:
        source: What `cutlayer.fit`, `simulate` or `session.result()` gave, with all parties in this process; or the
            folder of a run, whose contract names in `assemble_at` who may do this.

    Raises:
        ConfigError: E229, the contract does not allow it here, stages of other parties are missing, or the source is
            none of these.
        CheckpointError: E806, a weights file of the folder is damaged.
    """
    if isinstance(source, str | Path):
        return _from_folder(Path(source))
    result = source.result if isinstance(source, Ended) else source
    if not isinstance(result, Result):
        raise ConfigError(
            "the whole model cannot be put together from this",
            where="assemble",
            expected="what fit or simulate gave, or the folder of a run",
            got=type(source).__name__,
            remedy="give cl.assemble(session.result()), once its rounds are over"
            if isinstance(source, Ended) and callable(result)
            else "give cl.assemble(run), cl.assemble(result) or cl.assemble('FOLDER')",
            code="E229",
        )
    states: dict[str, dict[str, Tensor]] = {}
    for worker in result.workers.values():
        states |= _of_site(worker.site)
    return _union(result.plan, states, "this result")


def export(folder: Path, path: Path) -> int:
    """Write the uncut model's weights of a run as safetensors; return the number of tensors. Raises as `assemble`."""
    weights = assemble(folder)
    write_atomic(path, safetensors.torch.save(weights))
    return len(weights)


def write_joined(folder: Path, plan: Plan, site: Site) -> None:
    """Write `joined.safetensors` if the site's party may put the model together and has gathered all of it."""
    if site.parts.party in plan.assemble_at:
        states = _of_site(site) | site.gathered
        write_atomic(folder / JOINED, safetensors.torch.save(_union(plan, states, f"party {site.parts.party}")))


def _of_site(site: Site) -> dict[str, dict[str, Tensor]]:
    losses = {stage.name for stage in site.plan.stages if isinstance(stage, Loss)}
    return {stage: site.weights(stage, lane) for stage, lane in site.stages if lane == 0 and stage not in losses}


def _from_folder(folder: Path) -> dict[str, Tensor]:
    contract = folder / "contract.toml"
    if not contract.exists():
        raise ConfigError(
            "the folder holds no run with a contract",
            where=str(folder),
            expected="contract.toml, as `cutlayer run` and `cutlayer join` leave it",
            remedy="name the folder of a run",
            code="E229",
        )
    plan = load_contract(contract).plan
    if not plan.assemble_at:
        raise ConfigError(
            "the contract allows nobody to put the whole model together",
            where=str(contract),
            expected='parties in assemble_at, such as assemble_at = ["server"] in [contract]',
            got="none",
            remedy="agree on it with all parties, and run with the new contract",
            code="E229",
        )
    if (folder / JOINED).exists():
        return _read(folder / JOINED)
    if unfinished(folder):
        raise ConfigError(
            "the run has not ended, and has left no weights yet",
            where=str(folder),
            expected="summary.json, which a run writes when it ends",
            remedy=f"go on with it first: cutlayer resume {folder}",
            code="E229",
        )
    states: dict[str, dict[str, Tensor]] = {}
    for party in plan.parties:
        path = folder / f"{party}.safetensors"
        for name, tensor in (_read(path) if path.exists() else {}).items():
            stage, _, rest = name.partition(".")
            stage, _, lane = stage.partition("@")
            if lane in ("", "0"):
                states.setdefault(stage, {}).setdefault(rest, tensor)
    return _union(plan, states, str(folder))


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(path.read_bytes())
    except (safetensors.SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            "a file of weights cannot be read",
            where=str(path),
            got=type(error).__name__,
            remedy="copy it again from where the run was",
            code="E806",
        ) from error


def _union(plan: Plan, states: Mapping[str, Mapping[str, Tensor]], where: str) -> dict[str, Tensor]:
    wanted = [stage.name for stage in plan.stages if not isinstance(stage, Loss)]
    missing = [name for name in wanted if name not in states and not _bare(plan, name, states)]
    if missing:
        raise ConfigError(
            f"the weights of the stages {', '.join(missing)} are not here",
            where=where,
            expected=f"those of {', '.join(wanted)}",
            remedy="only a party of assemble_at gets them, at the end of the run",
            code="E229",
        )
    found: dict[str, Tensor] = {}
    for name in wanted:
        for key, tensor in states.get(name, {}).items():
            if key in found and not torch.equal(found[key], tensor):
                return {f"{n}.{k}": t.clone() for n in wanted for k, t in states.get(n, {}).items()}
            found.setdefault(key, tensor.clone())
    return found


def _bare(plan: Plan, name: str, states: Mapping[str, Mapping[str, Tensor]]) -> bool:
    """Whether a stage may have no weights at all: another stage of its party is here."""
    places = plan.stage(name).places
    return any(other in states and plan.stage(other).places == places for other in states)
