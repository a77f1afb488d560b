"""A party's part in shared preprocessing: it scans its own samples once, keeps what was agreed, and applies it.

| code | error | meaning |
| --- | --- | --- |
| E253 | DataError | a field that is to be preprocessed is not in the data |
| E262 | DataError | preprocessing was not agreed on before data was loaded |
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import msgspec

from cutlayer.core.batching import lane_batches
from cutlayer.core.plan import Plan
from cutlayer.engine.agree import Agreed, apply, merge, read, summarise
from cutlayer.engine.wire import Buffer
from cutlayer.errors import DataError

__all__ = ["Batches", "Preprocess"]


class Batches(Protocol):
    """A party's data for one mode, in the order that the plan fixes."""

    @property
    def count(self) -> int:
        """Return the number of samples."""

    def load(self, *, lane: int, epoch: int, index: int, size: int) -> Mapping[str, Any]:
        """Return the `index`-th batch of an epoch, of `size` samples.

        Field -> tensor of shape (size, ...); or a list of `size` texts, for a field that the plan makes numbers of.
        """


class Preprocess:
    """What one party does with the plan's `preprocessing`.

    Args:
        plan: The plan.
        party: This party.
        train: Its training data; None if it has none.
        agreed: Field -> what an earlier run agreed on, for a prediction.
    """

    def __init__(
        self, plan: Plan, party: str, train: Batches | None, agreed: Mapping[str, Agreed] | None = None
    ) -> None:
        """Find this party's fields. Nothing is read yet."""
        graph = plan.graph
        self._every = {f"data.{one.field}": one for one in plan.preprocessing}
        self._mine = {one.field: one for one in plan.preprocessing if party in graph.holders(one.at)}
        self._training, self._party, self._train = plan.training, party, train
        self._lane = next((lane for lane in range(graph.lanes) if party in graph.data_fields(lane)), 0)
        self.agreed = {name: value for name, value in (agreed or {}).items() if name in self._mine}

    def summary(self, name: str) -> bytes:
        """Return what this party tells of "data.FIELD": sums over its training samples, or a list of values."""
        shared = self._every[name]
        return summarise(shared, self._values(shared.field), f"party {self._party}, training data")

    def merge(self, name: str, told: Sequence[tuple[str, Buffer]]) -> bytes:
        """Put together what all holders told, for the hub."""
        return merge(self._every[name], told)

    def take(self, name: str, total: Buffer, source: str) -> None:
        """Keep what was agreed on. Raises `ContractError` E541 if it cannot be read."""
        shared = self._every[name]
        if shared.field in self._mine:
            self.agreed[shared.field] = read(shared, total, source)

    def alone(self) -> None:
        """Agree with oneself, to try a party without the others."""
        for field, shared in self._mine.items():
            name = f"data.{field}"
            self.agreed[field] = read(shared, self.merge(name, [(self._party, self.summary(name))]), self._party)

    def prepare(self, batch: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        """Return a batch with what was agreed on applied to its fields.

        Raises:
            DataError: E261, a value does not fit; E262, nothing was agreed on yet.
        """
        if not self._mine:
            return batch
        missing = [field for field in self._mine if field not in self.agreed]
        if missing:
            raise DataError(
                f"the parties have not agreed on the preprocessing of {missing[0]!r}",
                where=where,
                expected="a training run before, or what it agreed on",
                remedy=f"give Party(agreed=result.agreed[{self._party!r}]), with the result of the training run",
                code="E262",
            )
        ready = {
            field: apply(self._mine[field], self.agreed[field], batch[field], where)
            for field in self._mine
            if field in batch
        }
        return {**batch, **ready}

    def document(self) -> bytes:
        """Return what was agreed on as JSON, for a checkpoint or a file."""
        return msgspec.json.encode(self.agreed)

    def restore(self, document: bytes) -> None:
        """Go back to a `document`. Raises `msgspec.DecodeError` if it is none."""
        self.agreed = msgspec.json.decode(document, type=dict[str, Agreed])

    def _values(self, field: str) -> Iterator[Any]:
        """Yield the field's raw values, batch by batch, over the training samples."""
        train = self._train
        if train is None:
            return
        for index, size in enumerate(lane_batches(train.count, self._training.batch_size, self._training.drop_last)):
            try:
                batch = train.load(lane=self._lane, epoch=0, index=index, size=size)
            except DataError as error:
                error.within(f"party {self._party}, preprocessing of {field!r}, batch {index}")
                raise
            if field not in batch:
                raise DataError(
                    f"the training data has no field {field!r}",
                    where=f"party {self._party}",
                    expected=f"fields {', '.join(batch)}",
                    remedy="let the data set give this field; name tuple items with Party(fields=[...])",
                    code="E253",
                )
            yield batch[field]
