"""A library and a server train a small GPT on the works of Shakespeare; the texts stay in the library.

U-shaped: embedding, first block and output are at the library, the other blocks at the server. Characters go in and
characters are predicted in the library, so neither texts nor losses leave it. The output layer *is* the embedding (tied
weights): both ends are at one party, and the weight is one parameter of its one optimizer.

    python examples/shakespeare_gpt.py           (--quick: 20 steps)

prints loss and perplexity on works held out, beside the uncut GPT on the same batches (the same weights, bit for bit),
beside what the library's own layers reach without the server's, and beside bigrams counted on all training works; then
a few lines that the trained model writes, bytes by cut, and where the results are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from common import Fields, Recipe, finish, options, same_bits, show, train_uncut
from torch import Tensor, nn, optim
from torch.nn.functional import cross_entropy, linear, scaled_dot_product_attention

import cutlayer as cl
from cutlayer.data.bundled import shakespeare
from cutlayer.data.holdout import holdout

TIME, WIDTH, HEADS = 64, 64, 4  # characters a sample, numbers a character, attention heads
STEPS, BATCH, SEED, RATE = 1600, 16, 4, 6e-3


class Block(nn.Module):
    """Attention to earlier characters, then a small network for each."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attend, self.project = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        wide = (nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.think = nn.Sequential(nn.LayerNorm(WIDTH), *wide)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, _ = x.shape
        parts = self.attend(self.norm(x)).view(batch, time, 3, HEADS, WIDTH // HEADS)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        seen = scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(seen.transpose(1, 2).reshape(batch, time, WIDTH))
        return x + self.think(x)


class Begin(nn.Module):
    """The library's first stage: embedding, positions, and a block."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, WIDTH)
        self.position = nn.Parameter(torch.zeros(TIME, WIDTH))
        self.block = Block()
        nn.init.normal_(self.embedding.weight, std=0.06)

    def forward(self, text: Tensor) -> Tensor:
        return self.block(self.embedding(text) + self.position[: text.shape[1]])


class End(nn.Module):
    """The library's last stage. Its weight is the embedding's, the same object."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.norm, self.weight = nn.LayerNorm(WIDTH), weight

    def forward(self, x: Tensor) -> Tensor:
        return linear(self.norm(x), self.weight)


def network(characters: int) -> nn.ModuleDict:
    torch.manual_seed(SEED)
    begin = Begin(characters)
    return nn.ModuleDict(
        {"begin": begin, "blocks": nn.Sequential(Block(), Block()), "end": End(begin.embedding.weight)}
    )


def gpt(parts: nn.ModuleDict, text: Tensor) -> Tensor:
    """Logits from all the parts that are there, in their order."""
    for part in parts.values():
        text = part(text)
    return text


def loss(logits: Tensor, following: Tensor) -> Tensor:
    """Nats a character: logits (batch, time, characters), following int64 (batch, time)."""
    return cross_entropy(logits.flatten(0, 1), following.flatten())


def plan(characters: int) -> cl.Plan:
    inner = f"float32[batch, {TIME}, {WIDTH}]"
    stages = [
        cl.Stage("begin", at="library", inputs=["data.text"], output=inner),
        cl.Stage("blocks", at="server", inputs=["begin"], output=inner),
        cl.Stage("end", at="library", inputs=["blocks"], output=f"float32[batch, {TIME}, {characters}]"),
        cl.Loss("loss", at="library", inputs=["end", "data.following"]),
    ]
    return cl.Plan(stages, training=cl.Training(batch_size=BATCH, seed=SEED), name="gpt")


def windows(text: Tensor, count: int) -> dict[str, Tensor]:
    """`count` samples spread over a text: TIME characters each, and the characters that follow them."""
    begins = torch.linspace(0, len(text) - TIME - 1, count).long()
    rows = begins.unsqueeze(1) + torch.arange(TIME + 1)
    return {"text": text[rows][:, :-1], "following": text[rows][:, 1:]}


def bigrams(text: Tensor, test: Fields, characters: int) -> float:
    """Nats a character if only the character before counts: how often which follows which in the training works."""
    counts = torch.ones(characters, characters)
    counts.index_put_((text[:-1], text[1:]), torch.ones(len(text) - 1), accumulate=True)
    return float(loss((counts / counts.sum(1, keepdim=True)).log()[test["text"]], test["following"]))


def written(parts: nn.ModuleDict, alphabet: Tensor, start: str, length: int) -> str:
    draws, text = torch.Generator().manual_seed(SEED), encoded(start, alphabet)
    for _ in range(length):
        with torch.no_grad():
            scores = gpt(parts, text[-TIME:].unsqueeze(0))[0, -1]
        text = torch.cat([text, torch.multinomial((scores / 0.7).softmax(0), 1, generator=draws)])
    return bytes(alphabet[text].tolist()).decode("ascii")


def encoded(text: str, alphabet: Tensor) -> Tensor:
    """int64[characters]: the place of each in the alphabet (ASCII codes, ascending)."""
    return torch.searchsorted(alphabet, torch.frombuffer(bytearray(text, "ascii"), dtype=torch.uint8))


def uncut(parts: nn.ModuleDict, train: Fields, training: cl.Training, recipe: Recipe) -> nn.ModuleDict:
    """These parts as one network, trained in one piece."""
    train_uncut(parts, lambda b: loss(gpt(parts, b["text"]), b["following"]), {0: train}, training, recipe)
    return parts


def train_split(
    shape: cl.Plan, train: Fields, test: Fields, recipe: Recipe, characters: int
) -> tuple[cl.Result, nn.ModuleDict]:
    parts = network(characters)
    ends = {"begin": parts["begin"], "end": parts["end"], "loss": loss}
    data, evaluation = cl.TensorTable(**train), cl.TensorTable(**test)
    library = cl.Party("library", modules=ends, data=data, evaluation=evaluation, **vars(recipe))
    server = cl.Party("server", modules={"blocks": parts["blocks"]}, **vars(recipe))
    return cl.simulate(shape, [library, server]), parts


def main(words: Sequence[str] | None = None) -> dict[str, float]:
    chosen = options(__doc__, words)
    steps, tested = (20, 64) if chosen.quick else (STEPS, 512)
    works = shakespeare()
    alphabet = torch.frombuffer(bytearray("".join(works.values()), "ascii"), dtype=torch.uint8).unique()
    split, texts = holdout(works), list(works.values())  # whole works
    text, unseen = (encoded("".join(texts[row] for row in rows), alphabet) for rows in (split.train, split.test))
    train, test = windows(text, steps * BATCH), windows(unseen, tested)
    recipe = Recipe(
        lambda p: optim.AdamW(p, lr=RATE),
        lambda o: optim.lr_scheduler.OneCycleLR(o, RATE, total_steps=steps, pct_start=0.15),
        "step",
    )
    shape = plan(len(alphabet))
    print(shape, "\n", flush=True)
    result, parts = train_split(shape, train, test, recipe, len(alphabet))
    whole = uncut(network(len(alphabet)), train, shape.training, recipe)
    ends = network(len(alphabet))
    del ends["blocks"]
    models = {"uncut GPT, same batches": whole}
    models["library alone, its own layers"] = uncut(ends, train, shape.training, recipe)

    nats = {"split, library and server": result.metrics("evaluate")["loss"]["loss"]}
    for title, model in models.items():
        with torch.no_grad():
            nats[title] = float(loss(gpt(model, test["text"]), test["following"]))
    nats["bigrams of all training works"] = bigrams(text, test, len(alphabet))
    rows = {model: {"loss": value, "perplexity": math.exp(value)} for model, value in nats.items()}
    found = show(f"a character of {len(split.test)} works held out", rows, ["loss", "perplexity"])
    found["equal"] = float(same_bits(parts, whole))
    print(f"\n{written(whole, alphabet, 'KING.', 200)}")
    finish(result, "shakespeare-gpt", chosen.runs, found)
    return found


if __name__ == "__main__":
    main()
