"""One stage at work: its own graph and generator, and the errors that name it."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from cutlayer.core.spec import TensorSpec
from cutlayer.engine.stage import Context, ModuleStage
from cutlayer.errors import StageError

CPU = torch.device("cpu")


def stage_of(module: nn.Module, spec: str | None = "float32[batch, 3]", seed: int = 5) -> ModuleStage:
    ports = None if spec is None else {"": TensorSpec.parse(spec)}
    return ModuleStage("body", module, ports=ports, seed=seed, device=CPU)


def context(batch: int = 4, micro: int = 0, *, training: bool = True, wanted: tuple[bool, ...] = (True,)) -> Context:
    return Context(key=(0, micro), batch=batch, training=training, wanted=wanted)


class Odd(nn.Module):
    """Calls a function, so that a test can say in one line what the module does."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, *inputs):
        return self.function(*inputs)


def test_gradients_are_those_of_autograd():
    torch.manual_seed(0)
    layer, value = nn.Linear(5, 3), torch.randn(4, 5)
    stage = stage_of(layer)
    (output,) = stage.forward([value], context())
    assert not output.requires_grad
    (gradient,) = stage.backward([torch.ones(4, 3)], (0, 0))
    leaf = value.clone().requires_grad_()
    other = nn.Linear(5, 3)
    other.load_state_dict(layer.state_dict())
    other(leaf).backward(torch.ones(4, 3))
    assert torch.equal(gradient, leaf.grad)
    assert torch.equal(layer.weight.grad, other.weight.grad)
    assert value.grad is None


def test_microbatches_in_flight_keep_apart():
    stage = stage_of(nn.Linear(5, 3))
    values = [torch.full((4, 5), float(n)) for n in range(3)]
    for micro, value in enumerate(values):
        stage.forward([value], context(micro=micro))
    for micro in (2, 0, 1):
        stage.module.zero_grad()
        stage.backward([torch.ones(4, 3)], (0, micro))
        assert torch.equal(stage.module.weight.grad, torch.full((3, 5), 4.0 * micro))


def test_only_wanted_gradients_are_given():
    stage = stage_of(Odd(lambda a, b: (a + b)[:, :3]))
    stage.forward([torch.ones(4, 5), torch.ones(4, 5)], context(wanted=(False, True)))
    gradients = stage.backward([torch.ones(4, 3)], (0, 0))
    assert gradients[0] is None
    assert gradients[1].sum() == 12


def test_an_input_that_is_not_used_gets_zeros():
    stage = stage_of(Odd(lambda a, b: a[:, :3]))
    stage.forward([torch.ones(4, 5), torch.ones(4, 2)], context(wanted=(True, True)))
    gradients = stage.backward([torch.ones(4, 3)], (0, 0))
    assert torch.equal(gradients[1], torch.zeros(4, 2))


def test_an_output_that_no_input_reaches_gives_zeros():
    stage = stage_of(Odd(lambda a: torch.ones(4, 3)))
    stage.forward([torch.ones(4, 5)], context())
    assert torch.equal(stage.backward([torch.ones(4, 3)], (0, 0))[0], torch.zeros(4, 5))


def test_operations_in_place_are_allowed():
    linear, value = nn.Linear(5, 3), torch.randn(4, 5)
    plain = value.clone().requires_grad_()
    expected = linear(plain.relu()).relu()
    expected.backward(torch.ones(4, 3))
    stage = stage_of(nn.Sequential(nn.ReLU(inplace=True), linear, nn.ReLU(inplace=True)))
    assert torch.equal(stage.forward([value], context())[0], expected)
    assert torch.equal(stage.backward([torch.ones(4, 3)], (0, 0))[0], plain.grad)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_loss_begins_with_a_number(shape):
    stage = stage_of(Odd(lambda a: a.sum().reshape(shape)), spec=None)
    stage.forward([torch.ones(4, 5)], context())
    assert torch.equal(stage.backward(0.25, (0, 0))[0], torch.full((4, 5), 0.25))


# --- the generator ---------------------------------------------------------------------------------------------------


