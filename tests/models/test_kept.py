"""A model that is changed after it was cut: what the pieces follow is followed, all else is refused."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.hooks import RemovableHandle

import cutlayer as cl
from cutlayer.errors import PlanError

ROWS = TensorDataset(torch.randn(8, 6, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3)
LOSS = nn.CrossEntropyLoss()


class Cooled(nn.Module):
    """Stays whole: its own attribute is read at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.by = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return x / self.by


class Own:
    """A configuration as a plain class, with another one in it."""

    def __init__(self) -> None:
        self.slope, self.names, self.inner = 1.0, ["a"], SimpleNamespace(deep={"deeper": [1]})


class Counting:
    """Does something when it is called, and counts that."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> None:
        self.calls += 1


class Clock:
    """Has an object that use changes, such as a logger's handlers: not only plain values."""

    def __init__(self) -> None:
        self.now, self.zone = 0, object()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.cooled, self.calls, self.tau = Cooled(), 0, 1.0
        self.settings, self.steps = SimpleNamespace(power=1, name="net"), [1, float("nan")]
        self.own, self.clock, self.dice, self.count = Own(), Clock(), Random(0), Counting()
        self.register_buffer("heat", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = self.cooled(self.b(torch.relu(self.a(x)))) / self.tau * self.heat
        return self.c(torch.relu(h**self.settings.power)) * self.steps[0] * self.own.slope


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def uncut(model: nn.Module) -> None:
    optimizer = sgd(list(model.parameters()))
    for x, y in DataLoader(ROWS, batch_size=4):
        optimizer.zero_grad()
        LOSS(model(x), y).backward()
        optimizer.step()


def split(model: nn.Module) -> cl.Split:
    return cl.split(model, "a", example=ROWS.tensors[0][:2], labels="server")


def fit(cut: cl.Split) -> cl.Run:
    return cl.fit(cut, DataLoader(ROWS, batch_size=4), loss=LOSS, optimizer=sgd)


CHANGES: dict[str, tuple[str, Callable[[Net], object]]] = {
    "number": ("'tau'.*expected 1.0.*got 0.25", lambda model: setattr(model, "tau", 0.25)),
    "settings": ("'settings.power'.*expected 1,.*got 2", lambda model: setattr(model.settings, "power", 2)),
    "object": ("'own.slope'.*expected 1.0,.*got 0.5", lambda model: setattr(model.own, "slope", 0.5)),
    "new in it": ("'own.other'.*expected none.*got 1", lambda model: setattr(model.own, "other", 1)),
    "gone from it": ("'own.slope'.*expected 1.0.*got none", lambda model: delattr(model.own, "slope")),
    "list": ("'steps'", lambda model: model.steps.__setitem__(0, 2)),
    "layer": ("'b'.*got a Linear, another one", lambda model: setattr(model, "b", nn.Linear(6, 6))),
    "removed": ("'tau'.*got none", lambda model: delattr(model, "tau")),
    "buffer": ("'heat'.*another one", lambda model: setattr(model, "heat", torch.zeros(()))),
}


@pytest.mark.parametrize("change", list(CHANGES))
@pytest.mark.provokes("E335")
def test_a_change_that_the_pieces_would_not_follow_is_refused(change: str):
    text, apply = CHANGES[change]
    model = Net()
    cut = split(model)
    run = fit(cut)
    apply(model)
    for use in (cut.plan, lambda: cut.modules("client"), lambda: fit(cut), lambda: run.predict(ROWS)):
        with pytest.raises(PlanError, match=f"E335.*{text}.*cut the model again"):
            use()


def test_a_slice_of_a_sequential_is_held_to_its_layers():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    cut = cl.split(model, 0, example=ROWS.tensors[0][:2], labels="server")
    model[1] = nn.Tanh()
    with pytest.raises(PlanError, match=r"E335.*'1'.*expected a ReLU.*got a Tanh"):
        cut.plan()


def test_an_object_that_use_changes_is_no_change():
    model = Net()
    cut = split(model)
    model.clock.now = 1
    model.dice.gauss(0, 1)
    model.count()
    assert cut.plan()


def distilled() -> tuple[nn.Module, cl.Split, Tensor]:
    transformers = pytest.importorskip("transformers")
    config = transformers.DistilBertConfig(vocab_size=9, dim=8, n_layers=2, n_heads=2, hidden_dim=8, num_labels=2)
    model = transformers.DistilBertForSequenceClassification(config)
    words = torch.ones(2, 4, dtype=torch.long)
    return model, cl.split(model, 0, example={"input_ids": words}), words


def test_what_use_writes_to_a_configuration_of_transformers_is_no_change(tmp_path: Path):
    """As `save_pretrained` and a call with labels do."""
    model, cut, words = distilled()
    model(input_ids=words, labels=torch.zeros(2, dtype=torch.long))
    model.save_pretrained(tmp_path)
    assert model.config.problem_type == "single_label_classification"
    assert model.config.architectures
    assert cut.plan()
    model.config = copy.deepcopy(model.config)
    assert cut.plan()


CONFIGURED: dict[str, Any] = {
    "output_hidden_states": True,
    "_attn_implementation": "eager",
    "seq_classif_dropout": 0.9,
    "id2label": {0: "well", 1: "ill"},
}


@pytest.mark.provokes("E335")
@pytest.mark.parametrize("name", CONFIGURED)
def test_a_changed_configuration_of_transformers_is_refused(name: str):
    model, cut, _ = distilled()
    setattr(model.config, name, CONFIGURED[name])
    with pytest.raises(PlanError, match=rf"E335\] 'config.{name}\w*' of the model has changed"):
        cut.plan()


@pytest.mark.provokes("E335")
def test_a_change_deep_in_a_plain_object_is_refused():
    model = Net()
    cut = split(model)
    model.own.inner.deep["deeper"][0] = 2
    with pytest.raises(PlanError, match=r"E335\] 'own.inner.deep' .*expected .*1.*got .*2"):
        cut.plan()


def test_what_the_error_advises_trains_as_uncut():
    """Cut again; a buffer that is filled; an attribute of a submodule that stays whole."""
    plain = Net()
    model = copy.deepcopy(plain)
    cut = split(model)
    for tau, heat, by in ((1.0, 1.0, 1.0), (0.25, 1.0, 1.0), (0.25, 2.0, 1.0), (0.25, 2.0, 3.0)):
        for net in (plain, model):
            net.tau, net.cooled.by = tau, by
            net.heat.fill_(heat)
        model(ROWS.tensors[0])
        uncut(plain)
        cut = split(model) if tau != 1.0 and heat == 1.0 else cut
        run = fit(cut)
        assert all(torch.equal(value, run.state_dict()[name]) for name, value in plain.state_dict().items())


class Classy(Net):
    power = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.power


@pytest.mark.provokes("E335")
@pytest.mark.parametrize("name", ["power", "forward"])
def test_what_hides_an_attribute_of_the_class_is_refused(name: str):
    model = Classy()
    cut = split(model)
    model.extra = 3  # is nothing that the class has
    assert cut.plan()
    setattr(model, name, 5.0 if name == "power" else lambda x: x)
    with pytest.raises(PlanError, match=rf"E335\] '{name}' of the model has changed since it was cut"):
        cut.plan()


def doubled(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
    return output * 2


class Wrapped(nn.Module):
    """Its inner module is cut apart, and is not the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


HOOKS: dict[str, Callable[[nn.Module], RemovableHandle]] = {
    "_forward_hooks": lambda module: module.register_forward_hook(doubled),
    "_forward_pre_hooks": lambda module: module.register_forward_pre_hook(lambda _module, inputs: inputs),
    "_backward_hooks": lambda module: module.register_full_backward_hook(lambda _module, given, _got: given),
    "_backward_pre_hooks": lambda module: module.register_full_backward_pre_hook(lambda _module, got: got),
}


@pytest.mark.provokes("E335")
@pytest.mark.parametrize("table", HOOKS)
@pytest.mark.parametrize("path", ["", "net"])
def test_a_hook_that_comes_later_where_no_piece_calls_it_is_refused(path: str, table: str):
    model = Wrapped()
    cut = cl.split(model, "net.a", example=ROWS.tensors[0][:2], labels="server")
    run = fit(cut)
    handle = HOOKS[table](model.get_submodule(path))
    name = re.escape(f"{path}.{table}".lstrip("."))
    for use in (cut.plan, lambda: cut.modules("client"), lambda: fit(cut), lambda: run.predict(ROWS)):
        with pytest.raises(PlanError, match=rf"E335\] '{name}'.*expected no hook.*got 1 hook.*remove the hook"):
            use()
    handle.remove()
    assert cut.plan()


@pytest.mark.provokes("E335")
def test_a_hook_that_is_followed_and_removed_later_is_refused():
    model = Wrapped()
    handle = model.net.register_forward_hook(doubled)
    plain = copy.deepcopy(model)
    cut = cl.split(model, "net.a", example=ROWS.tensors[0][:2], labels="server")
    uncut(plain)
    found = fit(cut).state_dict()
    assert all(torch.equal(value, found[name]) for name, value in plain.state_dict().items())
    handle.remove()
    with pytest.raises(PlanError, match=r"E335\] 'net._forward_hooks'.*expected 1 hook.*doubled.*got no hook"):
        cut.plan()


def test_a_hook_that_comes_later_on_a_module_that_is_called_is_called():
    plain = Net()
    model = copy.deepcopy(plain)
    cut = split(model)
    for net in (plain, model):
        net.a.register_forward_hook(doubled)
    uncut(plain)
    found = fit(cut).state_dict()
    assert all(torch.equal(value, found[name]) for name, value in plain.state_dict().items())


def test_the_hooks_of_transformers_itself_are_no_change():
    """Its models put hooks that note hidden states on their layers, also on one that is cut apart."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=9, num_labels=3, **sizes))
    words = torch.ones(2, 4, dtype=torch.long)
    cut = cl.split(model, "bert.encoder.layer.0", example={"input_ids": words})
    assert len(model(words, output_hidden_states=True, output_attentions=True).hidden_states) == 3
    from transformers.utils.output_capturing import install_output_capuring_hook

    install_output_capuring_hook(model.bert, "hidden_states", 0)
    assert model.bert._forward_hooks
    assert cut.plan()
    model.bert.register_forward_hook(lambda _module, _inputs, output: output)
    with pytest.raises(PlanError, match=r"E335\] 'bert._forward_hooks'"):
        cut.plan()
