"""Shared preprocessing: what the holders of a field tell each other of it, how that is put together, and its use.

| code | error | meaning |
| --- | --- | --- |
| E261 | DataError | a field cannot be preprocessed as the plan says, or has a value that was not agreed on |
| E541 | ContractError | what a party tells of a field cannot be put together with the rest |
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import torch
from torch import Tensor

from cutlayer.core.parts import Shared
from cutlayer.engine.wire import Buffer
from cutlayer.errors import ContractError, DataError

__all__ = ["Agreed", "Entry", "Summary", "apply", "check_told", "merge", "read", "summarise"]

Entry = int | str
_TEXT_MAX = 200  # bytes of an entry of a list
_NAMED = 5  # values that an error names
_MOST = 1e130  # largest number to scale: sums of squares stay finite over all samples of all parties
_ROUNDING = 16 * 2.0**-52  # a deviation that rounding alone may give, as a share of the mean


class Agreed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is known of a field: first of one party's samples, then of all.

    For "scale": `count`, `mean` and `squares` (the sum of squared differences from the mean), one number a column. For
    lists: `values`, sorted.
    """

    kind: str
    count: tuple[int, ...] = ()
    mean: tuple[float, ...] = ()
    squares: tuple[float, ...] = ()
    values: tuple[Entry, ...] = ()

    @property
    def deviation(self) -> tuple[float, ...]:
        """Return the standard deviation of the population, one number a column; 1 where all values are equal.

        A deviation of at most 16 * 2^-52 * |mean| counts as none: values so near are equal but for float64's rounding.
        """
        found = ((s / n) ** 0.5 if n else 0.0 for s, n in zip(self.squares, self.count, strict=True))
        return tuple(d if d > _ROUNDING * abs(m) else 1.0 for d, m in zip(found, self.mean, strict=True))


class Summary(NamedTuple):
    """What a party tells of a field: an `Agreed` of its own samples, as msgpack; and what it holds back.

    `held` never leaves: the columns, counted from 0, or the entries, that fewer than `least` samples have.
    """

    told: bytes
    held: tuple[Entry, ...] = ()


def summarise(shared: Shared, batches: Iterable[object], where: str, *, sole: bool = False) -> Summary:
    """Return what a party tells of a field, and what it holds back: nothing, if it is the `sole` holder.

    `batches` are the field's values: tensors of shape (batch, ...), or lists of texts.

    Raises:
        DataError: E261, they are not what `shared` is for, or too many.
    """
    least = 1 if sole else shared.least
    summary = _moments if shared.kind == "scale" else _listed
    own, held = summary(shared, batches, where, least)
    size = max(len(own.mean), len(own.values))
    if size > shared.limit:
        what = "columns" if shared.kind == "scale" else "values"
        raise _unfit(shared, where, f"at most {shared.limit} {what}", f"{size}", "raise `limit` in the plan")
    return Summary(msgspec.msgpack.encode(own), held)


def merge(shared: Shared, told: Sequence[tuple[str, Buffer]], me: str = "") -> bytes:
    """Put together what the parties told, in the order given: (party, message). Returns the total as msgpack.

    `me` is who does it. An error names its own values, and none of another party.

    Means and squares by Chan, Golub and LeVeque 1979 ("Updating formulae and a pairwise algorithm for computing sample
    variances", eq. 2.1); lists by union.

    Raises:
        ContractError: E541, a message cannot be read, or the parties' fields differ.
    """
    total: Agreed | None = None
    lists: dict[str, tuple[Entry, ...]] = {}
    for party, message in told:
        own = read(shared, message, party)
        lists[party] = own.values
        total = own if total is None else _together(shared, total, own, party)
    if total is None:
        raise ContractError(
            "nobody holds the field",
            where=f"data.{shared.field}",
            remedy="let a party's data have it, or take it out of the plan's preprocessing",
            code="E541",
        )
    if len(total.values) > shared.limit:
        raise ContractError(
            f"the field {shared.field!r} has more values than the plan allows",
            where=f"data.{shared.field}",
            expected=f"at most {shared.limit}",
            got=f"{len(total.values)}{_by_party(lists, me)}",
            remedy="look for a value that is written in several ways, also in case and spaces; or raise `limit` of its "
            "preprocessing in the plan, at all parties",
            code="E541",
        )
    return msgspec.msgpack.encode(total)


def _by_party(lists: Mapping[str, tuple[Entry, ...]], me: str) -> str:
    """Return in words how many values each party told, and which of them `me` alone has."""
    others = {entry for party, values in lists.items() if party != me for entry in values}
    alone = [entry for entry in lists.get(me, ()) if entry not in others]
    more = ", ..." if len(alone) > _NAMED else ""
    own = f"; {me} alone has {', '.join(map(ascii, alone[:_NAMED]))}{more}" if alone else ""
    return f" ({', '.join(f'{len(values)} at {party}' for party, values in lists.items())}{own})"


