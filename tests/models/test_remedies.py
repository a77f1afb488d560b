"""Refusals whose cause is easily taken for another: what each names, and that what it advises trains."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import cutlayer as cl
from cutlayer.errors import PlanError, StageError
from tests.models.test_zoo import undropped
from tests.models.zoo import SUBJECTS

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))


def trains(model: nn.Module, at: str, target: Tensor, loss: nn.Module, x: Tensor = X) -> bool:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made = cl.split(model, at, example=x[:2], labels="server")
    found = cl.fit(made, TensorDataset(x, target), loss=loss, batch_size=4).state_dict()
    return all(value.isfinite().all() and not torch.equal(value, before[name]) for name, value in found.items())


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


class Forces(nn.Module):
    """Gives the gradient of an energy: of the whole model, or of its last part alone."""

    def __init__(self, *, whole: bool) -> None:
        super().__init__()
        self.a, self.b, self.head, self.whole = nn.Linear(6, 6), nn.Linear(6, 6), Energy(), whole

    def forward(self, x: Tensor) -> Tensor:
        if not self.whole:
            return self.head(torch.tanh(self.b(torch.tanh(self.a(x)))))
        x.requires_grad_()
        energy = self.head.last(torch.tanh(self.b(torch.tanh(self.a(x)))))
        return -torch.autograd.grad(energy.sum(), x, create_graph=True)[0]


class Energy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(6, 1, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        with torch.enable_grad():
            h = h if h.requires_grad else h.detach().requires_grad_()
            return -torch.autograd.grad(self.last(torch.tanh(h)).sum(), h, create_graph=True)[0]


@pytest.mark.provokes("E325")
def test_a_forward_that_takes_gradients():
    with pytest.raises(StageError, match=r"E325.*takes gradients itself.*torch.enable_grad\(\):`, in a submodule"):
        cl.split(Forces(whole=True), "a", example=X[:2], labels="server")
    assert trains(Forces(whole=False), "a", torch.randn(8, 6), nn.MSELoss())


class Weighed(nn.Module):
    """Weighs its output by the gradient of its own weight, also in evaluation; in its forward, or in a submodule."""

    def __init__(self, *, apart: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.apart = nn.Linear(6, 6), Slope(), nn.Linear(6, 3), apart

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        if not self.apart:
            return self.c(self.b(h))
        with torch.enable_grad():
            out = self.b.layer(h)
            (slope,) = torch.autograd.grad(out.square().sum(), self.b.layer.weight, create_graph=True)
        return self.c(out) * slope.norm()


class Slope(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, h: Tensor) -> Tensor:
        with torch.enable_grad():
            out = self.layer(h)
            (slope,) = torch.autograd.grad(out.square().sum(), self.layer.weight, create_graph=True)
        return out * slope.norm()


@pytest.mark.provokes("E325")
@pytest.mark.parametrize("labels", ["client", "server"])
def test_a_forward_that_takes_gradients_of_its_own_weight_with_them_switched_on(labels: str):
    wanted = (
        r"E325.*takes gradients itself.*function 'grad' at .*torch.autograd.grad.*enable_grad\(\):`, in a submodule"
    )
    with pytest.raises(StageError, match=wanted):
        cl.split(Weighed(apart=True), "a", example=X[:2], labels=labels)
    plain, model = Weighed(apart=False), Weighed(apart=False)
    made = cl.split(model, "a", example=X[:2], labels=labels)
    rows = TensorDataset(X, torch.arange(8) % 3)
    sgd = torch.optim.SGD(plain.parameters(), lr=0.1)
    loss = nn.CrossEntropyLoss()
    for x, y in DataLoader(rows, 4):
        sgd.zero_grad()
        loss(plain(x), y).backward()
        sgd.step()
    run = cl.fit(made, DataLoader(rows, 4), loss=loss, optimizer=lambda given: torch.optim.SGD(given, lr=0.1))
    found = run.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in plain.state_dict().items())
    plain.eval()
    assert torch.equal(run.predict(rows), plain(X).detach())


class Switched(nn.Module):
    """Runs only while the model has switched it on, for all of its kind."""

    on = False

    def forward(self, h: Tensor) -> Tensor:
        if not Switched.on:
            raise LookupError("it is off")
        return h


class Switching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.switched, self.b = nn.Linear(6, 6), Switched(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        Switched.on = True
        h = self.switched(self.a(x))
        Switched.on = False
        return self.b(torch.relu(h))


@pytest.mark.provokes("E321")
def test_a_submodule_that_runs_in_the_model_alone():
    with pytest.raises(StageError, match=r"E321.*do not run.*submodule 'switched' at .*got LookupError: it is off"):
        cl.split(Switching(), "a", example=X[:2], labels="server")


class Real(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.view_as_real(x)


class Waves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Linear(6, 6, dtype=torch.cfloat) for _ in range(2))
        self.real, self.out = Real(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.b(torch.view_as_complex(self.real(self.a(x.to(torch.cfloat))))).abs())


@pytest.mark.provokes("E319")
def test_complex_numbers_do_not_cross():
    with pytest.raises(StageError, match=r"E319.*cannot cross.*got complex64.*torch.view_as_real\(x\) cross"):
        cl.split(Waves(), "a", example=X[:2], labels="server")
    assert trains(Waves(), "real", torch.arange(8) % 3, nn.CrossEntropyLoss())


class Token(nn.Module):
    """Puts a token before those of each sample."""

    def __init__(self, batch: Callable[[Tensor], int]) -> None:
        super().__init__()
        self.patch, self.first, self.batch = nn.Linear(6, 6), nn.Parameter(torch.ones(1, 1, 6)), batch
        self.mlp, self.out = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x)
        x = torch.cat([self.first.expand(self.batch(x), -1, -1), x], 1)
        return self.out(torch.relu(self.mlp(x))[:, 0])


@pytest.mark.provokes("E314")
def test_the_batch_as_a_number():
    x = X[:, None].repeat(1, 3, 1)
    with pytest.raises(StageError, match=r"E314.*for another batch size.*take the batch as x.size\(0\)"):
        cl.split(Token(lambda x: int(x.size(0))), "patch", example=x[:2], labels="server")
    for batch in (lambda x: x.size(0), lambda x: len(x)):
        made = cl.split(Token(batch), "patch", example=x[:2], labels="server")
        assert cl.fit(made, TensorDataset(x, torch.arange(8) % 3), loss=nn.CrossEntropyLoss(), batch_size=4).result


@pytest.mark.provokes("E319")
def test_a_bias_of_positions_crosses_for_each_sample():
    def spread(_block: nn.Module, _given: object, out: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        return out[0], *(x if x is None else x.expand(len(out[0]), -1, -1, -1) for x in out[1:])

    subject = SUBJECTS["t5"]
    example = {name: value[:2] for name, value in subject.inputs.items()}
    options = {"labels": "server", "release": subject.release}
    for at in ("encoder.block.0", "decoder.block.0"):
        with pytest.raises(StageError, match=r"E319.*got float32\[1, 2, .*x.expand\(batch, ...\) in it, or in a f"):
            cl.split(subject.make(), at, example=example, **options)
        uncut, model = undropped(subject.make()), undropped(subject.make())
        for block in (*uncut.encoder.block, *uncut.decoder.block, *model.encoder.block, *model.decoder.block):
            block.register_forward_hook(spread)
        made = cl.split(model, at, example=example, **options)
        run = cl.fit(made, DataLoader(subject.rows(), batch_size=6), loss=subject.loss, optimizer=sgd)
        optimizer = sgd(list(uncut.parameters()))
        subject.loss(uncut(**subject.inputs).logits, subject.labels).backward()
        optimizer.step()
        assert all(torch.equal(value, uncut.state_dict()[name]) for name, value in run.state_dict().items())


class Siamese(nn.Module):
    """One stem and encoder for two inputs, called for each, or once for both."""

    def __init__(self, *, once: bool) -> None:
        super().__init__()
        self.stem, self.encoder, self.head, self.once = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4), once

    def one(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.encoder(torch.relu(self.stem(x)))))

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        if self.once:
            return self.one(torch.stack([left, right], 1)).flatten(1)
        return torch.cat([self.one(left), self.one(right)], 1)


def contrast(score: Tensor, same: Tensor) -> Tensor:
    left, right = score.chunk(2, 1)
    return nn.functional.cosine_embedding_loss(left, right, same)


@pytest.mark.provokes("E332")
def test_a_layer_that_is_called_for_two_inputs_is_called_once_for_both():
    with pytest.raises(PlanError, match=r"E332.*call it once for all: layer\(torch.stack\(\[left, right\], 1\)\)"):
        cl.split(Siamese(once=False), "stem", example=(X[:2], X[:2]))
    ours, theirs, same = Siamese(once=True), Siamese(once=False), torch.tensor([1.0, -1.0] * 4)
    theirs.load_state_dict(ours.state_dict())
    data = TensorDataset(X, X.flip(0), same)
    cl.fit(
        cl.split(ours, "stem", example=(X[:2], X[:2])), data, loss=contrast, optimizer=sgd, batch_size=4, shuffle=False
    )
    optimizer = sgd(list(theirs.parameters()))
    for left, right, label in DataLoader(data, batch_size=4):
        optimizer.zero_grad()
        contrast(theirs(left, right), label).backward()
        optimizer.step()
    for name, value in theirs.state_dict().items():  # both inputs in one product: sums in another order
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.provokes("E325")
def test_of_a_wrapper_what_it_wraps_is_cut():
    wrapped = torch.nn.DataParallel(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)))
    with pytest.raises(StageError, match=r"E325.*as \*inputs, without names.*cut what it wraps: model.module"):
        cl.split(wrapped, "module.0", example=X[:2], labels="server")
    assert trains(wrapped.module, "0", torch.randn(8, 3), nn.MSELoss())


class Tasks(nn.Module):
    def __init__(self, *, together: bool) -> None:
        super().__init__()
        self.a, self.kind, self.size, self.together = nn.Linear(6, 6), nn.Linear(6, 2), nn.Linear(6, 1), together

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        h = torch.tanh(self.a(x))
        outputs = {"kind": self.kind(h), "size": self.size(h)}
        return torch.cat([*outputs.values()], 1) if self.together else outputs


@pytest.mark.provokes("E317")
def test_several_outputs_go_side_by_side_into_one_loss():
    words = r"E317.*output='kind', output='size'.*side by side, torch.cat\(\[first, second\], 1\)"
    with pytest.raises(StageError, match=words):
        cl.split(Tasks(together=False), "a", example=X[:2], labels="server")
    assert trains(Tasks(together=True), "a", torch.randn(8, 3), nn.MSELoss())
