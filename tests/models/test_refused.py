"""What cannot be cut, and that the error names the operation and the remedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cutlayer as cl
from cutlayer.errors import CutlayerError, PlanError, StageError
from cutlayer.models.cut import compose, cut

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Three layers, and a forward that a test gives in one line."""

    def __init__(self, forward: Callable[[Any, Tensor], Any] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.three = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.unused = nn.Linear(2, 2)
        self.body = forward or (lambda self, x: self.three(self.two(self.one(x))))

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)
        self.encoder, self.fc = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.encoder(x))


def by_value(self: Net, x: Tensor) -> Tensor:
    y = self.one(x)
    return self.two(y) if y.sum() > 0 else self.three(y)


def by_batch(self: Net, x: Tensor) -> Tensor:
    y = self.one(x)
    return self.two(y) if x.shape[0] > 2 else self.three(self.two(y))


def by_size(self: Net, x: Tensor) -> Tensor:
    y = self.one(x)
    return self.two(y) if x.shape[1] > 3 else self.three(y)


def in_place(self: Net, x: Tensor) -> Tensor:
    y = self.one(x)
    part = y[:, :3]
    z = self.two(y.clone())
    part += 1  # y has changed too; but after the cut it is another tensor
    return self.three(y + z)


def with_list(self: Net, x: Tensor) -> Tensor:
    y = self.one(x)
    words = {"a": y, "b": str(type(y))}
    return self.three(self.two(words["a"]))


def in_training(self: Net, x: Tensor) -> Tensor:
    z = torch.tanh(x)
    y = self.one(x)
    return self.three(self.two(y) + z) if self.training else self.three(self.two(y))


def lying(self: Net, x: Tensor) -> Tensor:
    self.calls = getattr(self, "calls", 0) + 1
    return self.three(self.two(self.one(x)) * (1 if self.calls < 5 else 2))


