"""Random generators that data code draws from: the global ones, and those that a user's loader has of its own."""

from __future__ import annotations

import random
from collections import deque
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

__all__ = ["Dice", "LoaderDice"]


class Dice:
    """Runs data code with a random generator of its own, so that it disturbs no stage and no other party."""

    def __init__(self) -> None:
        """Begin where the global ones are."""
        self.state = _generators()

    def seed(self, *parts: int) -> None:
        """Begin again from the party's private seed: an epoch's randomness depends on seed and epoch only."""
        mixed = hash(parts) & (2**63 - 1)  # a hash of ints is the same in every process
        legacy = np.random.RandomState(mixed % 2**32).get_state()
        self.state = torch.Generator().manual_seed(mixed).get_state(), random.Random(mixed).getstate(), legacy  # noqa: S311

    def __enter__(self) -> None:
        """Put them in place of the global ones."""
        self._outer = _generators()
        _set_generators(self.state)

    def __exit__(self, *_error: object) -> None:
        """Put the global ones back."""
        self.state = _generators()
        _set_generators(self._outer)


_States = tuple[Tensor, Any, Any]


def _generators() -> _States:
    """Return the states of the generators that data code uses: torch, random, numpy."""
    return torch.get_rng_state(), random.getstate(), np.random.get_state()


def _set_generators(states: _States) -> None:
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])


class LoaderDice:
    """The generators that a loader and its sampler have of their own: in each epoch where a loop over it has them.

    They are the user's, and so is the order that they give; they are never seeded here. An epoch that is read again, or
    first of all in a process that goes on with a run, has them where an uninterrupted run had them: each epoch before
    it is drawn, not read.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        """Take note of where they are: the first epoch, number 1, begins there."""
        found = loader.generator, getattr(loader.sampler, "generator", None)
        own = {id(one): one for one in found if isinstance(one, torch.Generator)}
        self._loader, self._generators = loader, list(own.values())
        self._epoch, self._first = 1, self._states()
        self._begun = self._now = self._first

    def begin(self, epoch: int, *, follows: bool) -> None:
        """Bring them to where an epoch begins. `follows`: they are there, at the end of the one before."""
        if not follows:
            self._now = self._begun if epoch == self._epoch else self._first
            with self:
                for _ in range(1, epoch) if self._generators and epoch != self._epoch else ():
                    self._pass_by()
        self._epoch, self._begun = epoch, self._now

    def __enter__(self) -> None:
        """Bring them to where this loader left them, should another have drawn from them since."""
        for generator, state in zip(self._generators, self._now, strict=True):
            generator.set_state(state)

    def __exit__(self, *_error: object) -> None:
        """Take note of where they are."""
        self._now = self._states()

    def _states(self) -> list[Tensor]:
        return [generator.get_state() for generator in self._generators]

    def _pass_by(self) -> None:
        """Draw what an epoch draws, without its samples."""
        loader: Any = self._loader
        iter(DataLoader(cast("Dataset[Any]", []), generator=loader.generator))  # a loop begins with a seed for workers
        deque(loader.sampler if loader.batch_sampler is None else loader.batch_sampler, maxlen=0)
