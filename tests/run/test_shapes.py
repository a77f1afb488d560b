"""Data of every shape, and several tensors of every dtype on one cut: equal to the uncut model, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cutlayer as cl
from cutlayer.core.parts import Loss, Release, Stage, Training
from cutlayer.core.plan import Plan
from cutlayer.core.spec import DTYPES
from cutlayer.data.sources import TensorTable
from cutlayer.errors import DataError
from cutlayer.run.party import Party
from cutlayer.run.prediction import predict
from cutlayer.run.preflight import try_party
from cutlayer.run.simulate import roster_of, simulate
from tests.run.trial import Trial
from tests.small import Case, adam, difference

COUNT, WORDS, WIDTH, CLASSES = 21, 11, 6, 3


# --- every dtype on one cut ------------------------------------------------------------------------------------------


class Everything(nn.Module):
    """From an image of bytes, words, a mask and a float: a tensor of each dtype that may cross."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.table, self.age = nn.Conv2d(3, 2, 3), nn.Embedding(WORDS, WIDTH), nn.Linear(1, 4)

    def forward(self, image: Tensor, words: Tensor, mask: Tensor, age: Tensor) -> dict[str, Tensor]:
        seen = self.image(image.float() / 255)
        return {
            "float32": seen,
            "float64": self.age(age).double(),
            "float16": seen.half(),
            "bfloat16": self.table(words).bfloat16(),
            "int64": words,
            "int32": words.sum(1).int(),
            "int16": words.short(),
            "int8": (words - 5).char(),
            "uint8": image[:, 0],
            "bool": mask,
        }