@pytest.mark.provokes(by="code")
@pytest.mark.parametrize(
    ("forward", "at", "code", "words"),
    [
        (None, "four", "E310", "no submodule to cut after: 'four'.*near names are"),
        (None, "unused", "E311", "it is never called.*candidates"),
        (None, "three", "E312", "nothing is computed after 'three'.*leave this cut point out"),
        (by_value, "one", "E314", "depends on the values of its data.*by_value.*torch.where|torch.where"),
        (by_batch, "one", "E314", "something else for another batch size"),
        (in_place, "two", "E316", r"written in place on one side of the cut.*x = x \+ y"),
        (
            lambda self, x: (self.two(self.one(x)), x),
            "one",
            "E317",
            "not one tensor.*output=0",
        ),
        (lying, "one", "E321", "the pieces do not give what the model gives.*hand in the stages by hand"),
        (lambda self, x: self.three(torch.from_numpy(self.one(x).numpy())), "one", "E313", "cannot be followed"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.startswith("E3") else "",
)
def test_a_cut_that_cannot_be(forward, at: str, code: str, words: str):
    with pytest.raises(StageError, match=words) as caught:
        cut(Net(forward), at, example=X)
    assert caught.value.code == code
    assert caught.value.remedy


def test_an_example_is_asked_for_only_where_there_is_none():
    forward = Net(lambda self, x: self.three(torch.from_numpy(self.one(x).numpy())))
    for example, asked in ((X, False), (None, True)):
        with pytest.raises(StageError, match="E313") as caught:
            cut(forward, "one", example=example)
        assert ("pass example=" in caught.value.remedy) == asked
        assert "into a submodule of its own" in caught.value.remedy


@pytest.mark.provokes("E320")
def test_another_value_crosses_in_evaluation():
    with pytest.raises(StageError, match=r"E320.*other values across the cut in evaluation than in training"):
        cut(Net(in_training), "one", example=X, method="fx")


class Lists(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"a": x, "rows": range(3)}


class Consume(nn.Module):
    def forward(self, found: dict[str, Any]) -> Tensor:
        return found["a"] * len(found["rows"])


@pytest.mark.provokes("E315")
def test_what_is_no_tensor_does_not_cross():
    net = Net(lambda self, x: self.three(self.consume(self.lists(self.one(x)))))
    net.lists, net.consume = Lists(), Consume()
    with pytest.raises(StageError, match=r"E315.*is not a tensor.*make it a tensor"):
        cut(net, "lists", example=X)
    assert cut(net, "consume", example=X).checked


@pytest.mark.provokes("E326")
def test_a_decision_by_size_needs_an_example():
    with pytest.raises(StageError, match=r"E326.*control flow depends on a size.*pass example="):
        cut(Net(by_size), "one")
    assert cut(Net(by_size), "one", example=X).checked


class Scale(nn.Module):
    """Takes any width."""

    def __init__(self) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.by


@pytest.mark.provokes("E322")
def test_a_batch_of_another_size_is_refused_when_it_comes():
    net = Net(lambda self, x: self.two(y) if (y := self.one(x)).shape[1] > 3 else y)
    net.one, net.two = Scale(), Scale()
    made = cut(net, "one", example=X)
    assert compose(made, X[:2]).shape == (2, 6)
    assert torch.equal(compose(made, torch.ones(2, 5)), torch.ones(2, 5))  # the same decision
    with pytest.raises(StageError, match=r"E322.*cut for another size"):
        compose(made, torch.ones(2, 3))


@pytest.mark.provokes("E318")
@pytest.mark.parametrize("place", ["cpu", "meta"])
@pytest.mark.parametrize("where", ["two.weight, two.bias", "one.weight, one.bias, two.weight and 3 more"])
def test_weights_without_values(where: str, place: str):
    model = Net()
    model.unused = None
    for module in [model.two] if where.startswith("two") else [model]:
        module.to("meta")
    words = rf"E318.*no values.*\(Net, {where}\).*meta.*to_empty.*load_state_dict"
    with pytest.raises(StageError, match=words):
        cl.split(model, "one", example=X.to(place), labels="server")
    model.to_empty(device="cpu").load_state_dict(Net().state_dict(), strict=False)
    assert cl.split(model, "one", example=X, labels="server").plan()


@pytest.mark.provokes("E318")
def test_nothing_to_train():
    with pytest.raises(StageError, match=r"E318.*no parameter to train.*unfreeze"):
        cut(Net().requires_grad_(False), "one", example=X)


@pytest.mark.provokes("E318")
@pytest.mark.parametrize("example", [X, None], ids=["example", "none"])
def test_lazy_modules_that_were_never_called(example: Tensor | None):
    def model() -> nn.Module:
        return nn.Sequential(nn.LazyLinear(6), nn.LazyBatchNorm1d(), nn.Linear(6, 6))

    words = r"E318.*a lazy module has no parameters yet \(Sequential, 0, 1\).*call the model once on a batch"
    for attempt in (lambda: cut(model(), "0", example=example), lambda: cl.split(model(), ("0", "1"), example=X)):
        with pytest.raises(StageError, match=words):
            attempt()
    called = model()
    called(X)
    assert cut(called, "0", example=example).points == ("0",)


@pytest.mark.provokes("E325")
@pytest.mark.parametrize("example", [{"y": X}, (X, X), X[:0], {"x": [X]}], ids=["name", "two", "empty", "nested"])
def test_an_example_that_does_not_fit(example: Any):
    with pytest.raises(StageError, match=r"E325.*does not fit the model's forward.*at least one sample"):
        cut(Net(), "one", example=example)


def halved(_module: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
    return (given[0] / 2,)


def halved_by_name(
    _module: nn.Module, given: tuple[()], named: dict[str, Tensor]
) -> tuple[tuple[()], dict[str, Tensor]]:
    return given, {name: value / 2 for name, value in named.items()}


def doubled(_module: nn.Module, _given: object, output: Tensor) -> Tensor:
    return output * 2


@pytest.mark.provokes("E325")
def test_a_hook_on_the_model_that_takes_no_arguments_by_name():
    model = Net()
    model.register_forward_pre_hook(halved)
    with pytest.raises(StageError, match=r"a hook on the model itself does not take the example") as caught:
        cut(model, "one", example=X)
    assert (caught.value.code, caught.value.got) == ("E325", "IndexError: tuple index out of range")
    assert caught.value.where == "hook of Net, called with the arguments of forward by name"
    assert caught.value.remedy == "remove the hook before the cut; do in forward what it does to values"
    assert model._forward_pre_hooks
    with pytest.raises(StageError, match=r"E325.*the example does not fit the model's forward"):  # not the hook alone
        cut(model, "one", example=X[:, :3])


@pytest.mark.provokes("E321")
@pytest.mark.parametrize("kind", ["forward", "pre", "container"])
def test_a_hook_that_the_pieces_do_not_call(kind: str):
    model: nn.Module = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.ReLU(), nn.Linear(6, 6)), nn.Linear(6, 6))
    if kind == "forward":
        model.register_forward_hook(doubled)
    elif kind == "pre":
        model.register_forward_pre_hook(halved_by_name, with_kwargs=True)
    else:
        model[1].register_forward_hook(doubled)
    model[0].register_forward_hook(lambda *_: None)  # a piece calls it: it is not to blame
    with pytest.raises(StageError, match=r"E321.*do not call a hook that changes what the model gives") as caught:
        cut(model, "1.0", example=X)
    owner = "1" if kind == "container" else "the model itself"
    assert caught.value.where == f"Sequential, forward hook or pre-hook of {owner}"
    assert caught.value.got.startswith("outputs that differ by up to ")
    assert caught.value.remedy == "remove the hook before the cut, and do in forward what it does to values"
    assert model._forward_hooks or model._forward_pre_hooks or model[1]._forward_hooks


@pytest.mark.provokes("E321")
@pytest.mark.parametrize("place", ["", "1"], ids=["the model", "a container"])
@pytest.mark.parametrize("name", ["register_full_backward_hook", "register_full_backward_pre_hook"])
@pytest.mark.parametrize("example", [X, None], ids=["example", "no example"])
def test_a_backward_hook_that_the_pieces_do_not_call(place: str, name: str, example: Tensor | None):
    model = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.ReLU(), nn.Linear(6, 6)), nn.Linear(6, 6))
    getattr(model[0], name)(lambda *_: None)  # stays whole: its piece calls it
    assert cut(model, "1.0", example=example)
    getattr(model.get_submodule(place), name)(lambda *_: None)
    with pytest.raises(StageError, match=r"E321.*the pieces do not call a backward hook") as caught:
        cut(model, "1.0", example=example)
    assert caught.value.where == f"Sequential, backward hook or pre-hook of {place or 'the model itself'}"
    assert cut(model, "1", example=example) if place else True


