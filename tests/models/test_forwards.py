"""Ways in which people write a forward: each is cut, and the pieces give what the model gives."""

from __future__ import annotations

import copy
import random
import types
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import cutlayer as cl
from cutlayer.errors import PlanError, StageError
from cutlayer.models.costs import costs
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


class Fresh(Three):
    def forward(self, x: Tensor) -> Tensor:
        x = nn.ReLU()(self.one(x))
        x = nn.Sequential(nn.Tanh(), nn.Dropout(0.5))(x)
        return self.three(self.two(x))


class FreshWeights(Three):
    def forward(self, x: Tensor) -> Tensor:
        return self.three(nn.Linear(6, 6)(self.two(self.one(x))))


@pytest.mark.parametrize("example", [X, None], ids=["example", "none"])
def test_modules_without_weights_may_be_made_in_forward(example: Tensor | None):
    model = Fresh()
    made = cut(model, "one", example=example)
    torch.manual_seed(0)
    expected = model(X)
    torch.manual_seed(0)
    assert torch.equal(compose(made, X), expected)


@pytest.mark.provokes("E313")
def test_modules_with_weights_may_not_be_made_in_forward():
    with pytest.raises(StageError, match=r"E313.*calls a Linear that is not one of its.*'weight'.*once, in __init__"):
        cut(FreshWeights(), "one", example=X)


def test_a_classifier_that_makes_its_activation_in_forward():
    transformers = pytest.importorskip("transformers")
    config = transformers.DistilBertConfig(vocab_size=9, dim=8, n_layers=2, n_heads=2, hidden_dim=8, num_labels=2)
    model = transformers.DistilBertForSequenceClassification(config)
    words = torch.arange(12).reshape(3, 4) % 9
    assert cl.split(model, 0, example={"input_ids": words}).cut.checked


class Slices(Three):
    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x)
        out = torch.zeros_like(x)
        out[:, :4] = h[:, :4]
        out[:, 4:] = 2 * h[:, 4:]
        return self.three(self.two(out))


class SliceAfter(Three):
    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x)
        part = h[:, :3]
        z = self.two(h.clone())
        h[:, :3] = 0.0
        return self.three(z) + part.sum(1, keepdim=True)


@pytest.mark.parametrize("example", [X, None], ids=["example", "none"])
@pytest.mark.parametrize("at", ["one", "two"])
def test_slices_may_be_assigned_on_one_side(at: str, example: Tensor | None):
    model = Slices()
    made = cut(model, at, example=example)
    result = compose(made, X)
    assert torch.equal(result, model(X))
    result.sum().backward()
    assert model.one.weight.grad is not None


@pytest.mark.provokes("E316")
def test_slices_may_not_be_assigned_across_the_cut():
    with pytest.raises(StageError, match=r"E316.*setitem.*h\[:, :3\] = 0.0"):
        cut(SliceAfter(), "two", example=X)
    assert cut(SliceAfter(), "one", example=X).checked


class Counts(Three):
    """Counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))


class Adds(Counts):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.three(self.two(self.one(x)) * self.calls)


class Assigns(Counts):
    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return self.three(self.two(self.one(x)))


class Chance(Three):
    """Leaves out a layer at random."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x)
        if random.random() < 0.5:
            h = h + self.two(h)
        return self.three(h)


class ByNumpy(Three):
    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x)
        return self.three(h if np.random.rand() < 0.02 else h + self.two(h))


class BySwitch(Three):
    """A switch that torch draws from sizes which are no tensor's."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x)
        return self.three(h + torch.rand(1).lt(0.98) * self.two(h))


class AtTheEnd(Three):
    def forward(self, x: Tensor) -> Tensor:
        h = self.three(self.two(self.one(x)))
        return h if random.random() < 0.98 else torch.tanh(h)


class Likely(Three):
    """What the remedy says: a switch for each sample."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x)
        return self.three(h + torch.rand_like(h[:, :1]).lt(0.5) * self.two(h))


