"""A forum, a shop and a maker of clothes find out together who recommends what, on 23,486 real reviews.

Vertical, with two kinds of data: the forum holds what customers wrote, the shop a table (age, department, class, stars
and so on), the maker whether the customer recommends the piece. Texts are of every length: the forum cuts them into
words with a vocabulary of its own, pads them, and masks the padding. No word, no column and no answer leaves its party.

    python examples/clothing_reviews.py          (--quick: one epoch of 2,000 reviews)

prints AUROC and accuracy of all together, beside the uncut network on the same batches (the same weights, bit for bit)
and beside what text or table reach alone; then bytes by cut, and where the results are.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import torch
from common import Fields, Recipe, finish, measured, options, same_bits, show, train_uncut
from torch import Tensor, nn, optim
from torch.nn.functional import binary_cross_entropy_with_logits, one_hot
from torchmetrics import Metric
from torchmetrics.classification import BinaryAccuracy, BinaryAUROC

import cutlayer as cl
from cutlayer.data.bundled import clothing_reviews
from cutlayer.data.holdout import holdout

LONGEST, WORDS, WIDTH = 64, 4000, 40  # words of a review, words in the vocabulary, columns of the table
INPUTS = {"text": ("tokens", "mask"), "table": ("columns",)}
EPOCHS, BATCH, SEED = 4, 64, 2
ADAM = Recipe(lambda parameters: optim.Adam(parameters, lr=2e-3))


class Words(nn.Module):
    """The forum's part: the mean and the largest of the embeddings of a review's words, padding left out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS + 2, 32, padding_idx=0)
        self.output = nn.Linear(64, 16)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        words, present = self.embedding(tokens), mask.unsqueeze(2)
        mean = (words * present).sum(1) / present.sum(1).clamp(min=1)
        return self.output(torch.cat([mean, words.masked_fill(~present, -10.0).amax(1)], 1))


class Join(nn.Module):
    """The maker's part."""

    def __init__(self, parties: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.ReLU(), nn.Linear(16 * parties, 32), nn.ReLU(), nn.Linear(32, 1), nn.Flatten(0))

    def forward(self, *parts: Tensor) -> Tensor:
        return self.layers(torch.cat(parts, 1))


def network(*heads: str) -> nn.ModuleDict:
    torch.manual_seed(SEED)
    made = {"text": Words(), "table": nn.Sequential(nn.Linear(WIDTH, 32), nn.ReLU(), nn.Linear(32, 16))}
    return nn.ModuleDict({**{name: made[name] for name in heads}, "join": Join(len(heads))})


def encoded(texts: list[str], train: Tensor) -> Tensor:
    """int64[reviews, LONGEST]: 0 padding, 1 a word outside the vocabulary of the training reviews, 2... the words."""
    words = [re.findall(r"[a-z']+", text.lower()) for text in texts]
    common = Counter(word for row in train.tolist() for word in words[row]).most_common(WORDS)
    places = {word: place for place, (word, _) in enumerate(common, 2)}
    rows = [[places.get(word, 1) for word in found[:LONGEST]] for found in words]
    return torch.tensor([row + [0] * (LONGEST - len(row)) for row in rows])


def columns(table: dict[str, Tensor], train: Tensor) -> Tensor:
    """float32[reviews, WIDTH]: age and votes, standardised by the shop's own training rows; categories as 0 and 1."""
    numbers = torch.stack([table["age"].float(), table["feedback"].float().log1p()], 1)
    numbers = (numbers - numbers[train].mean(0)) / numbers[train].std(0)
    return torch.cat([numbers, *(one_hot(table[n]).float() for n in ("division", "department", "class", "rating"))], 1)


def loss(logits: Tensor, recommended: Tensor) -> Tensor:
    return binary_cross_entropy_with_logits(logits, recommended.float())


def plan(epochs: int) -> cl.Plan:
    return cl.Plan(
        [
            cl.Stage("text", at="forum", inputs=["data.tokens", "data.mask"], output="float32[batch, 16]"),
            cl.Stage("table", at="shop", inputs=["data.columns"], output="float32[batch, 16]"),
            cl.Stage("join", at="maker", inputs=["text", "table"], output="float32[batch]"),
            cl.Loss("loss", at="maker", inputs=["join", "data.recommended"]),
        ],
        training=cl.Training(epochs=epochs, batch_size=BATCH, seed=SEED),
        name="text-and-table",
    )


def metrics() -> dict[str, Metric]:
    return {"auroc": BinaryAUROC(), "accuracy": BinaryAccuracy()}


def train_split(train: Fields, test: Fields, steps: cl.Plan) -> tuple[cl.Result, nn.ModuleDict]:
    parts = network("text", "table")

    def party(name: str, modules: dict[str, object], *fields: str, **more: object) -> cl.Party:
        own, held_out = (cl.TensorTable(**{field: rows[field] for field in fields}) for rows in (train, test))
        return cl.Party(name, modules=modules, data=own, evaluation=held_out, optimizer=ADAM.optimizer, **more)

    parties = [
        party("forum", {"text": parts["text"]}, "tokens", "mask"),
        party("shop", {"table": parts["table"]}, "columns"),
        party("maker", {"join": parts["join"], "loss": loss}, "recommended", metrics={"loss": metrics}),
    ]
    return cl.simulate(steps, parties), parts


def uncut(train: Fields, heads: tuple[str, ...], steps: cl.Plan) -> nn.ModuleDict:
    """The network with these heads, in one piece."""
    parts = network(*heads)
    train_uncut(parts, lambda rows: loss(scores(parts, rows), rows["recommended"]), {0: train}, steps.training, ADAM)
    return parts


def scores(parts: nn.ModuleDict, rows: Fields) -> Tensor:
    return parts["join"](*(parts[name](*(rows[field] for field in INPUTS[name])) for name in parts if name != "join"))


def main(words: Sequence[str] | None = None) -> dict[str, float]:
    chosen = options(__doc__, words)
    texts, table = clothing_reviews()
    split = holdout(table["item"])  # by piece of clothing: no review of a piece held out is trained on
    tokens = encoded(texts, split.train)
    fields = {"tokens": tokens, "mask": tokens > 0, "columns": columns(table, split.train)}
    fields["recommended"] = table["recommended"]
    places = (split.train[:2000] if chosen.quick else split.train, split.test)
    train, test = ({name: values[rows] for name, values in fields.items()} for rows in places)
    steps = plan(1 if chosen.quick else EPOCHS)
    print(steps, "\n", flush=True)
    result, parts = train_split(train, test, steps)
    whole = uncut(train, ("text", "table"), steps)
    rows = {"split, text and table": result.metrics("evaluate")["loss"]}
    alone = {f"{name} alone": uncut(train, (name,), steps) for name in INPUTS}
    for title, model in {"uncut network, same batches": whole, **alone}.items():
        with torch.no_grad():
            rows[title] = measured(metrics(), scores(model, test), test["recommended"])
    rows["always recommended"] = {"accuracy": float(test["recommended"].float().mean())}
    found = show(f"{len(split.test):,} reviews held out", rows, ["auroc", "accuracy"])
    found["equal"] = float(same_bits(parts, whole))
    finish(result, "clothing-reviews", chosen.runs, found)
    return found


if __name__ == "__main__":
    main()