def test_a_hook_that_changes_nothing_is_not_blamed():
    model = Net(lying)
    model.register_forward_hook(lambda *_: None)
    with pytest.raises(StageError, match=r"E321.*the pieces do not give what the model gives"):
        cut(model, "one", example=X)
    plain = Net()
    plain.register_forward_hook(lambda *_: None)
    assert cut(plain, "one", example=X).checked


@pytest.mark.provokes("E327")
def test_a_call_that_does_not_say_how():
    with pytest.raises(StageError, match=r"E327.*no cut point.*name one in at="):
        cut(Net(), [], example=X)
    with pytest.raises(StageError, match=r"E327.*unknown method 'magic'.*auto, sequential, fx"):
        cut(Net(), "one", example=X, method="magic")


@pytest.mark.provokes("E313")
def test_only_a_sequential_can_be_sliced():
    with pytest.raises(StageError, match=r"E313.*only an nn.Sequential can be sliced"):
        cut(Net(), "one", example=X, method="sequential")


@pytest.mark.provokes("E311")
def test_a_block_is_kept_whole():
    with pytest.raises(StageError, match=r"E311.*inside a stack of blocks.*cut after a whole block"):
        cut(Blocks(), "encoder.layers.0.linear1", example=torch.randn(3, 4, 6))


