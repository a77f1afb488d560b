"""Two hospitals and a server segment grey and white matter in brain scans with a U-Net that none of them holds whole.

U-shaped in both senses: scans, tissue maps, the first and the last layers and both long skips of the U-Net stay at the
hospital; only its lowest level is at the server. The hospitals take turns and hand their layers on (relay).

The data is **one subject**: the MNI152 template, an average of 152 adults, cut into slices. It shows that a U-Net can
be cut across its skips and learns; it is no evidence for patients. To give the network something to do, each slice gets
what scanners add: a smooth change of brightness and noise (simulated, fixed seed). Slabs of slices are held out, with
three slices between them and the training slices, and only one hemisphere is used, as the other is its mirror image.

    python examples/mri_segmentation.py          (--quick: one epoch)

prints Dice scores beside the uncut U-Net on the same batches (the same weights, bit for bit), beside what each hospital
reaches alone, and beside the two best thresholds of brightness; then bytes by cut, and where the results are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from common import Fields, Recipe, finish, options, same_bits, show, train_uncut
from torch import Tensor, nn, optim
from torch.nn.functional import avg_pool2d, cross_entropy, interpolate
from torchmetrics.classification import MulticlassF1Score

import cutlayer as cl
from cutlayer.data.bundled import brain_slices

HOSPITALS = ("hospital-a", "hospital-b")
HELD_OUT, SLAB, GAP = (50, 90, 125), 10, 3  # first slices held out, thickness of a slab, slices left out beside
EPOCHS, BATCH, SEED = 12, 4, 3


def block(inputs: int, outputs: int) -> nn.Sequential:
    first = (nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())
    return nn.Sequential(
        *first, nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class Encoder(nn.Module):
    """The hospital's way down. Its outputs are ports of the stage: one goes to the server, two stay for the way up."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = block(1, 8), nn.Sequential(nn.MaxPool2d(2), block(8, 16))
        self.pool = nn.MaxPool2d(2)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        fine = self.fine(image)
        coarse = self.coarse(fine)
        return {"deep": self.pool(coarse), "coarse": coarse, "fine": fine}


class Decoder(nn.Module):
    """The hospital's way up: what came back, joined with the skips that never left."""

    def __init__(self) -> None:
        super().__init__()
        self.coarse, self.fine, self.classes = block(32 + 16, 16), block(16 + 8, 8), nn.Conv2d(8, 3, 1)

    def forward(self, deep: Tensor, coarse: Tensor, fine: Tensor) -> Tensor:
        up = self.coarse(torch.cat([interpolate(deep, scale_factor=2.0), coarse], 1))
        return self.classes(self.fine(torch.cat([interpolate(up, scale_factor=2.0), fine], 1)))


def network() -> nn.ModuleDict:
    torch.manual_seed(SEED)
    bottom = nn.Sequential(block(16, 32), nn.MaxPool2d(2), block(32, 32), nn.Upsample(scale_factor=2.0), block(32, 32))
    return nn.ModuleDict({"encoder": Encoder(), "bottom": bottom, "decoder": Decoder()})


def unet(parts: nn.ModuleDict, image: Tensor) -> Tensor:
    down = parts["encoder"](image)
    return parts["decoder"](parts["bottom"](down["deep"]), down["coarse"], down["fine"])


def plan(epochs: int) -> cl.Plan:
    ports = {
        "deep": "float32[batch, 16, 24, 10]",
        "coarse": "float32[batch, 16, 48, 20]",
        "fine": "float32[batch, 8, 96, 40]",
    }
    stages = [
        cl.Stage("encoder", at=HOSPITALS, inputs=["data.image"], output=ports),
        cl.Stage("bottom", at="server", inputs=["encoder.deep"], output="float32[batch, 32, 24, 10]"),
        cl.Stage("decoder", at=HOSPITALS, inputs=["bottom", "encoder.coarse", "encoder.fine"],
                 output="float32[batch, 3, 96, 40]"),
        cl.Loss("loss", at=HOSPITALS, inputs=["decoder", "data.tissue"]),
    ]  # fmt: skip
    return cl.Plan(stages, training=cl.Training(epochs=epochs, batch_size=BATCH, seed=SEED), name="u-net")