def test_a_stage_draws_from_its_own_generator_only():
    outer = torch.get_rng_state()
    outputs = [stage_of(nn.Dropout(0.5), "float32[batch, 50]").forward([torch.ones(4, 50)], context())[0] for _ in "ab"]
    assert torch.equal(*outputs)
    assert torch.equal(torch.get_rng_state(), outer)
    torch.manual_seed(1)
    (again,) = stage_of(nn.Dropout(0.5), "float32[batch, 50]").forward([torch.ones(4, 50)], context())
    assert torch.equal(again, outputs[0])
    (other,) = stage_of(nn.Dropout(0.5), "float32[batch, 50]", seed=6).forward([torch.ones(4, 50)], context())
    assert not torch.equal(other, outputs[0])


def test_training_advances_the_generator_and_evaluation_does_not():
    stage = stage_of(nn.Dropout(0.5), "float32[batch, 50]")
    states = [stage.generator]
    for training in (True, False, True):
        stage.forward([torch.ones(4, 50)], context(training=training))
        states.append(stage.generator)
    assert [torch.equal(a, b) for a, b in itertools.pairwise(states)] == [False, True, False]


def test_a_module_that_always_draws_does_not_advance_the_generator_in_evaluation():
    stage = stage_of(Odd(lambda a: a[:, :3] + torch.rand(4, 3)))
    before = stage.generator
    outputs = [stage.forward([torch.ones(4, 5)], context(training=False))[0] for _ in "ab"]
    assert torch.equal(*outputs)
    assert torch.equal(stage.generator, before)


def test_evaluation_keeps_no_graph_and_changes_no_buffer():
    stage = stage_of(nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)))
    before = {name: buffer.clone() for name, buffer in stage.module.named_buffers()}
    stage.forward([torch.randn(4, 5)], context(training=False))
    assert all(torch.equal(buffer, before[name]) for name, buffer in stage.module.named_buffers())
    with pytest.raises(StageError) as caught:
        stage.backward([torch.ones(4, 3)], (0, 0))
    assert caught.value.code == "E303"


def test_a_failed_forward_gives_the_global_generator_back():
    def fail(value):
        torch.rand(3)
        raise ValueError("no")

    outer = torch.get_rng_state()
    stage = stage_of(Odd(fail))
    own = stage.generator
    with pytest.raises(StageError):
        stage.forward([torch.ones(4, 5)], context())
    assert torch.equal(torch.get_rng_state(), outer)
    assert torch.equal(stage.generator, own)


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.provokes(by="code")
@pytest.mark.parametrize(
    ("function", "code", "words"),
    [
        (lambda a: a, "E301", "expected float32[batch, 3] for 4 samples, got float32[4, 5] instead of float32[4, 3]"),
        (lambda a: a[:3, :3], "E301", "got float32[3, 3] instead of float32[4, 3]"),
        (lambda a: a[:, :3].double(), "E301", "got float64[4, 3] instead of float32[4, 3]"),
        (lambda a: (a, a), "E302", "expected one tensor, got 2 values: Tensor, Tensor"),
        (lambda a: None, "E302", "got NoneType"),
        (lambda a: a @ a, "E304", "got RuntimeError: mat1 and mat2 shapes"),
        (lambda a: a.missing, "E304", "got AttributeError: "),
    ],
)
def test_a_module_that_gives_something_else_is_named(function, code, words):
    with pytest.raises(StageError) as caught:
        stage_of(Odd(function)).forward([torch.ones(4, 5)], context())
    assert caught.value.code == code
    assert words in str(caught.value)
    assert "stage 'body'" in str(caught.value)
    if code != "E302":
        assert "inputs of shapes [[4, 5]]" in caught.value.where


def test_a_loss_must_be_one_number():
    with pytest.raises(StageError) as caught:
        stage_of(nn.CrossEntropyLoss(reduction="none"), spec=None).forward(
            [torch.ones(4, 5), torch.zeros(4, dtype=torch.int64)], context(wanted=(True, False))
        )
    assert caught.value.code == "E301"
    assert "expected a scalar for 4 samples, got shape [4]" in str(caught.value)


def test_a_failed_backward_is_named():
    class Breaks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value[:, :3].clone()

        @staticmethod
        def backward(ctx, gradient):
            raise ValueError("broken")

    stage = stage_of(Odd(Breaks.apply))
    stage.forward([torch.ones(4, 5)], context())
    with pytest.raises(StageError) as caught:
        stage.backward([torch.ones(4, 3)], (0, 0))
    assert caught.value.code == "E304"
    assert "failed in its backward" in str(caught.value)


