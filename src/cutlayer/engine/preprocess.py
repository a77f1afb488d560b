"""A party's part in shared preprocessing: it scans its own samples once, keeps what was agreed, and applies it.

| code | error | meaning |
| --- | --- | --- |
| E253 | DataError | a field that is to be preprocessed is not in the data |
| E262 | DataError | preprocessing was not agreed on before data was loaded |
| E268 | DataError | a user's data set fails at a batch |
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Any, Protocol

import msgspec

from cutlayer.core.parts import Shared
from cutlayer.core.plan import Plan
from cutlayer.engine.agree import Agreed, Entry, apply, check_told, merge, read, summarise
from cutlayer.engine.cautions import Unknown, alike, noticed, warn_of_alike, warn_of_empty, warn_of_unknown
from cutlayer.engine.wire import Buffer
from cutlayer.errors import CutlayerError, DataError

__all__ = ["Batches", "Preprocess", "unread"]


class Batches(Protocol):
    """A party's data for one mode, in the order that the plan fixes."""

    def load(self, *, lane: int, epoch: int, index: int, size: int) -> Mapping[str, Any]:
        """Return the `index`-th batch of an epoch, of `size` samples.

        Field -> tensor of shape (size, ...); or a list of `size` texts, for a field that the plan makes numbers of.
        """

    def every(self) -> Iterator[Mapping[str, Any]]:
        """Yield all samples once, in batches as `load` gives them; also those that `drop_last` leaves out."""


