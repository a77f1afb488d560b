"""Several tensors on a cut, of several dtypes and lengths; tied weights; autocast: equal to the uncut model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from cutlayer.core.parts import Loss, Stage, Training
from cutlayer.core.plan import Plan
from cutlayer.data.sources import TensorTable
from cutlayer.engine.site import Parts, Site
from cutlayer.errors import ConfigError, StageError
from cutlayer.run.party import Party
from cutlayer.run.prediction import predict
from cutlayer.run.simulate import simulate
from tests.oracle import parts_of

WORDS, WIDTH, CLASSES = 11, 6, 3


def adam(parameters):
    return torch.optim.Adam(parameters, 1e-2)


class Texts(torch.utils.data.Dataset):
    """Sentences of unequal length; `collate` pads each batch to its longest."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(1)
        lengths = torch.randint(1, 9, (count,), generator=generator).tolist()
        self.rows = [torch.randint(1, WORDS, (length,), generator=generator) for length in lengths]
        self.labels = torch.randint(0, CLASSES, (count,), generator=generator)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor]:
        return self.rows[place], self.labels[place]

    @staticmethod
    def collate(items: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        words = nn.utils.rnn.pad_sequence([row for row, _ in items], batch_first=True)
        return {"words": words, "label": torch.stack([label for _, label in items])}


class Embed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, WIDTH)

    def forward(self, words: Tensor) -> dict[str, Tensor]:
        return {"states": self.table(words), "mask": words == 0}


