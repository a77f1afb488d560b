"""Ways in which people write a forward: each is cut, and the pieces give what the model gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cutlayer.models.cut import compose, cut

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


class Three(nn.Module):
    """Three layers; each test's model has a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.three = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)


class Builtins(Three):
    def forward(self, input: Tensor, range: Tensor) -> Tensor:
        return self.three(self.two(self.one(input)) + range)


@pytest.mark.parametrize("example", [(X, X), None], ids=["example", "none"])
def test_arguments_may_be_called_as_builtins_are(example: tuple[Tensor, Tensor] | None):
    model = Builtins()
    made = cut(model, "one", example=example)
    assert made.inputs == ("input", "range")
    assert made.pieces[1].inputs == ("data.range", "0.one")
    assert torch.equal(compose(made, (X, 2 * X)), model(X, 2 * X))