class Turns(Three):
    """Does something else in every second call."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = self.one(x)
        return self.three(self.two(h) if self.calls % 2 else torch.relu(self.two(h)))


def test_calls_may_be_counted():
    model = Adds()
    made = cut(model, "one", example=X)
    assert model.calls == 0
    expected = model(X)
    model.calls.zero_()
    assert torch.equal(compose(made, X), expected)
    assert model.calls == 1


@pytest.mark.provokes("E313")
def test_a_buffer_may_not_be_replaced():
    model = Assigns()
    with pytest.raises(StageError, match=r"E313.*in place of its buffer 'calls'.*self.calls.copy_\(...\)"):
        cut(model, "one", example=X)
    assert isinstance(model.calls, Tensor)


@pytest.mark.provokes("E314")
@pytest.mark.parametrize("kind", [Chance, ByNumpy, BySwitch, AtTheEnd])
@pytest.mark.parametrize("seed", range(4))
def test_chance_that_no_step_draws_is_refused_whatever_it_gives(kind: type[nn.Module], seed: int):
    """Two calls that happen to do the same say nothing: a layer left out in the example was left out for ever."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    words = (
        r"E314.*draws a random number that is no step.*torch with sizes that are plain numbers.*submodule of its own"
    )
    with pytest.raises(StageError, match=words):
        cut(kind(), "one", example=X)


def test_chance_like_a_tensor_is_a_step():
    model = Likely()
    made = cut(model, "one", example=X)
    torch.manual_seed(3)
    expected = model(X)
    torch.manual_seed(3)
    assert torch.equal(compose(made, X), expected)


@pytest.mark.provokes("E314")
def test_memory_is_not_taken_for_the_batch():
    with pytest.raises(StageError, match=r"E314.*each time it is called with the same example.*submodule of its own"):
        cut(Turns(), "one", example=X)


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)
        self.encoder, self.fc = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.encoder(x))


@pytest.mark.parametrize("example", [X, None], ids=["example", "none"])
def test_a_negative_index_counts_from_the_end(example: Tensor | None):
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    assert cut(model, (0, -2), example=example).points == ("0", "1")
    with pytest.raises(StageError, match=r"E310.*-4.*got 3 children"):
        cut(model, -4, example=example)


def test_a_negative_index_of_a_block():
    made = cut(Blocks(), (0, -1), example=X[:, None])
    assert made.points == ("encoder.layers.0", "encoder")


@pytest.mark.provokes("E313")
@pytest.mark.parametrize("how", [lambda model: torch.jit.trace(model, X), torch.compile], ids=["jit", "compile"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_model_is_refused(how: Callable[[nn.Module], nn.Module]):
    model = how(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)))
    for attempt in (lambda: cut(model, "0", example=X), lambda: cl.split(model, 0, example=X)):
        with pytest.raises(StageError, match=r"E313.*a compiled model cannot be cut.*pass the module"):
            attempt()
    with pytest.raises(StageError, match="E313"):
        list(costs(model, X))


class Bent(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.layer(x))


class Plain(Three):
    def __init__(self) -> None:
        super().__init__()
        self.two = Bent(self.two)

    def forward(self, x: Tensor) -> Tensor:
        return self.three(self.two(torch.relu(self.one(x))))


@pytest.mark.provokes("E313")
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("at", ["one", "two"])
def test_a_submodule_is_compiled_after_the_cut(at: str, in_place: bool):
    model = Plain()
    if in_place:
        model.two.compile(backend="eager")
    else:
        model.two = torch.compile(model.two, backend="eager")
    with pytest.raises(StageError, match=r"E313.*Plain, two\).*before 'two' is compiled.*model.two.compile"):
        cut(model, at, example=X)
    plain = Plain()
    made = cut(plain, at, example=X)
    expected, calls = plain(X), []

    def backend(graph: torch.fx.GraphModule, _inputs: object) -> torch.fx.GraphModule:
        calls.append(graph)
        return graph

    plain.two.compile(backend=backend)
    with torch.no_grad():
        assert torch.equal(compose(made, X), expected)
    assert len(calls) == 1