def read(shared: Shared, message: Buffer, party: str) -> Agreed:
    """Read a message of `party`. Raises `ContractError` E541 if it is no `Agreed` of this kind, within bounds."""
    try:
        own = msgspec.msgpack.decode(message, type=Agreed)
    except (msgspec.DecodeError, UnicodeDecodeError):
        own = Agreed("unreadable")
    columns = {len(own.count), len(own.mean), len(own.squares)}
    numbers = all(c >= 0 for c in own.count) and all(abs(m) < float("inf") for m in own.mean)
    numbers = numbers and all(0.0 <= s < float("inf") for s in own.squares)
    texts = all(isinstance(v, int) or len(v.encode()) <= _TEXT_MAX for v in own.values)
    if own.kind != shared.kind or len(columns) != 1 or not numbers or not texts:
        raise ContractError(
            f"what {party!r} tells of the field {shared.field!r} cannot be used",
            where=f"data.{shared.field}, from {party}",
            expected=f"the summary of a field to {shared.kind}",
            remedy="install the same release of cutlayer, and use the same contract, at all parties",
            code="E541",
        )
    return own


def check_told(shared: Shared, agreed: Agreed, held: Sequence[Entry], where: str) -> None:
    """Raise `DataError` E261 if nobody told what this party `held` back, and its samples cannot do without."""
    if shared.kind == "scale":
        what, missing = "column", [column for column in held if not agreed.count[int(column)]]
    else:
        what, missing = "class", [entry for entry in held if entry not in agreed.values]
    if missing and shared.kind != "categories":
        raise _unfit(
            shared,
            where,
            f"a party with at least {shared.least} samples of {what} {missing[0]!r}",
            "fewer here, and at all others",
            f"leave this {what} out at all parties; or lower `least` in the plan, if so few samples may be told of",
        )


def apply(shared: Shared, agreed: Agreed, value: object, where: str) -> Tensor:
    """Return a field's values after preprocessing: same shape; "scale" keeps the dtype, lists give int64.

    Raises:
        DataError: E261, another number of columns, texts where whole numbers were agreed on or the reverse, or a class
            that is not in the list.
    """
    if shared.kind == "scale":
        return _scaled(shared, agreed, value, where)
    places = {entry: place for place, entry in enumerate(agreed.values)}
    entries, shape = _entries(shared, value, where)
    if places and entries and _kind(entries) != (known := _kind(agreed.values)):
        other = "as texts, str(value)" if known == "texts" else "as whole numbers, int(value)"
        remedy = f"give this field {other}, as in the training data"
        raise _unfit(shared, where, f"{known}, as the parties agreed on", _kind(entries), remedy)
    if shared.kind == "categories":
        return torch.tensor([places.get(entry, -1) + 1 for entry in entries]).reshape(shape)
    unknown = [entry for entry in entries if entry not in places]
    if unknown:
        raise _unfit(
            shared,
            where,
            f"one of the {len(places)} classes of the training data",
            f"{unknown[0]!r}, and so {len(unknown)} in a batch",
            "remove these samples, or have samples of this class in the training data",
        )
    return torch.tensor([places[entry] for entry in entries], dtype=torch.int64).reshape(shape)


def _kind(entries: Sequence[Entry]) -> str:
    return "texts" if isinstance(entries[0], str) else "whole numbers"


def _scaled(shared: Shared, agreed: Agreed, value: object, where: str) -> Tensor:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise _unfit(shared, where, "a floating tensor", type(value).__name__, "convert it in the data set")
    columns = value.shape[1] if value.ndim > 1 else 1
    if columns != len(agreed.mean):
        raise _unfit(shared, where, f"{len(agreed.mean)} columns", f"{columns}", "give all parties the same columns")
    shape = (1, columns, *[1] * (value.ndim - 2)) if value.ndim > 1 else (1,)
    mean = torch.tensor(agreed.mean, dtype=torch.float64).reshape(shape)
    deviation = torch.tensor(agreed.deviation, dtype=torch.float64).reshape(shape)
    scaled = (value.double() - mean) / deviation
    return torch.where(value.isnan(), 0.0, scaled).to(value.dtype)