class Encode(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        return self.attention(states, states, states, key_padding_mask=mask, need_weights=False)[0]


class Pool(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(WIDTH, CLASSES)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        kept = states.masked_fill(mask.unsqueeze(-1), 0.0).sum(1) / (~mask).sum(1, keepdim=True)
        return self.out(kept)


def text_plan(**training) -> Plan:
    stages = [
        Stage(
            "embed",
            at="clinic",
            inputs=["data.words"],
            output={"states": f"float32[batch, time<=8, {WIDTH}]", "mask": "bool[batch, time<=8]"},
        ),
        Stage("encode", at="server", inputs=["embed.states", "embed.mask"], output=f"float32[batch, time<=8, {WIDTH}]"),
        Stage("pool", at="clinic", inputs=["encode", "embed.mask"], output=f"float32[batch, {CLASSES}]"),
        Loss("loss", at="clinic", inputs=["pool", "data.label"]),
    ]
    return Plan(stages, training=Training(epochs=2, batch_size=8, **training))


def text_modules() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {"embed": Embed(), "encode": Encode(), "pool": Pool(), "loss": nn.CrossEntropyLoss()}


def text_parties(modules: dict[str, nn.Module], **more) -> list[Party]:
    modules = copy.deepcopy(modules)
    texts = Texts(21)
    loader = torch.utils.data.DataLoader(texts, batch_size=8, collate_fn=Texts.collate)
    mine = {name: module for name, module in modules.items() if name != "encode"}
    return [
        Party("clinic", data=loader, optimizer=adam, modules=mine, **more),
        Party("server", optimizer=adam, modules={"encode": modules["encode"]}),
    ]


def uncut_texts(modules: dict[str, nn.Module], plan: Plan) -> list[Tensor]:
    """A plain loop over the same batches, padded alike."""
    modules = copy.deepcopy(modules)
    embed, encode, pool, loss = modules.values()
    optimizer = adam([p for module in modules.values() for p in module.parameters()])
    texts, size = Texts(21), plan.training.batch_size
    for _ in (1, 2):
        for begin in range(0, 21, size):  # the loader's own order
            batch = Texts.collate([texts[place] for place in range(begin, min(begin + size, 21))])
            for rows in parts_of(range(len(batch["label"])), plan.training.microbatches):
                words, label = batch["words"][rows], batch["label"][rows]
                given = embed(words)
                states = encode(given["states"], given["mask"])
                score = loss(pool(states, given["mask"]), label) * (len(rows) / len(batch["label"]))
                score.backward()
            optimizer.step()
            optimizer.zero_grad()
    return [p for module in modules.values() for p in module.parameters()]


@pytest.mark.parametrize("microbatches", [1, 3])
@pytest.mark.parametrize("schedule", ["sequential", "1f1b"])
def test_texts_of_any_length_with_a_mask_on_the_cut(microbatches, schedule):
    plan, modules = text_plan(microbatches=microbatches, schedule=schedule), text_modules()
    result = simulate(plan, text_parties(modules))
    trained = {n: s.module for w in result.workers.values() for (n, _), s in w.site.stages.items()}
    own = [p for name in modules for p in trained[name].parameters()]
    for mine, theirs in zip(own, uncut_texts(modules, plan), strict=True):
        assert torch.equal(mine, theirs)
    masks = [row for key, row in result.ledgers["server"].flows.items() if key[4] == plan.graph.cuts(0)[1].index]
    assert [key[3] for key in result.ledgers["server"].flows if key[4] == plan.graph.cuts(0)[1].index] == ["up"]
    assert 0 < masks[0].payload <= 2 * 21 * 8  # a byte a word, and no gradient


def test_a_text_that_is_too_long_is_refused_before_it_leaves():
    plan = text_plan()
    texts = Texts(21)
    texts.rows[5] = torch.ones(9, dtype=torch.int64)
    modules = text_modules()
    party, server = text_parties(modules)
    loader = torch.utils.data.DataLoader(texts, batch_size=8, collate_fn=Texts.collate)
    longer = Party("clinic", data=loader, optimizer=adam, modules=party.modules)
    with pytest.raises(StageError) as caught:
        simulate(plan, [longer, server])
    assert caught.value.code == "E301"
    assert "port states" in str(caught.value)
    assert "<=8" in str(caught.value)


def test_predictions_of_a_port_are_named_by_it():
    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x * 2, x.sum(1)

    stages = [
        Stage("both", at="a", inputs=["data.x"], output={"wide": "float32[batch, 2]", "sum": "float32[batch]"}),
        Stage("end", at="b", inputs=["both.wide"], output="float32[batch, 2]"),
        Loss("first", at="a", inputs=["both.sum", "data.y"]),
        Loss("second", at="b", inputs=["end"]),
    ]
    x = torch.arange(8.0).reshape(4, 2)
    parties = [
        Party("a", prediction=TensorTable(x=x), modules={"both": Two(), "first": nn.MSELoss()}),
        Party("b", modules={"end": nn.Identity(), "second": nn.Identity()}),
    ]
    found = predict(Plan(stages), parties)
    assert found.keys() == {"both.sum", "end"}
    assert torch.equal(found["both.sum"], x.sum(1))
    assert torch.equal(found["end"], x * 2)


# --- tied weights ----------------------------------------------------------------------------------------------------


class Head(nn.Module):
    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.table = table

    def forward(self, words: Tensor) -> Tensor:
        return self.table(words)


class Tail(nn.Module):
    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.out = nn.Linear(WIDTH, WORDS, bias=False)
        self.out.weight = table.weight

    def forward(self, states: Tensor) -> Tensor:
        return self.out(states).transpose(1, 2)


def tied_modules(seed: int = 0) -> dict[str, nn.Module]:
    torch.manual_seed(seed)
    table = nn.Embedding(WORDS, WIDTH)
    return {
        "head": Head(table),
        "body": nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()),
        "tail": Tail(table),
        "loss": nn.CrossEntropyLoss(),
    }


def tied_plan(at: str | list[str], order: str = "relay") -> Plan:
    stages = [
        Stage("head", at=at, inputs=["data.x"], output=f"float32[batch, 4, {WIDTH}]"),
        Stage("body", at="server", inputs=["head"], output=f"float32[batch, 4, {WIDTH}]"),
        Stage("tail", at=at, inputs=["body"], output=f"float32[batch, {WORDS}, 4]"),
        Loss("loss", at=at, inputs=["tail", "data.y"]),
    ]
    return Plan(stages, training=Training(epochs=2, batch_size=6, order=order, shuffle=False))


def sentences(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, WORDS, (count, 4), generator=generator)
    return x, x.roll(-1, 1)


def uncut_tied(batches: list[list[tuple[Tensor, Tensor]]]) -> dict[str, nn.Module]:
    """One model with one table; each step adds the gradients of several batches, each weighted by its samples."""
    modules = tied_modules()
    parameters = {id(p): p for module in modules.values() for p in module.parameters()}
    optimizer = adam(list(parameters.values()))
    for step in batches:
        total = sum(len(x) for x, _ in step)
        for x, y in step:
            score = modules["tail"](modules["body"](modules["head"](x)))
            (modules["loss"](score, y) * (len(x) / total)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return modules


@pytest.mark.parametrize("clients", [1, 3])
def test_a_tied_weight_is_one_weight_in_a_relay(clients):
    names = ["a", "b", "c"][:clients]
    plan = tied_plan(names if clients > 1 else "a")
    data = {name: sentences(12, seed) for seed, name in enumerate(names)}
    result = simulate(plan, tied_parties(names, data))
    steps = [[(x[i : i + 6], y[i : i + 6])] for _ in (1, 2) for x, y in data.values() for i in (0, 6)]
    uncut = uncut_tied(steps)
    site = result.workers[names[-1]].site
    mine = {name: stage.module for (name, _), stage in site.stages.items()}
    assert torch.equal(mine["head"].table.weight, uncut["head"].table.weight)
    assert mine["tail"].out.weight is mine["head"].table.weight
    assert sum(len(b.parameters) for b in site.bundles.values()) == 1


def tied_parties(names: list[str], data: dict[str, tuple[Tensor, Tensor]]) -> list[Party]:
    clients = []
    for name in names:
        mine = {key: module for key, module in tied_modules().items() if key != "body"}
        table = TensorTable(x=data[name][0], y=data[name][1])
        clients.append(Party(name, data=table, optimizer=adam, modules=mine))
    return [*clients, Party("server", optimizer=adam, modules={"body": tied_modules()["body"]})]


def test_a_tied_weight_counts_once_when_replicas_step_together():
    """Their gradients are added stage by stage: a weight of two stages must not be added twice."""
    names = ["a", "b"]
    data = {name: sentences(12, seed) for seed, name in enumerate(names)}
    result = simulate(tied_plan(names, "parallel"), tied_parties(names, data))
    steps = [[(x[i : i + 6], y[i : i + 6]) for x, y in data.values()] for _ in (1, 2) for i in (0, 6)]
    uncut = uncut_tied(steps)
    for name in names:
        mine = {key: stage.module for (key, _), stage in result.workers[name].site.stages.items()}
        assert (mine["head"].table.weight - uncut["head"].table.weight).abs().max() < 1e-6
        assert mine["tail"].out.weight is mine["head"].table.weight


def test_replicas_at_one_party_keep_the_tie_each():
    plan = tied_plan(["a", "a"], "parallel")
    modules = {key: module for key, module in tied_modules().items() if key != "body"}
    site = Site(plan, Parts(party="a", modules=modules, optimizer=adam))
    for lane in (0, 1):
        assert site.stages["tail", lane].module.out.weight is site.stages["head", lane].module.table.weight
    assert site.stages["head", 0].module.table.weight is not site.stages["head", 1].module.table.weight


@pytest.mark.provokes("E228")
def test_a_weight_of_two_optimizers_is_refused():
    stages = [
        Stage("head", at=["a", "b"], inputs=["data.x"], output=f"float32[batch, 4, {WIDTH}]"),
        Stage("tail", at="a", inputs=["head"], output=f"float32[batch, {WORDS}, 4]"),
        Loss("loss", at="a", inputs=["tail"]),
    ]
    modules = tied_modules()
    parts = Parts(
        party="a",
        modules={"head": modules["head"], "tail": modules["tail"], "loss": nn.Identity()},
        optimizer=adam,
    )
    with pytest.raises(ConfigError) as caught:
        Site(Plan(stages), parts)
    assert caught.value.code == "E228"
    assert "'head' and 'tail' share a weight" in str(caught.value)


# --- autocast --------------------------------------------------------------------------------------------------------


def test_bfloat16_on_the_cut_under_autocast():
    stages = [
        Stage("head", at="a", inputs=["data.x"], output="bfloat16[batch, 16]"),
        Stage("body", at="b", inputs=["head"], output="bfloat16[batch, 3]"),
        Loss("loss", at="b", inputs=["body", "data.y"]),
    ]
    plan = Plan(stages, training=Training(batch_size=8, shuffle=False, epochs=2))
    torch.manual_seed(0)
    head, body = nn.Linear(5, 16), nn.Sequential(nn.ReLU(), nn.Linear(16, 3))
    x, y = torch.randn(16, 5), torch.randint(0, 3, (16,))
    uncut = copy.deepcopy(nn.Sequential(head, body))
    optimizer = adam(list(uncut.parameters()))
    for _ in (1, 2):
        for begin in (0, 8):
            with torch.autocast("cpu", torch.bfloat16):
                loss = nn.functional.cross_entropy(uncut(x[begin : begin + 8]), y[begin : begin + 8])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    parties = [
        Party("a", data=TensorTable(x=x), modules={"head": head}, optimizer=adam, autocast="bfloat16"),
        Party(
            "b",
            data=TensorTable(y=y),
            modules={"body": body, "loss": nn.CrossEntropyLoss()},
            optimizer=adam,
            autocast="bfloat16",
        ),
    ]
    result = simulate(plan, parties)
    for mine, theirs in zip([*head.parameters(), *body.parameters()], uncut.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert result.ledgers["a"].total("sent") == 2 * 16 * 16 * 2


def test_an_unknown_autocast_is_refused():
    with pytest.raises(ConfigError, match="unknown autocast"):
        Party("a", autocast="float8")