class TwoInTraining(Three):
    """As GoogLeNet and Inception: a tuple in train mode, a tensor in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.aside = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        h = torch.relu(self.one(x))
        aside = self.aside(h) if self.training else None
        found = self.three(torch.relu(self.two(h)))
        return found if aside is None else (found, aside)


@pytest.mark.parametrize("at", ["one", "two"])
def test_an_output_that_is_a_tuple_in_train_mode_only(at: str):
    model = TwoInTraining()
    with pytest.raises(StageError, match=r"E317.*output=0"):
        cut(model, at, example=X)
    made = cut(model, at, example=X, output=0)
    assert torch.equal(compose(made, X), model(X)[0])
    for piece in made.pieces:
        piece.module.eval()
    assert torch.equal(compose(made, X), model.eval()(X))
    with pytest.raises(StageError, match=r"E317.*tuple of 2|E317.*got Tensor"):
        cut(model, at, example=X, output="pred")


class Named(Three):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"pred": self.three(self.two(self.one(x))), "input": x}


@pytest.mark.provokes("E317")
def test_the_remedy_for_several_outputs_can_be_followed():
    with pytest.raises(StageError, match=r"E317.*output='pred'") as caught:
        cl.split(Named(), "one", example=X)
    assert "output='pred'" in caught.value.remedy
    model = Named()
    made = cl.split(model, "one", example=X, output="pred")
    assert torch.equal(compose(made.cut, X), model(X)["pred"])


def test_a_misspelt_option_is_refused():
    with pytest.raises(TypeError, match="outputs"):
        cl.split(Named(), "one", example=X, outputs="pred")


@pytest.mark.provokes("E325")
@pytest.mark.parametrize("example", [X[:, :5], X.double()], ids=["width", "dtype"])
def test_an_example_that_the_layers_do_not_take_is_told_from_code_that_cannot_be_followed(example: Tensor):
    with pytest.raises(StageError, match=r"E325.*got float(32\[3, 5\]|64\[3, 6\]); RuntimeError"):
        cl.split(Named(), "one", example=example, output="pred")


class Spare(Three):
    """Does not use its last two layers."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.one(x))


def test_a_second_cut_point_that_was_chosen_is_told():
    with pytest.raises(StageError, match=r"E311.*at='two', the second cut point, chosen as.*at=\(FIRST, SECOND\)"):
        cl.split(Spare(), "one", example=X)
    assert cl.split(Spare(), "one", example=X, labels="server").names == ("head", "body")
    pair = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    with pytest.raises(PlanError, match=r"E330.*nothing is left for the server after -2.*labels='server'"):
        cl.split(pair, -2, example=X)