@pytest.mark.provokes("E319")
def test_what_crosses_begins_with_the_batch():
    def turned(self: Net, x: Tensor) -> Tensor:
        return self.three(self.two(self.one(x).t().contiguous().t()))

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.turn, self.two = nn.Linear(6, 5), Turn(), nn.Linear(6, 5)
            self.three = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.three(x) + self.turn(self.one(x)).sum(0)[:, None]

    class Turn(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.t()

    assert cut(Net(turned), "one", example=X).checked
    with pytest.raises(StageError, match=r"E319.*does not begin with the batch.*cut elsewhere"):
        cl.split(Turned(), "turn", example=X, labels="server", release=["x"])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.middle, self.out = nn.Embedding(7, 6), nn.Linear(6, 6), nn.Linear(6, 7, bias=False)
        self.out.weight = self.table.weight

    def forward(self, words: Tensor) -> Tensor:
        return self.out(torch.relu(self.middle(self.table(words))))


WORDS = torch.arange(8).reshape(4, 2) % 7


@pytest.mark.provokes("E332")
def test_one_weight_at_two_parties():
    with pytest.raises(PlanError, match=r"E332.*'table.weight' and 'out.weight' are one weight, at two parties"):
        cl.split(Tied(), "table", example=WORDS, labels="server")
    assert cl.split(Tied(), "table", example=WORDS, labels="client").places == ("client", "server", "client")


def test_one_weight_at_two_parties_of_a_u_shape():
    """What is said to help does, and what is so already is not advised."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.three = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return self.three(self.two(self.one(x) * self.scale) * self.scale)

    with pytest.raises(PlanError) as caught:
        cl.split(Scaled(), "one", example=X)
    assert caught.value.what == "two uses of 'scale' are one weight, at two parties"
    assert caught.value.where == "piece 1 (server, after 'one' up to 'two') and piece 2 (client, after 'two')"
    assert "labels='client'" not in caught.value.remedy
    assert "labels='server', without the cut after 'two'" in caught.value.remedy
    assert cl.split(Scaled(), "one", example=X, labels="server").places == ("client", "server")

    class Early(Scaled):
        def forward(self, x: Tensor) -> Tensor:
            return self.three(self.two(self.one(x * self.scale) * self.scale.exp()))

    with pytest.raises(PlanError, match=r"E332.*one party.*\. cut so that both are at one party, or give each its own"):
        cl.split(Early(), "one", example=X)


@pytest.mark.provokes("E331")
def test_a_raw_input_stays_at_the_client():
    class Masked(Net):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.three(self.two(self.one(x) * mask))

    given = {"x": X, "mask": torch.ones(4, 1)}
    with pytest.raises(PlanError, match=r"E331.*runs at the server and needs the raw input 'mask'.*release=\['mask'\]"):
        cl.split(Masked(), ("one", "two"), example=given)
    with pytest.raises(PlanError, match=r"E331.*no input 'masks' to release.*one of x, mask"):
        cl.split(Masked(), ("one", "two"), example=given, release=["masks"])
    assert [r.field for r in cl.split(Masked(), ("one", "two"), example=given, release=["mask"]).plan().releases] == [
        "mask"
    ]


def test_an_error_says_which_line():
    with pytest.raises(CutlayerError, match=r"test_refused.py:\d+ `return self.two\(y\) if y.sum\(\) > 0"):
        cut(Net(by_value), "one", example=X)


def test_one_cut_point_that_leaves_the_server_nothing():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    named = nn.Sequential()
    for name, module in zip(("first", "act", "last"), model, strict=True):
        named.add_module(name, module)
    with pytest.raises(PlanError, match=r"E330.*nothing is left for the server after 'act'.*labels='server'"):
        cl.split(named, "act", example=torch.zeros(2, 4))
    with pytest.raises(PlanError, match=r"E330.*nothing is left for the server after -2"):
        cl.split(named, -2, example=torch.zeros(2, 4))


@pytest.mark.provokes("E325")
@pytest.mark.parametrize(
    ("example", "words"),
    [
        (torch.zeros(2, 5), r"E325.*does not fit.*got float32\[3, 5\]; RuntimeError: mat1 and mat2"),
        (torch.zeros(2, 4, dtype=torch.uint8), r"E325.*does not fit.*got uint8\[3, 4\]"),
    ],
)
def test_an_example_that_the_layers_do_not_take(example: Tensor, words: str):
    with pytest.raises(StageError, match=words):
        cl.split(nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Linear(3, 2)), 1, labels="server", example=example)
