"""Three shops and a server train a ResNet on pictures of clothes; neither pictures nor labels leave a shop.

U-shaped, by the short way: `cl.split` cuts an ordinary network after a named submodule and finds by itself what
crosses, `cl.fit` trains it. Stem, first residual stage and classifier are at the shops, which take turns and hand them
on (relay); most of the network is at the server. The pictures are 14,000 of Fashion-MNIST's 60,000, shared out
unequally; the test is on its 10,000 test pictures.

    python examples/fashion_resnet.py            (--quick: a few steps)

prints test accuracy beside the uncut ResNet on the same batches (the same weights, bit for bit) and beside what each
shop reaches alone; then bytes by cut, and where the results are. `joined.safetensors` there is the uncut ResNet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from common import Fields, Recipe, finish, measured, options, same_bits, show, train_uncut
from torch import Tensor, nn, optim
from torch.nn.functional import cross_entropy
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

import cutlayer as cl
from cutlayer.data.bundled import fashion_mnist

SHOPS = (8000, 4000, 2000)  # pictures of each
EPOCHS, BATCH, SEED = 3, 50, 6
QUICK = (200, 100, 50)


class Block(nn.Module):
    """Two convolutions with a way around them (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)])
        self.around = nn.Identity() if stride == 1 else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        inner = self.norms[0](self.first(image)).relu()
        return (self.norms[1](self.second(inner)) + self.around(image)).relu()


class ResNet(nn.Module):
    """An ordinary network: it knows nothing of cuts."""

    def __init__(self) -> None:
        super().__init__()
        stem = (nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2))
        self.stem = nn.Sequential(*stem)
        self.stage1, self.stage2, self.stage3 = Block(16, 16), Block(16, 32, 2), Block(32, 64, 2)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Linear(64, 10)

    def forward(self, image: Tensor) -> Tensor:
        deep = self.stage3(self.stage2(self.stage1(self.stem(image))))
        return self.classifier(self.pool(deep))


def network() -> ResNet:
    torch.manual_seed(SEED)
    return ResNet()


def metrics() -> dict[str, Metric]:
    return {"accuracy": MulticlassAccuracy(10, average="micro")}


def shared_out(fields: Fields, counts: Sequence[int]) -> list[Fields]:
    """Each shop's own samples: the next `count` of a mixed order."""
    order = torch.randperm(len(fields["label"]), generator=torch.Generator().manual_seed(0))
    parts = order[: sum(counts)].split(list(counts))
    return [{name: values[rows] for name, values in fields.items()} for rows in parts]


def train_split(train: Sequence[Fields], test: Sequence[Fields], recipe: Recipe, epochs: int) -> cl.Run:
    """All that a user writes: cut the network, and train it with what each shop holds."""
    split = cl.split(network(), at="stage1", example=train[0]["image"][:2], labels="client")
    return cl.fit(
        split,
        [cl.TensorTable(**fields) for fields in train],
        loss=cross_entropy,
        optimizer=recipe.optimizer,
        evaluation=[cl.TensorTable(**fields) for fields in test],
        party={"metrics": {"loss": metrics}, "scheduler": recipe.scheduler},
        epochs=epochs,
        batch_size=BATCH,
        seed=SEED,
    )


def uncut(lanes: Mapping[int, Fields], recipe: Recipe, training: cl.Training) -> ResNet:
    """The network in one piece, on the pictures of these shops, one after another in each epoch."""
    whole = network()
    train_uncut(whole, lambda rows: cross_entropy(whole(rows["image"]), rows["label"]), lanes, training, recipe)
    return whole


def main(words: Sequence[str] | None = None) -> dict[str, float]:
    chosen = options(__doc__, words)
    epochs, counts = (1, QUICK) if chosen.quick else (EPOCHS, SHOPS)
    train, test = (dict(zip(("image", "label"), fashion_mnist(train=own), strict=True)) for own in (True, False))
    if chosen.quick:
        test = {name: values[:300] for name, values in test.items()}
    held = shared_out(train, counts)
    recipe = Recipe(lambda p: optim.Adam(p, lr=4e-3), lambda o: optim.lr_scheduler.CosineAnnealingLR(o, epochs))
    third = -(-len(test["label"]) // 3)
    run = train_split(held, shared_out(test, (third, third, len(test["label"]) - 2 * third)), recipe, epochs)
    print(run.result.plan, "\n", flush=True)
    joined, training = network(), run.result.plan.training
    joined.load_state_dict(run.state_dict(), strict=True)

    whole = uncut(dict(enumerate(held)), recipe, training)
    alone = {f"shop {n + 1} alone, {counts[n]:,} pictures": {n: fields} for n, fields in enumerate(held)}
    rows = {"split, three shops and a server": run.result.metrics("evaluate")["loss"]}
    models = {"uncut ResNet, same batches": whole}
    models |= {title: uncut(lane, recipe, training) for title, lane in alone.items()}
    for title, model in models.items():
        with torch.no_grad():
            rows[title] = measured(metrics(), model(test["image"]), test["label"])
    found = show(f"{len(test['label']):,} pictures held out", rows, ["accuracy"])
    found["equal"] = float(same_bits({"network": joined}, {"network": whole}))
    finish(
        run.result, "fashion-resnet", chosen.runs, found, then=lambda folder: run.save(folder / "joined.safetensors")
    )
    return found


if __name__ == "__main__":
    main()
