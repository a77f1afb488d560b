"""A clinic, a laboratory and a registry diagnose thyroid patients together, on 9,172 real patients.

Vertical: all three know the same people. The clinic holds age, sex, history and referral; the laboratory five blood
values, of which one in eight was never measured; the registry holds the diagnoses, in eight groups. Features and
diagnoses stay where they are: 16 numbers a patient leave the clinic and the laboratory, gradients come back.

    python examples/thyroid_vertical.py          (--quick: one epoch)

prints AUROC and accuracy of all together, beside the uncut network on the same batches (the same weights, bit for bit)
and beside what clinic or laboratory reach without the other; then bytes by cut, and where the results are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from common import Fields, Recipe, finish, measured, options, same_bits, show, train_uncut
from torch import Tensor, nn, optim
from torch.nn.functional import cross_entropy
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC

import cutlayer as cl
from cutlayer.data.bundled import thyroid
from cutlayer.data.holdout import holdout
from cutlayer.data.records import DIAGNOSES

WIDTHS = {"clinic": 24, "laboratory": 10}
EPOCHS, BATCH, SEED = 12, 64, 5
ADAM = Recipe(lambda parameters: optim.Adam(parameters, lr=3e-3))


class Join(nn.Module):
    """The registry's part: what clinic and laboratory say of a patient, together."""

    def __init__(self, parties: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16 * parties, 32), nn.ReLU(), nn.Linear(32, len(DIAGNOSES)))

    def forward(self, *parts: Tensor) -> Tensor:
        return self.layers(torch.cat(parts, 1))


def network(*parties: str) -> nn.ModuleDict:
    """Stage name -> its module: a head for each party, and the body."""
    torch.manual_seed(SEED)
    heads = {f"head-{p}": nn.Sequential(nn.Linear(WIDTHS[p], 32), nn.ReLU(), nn.Linear(32, 16)) for p in parties}
    return nn.ModuleDict({**heads, "body": Join(len(parties))})


def prepared(values: Tensor, train: Tensor) -> Tensor:
    """Standardise columns by one's own training patients. A gap becomes 0, with a column that says so."""
    gaps = values.isnan()
    mean = values[train].nanmean(0)
    deviation = (values[train] - mean).square().nanmean(0).sqrt().clamp(min=1e-6)
    return torch.cat([((values - mean) / deviation).nan_to_num(0.0), gaps[:, gaps[train].any(0)].float()], 1)


def plan(epochs: int) -> cl.Plan:
    cuts = {"clinic": "float32[batch, 16]", "laboratory": "float32[batch, 16]"}
    output = f"float32[batch, {len(DIAGNOSES)}]"
    return cl.vertical(cuts, "registry", output=output, epochs=epochs, batch_size=BATCH, seed=SEED)


def train_split(train: Fields, test: Fields, steps: cl.Plan) -> tuple[cl.Result, nn.ModuleDict]:
    parts = network(*WIDTHS)

    def party(name: str, modules: dict[str, object], held: str, field: str, **more: object) -> cl.Party:
        own, held_out = (cl.TensorTable(**{field: rows[held]}) for rows in (train, test))
        return cl.Party(name, modules=modules, data=own, evaluation=held_out, optimizer=ADAM.optimizer, **more)

    clinic, laboratory = (party(name, {f"head-{name}": parts[f"head-{name}"]}, name, "x") for name in WIDTHS)
    modules = {"body": parts["body"], "loss": cross_entropy}
    registry = party("registry", modules, "diagnosis", "y", metrics={"loss": metrics})
    return cl.simulate(steps, [clinic, laboratory, registry]), parts


def uncut(train: Fields, parties: tuple[str, ...], steps: cl.Plan) -> nn.ModuleDict:
    """The network of these parties in one piece, with all their columns in one place."""
    parts = network(*parties)
    train_uncut(
        parts, lambda rows: cross_entropy(scores(parts, rows), rows["diagnosis"]), {0: train}, steps.training, ADAM
    )
    return parts


def scores(parts: nn.ModuleDict, rows: Fields) -> Tensor:
    heads = [name for name in parts if name != "body"]
    return parts["body"](*(parts[name](rows[name.removeprefix("head-")]) for name in heads))


def metrics() -> dict[str, Metric]:
    """On the patients held out: AUROC (mean over the eight groups) and accuracy."""
    return {"auroc": MulticlassAUROC(len(DIAGNOSES)), "accuracy": MulticlassAccuracy(len(DIAGNOSES), average="micro")}


def main(words: Sequence[str] | None = None) -> dict[str, float]:
    chosen = options(__doc__, words)
    table = thyroid()
    split = holdout(table["patient"], share=0.25)  # each party by itself: patients' identifiers are enough
    fields = {
        "clinic": prepared(table["clinic"], split.train),
        "laboratory": prepared(table["laboratory"].log(), split.train),
        "diagnosis": table["diagnosis"],
    }
    train, test = ({name: values[rows] for name, values in fields.items()} for rows in (split.train, split.test))
    steps = plan(1 if chosen.quick else EPOCHS)
    print(steps, "\n", flush=True)
    result, parts = train_split(train, test, steps)
    whole = uncut(train, tuple(WIDTHS), steps)
    rows = {"split, clinic and laboratory": result.metrics("evaluate")["loss"]}
    alone = {f"{name} alone": uncut(train, (name,), steps) for name in WIDTHS}
    for title, model in {"uncut network, same batches": whole, **alone}.items():
        with torch.no_grad():
            rows[title] = measured(metrics(), scores(model, test), test["diagnosis"])
    rows["always the largest group"] = {"accuracy": float((test["diagnosis"] == 0).float().mean())}
    found = show(f"{len(split.test):,} patients held out", rows, ["auroc", "accuracy"])
    found["equal"] = float(same_bits(parts, whole))
    finish(result, "thyroid-vertical", chosen.runs, found)
    return found


if __name__ == "__main__":
    main()
