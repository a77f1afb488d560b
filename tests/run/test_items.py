"""What a data set may give: dictionaries, tuples, arrays, texts beside a table; and what it may not."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cutlayer as cl
from cutlayer.core.parts import Loss, Shared, Stage, Training
from cutlayer.core.plan import Plan
from cutlayer.data.sources import TensorTable
from cutlayer.errors import DataError, StageError
from cutlayer.run.party import Party
from cutlayer.run.simulate import simulate
from tests.small import adam

WORDS, WIDTH, CLASSES = 11, 6, 3


class Row(NamedTuple):
    x: Any
    y: Any


ITEMS = {
    "dictionaries of tensors": lambda x, y: {"x": torch.tensor(x), "y": torch.tensor(y), "more": torch.zeros(2)},
    "dictionaries of arrays": lambda x, y: {"x": np.array(x, dtype=np.float32), "y": np.int64(y)},
    "tuples": lambda x, y: (torch.tensor(x), y),
    "named tuples": lambda x, y: Row(torch.tensor(x), y),
}


@pytest.mark.parametrize("loader", [True, False], ids=["loader", "data set"])
@pytest.mark.parametrize("kind", ITEMS)
def test_items_of_every_kind_give_the_same_training(kind, loader):
    rows = [([float(place), 1.0], place % 2) for place in range(8)]
    items = [ITEMS[kind](*row) for row in rows]
    data: Any = torch.utils.data.DataLoader(items, batch_size=4) if loader else items  # type: ignore[arg-type]
    plan = Plan(
        [
            Stage("head", at="a", inputs=["data.x"], output="float32[batch, 3]"),
            Stage("body", at="b", inputs=["head"], output="float32[batch, 2]"),
            Loss("loss", at="a", inputs=["body", "data.y"]),
        ],
        training=Training(batch_size=4, shuffle=False),
    )
    torch.manual_seed(0)
    head, body = nn.Linear(2, 3), nn.Linear(3, 2)
    uncut = copy.deepcopy(nn.Sequential(head, body))
    fields = ["x", "y"] if kind == "tuples" else None
    simulate(
        plan,
        [
            Party("a", data=data, modules={"head": head, "loss": nn.CrossEntropyLoss()}, optimizer=adam, fields=fields),
            Party("b", modules={"body": body}, optimizer=adam),
        ],
    )
    optimizer = adam(list(uncut.parameters()))
    for begin in (0, 4):
        x, y = (
            torch.tensor([r[0] for r in rows[begin : begin + 4]]),
            torch.tensor([r[1] for r in rows[begin : begin + 4]]),
        )
        F.cross_entropy(uncut(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(head.weight, uncut[0].weight)
    assert torch.equal(body.weight, uncut[1].weight)


FIELDS = {
    "missing": ({"z": torch.ones(4)}, "got fields z"),
    "an array": ({"x": np.ones((4, 2))}, "got a ndarray"),
    "texts": ({"x": ["a", "b", "c", "d"]}, "got a list"),
    "a row too few": ({"x": torch.ones(3, 2)}, r"got shape \[3, 2\]"),
    "a scalar": ({"x": torch.ones(())}, r"got shape \[\]"),
    "numbered": ({1: torch.ones(4)}, "got fields 1"),
}


@pytest.mark.provokes("E253")
@pytest.mark.parametrize("name", FIELDS)
def test_a_field_that_cannot_be_used_is_named(name):
    batch, got = FIELDS[name]
    plan = Plan(
        [Stage("head", at="a", inputs=["data.x"], output="float32[batch]"), Loss("loss", at="a", inputs=["head"])],
        training=Training(batch_size=4),
    )
    loader = torch.utils.data.DataLoader(list(range(4)), batch_size=4, collate_fn=lambda _: batch)  # type: ignore[arg-type]
    party = Party("a", data=loader, modules={"head": nn.Linear(2, 1), "loss": torch.mean}, optimizer=adam)
    with pytest.raises(DataError, match=got) as caught:
        simulate(plan, [party])
    assert caught.value.code == "E253"
    assert "no usable field 'x'" in caught.value.what


def test_texts_and_a_table_become_numbers_at_their_party():
    """Words of a column are agreed on as categories; a table is scaled, its gaps become 0."""

    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.out = nn.Embedding(4, 2), nn.Linear(4, 3)

        def forward(self, ward: Tensor, values: Tensor) -> Tensor:
            return self.out(torch.cat([self.table(ward), values], 1))

    stages = [
        Stage("head", at="a", inputs=["data.ward", "data.values"], output="float32[batch, 3]"),
        Stage("body", at="b", inputs=["head"], output="float32[batch, 2]"),
        Loss("loss", at="a", inputs=["body", "data.y"]),
    ]
    plan = Plan(
        stages,
        training=Training(batch_size=4, shuffle=False),
        preprocessing=[Shared("ward", at="a", kind="categories"), Shared("values", at="a")],
    )
    values = torch.tensor([[1.0, 2.0], [3.0, float("nan")], [5.0, 4.0], [7.0, 6.0]])
    wards = ["b", "a", "c", "a"]
    items = [{"ward": w, "values": v, "y": place % 2} for place, (w, v) in enumerate(zip(wards, values, strict=True))]
    torch.manual_seed(0)
    head, body = Read(), nn.Linear(3, 2)
    first, second = copy.deepcopy(head), copy.deepcopy(body)
    simulate(
        plan,
        [
            Party("a", data=items, modules={"head": head, "loss": nn.CrossEntropyLoss()}, optimizer=adam),
            Party("b", modules={"body": body}, optimizer=adam),
        ],
    )
    seen = values.double()
    mean = seen.nanmean(0)
    deviation = ((seen - mean) ** 2).nanmean(0).sqrt()
    scaled = ((seen - mean) / deviation).nan_to_num(0.0).float()
    optimizer = adam([*first.parameters(), *second.parameters()])
    F.cross_entropy(second(first(torch.tensor([2, 1, 3, 1]), scaled)), torch.tensor([0, 1, 0, 1])).backward()
    optimizer.step()
    assert torch.allclose(head.out.weight, first.out.weight, atol=1e-7)
    assert torch.equal(head.table.weight.sign(), first.table.weight.sign())


class Patient(nn.Module):
    """Words with a padding mask, and a table beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(WORDS, WIDTH), nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.facts, self.out = nn.Linear(2, WIDTH), nn.Linear(2 * WIDTH, CLASSES)

    def forward(self, words: Tensor, padding: Tensor, facts: Tensor) -> Tensor:
        states = self.norm(self.table(words))
        states = self.attention(states, states, states, key_padding_mask=padding, need_weights=False)[0]
        states = states.masked_fill(padding.unsqueeze(-1), 0.0).sum(1)
        return self.out(torch.cat([states, torch.relu(self.facts(facts))], 1))


