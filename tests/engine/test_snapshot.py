"""A snapshot is all of a party that a run changes; going back to it is going back in time."""

from __future__ import annotations

import pytest
import torch
from torchmetrics.classification import MulticlassAccuracy

from cutlayer.engine.site import Site
from cutlayer.engine.snapshot import restore, snapshot
from cutlayer.errors import CheckpointError
from cutlayer.run.simulate import simulate
from tests.small import CLASSES, TOPOLOGIES, Case, far


def trained(epochs: int = 1, *, metrics: bool = True) -> Site:
    """A client of a U after some epochs."""
    case = Case.of(TOPOLOGIES["u_shaped"](batch_size=8, epochs=epochs))
    made = {"loss": lambda: {"accuracy": MulticlassAccuracy(CLASSES, average="micro")}} if metrics else {}
    parties = case.parties(metrics=made)
    return simulate(case.plan, parties).workers["a"].site


def test_a_snapshot_holds_everything_that_an_epoch_changes():
    first, second = snapshot(trained(1)), snapshot(trained(2))
    assert first.keys() == second.keys()
    same = {name for name in first if far(first[name], second[name]) == 0.0 and not name.startswith("metrics.")}
    assert same == {"head@0/m", "tail@0/m", "loss@0/m", "loss@0/g.cpu"}  # constant rates; a loss that draws nothing
    owners = {name.partition("/")[0] for name in first}
    assert owners == {"head@0", "tail@0", "loss@0", "metrics.loss@0"}


def test_a_site_goes_back_to_a_snapshot():
    early, late = trained(1), trained(2)
    restore(late, snapshot(early), "here")
    mine, other = snapshot(late), snapshot(early)
    assert mine.keys() == other.keys()
    assert all(far(mine[name], other[name]) == 0.0 for name in mine)


def test_a_snapshot_does_not_change_with_the_site():
    site = trained()
    kept = snapshot(site)
    before = {name: tensor.clone() for name, tensor in kept.items()}
    with torch.no_grad():
        for stage in site.stages.values():
            for parameter in stage.module.parameters():
                parameter.add_(1)
    assert all(far(kept[name], before[name]) == 0.0 for name in kept)


@pytest.mark.provokes("E803")
@pytest.mark.parametrize(
    "spoil",
    [
        lambda s: s.pop("head@0/p.linear.weight"),
        lambda s: s.update({"head@0/p.linear.weight": torch.zeros(2, 2)}),
        lambda s: s.pop("head@0/g.cpu"),
        lambda s: s.pop("metrics.loss@0/accuracy.tp"),
        lambda s: [s.pop(name) for name in list(s) if name.startswith("tail@0/")],
    ],
    ids=range(5),
)
def test_a_snapshot_of_other_modules_is_refused(spoil):
    site = trained()
    kept = snapshot(site)
    spoil(kept)
    with pytest.raises(CheckpointError) as caught:
        restore(site, kept, "checkpoint 3")
    assert caught.value.code == "E803"
    assert "checkpoint 3" in caught.value.where


def test_a_snapshot_of_other_metrics_is_refused():
    with pytest.raises(CheckpointError):
        restore(trained(), snapshot(trained(metrics=False)), "here")
