"""A party's data set or loader, as batches in the order that the plan fixes.

The plan fixes the order where several parties must load the same people's samples together, and for every plain data
set. A `DataLoader` whose party is the only one with data in its lane keeps its own sampler, and the `generator` that it
was given: its order is that of a loop over it. Collate function, workers and pinned memory are kept in both cases.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count, islice
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, WeightedRandomSampler

from cutlayer.core.batching import batch_slice, lane_batches, permutation
from cutlayer.core.parts import Training
from cutlayer.data.collating import collated, next_batch
from cutlayer.data.columns import column
from cutlayer.data.dice import Dice, LoaderDice
from cutlayer.data.samples import samples_of, whole
from cutlayer.errors import DataError

__all__ = ["LoaderBatches", "Order", "OrderedBatches", "TensorTable", "again", "batches", "sample_count"]


@runtime_checkable
class BatchDataset(Protocol):
    """A data set that can give a whole batch at once."""

    def batch(self, indices: Sequence[int]) -> Mapping[str, Tensor]:
        """Return the samples of these indices: field -> tensor of shape (len(indices), ...)."""


class TensorTable(Dataset[dict[str, Any]]):
    """Fields held in memory: field -> tensor whose first dimension counts samples. Batches cost one index each.

    A field may be given as an array or a list too. One of texts, one a sample, is for the plan's `preprocessing`.
    """

    def __init__(self, **fields: Any) -> None:  # noqa: ANN401 - see `column`
        """Raises `DataError` if the fields have different numbers of samples (E254), or one is no column (E253)."""
        fields = {name: column(name, value) for name, value in fields.items()}
        sizes = {name: len(value) for name, value in fields.items()}
        if len(set(sizes.values())) != 1:
            raise DataError(
                "the fields of a table have different numbers of samples",
                where="TensorTable",
                got=str(sizes),
                code="E254",
                remedy="give each field one row a sample",
            )
        self.fields = fields
        self._size = next(iter(sizes.values()))

    def __len__(self) -> int:
        """Return the number of samples."""
        return self._size

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one sample."""
        return {name: value[index] for name, value in self.fields.items()}

    def batch(self, indices: Sequence[int]) -> dict[str, Any]:
        """Return many samples at once; of texts, a list."""
        rows = torch.as_tensor(indices)
        return {
            name: value[rows] if isinstance(value, Tensor) else [value[row] for row in rows.tolist()]
            for name, value in self.fields.items()
        }


@dataclass(frozen=True, kw_only=True)
class Order:
    """The public part of the order of samples, and the party's private seed for what is random in its data set.

    `fields` are the names of a tuple's parts; `taken` are the fields that the party's stages take, if that is known.
    """

    training: Training
    count: int
    seed: int
    shuffle: bool
    drop_last: bool
    fields: tuple[str, ...] | None = None
    taken: tuple[str, ...] = ()


def sample_count(data: Dataset[Any] | DataLoader[Any]) -> int:
    """Return how many samples a map-style data set, or a loader's sampler, gives in an epoch."""
    counted: Any = data.sampler if isinstance(data, DataLoader) and data.batch_sampler is not None else data
    try:
        return len(counted)
    except TypeError:
        raise DataError(
            "the data set has no length",
            where="the data set",
            expected="a map-style data set with __len__ and __getitem__",
            got=type(data.dataset if isinstance(data, DataLoader) else data).__name__,
            remedy="load the stream into a map-style data set: all parties must know the number of steps",
            code="E255",
        ) from None


def batches(data: Dataset[Any] | DataLoader[Any], order: Order, *, alone: bool) -> OrderedBatches | LoaderBatches:
    """Return the data as batches. `alone`: no other party loads data in this lane, so a loader keeps its sampler."""
    if isinstance(data, DataLoader) and alone:
        return LoaderBatches(data, order)
    return OrderedBatches(data, order)