class Asks(Three):
    """Asks what its values are, as MONAI's BasicUNet does."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        if torch.jit.isinstance(x, Tensor) and not torch.jit.isinstance(x, list[Tensor]):
            x = self.two(x).relu()
        if torch.jit.isinstance([x, x], list[Tensor]) and not torch.jit.isinstance((x, 1), tuple[Tensor, Tensor]):
            x = x * 2
        return self.three(x)


class AsksPython(Three):
    """Asks with `isinstance` and `torch.is_tensor`, in forward and in a function beside it."""

    def forward(self, x: Tensor) -> Tensor:
        x = first_of(self.one(x))
        if torch.is_tensor(x) and isinstance(x.shape[0], int):
            x = self.two(x).relu()
        pair = x.chunk(2, 1)
        if isinstance(pair, tuple | list) and not isinstance(pair[0], nn.Parameter):
            x = torch.cat([pair[1], pair[0]], 1)
        return self.three(x) if isinstance(self.three.weight, nn.Parameter) else x


def first_of(value: Tensor | tuple[Tensor, ...]) -> Tensor:
    return value * 2 if isinstance(value, Tensor) else value[0]


@pytest.mark.parametrize("kind", [Asks, AsksPython])
@pytest.mark.parametrize("at", ["one", "two"])
def test_a_forward_may_ask_whether_a_value_is_a_tensor(at: str, kind: type[Three]):
    model = kind()
    made = cut(model, at, example=X)
    assert torch.equal(compose(made, X), model(X))
    assert "isinstance" not in globals()


@pytest.mark.provokes("E321")
def test_code_of_another_file_asks_in_vain_but_not_in_a_submodule():
    elsewhere = types.FunctionType(first_of.__code__, {"Tensor": Tensor, "__builtins__": __builtins__})

    class Through(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return elsewhere(x)

    class Calls(Three):
        def __init__(self, inside: bool) -> None:
            super().__init__()
            self.through = Through() if inside else elsewhere

        def forward(self, x: Tensor) -> Tensor:
            return self.three(self.two(self.through(self.one(x))))

    with pytest.raises(StageError, match=r"E321.*a type that code of another file asks for\); do it in a submodule of"):
        cut(Calls(False), "one", example=X)
    model = Calls(True)
    assert torch.equal(compose(cut(model, "one", example=X), X), model(X))


@pytest.mark.provokes("E326")
def test_what_a_value_is_is_known_with_an_example_only():
    with pytest.raises(StageError, match=r"E326.*depends on what a value is.*first_of|isinstance.*pass example="):
        cut(AsksPython(), "one")
    assert "isinstance" not in globals()


def test_a_forward_of_the_object_alone_is_followed():
    model = Three()
    model.forward = lambda x: model.three(model.two(model.one(x)) ** 2)
    made = cut(model, "two", example=X)
    assert torch.equal(compose(made, X), model(X))


class SharedTanh(Three):
    """Two blocks with one activation between them, which the model holds itself and in each block."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.Tanh()
        self.low, self.high = nn.Sequential(self.one, self.act), nn.Sequential(self.two, self.act)

    def forward(self, x: Tensor) -> Tensor:
        return self.three(self.act(self.high(self.low(x)) + x))


@pytest.mark.parametrize("example", [X, None], ids=["example", "none"])
@pytest.mark.parametrize(("at", "before"), [("low.1", 1), ("high.1", 2), ("act", 2), ("one", 1), ("two", 2)])
def test_a_name_of_several_is_cut_after_the_call_by_it(at: str, before: int, example: Tensor | None):
    model = SharedTanh()
    made = cut(model, at, example=example)
    assert torch.equal(compose(made, X), model(X))
    held = {id(p) for p in made.pieces[0].module.parameters()}
    assert [id(one.weight) in held for one in (model.one, model.two, model.three)] == [n < before for n in range(3)]
    assert (made.pieces[0].module.state_dict().keys() | made.pieces[1].module.state_dict().keys()) == set(
        model.state_dict()
    )


