"""Weights that several stages of a party share, with gradients added in the order of the uncut backward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from cutlayer.engine.autograd import go_back

__all__ = ["Tied", "ties"]

Key = tuple[int, int]  # lane, micro
Run = Callable[[tuple[Tensor, ...], tuple[Tensor, ...]], None]


class Tied:
    """A stage's backward, for a stage that shares weights with others of its party.

    Autograd first adds up all that one backward brings to a weight, use by use, and then adds the sum to `weight.grad`.
    A cut makes several backwards of one. So what the backward of a later stage has brought to a shared weight is kept
    aside, and is what the next one's sum begins with; only the earliest stage's backward adds to `weight.grad`.

    A weight with hooks is added to by each stage: the hooks would see the later stages' part more than once.
    """

    def __init__(
        self,
        earlier: Sequence[nn.Parameter] = (),
        later: Sequence[nn.Parameter] = (),
        aside: dict[tuple[Key, nn.Parameter], Tensor] | None = None,
    ) -> None:
        """Take the weights shared with earlier stages, those shared with later ones, and what is kept aside for all."""
        self.earlier, self.later, self._aside = earlier, later, {} if aside is None else aside

    def go_back(self, key: Key, roots: Sequence[Tensor], seeds: Sequence[Tensor], run: Run = go_back) -> None:
        """Run backwards from `roots`, for the microbatch of this key, with `seeds` as their gradients, by `run`."""
        if not (self.earlier or self.later):
            run(tuple(roots), tuple(seeds))
            return
        begun = [weight for weight in self.later if (key, weight) in self._aside]
        sums = [self._aside.pop((key, weight)) for weight in begun]
        kept = {weight: weight.grad for weight in self.earlier if not _hooked(weight)}
        for weight in kept:
            weight.grad = None
        try:
            if roots or begun:
                run((*roots, *begun), (*seeds, *sums))
            self._aside.update({(key, weight): weight.grad for weight in kept if weight.grad is not None})
        finally:
            for weight, gradient in kept.items():
                weight.grad = gradient

    def forget(self) -> None:
        """Drop what is kept aside, for a roll-back in mid-step."""
        self._aside.clear()


def ties(stages: Mapping[str, Sequence[nn.Parameter]]) -> dict[str, Tied]:
    """Return, for each stage that shares a weight with another, how it goes back.

    Args:
        stages: The weights of the stages of one party that train, in the plan's order; backwards run in reverse.
    """
    holders = Counter(weight for weights in stages.values() for weight in {*weights})
    found, seen = dict[str, Tied](), Counter[nn.Parameter]()
    aside: dict[tuple[Key, nn.Parameter], Tensor] = {}
    for name, weights in stages.items():
        shared = [weight for weight in dict.fromkeys(weights) if holders[weight] > 1]
        if shared:
            earlier = [weight for weight in shared if seen[weight]]
            later = [weight for weight in shared if seen[weight] + 1 < holders[weight]]
            found[name] = Tied(earlier, later, aside)
            seen.update(shared)
    return found


def _hooked(weight: nn.Parameter) -> bool:
    return bool(weight._backward_hooks or weight._post_accumulate_grad_hooks)
