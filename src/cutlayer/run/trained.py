"""What a training run has left at a party: its weights and what it agreed on, read back for a prediction.

| code | error | meaning |
| --- | --- | --- |
| E811 | CheckpointError | there are no weights of this party, or the file is damaged |
| E812 | CheckpointError | the weights are not those of this party's stages |
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import safetensors
from torch import Tensor

from cutlayer.engine.agree import Agreed
from cutlayer.engine.site import Site
from cutlayer.engine.tensors import dtype_name
from cutlayer.errors import CheckpointError
from cutlayer.run.launch import unfinished
from cutlayer.run.results import site_modules

__all__ = ["agreed_in", "load_trained"]

_LISTED = 4  # names that an error lists
_JSON_MAX = 64 * 2**20


def load_trained(site: Site, folder: str | Path, without: Collection[str] = ()) -> None:
    """Give a party's stages the weights that a run has left in `folder`, and what it agreed on about preprocessing.

    Reads `<party>.safetensors`, and `<party>.preprocessing.json` if it is there. Where the folder has the run's
    `summary.json`, the file must be the one that the run wrote. Tensors of the stages or losses `without` are left out.

    Raises:
        CheckpointError: E811, the file is missing, damaged or another one than the run wrote; E812, its names, shapes
            or dtypes are not those of the stages. Nothing is loaded then.
    """
    party, folder = site.parts.party, Path(folder)
    path = folder / f"{party}.safetensors"
    try:
        _check_hash(folder, path, party)
        with safetensors.safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if _stage_of(name) not in without]  # noqa: SIM118 - no mapping
            held = {name: file.get_tensor(name) for name in names}
    except (OSError, safetensors.SafetensorError) as error:
        raise _unreadable(path, str(error)[:200] or type(error).__name__) from error
    modules = dict(site_modules(site))
    wanted = {
        f"{prefix}.{name}": tensor
        for prefix, module in modules.items()
        for name, tensor in module.state_dict().items()
        if isinstance(tensor, Tensor)
    }
    _check_fit(wanted, held, path)
    for prefix, module in modules.items():
        own = {name.removeprefix(f"{prefix}."): held[name] for name in wanted if name.startswith(f"{prefix}.")}
        module.load_state_dict(own, strict=False)  # names were compared: what is left out is no tensor
    site.preprocess.agreed = agreed_in(folder, [party]).get(party, site.preprocess.agreed)


def agreed_in(folder: Path, parties: Iterable[str]) -> dict[str, dict[str, Agreed]]:
    """Return party -> field -> what it agreed on in the run of this folder, for those whose files are there.

    Raises `CheckpointError` E811 if one is damaged.
    """
    return {party: _agreed(path) for party in parties if (path := folder / f"{party}.preprocessing.json").exists()}


def _agreed(path: Path) -> dict[str, Agreed]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Agreed])
    except (OSError, msgspec.DecodeError) as error:
        raise _unreadable(path, str(error)[:200]) from error


def _stage_of(name: str) -> str:
    """Return the stage of "stage.weight" or "stage@lane.weight"."""
    return name.partition(".")[0].partition("@")[0]


def _check_hash(folder: Path, path: Path, party: str) -> None:
    """Compare the file with the run's summary, if there is one and it names it."""
    summary = folder / "summary.json"
    if not summary.exists() or summary.stat().st_size > _JSON_MAX:
        return
    try:
        known = msgspec.json.decode(summary.read_bytes(), type=dict[str, Any]).get("weights_sha256", {})
    except msgspec.DecodeError as error:
        raise _unreadable(summary, str(error)[:200]) from error
    expected = known.get(party) if isinstance(known, dict) else None
    if expected is None:
        return
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise CheckpointError(
            "the weights are not those that the run wrote",
            where=str(path),
            expected=f"SHA-256 {expected}, as {summary.name} says",
            got=found,
            remedy="copy the run's folder again; for other weights give a folder without summary.json",
            code="E811",
        )


def _check_fit(wanted: Mapping[str, Tensor], held: Mapping[str, Tensor], path: Path) -> None:
    missing, stray = sorted(wanted.keys() - held.keys()), sorted(held.keys() - wanted.keys())
    if missing or stray:
        raise _unfit(path, f"without {_list(missing)}" if missing else f"also {_list(stray)}", "names")
    for name, tensor in wanted.items():
        own, other = (f"{dtype_name(t.dtype)}{list(t.shape)}" for t in (tensor, held[name]))
        if own != other:
            raise _unfit(path, f"{other} for {name!r}", f"{own} for {name!r}")


def _list(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _unfit(path: Path, got: str, expected: str) -> CheckpointError:
    return CheckpointError(
        "the weights are not those of this party's stages",
        where=str(path),
        expected="the names of the stages' own parameters and buffers" if expected == "names" else expected,
        got=got,
        remedy="give the run's folder of this plan, and the builder that made the modules of that run",
        code="E812",
    )


def _unreadable(path: Path, got: str) -> CheckpointError:
    folder = path.parent
    held = sorted(one.stem for one in folder.glob("*.safetensors") if one.stem != "joined")
    return CheckpointError(
        "a trained party cannot be read",
        where=str(path),
        expected="what a training run has left: its folder holds <party>.safetensors",
        got=got,
        remedy=f"the run has not ended: cutlayer resume {folder}, then predict"
        if unfinished(folder)
        else f"this is the folder of {', '.join(held[:_LISTED])}: give that of {path.stem}'s own run"
        if held and path.stem not in held and path.suffix == ".safetensors"
        else "give the folder that the run named in its last line",
        code="E811",
    )