@pytest.mark.parametrize("labels", ["client", "server"])
def test_five_lines_with_a_dictionary_of_tensors(labels):
    """`cl.split` and `cl.fit`: inputs by the names of forward; the mask leaves only if it is released."""
    generator = torch.Generator().manual_seed(0)
    fields = {
        "words": torch.randint(1, WORDS, (12, 7), generator=generator),
        "padding": torch.rand(12, 7, generator=generator) < 0.3,
        "facts": torch.randn(12, 2, generator=generator),
        "label": torch.randint(0, CLASSES, (12,), generator=generator),
    }
    fields["padding"][:, 0] = False
    table = TensorTable(**fields)
    torch.manual_seed(0)
    model = Patient()
    uncut = copy.deepcopy(model)
    example = {name: value[:3] for name, value in fields.items() if name != "label"}
    release = ["padding", "facts"] if labels == "server" else []
    at = ["norm"] if labels == "server" else ["table", "norm"]
    split = cl.split(model, at=at, example=example, labels=labels, release=release)
    run = cl.fit(split, torch.utils.data.DataLoader(table, batch_size=4), loss=nn.CrossEntropyLoss(), epochs=2)
    optimizer = torch.optim.Adam(uncut.parameters())
    for _ in (1, 2):
        for begin in range(0, 12, 4):
            rows = slice(begin, begin + 4)
            given = {name: fields[name][rows] for name in example}
            F.cross_entropy(uncut(**given), fields["label"][rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
    trained = run.state_dict()
    assert all(torch.equal(trained[name], value) for name, value in uncut.state_dict().items())
    plan = run.result.plan
    parties = [
        Party(at, modules={**split.modules(at), **({"loss": nn.CrossEntropyLoss()} if at == labels else {})},
              prediction=TensorTable(**{name: fields[name] for name in example}) if at == "client" else None)
        for at in ("client", "server")
    ]  # fmt: skip
    with torch.no_grad():
        parts = [{name: fields[name][begin : begin + 4] for name in example} for begin in range(0, 12, 4)]
        expected = torch.cat([uncut.eval()(**part) for part in parts])
    assert torch.equal(next(iter(cl.predict(plan, parties).values())), expected)
    released = {r.field for r in plan.releases}
    assert released == ({"padding", "facts", "label"} if labels == "server" else set())


class Sentences(torch.utils.data.Dataset):
    """Words of unequal lengths; `padded` gives a batch as the model takes it."""

    def __init__(self, word_labels: bool) -> None:
        generator = torch.Generator().manual_seed(1)
        lengths = torch.randint(2, 9, (14,), generator=generator).tolist()
        self.rows = [torch.randint(1, WORDS, (length,), generator=generator) for length in lengths]
        self.word_labels = word_labels

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> Tensor:
        return self.rows[place]

    def padded(self, rows: list[Tensor]) -> dict[str, Tensor]:
        words = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        label = words % CLASSES if self.word_labels else words[:, 0] % CLASSES
        return {"words": words, "padding": words == 0, "facts": words[:, :2].float(), "label": label}


class Tagger(nn.Module):
    """A class for each word."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.out = nn.Embedding(WORDS, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        return self.out(torch.relu(self.norm(self.table(words)))).transpose(1, 2)


@pytest.mark.parametrize("model", [Patient, Tagger])
def test_five_lines_with_texts_of_any_length(model):
    """`longest` leaves the length open in the plan; labels at the server are as long as the words."""
    sentences = Sentences(word_labels=model is Tagger)
    loader = torch.utils.data.DataLoader(sentences, batch_size=4, collate_fn=sentences.padded)
    first = sentences.padded(sentences.rows[:3])
    torch.manual_seed(0)
    cut = model()
    uncut = copy.deepcopy(cut)
    names = ["words"] if model is Tagger else ["words", "padding", "facts"]
    longest = dict.fromkeys(["words"] if model is Tagger else ["words", "padding"], 64)
    split = cl.split(
        cut, at="norm" if model is Tagger else ["table", "norm"], example={name: first[name] for name in names},
        labels="server" if model is Tagger else "client", longest=longest,
    )  # fmt: skip
    assert str(split.ports[0].specs[next(iter(split.ports[0].specs))]) == f"float32[batch, time<=64, {WIDTH}]"
    run = cl.fit(split, loader, loss=nn.CrossEntropyLoss(), epochs=2)
    optimizer = torch.optim.Adam(uncut.parameters())
    for _ in (1, 2):
        for begin in range(0, 14, 4):
            batch = sentences.padded(sentences.rows[begin : begin + 4])
            F.cross_entropy(uncut(**{name: batch[name] for name in names}), batch["label"]).backward()
            optimizer.step()
            optimizer.zero_grad()
    trained = run.state_dict()
    assert all(torch.equal(trained[name], value) for name, value in uncut.state_dict().items())


@pytest.mark.provokes("E325")
@pytest.mark.parametrize(
    ("longest", "words"),
    [
        ({"words": 64, "facts": 64}, r"lengths \[2, 7\]"),
        ({"words": 64, "padding": 32}, r"bounds \[32, 64\]"),
        ({"word": 64}, r"lengths \[0\]"),
        ({"words": 6}, r"lengths \[7\] in the example, bounds \[6\]"),
    ],
)
def test_inputs_that_have_no_common_length_are_refused(longest, words):
    example = {"words": torch.ones(3, 7).long(), "padding": torch.zeros(3, 7).bool(), "facts": torch.ones(3, 2)}
    with pytest.raises(StageError, match=words) as caught:
        cl.split(Patient(), at=["table", "norm"], example=example, longest=longest)
    assert caught.value.code == "E325"


@pytest.mark.provokes("E322")
def test_a_piece_for_one_length_only_is_refused():
    class Places(Tagger):
        def __init__(self) -> None:
            super().__init__()
            self.places = nn.Embedding(64, WIDTH)

        def forward(self, words: Tensor) -> Tensor:
            size = words.shape[1]
            return self.out(self.norm(self.table(words)) + self.places(torch.arange(size)))

    with pytest.raises(StageError, match=r"cut for another size.*words\.shape") as caught:
        cl.split(Places(), at=["table", "norm"], example=torch.ones(3, 7).long(), longest={"words": 64})
    assert caught.value.code == "E322"