def slices() -> tuple[Fields, dict[str, tuple[Tensor, Tensor]]]:
    """Scans and tissue maps of one hemisphere at 2 mm; the places of each hospital's training and test slices."""
    brain = brain_slices()
    halves = (brain[name].reshape(-1, 1, 192, 160)[..., 80:] for name in ("image", "grey", "white"))
    clean, grey, white = (avg_pool2d(half, 2) for half in halves)
    draws = torch.Generator().manual_seed(0)
    coarse = torch.rand(len(clean), 1, 4, 3, generator=draws) - 0.5
    bright = clean * interpolate(coarse, size=clean.shape[2:], mode="bicubic", align_corners=True).exp()
    real, imaginary = (0.04 * torch.randn(clean.shape, generator=draws) for _ in range(2))
    scanned = ((bright + real).square() + imaginary.square()).sqrt()  # the magnitude of a noisy signal
    tissue = torch.stack([1 - grey - white, grey, white]).argmax(0).squeeze(1)
    place = torch.arange(len(clean))
    held_out, near = (
        torch.stack([(place >= s - g) & (place < s + SLAB + g) for s in HELD_OUT]).any(0) for g in (0, GAP)
    )
    owner = place // 8 % len(HOSPITALS)
    rows = {
        name: ((~near & (owner == lane)).nonzero().flatten(), (held_out & (owner == lane)).nonzero().flatten())
        for lane, name in enumerate(HOSPITALS)
    }
    return {"image": scanned, "clean": clean, "tissue": tissue}, rows


def dice(found: Tensor, tissue: Tensor) -> dict[str, float]:
    """Dice's score, the overlap of two tissue maps (the same as F1 over pixels)."""
    both = {name: (found == place, tissue == place) for place, name in enumerate(("grey", "white"), 1)}
    return {name: 2 * int((a & b).sum()) / int(a.sum() + b.sum()) for name, (a, b) in both.items()}


def levelled(image: Tensor, low: float, high: float) -> Tensor:
    """Tissue by brightness alone."""
    return ((image > low).long() + (image > high).long()).squeeze(1)


def by_thresholds(image: Tensor, tissue: Tensor, train: Tensor, test: Tensor) -> dict[str, float]:
    """Dice of the two levels of brightness that are best on the training slices."""
    pairs = [(low / 100, high / 100) for low in range(20, 80, 4) for high in range(40, 110, 4) if low < high]
    best = max(pairs, key=lambda pair: sum(dice(levelled(image[train], *pair), tissue[train]).values()))
    return dice(levelled(image[test], *best), tissue[test])


def train_split(fields: Fields, rows: dict, steps: cl.Plan, recipe: Recipe) -> tuple[cl.Result, nn.ModuleDict]:
    held = network()
    parties = [cl.Party("server", modules={"bottom": held["bottom"]}, **vars(recipe))]
    for name, (train, test) in rows.items():
        parts = network()
        own, unseen = (cl.TensorTable(image=fields["image"][r], tissue=fields["tissue"][r]) for r in (train, test))
        modules = {"encoder": parts["encoder"], "decoder": parts["decoder"], "loss": cross_entropy}
        metrics = {"loss": lambda: {"dice": MulticlassF1Score(3, average="none")}}
        parties.append(cl.Party(name, modules=modules, data=own, evaluation=unseen, metrics=metrics, **vars(recipe)))
        held.update({"encoder": parts["encoder"], "decoder": parts["decoder"]})
    return cl.simulate(steps, parties), held


def uncut(lanes: Mapping[int, Fields], training: cl.Training, recipe: Recipe) -> nn.ModuleDict:
    """The U-Net in one piece, on the slices of these hospitals, one after another in each epoch."""
    whole = network()
    train_uncut(whole, lambda b: cross_entropy(unet(whole, b["image"]), b["tissue"]), lanes, training, recipe)
    return whole


def main(words: Sequence[str] | None = None) -> dict[str, float]:
    chosen = options(__doc__, words)
    epochs = 1 if chosen.quick else EPOCHS
    fields, rows = slices()
    recipe = Recipe(lambda p: optim.Adam(p, lr=5e-3), lambda o: optim.lr_scheduler.CosineAnnealingLR(o, epochs))
    steps = plan(epochs)
    print(steps, "\n", flush=True)
    result, parts = train_split(fields, rows, steps, recipe)
    _, grey, white = result.metrics("evaluate")["loss"]["dice"]
    lanes = {k: {n: values[train] for n, values in fields.items()} for k, (train, _) in enumerate(rows.values())}
    whole = uncut(lanes, steps.training, recipe)
    models = {"uncut U-Net, same batches": whole}
    for lane, name in enumerate(HOSPITALS):
        models[f"{name} alone"] = uncut({lane: lanes[lane]}, steps.training, recipe)

    train, test = (torch.cat(places) for places in zip(*rows.values(), strict=True))
    found = {"split, two hospitals and a server": {"grey": grey, "white": white}}
    for title, model in models.items():
        with torch.no_grad():
            found[title] = dice(unet(model, fields["image"][test]).argmax(1), fields["tissue"][test])
    found["two thresholds"] = by_thresholds(fields["image"], fields["tissue"], train, test)
    found["two thresholds, undisturbed scans"] = by_thresholds(fields["clean"], fields["tissue"], train, test)
    numbers = show(f"Dice on {len(test)} slices held out", found, ["grey", "white"])
    numbers["equal"] = float(same_bits(parts, whole))
    finish(result, "mri-segmentation", chosen.runs, numbers)
    return numbers


if __name__ == "__main__":
    main()
