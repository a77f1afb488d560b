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


class Coder(nn.Module):
    """An encoder, what a test draws between, and a decoder; each test's `draw` uses the names of this file."""

    def __init__(self, draw: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mean, self.spread = nn.Linear(5, 2), nn.Linear(5, 2)
        self.one, self.two, self.out = nn.Linear(2, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.draw, self.prior = draw, Normal(0.0, 1.0)

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
    "own": lambda _, mean, spread: Tilted(mean, spread).rsample(),
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
