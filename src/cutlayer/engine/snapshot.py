"""All that a restart needs of a party, as named tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cutlayer.engine.site import Site
from cutlayer.errors import CheckpointError, ContractError

__all__ = ["restore", "snapshot"]

AGREED = "preprocessing/json"
GATHERED = "gathered."  # before the name of a stage of another party


def snapshot(site: Site) -> dict[str, Tensor]:
    """Return all that a restart needs, as copies: "stage@lane/...", "metrics@lane/..." and `AGREED` -> tensor."""
    found: dict[str, Tensor] = {}
    for stage, lane in site.stages:
        found |= {f"{stage}@{lane}/{name}": t.clone() for name, t in site.state(stage, lane).items()}
    for (stage, lane), book in site.books.items():
        found |= {f"metrics.{stage}@{lane}/{name}": t for name, t in book.state().items()}
    for stage, weights in site.gathered.items():
        found |= {f"{GATHERED}{stage}/{name}": tensor for name, tensor in weights.items()}
    if site.preprocess.agreed:
        found[AGREED] = torch.frombuffer(bytearray(site.preprocess.document()), dtype=torch.uint8)
    return found


def restore(site: Site, snapshot: Mapping[str, Tensor], where: str) -> None:
    """Go back to a snapshot. Raises `CheckpointError` if it is of other modules."""
    groups: dict[str, dict[str, Tensor]] = {}
    site.preprocess.restore(snapshot[AGREED].numpy().tobytes() if AGREED in snapshot else b"{}")
    for full, tensor in snapshot.items():
        owner, _, name = full.partition("/")
        groups.setdefault(owner, {})[name] = tensor
    site.gathered = {
        owner.removeprefix(GATHERED): weights for owner, weights in groups.items() if owner.startswith(GATHERED)
    }
    try:
        for stage, lane in site.stages:
            site.load_state(stage, lane, groups.get(f"{stage}@{lane}", {}), where)
        for stage, lane in site.books:
            site.books[stage, lane].set_state(groups.get(f"metrics.{stage}@{lane}", {}), where)
    except ContractError as error:
        raise CheckpointError(
            "the checkpoint does not fit this party's modules",
            where=error.where,
            expected=error.expected,
            got=error.got,
            remedy="use the modules, optimizer and metrics that the run was started with",
            code="E803",
        ) from error
