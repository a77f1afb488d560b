"""Distributions in a forward (`torch.distributions`): what they draw and tell is what the uncut model would get."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributions as td
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.utils.data import TensorDataset

import cutlayer as cl
from cutlayer.engine.site import stage_seed
from cutlayer.errors import StageError

X = torch.randn(16, 5, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(16) % 3


class Tilted(Normal):
    """A user's own distribution."""

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return torch.tanh(super().rsample(sample_shape))


SEEN: list[str] = []


class Listed(Normal):
    """One whose subclasses are registered."""

    def __init_subclass__(cls) -> None:
        SEEN.append(cls.__name__)


class Last(Normal):
    """One that takes no subclasses."""

    def __init_subclass__(cls) -> None:
        raise TypeError("no subclasses")


class Scored(nn.Module):
    """A submodule that is given a distribution."""

    def forward(self, value: Tensor, given: Normal) -> Tensor:
        return given.log_prob(value)


class Coder(nn.Module):
    """An encoder, what a test draws between, and a decoder; each test's `draw` uses the names of this file."""

    def __init__(self, draw: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mean, self.spread = nn.Linear(5, 2), nn.Linear(5, 2)
        self.one, self.two, self.out = nn.Linear(2, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.draw, self.prior, self.scored = draw, Normal(0.0, 1.0), Scored()
        self.priors, self.wide = [self.prior], Normal(torch.zeros(2), torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        z = self.draw(self, self.mean(x), nn.functional.softplus(self.spread(x)) + 0.01)
        return self.out(torch.relu(self.two(torch.relu(self.one(z)))))


def either(self: Any, mean: Tensor, spread: Tensor) -> Tensor:
    made = td.Normal(mean, spread)
    assert isinstance(made, Normal)
    assert not isinstance(made, td.Beta)
    return made.rsample() if self.training else made.mean


def straight_through(_: Any, mean: Tensor, __: Tensor) -> Tensor:
    chance = torch.sigmoid(mean)
    return td.Bernoulli(chance).sample() + chance - chance.detach()


def chosen(_: Any, mean: Tensor, __: Tensor) -> Tensor:
    made = td.Categorical(logits=mean)
    index = made.sample()
    return nn.functional.one_hot(index, 2) * made.log_prob(index).unsqueeze(1) + mean


def far_from_the_prior(_: Any, mean: Tensor, spread: Tensor) -> Tensor:
    made = Normal(mean, spread)
    return made.rsample() + kl_divergence(made, Normal(torch.zeros(2), 1.0)) + td.kl_divergence(made, made)


def same_kind(self: Any, mean: Tensor, spread: Tensor) -> Tensor:
    return mean + spread if isinstance(self.prior, td.Normal) and type(self.prior) is Normal else mean


DRAWS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "normal": lambda _, mean, spread: Normal(mean, spread).rsample(),
    "unchecked": lambda _, mean, spread: td.Normal(mean, spread, validate_args=False).rsample(),
    "either": either,
    "beta": lambda _, mean, spread: td.Beta(mean.exp(), spread).rsample(),
    "relaxed": lambda _, mean, spread: td.RelaxedBernoulli(torch.tensor(0.5), logits=mean + spread).rsample(),
    "bernoulli": straight_through,
    "categorical": chosen,
    "independent": lambda _, mean, spread: td.Independent(td.Normal(mean, spread), 1).rsample(),
    "divergence": far_from_the_prior,
    "prior made": lambda _, mean, spread: mean + spread * Normal(0.0, 1.0).sample((mean.size(0), 2)),
    "prior kept": lambda self, mean, spread: mean + spread * self.prior.sample(mean.shape),
    "divergence from a kept one": lambda self, mean, spread: mean + kl_divergence(Normal(mean, spread), self.prior),
    "divergence by its module": lambda self, mean, spread: mean + td.kl.kl_divergence(self.prior, Normal(mean, spread)),
    "kept in a list": lambda self, mean, spread: mean + spread * self.priors[0].log_prob(mean),
    "kept, to a submodule": lambda self, mean, spread: self.scored(mean, self.prior) + spread,
    "kept, to a class": lambda self, mean, _: mean + td.Independent(self.wide, 1).log_prob(mean).unsqueeze(1),
    "kept, its kind": same_kind,
    "by its module": lambda _, mean, spread: td.normal.Normal(mean, spread).rsample(),
    "own": lambda _, mean, spread: Tilted(mean, spread).rsample(),
    "own without subclasses": lambda _, mean, spread: Last(mean, spread).rsample() + Listed(mean, spread).rsample(),
}


def trained_uncut(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Train by a plain loop, with all draws from a generator that begins as the stage's own does."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for rows in (slice(0, 8), slice(8, 16)):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(X[rows]), LABELS[rows]).backward()
            optimizer.step()
    return model.state_dict()


@pytest.mark.parametrize(("at", "stage"), [("one", "head"), ("spread", "body")])
@pytest.mark.parametrize("name", DRAWS)
def test_trains_as_uncut(name: str, at: str, stage: str):
    model = Coder(DRAWS[name])
    uncut = copy.deepcopy(model)
    made, sgd = cl.split(model, at, example=X[:4]), partial(torch.optim.SGD, lr=0.1)
    data = TensorDataset(X, LABELS)
    run = cl.fit(made, data, loss=nn.CrossEntropyLoss(), optimizer=sgd, epochs=1, batch_size=8, shuffle=False, seed=3)
    found = run.state_dict()
    wanted = trained_uncut(uncut, stage_seed(3, stage, 0))
    assert [name for name, value in wanted.items() if not torch.equal(value, found[name])] == []


def test_all_is_as_before_the_cut():
    model = Coder(DRAWS["prior kept"])
    before = model.prior, td.Normal, Normal
    cl.split(model, "one", example=X[:4])
    assert all(one is two for one, two in zip((model.prior, td.Normal, Normal), before, strict=True))


def test_a_cut_leaves_no_trace_in_torch():
    def failing(_: Any, mean: Tensor, spread: Tensor) -> Tensor:
        return mean if Normal(mean, spread).rsample().sum() > 0 else spread

    def now() -> list[dict[str, Any]]:
        return [{**vars(kind), "__new__": None} for kind in (td.Distribution, Normal, Last)]

    before = now()
    cl.split(Coder(DRAWS["own"]), "one", example=X[:4])
    with pytest.raises(StageError, match="E314"):
        cl.split(Coder(failing), "one", example=X[:4])
    assert now() == before
    assert SEEN == []
    assert type(Last(0.0, 1.0)) is Last
    assert type(td.Normal(0.0, 1.0).expand((2,))) is Normal


def test_a_distribution_does_not_cross():
    """It is made before the cut, and drawn from after it."""

    def late(self: Any, mean: Tensor, spread: Tensor) -> Tensor:
        made = Normal(mean, spread)
        return self.spread(torch.cat([mean, mean, mean[:, :1]], 1)) + made.rsample()

    with pytest.raises(StageError, match=r"\[E315\].*not a tensor.*'Normal'.*got Normal"):
        cl.split(Coder(late), "spread", example=X[:4])


def test_a_length_that_python_takes_is_called_so():
    def long(_: Any, mean: Tensor, spread: Tensor) -> Tensor:
        return mean + spread if len(mean) else mean

    with pytest.raises(StageError, match=r"\[E314\].*a number that Python asks for at test_dist.*`return mean") as e:
        cl.split(Coder(long), "one", example=X[:4])
    assert "hold" not in str(e.value).replace("that hold for one batch size", "")
    assert "a submodule of its own" in str(e.value)


LENGTHS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "key": lambda _, mean, spread: mean * {2: 2.0}.get(len(mean.t()), 5.0) + spread,
    "reckoned key": lambda _, mean, spread: mean * {4: 2.0}[len(mean[0]) + 2] + spread,
    "in a set": lambda _, mean, spread: mean + spread if len(mean.t()) in {2, 3} else mean,
    "text": lambda _, mean, spread: mean * {"2": 3.0}[str(len(mean[0]))] + spread,
    "format": lambda self, mean, spread: mean * {"06": 3.0}[f"{len(self.one.weight):02d}"] + spread,
    "batch": lambda _, mean, spread: mean + spread.mean(0).expand(len(mean), -1),
}


@pytest.mark.parametrize("name", LENGTHS)
def test_a_length_that_is_no_batch_is_a_number(name: str):
    model = Coder(LENGTHS[name])
    made = cl.split(model, "one", example=X[:4])
    run = cl.fit(
        made,
        TensorDataset(X, LABELS),
        loss=nn.CrossEntropyLoss(),
        optimizer=partial(torch.optim.SGD, lr=0.0),
        epochs=1,
        batch_size=8,
    )
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in run.state_dict().items())


def test_a_batch_as_a_key_is_refused():
    def keyed(_: Any, mean: Tensor, spread: Tensor) -> Tensor:
        return mean + spread * {8: 1.0}.get(len(mean), 2.0)

    with pytest.raises(StageError, match=r"\[E314\].*test_dist.*get\(len\(mean\)"):
        cl.split(Coder(keyed), "one", example=X[:4])
