"""What a stage must keep to."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from cutlayer.core.spec import TensorSpec
from cutlayer.engine.stage import Context, StageProtocol
from cutlayer.engine.tensors import check_spec, torch_dtype
from cutlayer.testing.expect import expect, random_value
from cutlayer.testing.gradients import check_gradients, check_reference

__all__ = ["check_stage"]

_BATCH = 4


def check_stage(
    make: Callable[[], StageProtocol], inputs: Sequence[str], output: str, *, reference: nn.Module | None = None
) -> None:
    """Check a stage object: one forward and backward, several in flight, evaluation, and that it can be gone back.

    It has all of `StageProtocol`; gives outputs of `output` without a graph behind them; gives gradients of the shape
    and dtype of each input that wants one, and None for others; adds to the gradients of its parameters; keeps
    microbatches apart in any order; gives the same again from the same state; computes nothing for a backward in
    evaluation mode. Its gradients are those of its module by autograd, to 2 in 100. Where it computes otherwise than
    its module, or the module holds an `autograd.Function`, they are the slopes of its output too, by differences: these
    tell only gross errors, such as a sign, a factor, or a part that is missing.

    Args:
        make: Makes the stage anew; each one equal to the others.
        inputs: Specs of its inputs, such as ["float32[batch, 8]"].
        output: Spec of its one output.
        reference: A module of equal weights in the same order, whose output and gradients by autograd are compared with
            instead: for an `autograd.Function` whose gradients are meant to be others than the slopes (rounding with a
            straight-through gradient), and for stages in half precision that compute otherwise than their module.

    Raises:
        AssertionError: it does not keep to this.
    """
    stage = make()
    expect(isinstance(stage, StageProtocol), "all attributes and methods of StageProtocol")
    specs, given = [TensorSpec.parse(text) for text in inputs], TensorSpec.parse(output)
    values = [[_value(spec, 10 * micro + place) for place, spec in enumerate(specs)] for micro in range(3)]
    wanted = tuple(spec.floating for spec in specs)
    own = {id(parameter) for parameter in stage.module.parameters()}
    expect(all(id(parameter) in own for parameter in stage.parameters()), "all parameters to be those of `module`")
    forwards = _forwards(stage, values, wanted, given)
    first = _backwards(stage, forwards, [2, 0, 1], specs, wanted)
    gradients = [p.grad.clone() for p in stage.parameters() if p.grad is not None]
    expect(bool(gradients) or not stage.parameters(), "gradients of the parameters after backwards")
    other = make()
    second = _backwards(other, _forwards(other, values, wanted, given), [2, 0, 1], specs, wanted)
    expect(_same(first, second), "the same gradients from the same state")
    theirs = [p.grad for p in other.parameters() if p.grad is not None]
    expect(all(torch.equal(a, b) for a, b in zip(gradients, theirs, strict=True)), "the same gradients of parameters")
    stage.forget()
    context = Context(key=(0, 0), batch=_BATCH, training=False, wanted=wanted)
    (shown,) = stage.forward(values[0], context)
    (again,) = stage.forward(values[0], context)
    expect(torch.equal(shown, again), "evaluation to give the same twice")
    if reference is None:
        check_gradients(make, values)
    else:
        for each in values:
            check_reference(make, each, reference)


def _value(spec: TensorSpec, seed: int) -> Tensor:
    """Return random numbers; whole ones from 0 on, as an embedding takes them."""
    value = random_value(spec.concrete(_BATCH), torch_dtype(spec.dtype), seed)
    return value if spec.floating or value.dtype == torch.bool else value.abs()


def _forwards(
    stage: StageProtocol, values: list[list[Tensor]], wanted: tuple[bool, ...], given: TensorSpec
) -> list[Tensor]:
    outputs = []
    for micro, each in enumerate(values):
        before = [value.clone() for value in each]
        found = stage.forward(each, Context(key=(0, micro), batch=_BATCH, training=True, wanted=wanted))
        expect(len(found) == 1, "one output")
        wrong = check_spec(found[0], given, _BATCH)
        expect(not wrong, f"an output of {given}; got {wrong}")
        expect(not found[0].requires_grad, "an output without a graph behind it: return output.detach()")
        expect(all(torch.equal(a, b) for a, b in zip(each, before, strict=True)), "inputs not to be changed")
        outputs.append(found[0])
    return outputs


def _backwards(
    stage: StageProtocol,
    outputs: list[Tensor],
    order: list[int],
    specs: list[TensorSpec],
    wanted: tuple[bool, ...],
) -> list[list[Tensor | None]]:
    found: dict[int, list[Tensor | None]] = {}
    for micro in order:
        seed = torch.full_like(outputs[micro], float(micro + 1))
        back = list(stage.backward([seed], (0, micro)))
        expect(len(back) == len(specs), "a gradient, or None, for each input")
        for spec, want, gradient in zip(specs, wanted, back, strict=True):
            expect((gradient is not None) == want, "a gradient for each input that wants one, and None for others")
            if gradient is not None:
                wrong = check_spec(gradient, spec, _BATCH)
                expect(not wrong, f"a gradient of {spec}; got {wrong}")
        found[micro] = back
    return [found[micro] for micro in range(len(outputs))]


def _same(mine: list[list[Tensor | None]], other: list[list[Tensor | None]]) -> bool:
    pairs = [(a, b) for left, right in zip(mine, other, strict=True) for a, b in zip(left, right, strict=True)]
    return all(a is b is None or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)