class OrderedBatches:
    """Batches in the plan's order: the same samples at the same step at every party of a lane."""

    def __init__(self, data: Dataset[Any] | DataLoader[Any], order: Order) -> None:
        """Take over a loader's data set, collate function and workers; its sampler is replaced.

        Raises:
            DataError: the sampler picks only some of the samples, which would be lost.
        """
        self.order = order
        self._loader = data if isinstance(data, DataLoader) else None
        self._dataset: Any = data.dataset if isinstance(data, DataLoader) else data
        if self._loader is not None and sample_count(self._dataset) != order.count:
            raise DataError(
                "the sampler of a loader picks some of its samples, but here the plan orders the samples",
                where="the loader and its sampler",
                expected=f"all {sample_count(self._dataset)} samples of the data set",
                got=f"{order.count} of them",
                remedy="wrap the data set in torch.utils.data.Subset, and leave the sampler out",
                code="E256",
            )
        self._whole = isinstance(self._dataset, BatchDataset)
        self._plain = self._loader is None and isinstance(self._dataset, TensorTable)
        self.count = order.count
        self._random = Dice()
        self._at: tuple[int, int, int] | None = None
        self._indices: list[int] = []
        self._iterator: Iterator[Any] | None = None

    def load(self, *, lane: int, epoch: int, index: int, size: int) -> Mapping[str, Tensor]:  # noqa: ARG002
        """Return batch `index` of an epoch. Fields are as the data set names them, shape (size, ...)."""
        if self._at != (lane, epoch, index):
            self._restart(lane, epoch, index)
        self._at = (lane, epoch, index + 1)
        place = batch_slice(index, len(self._indices), self.order.training.batch_size)
        if self._plain:
            return self._rows(place)  # draws nothing, and swapping generators costs more than the rows
        with self._random:
            if self._loader is not None and self._iterator is not None:
                return _named(self._next(self._loader, index), self.order.fields)
            return self._rows(place)

    def every(self) -> Iterator[Mapping[str, Tensor]]:
        """Yield all samples once, in batches, unshuffled; also those that `drop_last` leaves out of an epoch."""
        order = replace(self.order, shuffle=False, drop_last=False)
        own = OrderedBatches(self._dataset if self._loader is None else self._loader, order)
        for index, size in enumerate(lane_batches(self.count, order.training.batch_size, drop_last=False)):
            yield own.load(lane=0, epoch=0, index=index, size=size)

    def _next(self, loader: DataLoader[Any], index: int) -> Any:  # noqa: ANN401 - a collated batch
        place = batch_slice(index, len(self._indices), self.order.training.batch_size)
        return next_batch(cast("Iterator[Any]", self._iterator), loader, lambda: self._indices[place])

    def _rows(self, place: slice) -> Mapping[str, Tensor]:
        rows = self._indices[place]
        if self._whole:
            return whole(self._dataset, rows)
        return _named(collated(samples_of(self._dataset, rows), rows, self.order.taken), self.order.fields)

    def _restart(self, lane: int, epoch: int, index: int) -> None:
        order, training = self.order, self.order.training
        count = order.count
        self._indices = permutation(training.seed, epoch, lane, count) if order.shuffle else list(range(count))
        self._random.seed(order.seed, epoch)
        self._iterator = None
        with self._random:
            if self._loader is not None:
                self._iterator = iter(self._ordered(self._loader))
                for earlier in range(index):
                    self._next(self._loader, earlier)
            elif not self._plain:
                for earlier in range(index):  # draws what was drawn before, so that the rest is the same
                    self._rows(batch_slice(earlier, count, training.batch_size))

    def _ordered(self, loader: DataLoader[Any]) -> DataLoader[Any]:
        sizes = lane_batches(self.order.count, self.order.training.batch_size, self.order.drop_last)
        rows = [
            self._indices[batch_slice(i, self.order.count, self.order.training.batch_size)] for i in range(len(sizes))
        ]
        return again(loader, batch_sampler=rows)


