"""What a submodule gives beside tensors, and how many of them: forward may decide by it, and is held to it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cutlayer.errors import StageError
from cutlayer.models.cut import compose, cut

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).abs() + 0.1


class Gives(nn.Module):
    def __init__(self, give: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.inner, self.give = nn.Linear(6, 6), give

    def forward(self, x: Tensor) -> Any:
        return self.give(self.inner(x), x)


class Told(nn.Module):
    """Uses what its first layer gives beside a tensor."""

    def __init__(self, give: Callable[[Tensor, Tensor], Any], use: Callable[[Any], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.use = Gives(give), use
        self.two, self.out = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.two(self.use(self.first(x)))))


def sizes(h: Tensor, x: Tensor) -> Any:
    return h, (x.shape[1], int(x.shape[1] > 5))


def by_sizes(given: Any) -> Tensor:
    h, (width, wide) = given
    return h * 2 if min(width, 7) - wide <= 5 else h


@pytest.mark.provokes("E314")
def test_forward_may_decide_by_numbers_that_a_submodule_gives():
    made, model = cut(Told(sizes, by_sizes), "two", example=X), Told(sizes, by_sizes)
    assert torch.equal(compose(made, X[:3]), model(X[:3]))
    with pytest.raises(StageError, match=r"E314.*depends on the values of its data.*got Python asks for bool\(\)"):
        cut(Told(lambda h, x: (h, x.sum()), lambda given: given[0] if given[1] > 0 else -given[0]), "two", example=X)
    with pytest.raises(StageError, match=r"E314.*for another batch size"):
        cut(Told(lambda h, x: (h, len(x)), lambda given: given[0] if given[1] > 2 else -given[0]), "two", example=X)


def by_item(given: Any) -> Tensor:
    h, positive = given
    return h if positive else -h


def down(x: Tensor) -> bool:
    return bool(x.sum() < 0)


@pytest.mark.provokes("E322")
@pytest.mark.parametrize(
    ("give", "use", "text"),
    [
        (lambda h, x: (h, down(x)), lambda o: -o[0] if o[1] else o[0], "expected False, got True"),
        (lambda h, x: SimpleNamespace(h=h, by=1 + down(x)), lambda o: o.h * o.by, "expected 1, got 2"),
        (lambda h, x: SimpleNamespace(h=h, by=[None, h][down(x)]), lambda o: o.h if o.by is None else -o.by, "None"),
        (lambda h, x: (h, [None, h][down(x)]), lambda o: o[0] if o[1] is None else -o[1], "None, got a tensor"),
        (
            lambda h, x: {"h": h, "by": "ud"[down(x)]},
            lambda o: o["h"] if o["by"] == "u" else -o["h"],
            "expected u, got d",
        ),
        (lambda h, x: [h] * (2 + down(x)), sum, "expected 2, got 3"),
        (lambda h, x: dict.fromkeys("abc"[: 2 + down(x)], h), lambda o: sum(o[key] for key in o), "expected 2, got 3"),
    ],
)
def test_what_a_submodule_finds_from_values_is_held_to(give: Any, use: Any, text: str):
    model = Told(give, use)
    made = cut(model, "two", example=X)
    assert torch.equal(compose(made, X + 1), model(X + 1))
    with pytest.raises(StageError, match=f"E322.*{text}.*use it in that submodule, or as a tensor"):
        compose(made, -X)