class Together(nn.Module):
    """Uses them all, each in its own dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(2 * 4 + 4 + 2 * 4 + WIDTH + 4, CLASSES)

    def forward(self, f32, f64, f16, b16, i64, i32, i16, i8, u8, kept) -> Tensor:
        words = b16.float().masked_fill(~kept[..., None], 0.0).sum(1)
        whole = [i64.sum(1), i32, i16.sum(1) + i8.sum(1), u8.float().mean((1, 2))]
        numbers = torch.stack([value.float() for value in whole], 1) / 100
        return self.out(
            torch.cat([f32.mean(3).flatten(1), f64.float(), f16.float().mean(3).flatten(1), words, numbers], 1)
        )


SHAPES = {
    "float32": "2, 4, 4", "float64": "4", "float16": "2, 4, 4", "bfloat16": f"5, {WIDTH}", "int64": "5", "int32": "",
    "int16": "5", "int8": "5", "uint8": "6, 6", "bool": "5",
}  # fmt: skip


def everything() -> Case:
    stages = [
        Stage(
            "head",
            at="clinic",
            inputs=["data.image", "data.words", "data.mask", "data.age"],
            output={d: f"{d}[{', '.join(filter(None, ['batch', s]))}]" for d, s in SHAPES.items()},
        ),
        Stage("body", at="server", inputs=[f"head.{d}" for d in SHAPES], output=f"float32[batch, {CLASSES}]"),
        Loss("loss", at="clinic", inputs=["body", "data.label"]),
    ]
    generator = torch.Generator().manual_seed(2)
    torch.manual_seed(4)
    data = {
        "image": torch.randint(0, 256, (COUNT, 3, 6, 6), generator=generator).byte(),
        "words": torch.randint(0, WORDS, (COUNT, 5), generator=generator),
        "mask": torch.rand(COUNT, 5, generator=generator) < 0.7,
        "age": torch.rand(COUNT, 1, generator=generator),
        "label": torch.randint(0, CLASSES, (COUNT,), generator=generator),
    }
    return Case(
        plan=Plan(stages, training=Training(epochs=2, batch_size=8, microbatches=2, schedule="1f1b")),
        counts=(COUNT,),
        modules={"head": Everything(), "body": Together(), "loss": nn.CrossEntropyLoss()},
        data={"clinic": data},
    )


def test_every_dtype_crosses_one_cut():
    """Gradients come back for the floats, in their own dtype, and for nothing else."""
    case = everything()
    assert set(SHAPES) == set(DTYPES)
    result = case.cut()
    assert difference(result, case.uncut()) == 0.0
    flows = result.ledgers["clinic"].flows
    for edge in case.plan.graph.cuts(0):
        if edge.source.stage != "head":
            continue
        size = edge.spec.nbytes(COUNT) * 2  # epochs
        assert flows["sent", "server", "train", "up", edge.index].payload == size
        back = flows.get(("received", "server", "train", "down", edge.index))
        assert (back.payload if back else 0) == (size if "float" in edge.source.port else 0)


def test_over_the_network_the_bits_and_bytes_are_the_same(tmp_path: Path):
    case = everything()
    local, there = case.cut(), case.parties()
    trial = Trial(case.plan, tmp_path, coordinator="server")

    def part(party: Party) -> Callable[[], cl.Result]:
        folder = tmp_path / "run" / party.name
        return lambda: cl.join(case.plan, party, network=trial.settings(party.name), folder=folder)

    found = trial.play({party.name: part(party) for party in there})
    for party in there:
        assert found[party.name].ledgers[party.name].flows == local.ledgers[party.name].flows
        for name, module in party.modules.items():
            mine = local.workers[party.name].site.stages[name, 0].module.state_dict()
            assert all(torch.equal(mine[key], value) for key, value in module.state_dict().items())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_dtypes_under_autocast(dtype):
    """Halves and float32 cross side by side, as in the uncut model under the same autocast."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Linear(5, WIDTH), nn.LayerNorm(WIDTH)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            half = self.first(x)
            return half, self.norm(half).float()

    class Add(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(WIDTH, CLASSES)

        def forward(self, half: Tensor, whole: Tensor) -> Tensor:
            return self.out(torch.relu(half) + whole)

    stages = [
        Stage(
            "head", at="a", inputs=["data.x"],
            output={"half": f"{dtype}[batch, {WIDTH}]", "whole": f"float32[batch, {WIDTH}]"},
        ),
        Stage("body", at="b", inputs=["head.half", "head.whole"], output=f"{dtype}[batch, {CLASSES}]"),
        Loss("loss", at="b", inputs=["body", "data.y"]),
    ]  # fmt: skip
    plan = Plan(stages, training=Training(batch_size=8, shuffle=False, epochs=2))
    torch.manual_seed(0)
    head, body, x, y = Two(), Add(), torch.randn(16, 5), torch.randint(0, CLASSES, (16,))
    first, second = copy.deepcopy(head), copy.deepcopy(body)
    optimizer = adam([*first.parameters(), *second.parameters()])
    for _ in (1, 2):
        for begin in (0, 8):
            with torch.autocast("cpu", getattr(torch, dtype)):
                loss = F.cross_entropy(second(*first(x[begin : begin + 8])), y[begin : begin + 8])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    rest = {"optimizer": adam, "autocast": dtype}
    result = simulate(
        plan,
        [
            Party("a", data=TensorTable(x=x), modules={"head": head}, **rest),
            Party("b", data=TensorTable(y=y), modules={"body": body, "loss": nn.CrossEntropyLoss()}, **rest),
        ],
    )
    for mine, theirs in ((head, first), (body, second)):
        assert all(torch.equal(p, q) for p, q in zip(mine.parameters(), theirs.parameters(), strict=True))
    assert result.ledgers["a"].total("sent") == 2 * 16 * WIDTH * (2 + 4)


# --- text of any length ----------------------------------------------------------------------------------------------


class Texts(torch.utils.data.Dataset):
    """Sentences of unequal length; `collate` pads a batch to its longest and says where."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        lengths = torch.randint(1, 9, (COUNT,), generator=generator).tolist()
        self.rows = [torch.randint(1, WORDS, (length,), generator=generator) for length in lengths]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> Tensor:
        return self.rows[place]

    @staticmethod
    def collate(rows: list[Tensor]) -> dict[str, Tensor]:
        words = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        after = nn.utils.rnn.pad_sequence([(row * 3) % WORDS for row in rows], batch_first=True, padding_value=-100)
        return {"words": words, "padding": words == 0, "after": after}


class Attend(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, states: Tensor, padding: Tensor) -> Tensor:
        return states + self.attention(states, states, states, key_padding_mask=padding, need_weights=False)[0]


def language(score: Tensor, after: Tensor) -> Tensor:
    return F.cross_entropy(score.transpose(1, 2), after, ignore_index=-100)


def text_plan(kept: bool, **training: Any) -> Plan:
    """`kept`: no mask leaves, and the server attends to padding too; else it is released, as are the labels."""
    long = "[batch, time<=64"
    server = ["embed"] if kept else ["embed", "data.padding@clinic"]
    stages = [
        Stage("embed", at="clinic", inputs=["data.words"], output=f"float32{long}, {WIDTH}]"),
        Stage("attend", at="server", inputs=server, output=f"float32{long}, {WIDTH}]"),
        Stage("score", at="clinic" if kept else "server", inputs=["attend"], output=f"float32{long}, {WORDS}]"),
        Loss("loss", at="clinic" if kept else "server", inputs=["score", "data.after@clinic"]),
    ]
    releases = [
        Release("padding", at="clinic", to="server", spec="bool[batch, time<=64]"),
        Release("after", at="clinic", to="server", spec="int64[batch, time<=64]"),
    ]
    settings = Training(epochs=2, batch_size=8, **training)
    return Plan(stages, training=settings, releases=[] if kept else releases)


def text_parties(plan: Plan, modules: dict[str, nn.Module]) -> list[Party]:
    loader = torch.utils.data.DataLoader(Texts(), batch_size=8, collate_fn=Texts.collate)
    found = []
    for name in plan.parties:
        mine = {s.name: modules[s.name] for s in plan.stages if name in s.places}
        data = {"data": loader, "prediction": loader} if name == "clinic" else {}
        found.append(Party(name, modules=mine, optimizer=adam, **data))
    return found


class Alone(nn.Module):
    """Attention where the mask stays at the clinic."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Attend()

    def forward(self, states: Tensor) -> Tensor:
        return self.inner(states, torch.zeros(states.shape[:2], dtype=torch.bool))


@pytest.mark.parametrize("microbatches", [1, 3])
@pytest.mark.parametrize("kept", [True, False], ids=["mask kept", "mask released"])
def test_language_of_any_length(kept, microbatches):
    plan = text_plan(kept, microbatches=microbatches, schedule="gpipe")
    torch.manual_seed(0)
    modules = {
        "embed": nn.Embedding(WORDS, WIDTH), "attend": Alone() if kept else Attend(),
        "score": nn.Linear(WIDTH, WORDS), "loss": language,
    }  # fmt: skip
    theirs = copy.deepcopy(modules)
    result = simulate(plan, text_parties(plan, modules))
    optimizer = adam([p for name in ("embed", "attend", "score") for p in theirs[name].parameters()])
    texts = Texts()
    for _ in (1, 2):
        for begin in range(0, COUNT, 8):
            batch = Texts.collate(texts.rows[begin : begin + 8])
            total = len(batch["words"])
            sizes = [total // microbatches + (place < total % microbatches) for place in range(microbatches)]
            parts = zip(*(batch[name].split(sizes) for name in batch), strict=True)
            for words, padding, after in parts:
                states = theirs["embed"](words)
                states = theirs["attend"](states) if kept else theirs["attend"](states, padding)
                (language(theirs["score"](states), after) * (len(words) / total)).backward()
            optimizer.step()
            optimizer.zero_grad()
    for name in ("embed", "attend", "score"):
        own = dict(modules[name].named_parameters())
        assert all(torch.equal(own[key], value) for key, value in theirs[name].named_parameters())
    places = sum(Texts.collate(texts.rows[i : i + 8])["words"].numel() for i in range(0, COUNT, 8))
    assert result.ledgers["clinic"].total("sent") == 2 * (
        places * WIDTH * 4 * (2 if kept else 1) + (0 if kept else places * (1 + 8))
    )


def test_predictions_of_unequal_length_are_refused():
    plan = text_plan(True)
    modules = {
        "embed": nn.Embedding(WORDS, WIDTH),
        "attend": Alone(),
        "score": nn.Linear(WIDTH, WORDS),
        "loss": language,
    }
    with pytest.raises(DataError, match="pad the data to one length") as caught:
        predict(plan, text_parties(plan, modules))
    assert caught.value.code == "E260"


@pytest.mark.parametrize("kept", [True, False], ids=["mask kept", "mask released"])
def test_each_party_can_be_tried_alone(kept):
    """What others would send is made up as long as the party's own batch is."""
    plan = text_plan(kept, microbatches=2)
    modules = {"embed": nn.Embedding(WORDS, WIDTH), "attend": Alone() if kept else Attend()}
    modules |= {"score": nn.Linear(WIDTH, WORDS), "loss": language}
    parties, before = text_parties(plan, modules), copy.deepcopy(modules)
    for party in parties:
        try_party(plan, party, roster_of(parties))
    for name in ("embed", "attend", "score"):
        changed = zip(modules[name].parameters(), before[name].parameters(), strict=True)
        assert not all(torch.equal(one, other) for one, other in changed), f"{name} has made one step"