class TwoStacks(Three):
    """Holds its stack of blocks a second time, by which it calls it."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.base = nn.ModuleDict({"stack": self.encoder, "first": self.encoder.layers[0]})

    def forward(self, x: Tensor) -> Tensor:
        return self.three(self.base["stack"](self.one(x)))


@pytest.mark.parametrize("at", ["encoder.layers.0", "base.stack.layers.0", "base.first"])
def test_a_stack_with_two_names_is_cut_by_either(at: str):
    model = TwoStacks()
    words = X.reshape(2, 2, 6)
    made = cut(model, at, example=words)
    assert made.points == ("encoder.layers.0",)
    assert torch.equal(compose(made, words), model(words))
    keys = [key for piece in made.pieces for key in piece.module.state_dict()]
    assert sorted(keys) == sorted(model.state_dict())


class Converted(Three):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.as_tensor(self.one(x))
        h = torch.asarray(self.two(h), dtype=torch.float64, requires_grad=True) * torch.tensor(x.shape[1])
        return self.three(torch.as_tensor(h, dtype=torch.float32))


@pytest.mark.parametrize("at", ["one", "two"])
def test_what_makes_tensors_of_anything_takes_a_tensor(at: str):
    model = Converted()
    made = cut(model, at, example=X)
    assert torch.equal(compose(made, X), model(X))
    compose(made, X).sum().backward()
    grad, model.one.weight.grad = model.one.weight.grad, None
    model(X).sum().backward()
    assert torch.equal(grad, model.one.weight.grad)


class Extra(Three):
    """Has a state of its own beside its parameters."""

    def get_extra_state(self) -> Tensor:
        return torch.tensor([1])

    def set_extra_state(self, state: Tensor) -> None: ...

    def forward(self, x: Tensor) -> Tensor:
        return self.three(self.two(self.one(x)))


@pytest.mark.provokes("E321")
def test_an_extra_state_is_kept_by_a_module_that_stays_whole():
    whole = nn.Sequential(nn.Linear(6, 6), Extra())
    made = cut(whole, "0", example=X)
    assert "1._extra_state" in made.pieces[1].module.state_dict()
    with pytest.raises(
        StageError, match=r"E321.*extra state of a module that is cut apart.*Extra.get_extra_state of 1"
    ):
        cut(whole, "1.one", example=X)
    with pytest.raises(StageError, match=r"Extra.get_extra_state of the model itself.*keep it in a buffer, self.reg"):
        cut(Extra(), "one", example=X)


@pytest.mark.provokes("E327")
@pytest.mark.parametrize("at", [None, 1.5])
def test_a_cut_point_that_is_none(at: object):
    with pytest.raises(StageError, match=rf"E327.*at= is no cut point \(at={at}\).*name of a submodule.*candidates"):
        cl.split(Extra(), at, example=X)  # type: ignore[arg-type]


class Renewed(Three):
    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x)
        return self.three(self.two(torch.Tensor(h)))


@pytest.mark.provokes("E313")
def test_what_takes_only_tensors_of_its_own_is_refused_without_harm():
    with pytest.raises(StageError, match=r"E313.*cannot be followed.*torch.Tensor\(h\).*put the operation into a sub"):
        cut(Renewed(), "one", example=X)


class Nested(Three):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.three(self.block(self.one(x)))


@pytest.mark.provokes("E321")
@pytest.mark.parametrize("example", [X, None], ids=["example", "none"])
@pytest.mark.filterwarnings("ignore:Using a non-full backward hook")
@pytest.mark.parametrize("name", ["full_backward_hook", "full_backward_pre_hook", "backward_hook"])
def test_a_backward_hook_of_a_container_that_is_looked_into(name: str, example: Tensor | None):
    model = Nested()
    getattr(model.block, f"register_{name}")(lambda *_: None)
    hooks = {**model.block._backward_hooks, **model.block._backward_pre_hooks}
    assert cut(model, "block", example=example).points == ("block",)  # one piece has it whole, hook and all
    with pytest.raises(
        StageError, match=r"E321.*do not call a backward hook \(Nested, backward hook or pre-hook of bl"
    ):
        cut(model, "block.0", example=example)
    assert {**model.block._backward_hooks, **model.block._backward_pre_hooks} == hooks != {}


class Joined(nn.Module):
    """What is joined by features has gradients with gaps: slices of a larger tensor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = (nn.Sequential(nn.Linear(6, 17), nn.BatchNorm1d(17)) for _ in range(2))
        self.out = nn.Linear(34, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.out(torch.cat([self.one(x), self.two(y)], 1))


def test_gradients_with_gaps_train_as_uncut():
    x, label = torch.randn(64, 6, generator=torch.Generator().manual_seed(1)), torch.arange(64) % 3
    model = Joined()
    uncut = copy.deepcopy(model)
    optimizer = torch.optim.SGD(uncut.parameters(), lr=0.1)
    for first in (0, 32):
        optimizer.zero_grad()
        rows = slice(first, first + 32)
        nn.functional.cross_entropy(uncut(x[rows], -x[rows]), label[rows]).backward()
        optimizer.step()
    made = cl.split(model, "one", example=(x[:3], x[:3]), labels="server", release=["y"])
    data, sgd = TensorDataset(x, -x, label), partial(torch.optim.SGD, lr=0.1)
    run = cl.fit(made, data, loss=nn.CrossEntropyLoss(), optimizer=sgd, epochs=1, shuffle=False, batch_size=32)
    trained = run.state_dict()
    assert [name for name, value in uncut.state_dict().items() if not torch.equal(value, trained[name])] == []