class LoaderBatches:
    """The user's own loader, with its sampler, collate function and workers."""

    def __init__(self, loader: DataLoader[Any], order: Order) -> None:
        """Refuse a loader whose batches are not those of the plan."""
        expected = (order.training.batch_size, order.drop_last)
        if loader.batch_size is not None and (loader.batch_size, loader.drop_last) != expected:
            raise DataError(
                "the loader makes other batches than the plan",
                where="the loader",
                expected=f"batch_size={expected[0]}, drop_last={expected[1]}",
                got=f"batch_size={loader.batch_size}, drop_last={loader.drop_last}",
                remedy="make the loader with the plan's numbers, or change the plan",
                code="E256",
            )
        self.loader, self.order, self.count = loader, order, order.count
        self._random, self._own = Dice(), LoaderDice(loader)
        self._at: tuple[int, int] | None = None
        self._iterator: Iterator[Any] | None = None

    def load(self, *, lane: int, epoch: int, index: int, size: int) -> Mapping[str, Tensor]:
        """Return batch `index` of an epoch; a repeated run of an epoch gives the same batches."""
        if self._at != (epoch, index) or self._iterator is None:
            self._restart(epoch, index)
        self._at = (epoch, index + 1)
        with self._random, self._own:
            batch = self._next(epoch, index)
        if batch is None:
            raise DataError(
                "the loader ended early",
                where=f"lane {lane}, epoch {epoch}, batch {index} of {size} samples",
                remedy="its sampler must give as many samples as its length says",
                code="E256",
            )
        return _named(batch, self.order.fields)

    def every(self) -> Iterator[Mapping[str, Tensor]]:
        """Yield all samples that the sampler may give, each once, in batches; also those that `drop_last` leaves out.

        A sampler that draws at random, or again what it has drawn, would count some people several times, and others
        not. A sampler of the user's own gives what it gives in an epoch, and so does a loader that batches by itself.
        """
        own, loader, size, rows = Dice(), self.loader, self.order.training.batch_size, list[int]()
        own.seed(self.order.seed, 0)
        with own:
            if loader.batch_sampler is not None and type(loader).__iter__ is DataLoader.__iter__:
                rows = list(dict.fromkeys(_drawn(loader)))
                loader = again(loader, batch_sampler=[rows[at : at + size] for at in range(0, len(rows), size)])
            iterator = iter(loader)
        for at in count(0, size):
            with own:
                batch = next_batch(iterator, loader, lambda at=at: rows[at : at + size])  # type: ignore[misc]
            if batch is None:
                return
            yield _named(batch, self.order.fields)

    def _next(self, epoch: int, index: int) -> Any:  # noqa: ANN401 - a collated batch
        return next_batch(cast("Iterator[Any]", self._iterator), self.loader, lambda: self._drawn_at(epoch, index))

    def _drawn_at(self, epoch: int, index: int) -> list[int]:
        """Return the samples of a batch that was drawn: draws them again, and reads none."""
        again_ = Dice()
        with again_:
            self._own.begin(epoch, follows=False)
        again_.seed(self.order.seed, epoch)
        with again_, self._own:
            return next(islice(self._own.draw(epoch), index, None), [])

    def _restart(self, epoch: int, index: int) -> None:
        count = len(lane_batches(self.count, self.order.training.batch_size, self.order.drop_last))
        if follows := self._at == (epoch - 1, count):
            with self._random, self._own:
                next(cast("Iterator[Any]", self._iterator), None)  # as a loop does: a sampler may draw at its end
        with self._random:
            self._own.begin(epoch, follows=follows)
        if not follows:
            self._iterator = None
            self._random.seed(self.order.seed, 1)
            with self._random:
                self._own.employ(epoch)
        self._random.seed(self.order.seed, epoch)
        with self._random, self._own:
            if hasattr(sampler := self.loader.sampler, "set_epoch"):
                sampler.set_epoch(epoch)
            self._iterator = iter(self.loader)
            for earlier in range(index):
                self._next(epoch, earlier)


def _drawn(loader: DataLoader[Any]) -> Iterator[int]:
    """Yield the places of the samples that a loader may draw."""
    sampler: Any = loader.sampler
    if loader.batch_size is None:
        yield from chain.from_iterable(cast("Any", loader.batch_sampler))
    elif isinstance(sampler, WeightedRandomSampler):
        yield from sampler.weights.nonzero().flatten().tolist()
    elif isinstance(sampler, RandomSampler):
        yield from range(sample_count(loader.dataset))
    else:
        yield from sampler


def again(loader: DataLoader[Any], **sampling: Any) -> DataLoader[Any]:  # noqa: ANN401 - arguments of DataLoader
    """Return a loader of the same data set, collate function and workers, with another choice of samples."""
    return DataLoader(
        loader.dataset,
        num_workers=loader.num_workers,
        prefetch_factor=loader.prefetch_factor,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        timeout=loader.timeout,
        **sampling,
    )


def _named(item: Any, fields: tuple[str, ...] | None) -> Mapping[str, Tensor]:  # noqa: ANN401 - a collated batch
    if isinstance(item, Mapping):
        return item
    values = item if isinstance(item, tuple | list) else (item,)
    fields = fields or getattr(item, "_fields", None)  # those of a NamedTuple
    if fields is None or len(fields) != len(values):
        raise DataError(
            "the data set gives tuples and their parts have no names",
            where="a batch of the data set",
            expected=f"{len(values)} names",
            got=f"{len(fields)}" if fields else "none",
            remedy="name them: Party(..., fields=['image', 'label'])",
            code="E253",
        )
    return dict(zip(fields, values, strict=True))
