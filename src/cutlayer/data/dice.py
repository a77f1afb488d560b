"""Random generators that data code draws from: the global ones, and those that a user's loader has of its own."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

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
    """The generators that a loader and its samplers have of their own: in each epoch where a loop over it has them.

    They are the user's, and so is the order that they give; they are never seeded here. An epoch that is read again, or
    first of all in a process that goes on with a run, has them where an uninterrupted run had them: each epoch before
    it is drawn, not read.

    A loop over a loader begins with a seed for its workers. Where these last (`persistent_workers`), that is in the
    first epoch only.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        """Take note of where they are: the first epoch, number 1, begins there."""
        found = [loader.generator, *_held(loader.sampler), *_held(loader.batch_sampler)]
        own = {id(one): one for one in found if isinstance(one, torch.Generator)}
        self._loader, self._generators = loader, list(own.values())
        self._lasting = loader.persistent_workers and loader.num_workers > 0
        self._fresh = self._lasting and cast("Any", loader)._iterator is None
        self._epoch, self._first = 1, self._states()
        self._begun = self._now = self._first

    def begin(self, epoch: int, *, follows: bool) -> None:
        """Bring them to where an epoch begins. `follows`: they are there, at the end of the one before."""
        if not follows:
            self._now = self._begun if epoch == self._epoch else self._first
            with self:
                for earlier in range(1, epoch) if self._generators and epoch != self._epoch else ():
                    deque(self.draw(earlier), maxlen=0)
        self._epoch, self._begun = epoch, self._now

    def draw(self, epoch: int) -> Iterator[list[int]]:
        """Draw what an epoch draws, without its samples: yield the places of those of each batch."""
        loader: Any = self._loader
        if not self._lasting or (epoch == 1 and self._fresh):
            iter(DataLoader(cast("Dataset[Any]", []), generator=loader.generator))
        yield from ([row] for row in loader.sampler) if loader.batch_sampler is None else loader.batch_sampler

    def employ(self, epoch: int) -> None:
        """Let workers that last be as they are where an uninterrupted run begins an epoch: at the first, not there.

        Where there are none yet, they are started with the seed that they get in the first epoch, and read in vain what
        they read ahead. To be called with the global generators of the first epoch.
        """
        loader: Any = self._loader
        if self._fresh and epoch == 1:
            loader._iterator = None  # torch keeps the workers there
        elif self._fresh and loader._iterator is None:
            now, self._now = self._now, self._first
            with self:
                iter(loader)
            self._now = now

    def __enter__(self) -> None:
        """Bring them to where this loader left them, should another have drawn from them since."""
        for generator, state in zip(self._generators, self._now, strict=True):
            generator.set_state(state)

    def __exit__(self, *_error: object) -> None:
        """Take note of where they are."""
        self._now = self._states()

    def _states(self) -> list[Tensor]:
        return [generator.get_state() for generator in self._generators]


def _held(sampler: object, depth: int = 3) -> Iterator[object]:
    """Yield what a sampler keeps, and samplers in it, such as that of a batch sampler."""
    yield getattr(sampler, "generator", None)  # which may be a property
    for name, value in getattr(sampler, "__dict__", {}).items():
        yield value
        if depth and (isinstance(value, Sampler) or name.endswith("sampler")):
            yield from _held(value, depth - 1)