def _moments(shared: Shared, batches: Iterable[object], where: str, least: int) -> tuple[Agreed, tuple[Entry, ...]]:
    total: Agreed | None = None
    samples = torch.zeros(1, dtype=torch.int64)
    for value in batches:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise _unfit(shared, where, "a floating tensor", type(value).__name__, "convert it in the data set")
        table = value.double() if value.ndim > 1 else value.double()[:, None]
        rows = table.movedim(1, -1).reshape(-1, table.shape[1])
        here = ~rows.isnan()
        if bool((rows.abs() > _MOST).any()):
            most = f"numbers up to {_MOST:.0e}, or NaN for a missing value"
            raise _unfit(shared, where, most, "a larger one", "remove it, or divide the column by a power of ten")
        count = here.sum(0)
        mean = rows.nansum(0) / count.clamp(min=1)
        mean = mean + torch.where(here, rows - mean, 0.0).sum(0) / count.clamp(min=1)  # equal values: exactly theirs
        squares = torch.where(here, rows - mean, 0.0).square().sum(0)
        own = Agreed("scale", tuple(count.tolist()), tuple(mean.tolist()), tuple(squares.tolist()))
        total = own if total is None else _together(shared, total, own, where)
        samples = samples + (~table.isnan()).unsqueeze(-1).flatten(2).any(2).sum(0)
    if total is None:
        return Agreed("scale"), ()
    few = [0 < count < least for count in samples.tolist()]
    rows_of = zip(few, total.count, total.mean, total.squares, strict=True)
    kept = [(0, 0.0, 0.0) if hidden else (count, mean, squares) for hidden, count, mean, squares in rows_of]
    return _columns(kept), tuple(column for column, hidden in enumerate(few) if hidden)


def _columns(found: Sequence[tuple[int, float, float]]) -> Agreed:
    return Agreed("scale", tuple(c for c, _, _ in found), tuple(m for _, m, _ in found), tuple(s for *_, s in found))


def _together(shared: Shared, one: Agreed, other: Agreed, party: str) -> Agreed:
    if shared.kind != "scale":
        kinds = {type(value) for value in (*one.values, *other.values)}
        if len(kinds) > 1:
            raise _differ(shared, party, "whole numbers at all parties, or texts at all", "both")
        return Agreed(shared.kind, values=_sorted({*one.values, *other.values}))
    if len(one.count) != len(other.count):
        raise _differ(shared, party, f"{len(one.count)} columns", f"{len(other.count)}")
    rows = zip(one.count, one.mean, one.squares, other.count, other.mean, other.squares, strict=True)
    return _columns([_joined(*row) for row in rows])


def _joined(n: int, mean: float, squares: float, m: int, other: float, more: float) -> tuple[int, float, float]:
    if not n:
        return m, other, more
    count, gap = n + m, other - mean
    return count, mean + gap * m / count, squares + more + gap * gap * n * m / count


def _listed(shared: Shared, batches: Iterable[object], where: str, least: int) -> tuple[Agreed, tuple[Entry, ...]]:
    seen: Counter[Entry] = Counter()
    for value in batches:
        entries, shape = _entries(shared, value, where)
        width = len(entries) // max(1, shape[0]) or 1  # entries of a sample; each counts once
        for place in range(0, len(entries), width):
            seen.update(set(entries[place : place + width]))
    kept = [entry for entry, samples in seen.items() if samples >= least]
    if len({type(entry) for entry in kept}) > 1:
        raise _unfit(shared, where, "texts, or whole numbers", "both", "give one kind of values")
    long = [entry for entry in kept if isinstance(entry, str) and len(entry.encode()) > _TEXT_MAX]
    if long:
        raise _unfit(shared, where, f"texts of at most {_TEXT_MAX} bytes", "longer ones", "shorten them")
    return Agreed(shared.kind, values=_sorted(kept)), _sorted(entry for entry in seen if seen[entry] < least)


def _sorted(entries: Iterable[Entry]) -> tuple[Entry, ...]:
    return tuple(sorted(entries, key=lambda entry: (isinstance(entry, str), entry)))


def _entries(shared: Shared, value: object, where: str) -> tuple[list[Entry], tuple[int, ...]]:
    """Return the values as a flat list, and their shape."""
    if isinstance(value, Tensor) and not value.is_floating_point():
        return [int(entry) for entry in value.flatten().tolist()], tuple(value.shape)
    if isinstance(value, np.ndarray):
        value = value.tolist() if value.dtype.kind in "UO" and value.ndim == 1 else value
    if isinstance(value, list | tuple):
        other = next((place for place, entry in enumerate(value) if not isinstance(entry, str)), None)
        if other is None:
            return list(value), (len(value),)
        kind = "None" if value[other] is None else type(value[other]).__name__
        got, remedy = f"{kind} at place {other} of this batch, counted from 0", "give a text there, or leave it out"
        raise _unfit(shared, where, "a tensor of whole numbers, or texts", got, remedy)
    got = f"{value.dtype} tensor" if isinstance(value, Tensor) else type(value).__name__
    raise _unfit(shared, where, "whole numbers or texts", got, "convert it in the data set")


def _unfit(shared: Shared, where: str, expected: str, got: str, remedy: str) -> DataError:
    return DataError(
        f"the field {shared.field!r} cannot be preprocessed ({shared.kind})",
        where=where,
        expected=expected,
        got=got,
        remedy=remedy,
        code="E261",
    )


def _differ(shared: Shared, party: str, expected: str, got: str) -> ContractError:
    return ContractError(
        f"the field {shared.field!r} is another one at {party!r}",
        where=f"data.{shared.field}, from {party}",
        expected=expected,
        got=got,
        remedy="give all parties the same field, in the same form",
        code="E541",
    )
