"""Mistakes that a user of the Python interface makes: each has an error of its own, that says what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import cutlayer as cl
from cutlayer.errors import ConfigError, CutlayerError, DataError, PlanError, StageError

DICE = torch.Generator().manual_seed(0)
X, Y = torch.randn(16, 6, generator=DICE), torch.randint(0, 3, (16,), generator=DICE)
LOSS = nn.CrossEntropyLoss()


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def made(at: Any = 1, example: Any = X[:4], **options: Any) -> Any:
    return cl.split(net(), at, example=example, **options)


def loader(data: Dataset[Any] | None = None) -> DataLoader[Any]:
    return DataLoader(data or TensorDataset(X, Y), batch_size=4)


class Lengths(Dataset):
    """Rows of another length from row `first` on."""

    def __init__(self, first: int) -> None:
        self.first = first

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return X[index, : 6 if index < self.first else 5], Y[index]


def one_cycle(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=2)


def trained(data: Any = None, **settings: Any) -> cl.Run:
    return cl.fit(made(), data or loader(), loss=LOSS, **settings)


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.out = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.out(self.body(self.embed(ids) * mask[..., None]).sum(1))


def padded(model: nn.Module, *names: str) -> Any:
    example = {"ids": torch.ones(4, 12, dtype=torch.int64), "mask": torch.ones(4, 12)}
    return cl.split(model, "embed", example=example, release=["mask"], longest=dict.fromkeys(names, 40))


@pytest.mark.provokes(by="code")
@pytest.mark.parametrize(
    ("mistake", "kind", "code", "words"),
    [
        (lambda: cl.fit(net(), loader(), loss=LOSS), ConfigError, "E236", "what cl.split gives, got Sequential. cut"),
        (
            lambda: trained(loader(Lengths(1))),
            DataError,
            "E253",
            r"sizes \[6\] of sample 0 and \[5\] of sample 1 in \[0\].*collate_fn that pads.*reference/data.md",
        ),
        (
            lambda: trained(loader(Lengths(6))),
            DataError,
            "E253",
            r"of sample \d+ in \[0\].*collate_fn that pads.*data.md",
        ),
        (
            lambda: trained(party={"scheduler": one_cycle, "scheduler_every": "step"}),
            ConfigError,
            "E221",
            r"OneCycleLR cannot be advanced.*step 3 of the scheduler.*got total_steps=2\. .*epochs \* batches",
        ),
        (
            lambda: trained(epochs=3, party={"scheduler": one_cycle}),
            ConfigError,
            "E221",
            r"OneCycleLR cannot be advanced.*step 3 of the scheduler",
        ),
        (lambda: trained(party=["seed"]), ConfigError, "E236", "party={...}.*got list of str.*give a dictionary"),
        (lambda: trained(party={"device": "gpu"}), ConfigError, "E227", "device of party 'server' is not here.*cpu"),
        (lambda: trained().result.metrics("eval"), ConfigError, "E239", "expected one of train, evaluate, got 'eval'"),  # type: ignore[arg-type]
        (lambda: made(example=None), StageError, "E326", "an example of the inputs is needed.*pass example="),
        (lambda: made(example=X[:4].numpy()), StageError, "E325", r"'input' is a numpy array\. .*torch.from_numpy"),
        (lambda: made(example={"input": X[:4].numpy()}), StageError, "E325", "'input' is a numpy array"),
        (lambda: made(at=[1, 1]), StageError, "E327", "the cut after '1' is named twice"),
        (lambda: made(at=[1, "1"], labels="server"), StageError, "E327", "the cut after '1' is named twice"),
        (lambda: made(at=nn.ReLU()), StageError, "E310", "cut after: 'ReLU'.*a module that is not in the model"),
        (
            lambda: padded(Padded(), "ids"),
            StageError,
            "E325",
            r"of length 12 in the example are ids, mask;.*name all.*longest=\{'ids': 40, 'mask': 40\}",
        ),
    ],
)
def test_a_mistake_says_what_to_do(mistake: Callable[[], Any], kind: type[CutlayerError], code: str, words: str):
    with pytest.raises(kind, match=f"(?s){code}.*{words}"):
        mistake()


class Fixed(Padded):
    """Mixes along the length, which is then fixed."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(12, 8)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.out(self.body((self.embed(ids) * mask[..., None]).transpose(1, 2)).sum(1))


