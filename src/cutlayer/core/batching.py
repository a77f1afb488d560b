"""Which samples a step uses: order, batches, microbatches and lanes. The same at every party, from public numbers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from cutlayer.core.parts import Training

__all__ = ["StepSizes", "batch_slice", "microbatch_sizes", "permutation", "round_steps"]

# Per lane (None: not in this step) the microbatch sizes.
StepSizes = tuple[tuple[int, ...] | None, ...]


@dataclass(frozen=True)
class _Turn:
    """`repeat` equal steps in a row."""

    sizes: StepSizes
    repeat: int


def permutation(seed: int, epoch: int, lane: int, count: int) -> list[int]:
    """Return the order of `count` samples in an epoch (Mersenne Twister, seeded by seed, epoch and lane).

    The seed is the plan's public one: this orders samples and is no secret.
    """
    order = list(range(count))
    random.Random(f"cutlayer:{seed}:{epoch}:{lane}").shuffle(order)  # noqa: S311 - a public order, not a secret
    return order


def microbatch_sizes(batch: int, parts: int) -> tuple[int, ...]:
    """Cut `batch` samples into at most `parts` sizes that differ by one at most, larger ones first."""
    parts = min(batch, parts)
    small, extra = divmod(batch, parts)
    return tuple(small + (place < extra) for place in range(parts))


def batch_slice(step: int, count: int, batch_size: int) -> slice:
    """Return the place of a lane's `step`-th batch in its order of `count` samples."""
    return slice(step * batch_size, min((step + 1) * batch_size, count))


def lane_batches(count: int, batch_size: int, drop_last: bool) -> list[int]:
    """Return the batch sizes of one pass over `count` samples."""
    whole, rest = divmod(count, batch_size)
    return [batch_size] * whole + ([rest] if rest and not drop_last else [])


def round_steps(counts: Sequence[int], training: Training, *, relay: bool, drop_last: bool) -> list[list[_Turn]]:
    """Return the steps of a round as groups of equal ones, one list for each turn.

    Args:
        counts: Samples of each lane.
        training: For batch size and microbatches.
        relay: One turn per lane; else one turn in which all lanes that still have samples take part in each step.
        drop_last: Leave out smaller last batches.
    """
    lanes = [lane_batches(count, training.batch_size, drop_last) for count in counts]
    if relay:
        return [
            _group([_only(lane, len(lanes), size, training.microbatches) for size in sizes])
            for lane, sizes in enumerate(lanes)
        ]
    most = max((len(sizes) for sizes in lanes), default=0)
    parts = training.microbatches
    steps: list[StepSizes] = [
        tuple(microbatch_sizes(sizes[step], parts) if step < len(sizes) else None for sizes in lanes)
        for step in range(most)
    ]
    return [_group(steps)]


def _only(lane: int, lanes: int, size: int, parts: int) -> StepSizes:
    return tuple(microbatch_sizes(size, parts) if other == lane else None for other in range(lanes))


def _group(steps: list[StepSizes]) -> list[_Turn]:
    return [_Turn(sizes, len(list(same))) for sizes, same in groupby(steps)]