def test_a_batch_norm_on_one_sample_says_what_to_do():
    with pytest.raises(StageError) as caught:
        stage_of(nn.BatchNorm1d(3)).forward([torch.ones(1, 3)], context(batch=1))
    assert caught.value.code == "E304"
    assert "drop_last" in caught.value.remedy


FAILURES = {
    "numpy's doubles": (nn.Linear(5, 3), torch.ones(4, 5).double(), "the module's weights, float32: .float() in"),
    "images as bytes": (
        nn.Conv2d(3, 4, 3),
        torch.ones(4, 3, 8, 8).byte(),
        "the module's weights, float32: .float() in",
    ),
    "doubles to a norm": (nn.LayerNorm(5), torch.ones(4, 5).double(), "the module's weights, float32: .float() in"),
    "single to double": (nn.Linear(5, 3).double(), torch.ones(4, 5), "weights, float64: .double() in"),
    "single to halves": (nn.Linear(5, 3).bfloat16(), torch.ones(4, 5), "weights, bfloat16: .to(torch.bfloat16) in"),
    "a wide row": (nn.Linear(5, 3), torch.ones(4, 6), "have another size than a layer takes"),
    "channels last": (nn.Conv2d(3, 4, 3), torch.ones(4, 8, 8, 3), "have another size than a layer takes"),
    "a wide norm": (nn.LayerNorm(5), torch.ones(4, 6), "have another size than a layer takes"),
    "more features": (nn.BatchNorm1d(5), torch.ones(4, 6), "have another size than a layer takes"),
    "an id outside": (nn.Embedding(5, 3), torch.full((4, 2), 7), "give ids in 0..num_embeddings-1"),
    "ids as floats": (nn.Embedding(5, 3), torch.ones(4, 2), "give the ids as int64, .long() in the data set"),
    "an own bug": (Odd(lambda a: a.missing), torch.ones(4, 5), "run the module alone on inputs of these shapes"),
    "an own dtype": (Odd(lambda a: a.double() @ torch.ones(5, 3)), torch.ones(4, 5), "run the module alone"),
    "one sample": (nn.BatchNorm1d(3), torch.ones(1, 3), "BatchNorm needs two samples a microbatch"),
    "memory": (Odd(lambda a: a.expand(10**6, 4, 5).repeat(10**6, 1, 1)), torch.ones(4, 5), "take more microbatches"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_has_the_remedy_that_fits_it(name):
    module, x, remedy = FAILURES[name]
    with pytest.raises(StageError) as caught:
        stage_of(module).forward([x], context(batch=len(x), wanted=(False,)))
    assert caught.value.code == "E304"
    assert remedy in caught.value.remedy, caught.value
    assert ("BatchNorm" in caught.value.remedy) == (name == "one sample")


OTHERS = {
    "another length": (lambda a: a, "", "float32[batch, 3]", "a length that changes with the batch needs longest="),
    "longer than free": (lambda a: a, "", "float32[batch, time<=4]", "needs longest= of cl.split"),
    "rows dropped": (lambda a: a[:2], "", "float32[batch, 5]", "output in the plan, or the module"),
    "autocast here only": (
        lambda a: a @ a.T,
        "bfloat16",
        "float32[batch, 4]",
        "give cl.split(autocast='bfloat16') too",
    ),
    "autocast there only": (
        lambda a: a,
        "",
        "bfloat16[batch, 5]",
        "run the party under it: Party(autocast='bfloat16')",
    ),
    "doubles": (lambda a: a.double(), "", "float32[batch, 5]", "output in the plan, or the module"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_tensor_has_the_remedy_that_fits_it(name):
    function, autocast, spec, remedy = OTHERS[name]
    ports = {"": TensorSpec.parse(spec)}
    stage = ModuleStage("body", Odd(function), ports=ports, seed=0, device=torch.device("cpu"), autocast=autocast)
    with pytest.raises(StageError) as caught:
        stage.forward([torch.ones(4, 5)], context())
    assert caught.value.code == "E301"
    assert remedy in caught.value.remedy, caught.value
    assert ("longest=" in caught.value.remedy) == (name in ("another length", "longer than free"))
    assert ("autocast" in caught.value.remedy) == name.startswith("autocast")


@pytest.mark.provokes("E303")
def test_each_forward_has_one_backward():
    stage = stage_of(nn.Linear(5, 3))
    stage.forward([torch.ones(4, 5)], context())
    stage.backward([torch.ones(4, 3)], (0, 0))
    with pytest.raises(
        StageError, match=r"'body' has no forward to go back from.*call backward once for each forward"
    ) as caught:
        stage.backward([torch.ones(4, 3)], (0, 0))
    assert caught.value.code == "E303"
    stage.forward([torch.ones(4, 5)], context())
    stage.forget()
    with pytest.raises(StageError):
        stage.backward([torch.ones(4, 3)], (0, 0))


# --- arithmetic ------------------------------------------------------------------------------------------------------


def test_operations_are_counted_at_each_call():
    """Two per multiply-add: a linear layer of 5 x 3 on 4 samples, forwards once and backwards twice as much."""
    stage = stage_of(nn.Linear(5, 3))
    for micro in range(3):
        stage.forward([torch.ones(4, 5)], context(micro=micro))
        assert stage.spent == 2 * 4 * 5 * 3
    for micro in range(3):
        stage.backward([torch.ones(4, 3)], (0, micro))
        assert stage.spent == 2 * 2 * 4 * 5 * 3
    stage.forward([torch.ones(2, 5)], context(batch=2))
    assert stage.spent == 2 * 2 * 5 * 3


@pytest.mark.provokes("E305")
def test_a_gradient_of_another_shape_is_refused():
    stage = stage_of(nn.Linear(5, 3))
    stage.forward([torch.ones(4, 5)], context())
    with pytest.raises(StageError, match=r"E305.*stage 'body'.*expected shape \[4, 3\], got shape \[4, 2\]"):
        stage.backward([torch.ones(4, 2)], (0, 0))


@pytest.mark.parametrize(
    "layer",
    [nn.SiLU(), nn.GELU(), nn.Mish(), nn.Hardswish(), nn.Softplus(), nn.LayerNorm(16), nn.GroupNorm(4, 16)],
    ids=lambda layer: type(layer).__name__,
)
def test_counting_changes_no_bit(layer: nn.Module):
    """The first call is counted, the second is not."""
    torch.manual_seed(1)
    stage = stage_of(nn.Sequential(nn.Linear(16, 16), layer, nn.Linear(16, 3)))
    value, seed, found = torch.randn(64, 16), torch.randn(64, 3), []
    for number in range(2):
        stage.module.zero_grad()
        (output,) = stage.forward([value], context(64))
        (gradient,) = stage.backward([seed], (0, 0))
        found.append([output, gradient, *(p.grad.clone() for p in stage.parameters())])
        assert stage.spent > 0, number
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3)), (7, 8)),
        (nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(3)), (5, 2, 6, 6)),
        (
            nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Flatten(), nn.Linear(32, 3)),
            (3, 4, 8),
        ),
    ],
    ids=["linear", "convolution", "attention"],
)
def test_counted_as_torch_counts(module: nn.Module, shape: tuple[int, ...]):
    from torch.utils.flop_counter import FlopCounterMode

    value = torch.randn(shape)
    module(value)
    stage, leaf = stage_of(module), value.clone().requires_grad_()
    stage.forward([value], context(shape[0]))
    forward = stage.spent
    stage.backward([torch.ones(shape[0], 3)], (0, 0))
    with FlopCounterMode(display=False) as counter:
        output = module(leaf)
        assert counter.get_total_flops() == forward
        output.backward(torch.ones(shape[0], 3))
    assert counter.get_total_flops() == forward + stage.spent


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_a_product_that_cannot_be_counted_trains():
    def ragged(x: torch.Tensor) -> torch.Tensor:
        rows = torch.nested.as_nested_tensor([x[:1], x[1:]])  # no formula of torch's can count a product of these
        return torch.cat([one.sum(-1) for one in torch.bmm(rows, rows.transpose(1, 2)).unbind()])

    stage = stage_of(Odd(ragged), "float32[batch]")
    value = torch.randn(4, 3)
    (output,) = stage.forward([value], context())
    torch.testing.assert_close(output[:1], value[0].square().sum()[None])
    (gradient,) = stage.backward([torch.ones(4)], (0, 0))
    torch.testing.assert_close(gradient[0], 2 * value[0])