@pytest.mark.provokes("E325")
def test_a_length_that_the_forward_does_not_take():
    assert padded(Padded(), "ids", "mask").longest == {"ids": 40, "mask": 40}
    with pytest.raises(StageError, match=r"E325.*cannot be multiplied.*leave longest out and pad to one length"):
        padded(Fixed(), "ids", "mask")


def test_a_submodule_itself_is_a_cut_point():
    model = nn.Sequential(nn.Sequential(nn.Linear(6, 8), nn.ReLU()), nn.Linear(8, 8), nn.Linear(8, 3))
    for at, points in ((model[0], ("0", "1")), ([model[0][0], model[1]], ("0.0", "1"))):
        assert cl.split(model, at, example=X[:4]).cut.points == points


def test_a_report_and_weights_go_into_a_folder_that_is_not_there(tmp_path: Path):
    run = trained()
    assert run.report(tmp_path / "a" / "b" / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    run.save(tmp_path / "c" / "joined.safetensors")
    assert (tmp_path / "c" / "joined.safetensors").stat().st_size > 0


U: dict[str, Any] = {"cut": "float32[batch, 8]", "back": "float32[batch, 8]", "output": "float32[batch, 3]"}


def two() -> tuple[cl.Plan, cl.Party, cl.Party]:
    plan = cl.u_shaped("a", "s", **U, batch_size=4)
    first, _, second, _, last = net()
    table = cl.TensorTable(x=X, y=Y)
    modules = {"head": first, "tail": last, "loss": LOSS}
    return (
        plan,
        cl.Party("a", modules=modules, data=table, optimizer=cl.fitting.adam),
        cl.Party("s", modules={"body": second}, optimizer=cl.fitting.adam),
    )


@pytest.mark.provokes("E225")
def test_one_party_is_no_list():
    plan, hospital, server = two()
    for one in (hospital, server):
        with pytest.raises(ConfigError, match=f"E225.*expected a, s, got {one.name}"):
            cl.simulate(plan, one)
    with cl.session(plan, hospital, others=server) as session:
        for _ in session.rounds():
            head, tail = hospital.modules["head"], hospital.modules["tail"]
            for part in _:
                LOSS(tail(session.remote(head(part["x"]))), part["y"]).backward()
                session.optimizer.step()
                session.optimizer.zero_grad()
    assert session.result().metrics("train")["loss"]["loss"] > 0


def test_weights_are_read_from_a_folder_given_as_text(tmp_path: Path):
    plan, hospital, server = two()
    result = cl.simulate(plan, [hospital, server])
    from cutlayer.run.results import write_results

    write_results(tmp_path, result)
    plan, other, far = two()
    asking = cl.Party("a", modules=other.modules, prediction=cl.TensorTable(x=X))
    found = cl.predict(plan, [asking, far], weights=str(tmp_path))
    assert torch.equal(found["tail"], cl.predict(plan, [asking, far], weights=tmp_path)["tail"])
    assert torch.equal(other.modules["head"].weight, hospital.modules["head"].weight)  # type: ignore[union-attr, arg-type]


@pytest.mark.provokes("E112")
def test_preprocessing_at_a_list_of_parties_names_the_stage():
    plan = cl.u_shaped(["a", "b"], "s", **U, batch_size=4)
    shared = cl.Shared("x", at=["a", "b"])  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=r"E112.*several places.*got \['a', 'b'\].*name the stage at whose parties"):
        cl.Plan(list(plan.stages), training=plan.training, preprocessing=[shared])