class Preprocess:
    """What one party does with the plan's `preprocessing`.

    Args:
        plan: The plan.
        party: This party.
        batches: Mode -> its data, such as "train"; those that it has.
        agreed: Field -> what an earlier run agreed on, for a prediction.
    """

    def __init__(
        self, plan: Plan, party: str, batches: Mapping[Any, Batches], agreed: Mapping[str, Agreed] | None = None
    ) -> None:
        """Find this party's fields. Nothing is read yet."""
        graph = plan.graph
        self._every = {f"data.{one.field}": one for one in plan.preprocessing}
        self._mine = {one.field: one for one in plan.preprocessing if party in graph.holders(one.at)}
        self._party, self._batches = party, batches
        self._sole = {field for field, one in self._mine.items() if graph.holders(one.at) == (party,)}
        self._held: dict[str, tuple[Entry, ...]] = {}
        self._own: dict[str, tuple[Entry, ...]] = {}  # entries of its training data, told or held
        self._unknown: dict[str, Unknown | None] = {}  # of this round
        self._taken: set[str] = set()
        self.agreed = {name: value for name, value in (agreed or {}).items() if name in self._mine}

    def summary(self, name: str) -> bytes:
        """Return what this party tells of "data.FIELD": sums over its training samples, or a list of values.

        Of columns and entries that fewer than `least` of its samples have, it holds nothing; the party remembers them.
        """
        return self._summarise(self._every[name], sole=self._every[name].field in self._sole)

    def merge(self, name: str, told: Sequence[tuple[str, Buffer]]) -> bytes:
        """Put together what all holders told, for the hub."""
        return merge(self._every[name], told, self._party)

    def take(self, name: str, total: Buffer, source: str) -> None:
        """Keep what was agreed on. Labels of the evaluation data are looked at now: training would be lost later.

        Raises:
            ContractError: E541, it cannot be read.
            DataError: E261, too few samples at any party have a column or a class that this party has, or a class
                is in its evaluation data only.
        """
        shared = self._every[name]
        if shared.field in self._mine:
            agreed = read(shared, total, source)
            check_told(shared, agreed, self._held.get(shared.field, ()), f"party {self._party}, training data")
            self.agreed[shared.field] = agreed
            own = self._own.get(shared.field, ())
            pairs = [pair for pair in alike((*own, *agreed.values)) if not {*pair} <= {*own}]
            warn_of_alike(self._party, shared.field, pairs, "at several parties")
            warn_of_empty(self._party, shared.field, agreed)
            self._taken.add(shared.field)
            classes = [field for field, one in self._mine.items() if one.kind == "classes"]
            if classes and self._taken.issuperset(classes):  # read once for all of them
                self._taken.clear()
                for field, value, where in self._values(classes, "evaluate"):
                    apply(self._mine[field], self.agreed[field], value, where)

    def alone(self) -> None:
        """Agree with oneself, to try a party without the others."""
        for field, shared in self._mine.items():
            own = merge(shared, [(self._party, self._summarise(shared, sole=True))])
            self.agreed[field] = read(shared, own, self._party)

    def begin(self) -> None:
        """Begin a round: its values are looked at anew."""
        self._unknown.clear()

    def end(self, mode: str) -> None:
        """Warn, at this party, of fields of which no value of this round is in the list."""
        for field, unknown in self._unknown.items():
            if unknown is not None and unknown[0]:
                warn_of_unknown(self._party, field, self.agreed[field], unknown, mode)

    def prepare(self, batch: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        """Return a batch, of the fields that are taken, with what was agreed on applied to them.

        Raises:
            DataError: E261, a value does not fit; E262, nothing was agreed on yet.
        """
        mine = [field for field in self._mine if field in batch]
        missing = [field for field in mine if field not in self.agreed]
        if missing:
            raise DataError(
                f"the parties have not agreed on the preprocessing of {missing[0]!r}",
                where=where,
                expected="a training run before, or what it agreed on",
                remedy=f"give Party(agreed=result.agreed[{self._party!r}]), with the result of the training run",
                code="E262",
            )
        ready = {field: apply(self._mine[field], self.agreed[field], batch[field], where) for field in mine}
        for field, value in ready.items():
            if self._mine[field].kind == "categories":
                self._unknown[field] = noticed(self._unknown.get(field, (0, ())), batch[field], value)
        return {**batch, **ready}

    def document(self) -> bytes:
        """Return what was agreed on as JSON, for a checkpoint or a file."""
        return msgspec.json.encode(self.agreed)

    def restore(self, document: bytes) -> None:
        """Go back to a `document`. Raises `msgspec.DecodeError` if it is none."""
        self.agreed = msgspec.json.decode(document, type=dict[str, Agreed])

    def _summarise(self, shared: Shared, *, sole: bool) -> bytes:
        where = f"party {self._party}, training data"
        values = (value for _, value, _ in self._values([shared.field], "train"))
        told, held = summarise(shared, values, where, sole=sole)
        self._held[shared.field] = held
        if shared.kind != "scale":
            self._own[shared.field] = own = (*read(shared, told, self._party).values, *held)
            warn_of_alike(self._party, shared.field, alike(own), "at this party")
        return told

    def _values(self, fields: Sequence[str], mode: str) -> Iterator[tuple[str, Any, str]]:
        """Yield each field, its raw values and their place, batch by batch: all samples, also without `drop_last`."""
        source = self._batches.get(mode)
        batches = iter(()) if source is None else source.every()
        of = "" if mode == "train" else " in the evaluation data"
        for index in count():
            where = self._where(", ".join(map(repr, fields)), of, index)
            try:
                batch = next(batches, None)
            except DataError as error:
                error.within(where)
                raise
            except CutlayerError:
                raise
            except Exception as error:
                raise unread(error, where) from error
            if batch is None:
                return
            for field in fields:
                where = self._where(repr(field), of, index)
                if field not in batch:
                    raise DataError(
                        f"the data has no field {field!r}",
                        where=where,
                        expected=f"fields {', '.join(batch)}",
                        remedy="let the data set give this field; name tuple items with Party(fields=[...])",
                        code="E253",
                    )
                yield field, batch[field], where

    def _where(self, fields: str, of: str, index: int) -> str:
        return f"party {self._party}, preprocessing of {fields}{of}, batch {index}"


def unread(error: Exception, where: str) -> DataError:
    """Return the error of data that cannot be read; what the data set says of it stays at this party."""
    return DataError(
        "the data set failed at a batch",
        where=where,
        got=" ".join(f"{type(error).__name__}: {error}".split())[:400],
        remedy="give the DataLoader a collate_fn that pads samples to one length, as in docs/reference/data.md; "
        "what differs is in the shapes of data[index], index by index"
        if "equal size" in str(error)
        else "read this batch's samples alone, as data[index]; check that its files are there and can be read",
        code="E268",
    )
