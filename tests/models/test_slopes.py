"""Gradients of the pieces are compared with the model's, and doing so leaves nothing behind."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.module import register_module_full_backward_hook

from cutlayer.errors import StageError
from cutlayer.models.cut import compose, cut
from cutlayer.models.slopes import Slopes

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


class Saving(nn.Module):
    """Two layers that keep what their backward needs in 16 bits, to save memory."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        with saved_tensors_hooks(lambda kept: kept.bfloat16(), lambda kept: kept.float()):
            return self.two(torch.tanh(self.one(x)))


class Net(nn.Module):
    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.norm, self.drop, self.last = first, nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(self.norm(self.first(x))))


class Body(nn.Sequential):
    pass


@pytest.fixture
def halving() -> Iterator[None]:
    """A hook for all modules, which halves the gradients of one class."""
    hook = register_module_full_backward_hook(
        lambda module, grads, _: tuple(0.5 * one for one in grads) if type(module) is Body else None
    )
    yield
    hook.remove()


@pytest.mark.provokes("E321")
def test_what_changes_gradients_alone_is_found_and_the_remedy_helps():
    model = Net(Saving())
    with pytest.raises(StageError, match=r"E321.*do not give the gradients that the model gives") as caught:
        cut(model, "first.one", example=X)
    assert caught.value.where.startswith("Net in train mode, gradient of 'first.one.weight', 'first.two.")
    assert "saved_tensors_hooks" in caught.value.remedy
    assert "do it in a submodule of its own" in caught.value.remedy
    made = cut(model, "first", example=X)
    model.eval()
    for piece in made.pieces:
        piece.module.eval()
    wanted = list(model.parameters())
    for one, other in zip(
        torch.autograd.grad(model(X).sum(), wanted), torch.autograd.grad(compose(made, X).sum(), wanted), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.provokes("E321")
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # torch's, of the model called by keyword
def test_a_hook_for_all_modules_on_what_is_cut_apart(halving: None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), Body(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)), nn.Linear(6, 3))
    with pytest.raises(StageError, match=r"E321.*do not give the gradients.*a hook for all modules"):
        cut(model, "1.0", example=X)
    assert cut(model, "1", example=X).checked


@pytest.mark.provokes("E321")
def test_pieces_that_have_no_gradient_where_the_model_has():
    slopes = Slopes(nn.Linear(6, 6), {"x": X})
    assert slopes.run(lambda given: given["x"] * 2) is not None
    assert slopes.run(lambda given: given["x"].detach() * 2) is None
    with pytest.raises(StageError, match=r"E321.*gradient of all parameters.*RuntimeError: .*does not require grad"):
        slopes.compare("Net")


def test_the_comparison_leaves_nothing_behind():
    model = Net(nn.Linear(6, 6))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    grads = [parameter.grad for parameter in model.parameters()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(5)
    random.seed(5)
    seeds = torch.get_rng_state(), random.getstate()
    cut(model, "first", example=X)
    assert torch.equal(torch.get_rng_state(), seeds[0])
    assert random.getstate() == seeds[1]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is grad for parameter, grad in zip(model.parameters(), grads, strict=True))
    assert all(bool((grad == 3.0).all()) for grad in grads)
    assert not X.requires_grad


def test_a_model_that_takes_no_inputs_that_need_gradients_is_cut():
    class Numpy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.from_numpy(x.numpy() * 2)

    class Through(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.numpy(x))

    model = Through(nn.Linear(6, 6))
    model.numpy = Numpy()
    made = cut(model, "first", example=X)
    model.eval()
    for piece in made.pieces:
        piece.module.eval()
    assert torch.equal(compose(made, X), model(X))
