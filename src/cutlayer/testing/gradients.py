"""Whether a stage's gradients are those of its module by autograd or of a reference, or the slopes of its output."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from cutlayer.engine.stage import Context, StageProtocol
from cutlayer.testing.expect import expect

__all__ = ["check_gradients", "check_reference"]

Make = Callable[[], StageProtocol]
_NEAR = 0.02  # of a norm: other orders of sums stay below it, also at kinks; a wrong factor does not
_GROSS = 0.2  # of a slope
_WAYS = 6  # random directions of each input and parameter
_TINY = 1e-7  # of the output: slopes below that are not judged
_STEPS = (1e-5, 1e-4, 1e-3, 1e-2, 0.1)  # of a variable's own size; the longer ones for what rounds more
_KEY = (0, 0)
_MEANT = "; or, if it is meant to be another, a reference=MODULE"
_WIDE = (torch.float32, torch.float64)


def check_gradients(make: Make, samples: Sequence[Sequence[Tensor]]) -> None:
    """Expect the gradients of inputs and parameters that autograd gives of the stage's module.

    Where the stage computes otherwise than its module, or a backward that is not torch's stands in the module's graph,
    autograd proves nothing: then gradients must be the slopes of the output, by differences.

    Raises:
        AssertionError: a gradient is another, or it takes differences of a stage in half precision.
    """
    if all(_computes(make, values, exact=False) for values in samples):
        own = [_compare(make, values, None, "its module by autograd") for values in samples]
        if not any(own):
            return
    _check_slopes(make, samples)


def check_reference(make: Make, values: Sequence[Tensor], reference: nn.Module) -> None:
    """Expect output and gradients of a stage to be those that autograd gives of a module of equal weights.

    Raises:
        AssertionError: one of them is another.
    """
    _compare(make, values, reference, "the reference")


def _compare(make: Make, values: Sequence[Tensor], reference: nn.Module | None, whose: str) -> bool:
    """Compare with a module (None: the stage's) by autograd; return whether its graph holds a backward of its own."""
    stage, other = make(), make()
    shown, seed, found = _gone_back(stage, values)
    module, trained = other.module, other.parameters()
    if reference is not None:
        module = copy.deepcopy(reference).to(other.device)
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    output, theirs = _by_autograd(other, module, trained, values, seed)
    expect(_near(shown, output), f"the output to be that of {whose}")
    expect(len(theirs) == len(found), f"{whose} to have as many parameters as the stage, in its order")
    most = max([float(due.norm()) for due in theirs], default=0.0)
    for name, gradient, due in zip(_names(stage, values), found, theirs, strict=True):
        expect(_near(gradient, due, most), f"the gradient of {name} to be that of {whose}{'' if reference else _MEANT}")
    return _own_backward(output)


def _check_slopes(make: Make, samples: Sequence[Sequence[Tensor]]) -> None:
    """Expect gradients to be slopes: of the module in float64, if that gives what the stage gives, else of the stage.

    One is refused only if it is grossly off along most directions, at two lengths of the step, and right at none.
    """
    exact = all(_computes(make, values, exact=True) for values in samples)
    shown, seed, _ = _gone_back(make(), samples[0])
    half = any(one.dtype not in _WIDE for one in [shown, *make().parameters(), *_floating(samples[0])])
    expect(exact or not half, "a reference=MODULE to compare with: in half precision no slopes can be seen")
    moved = _Moved(make(), exact=exact)
    trials = [_Trial(moved, values, _exact(seed), _gradients(make, values, seed, exact=exact)) for values in samples]
    dice = torch.Generator().manual_seed(98)
    for place, name in enumerate(_names(moved.stage, samples[0])):
        off = 0
        for step in _STEPS if exact else (1e-3, 1e-2, 1e-4):
            verdicts = [trials[way % len(trials)].verdict(place, step, dice) for way in range(_WAYS)]
            off += verdicts.count(False) > _WAYS / 2
            if verdicts.count(True) >= _WAYS / 2:
                break
        else:
            expect(off < 2, f"the gradient of {name} to be the slope of the output, by differences{_MEANT}")


def _gradients(make: Make, values: Sequence[Tensor], seed: Tensor, *, exact: bool) -> list[Tensor]:
    """Return the gradients of a stage, or of its module by autograd in float64."""
    stage = make()
    if not exact:
        return [_exact(one) for one in _gone_back(stage, values)[2]]
    return _by_autograd(stage, stage.module.double(), stage.parameters(), _double(values), seed)[1]


class _Trial:
    """Compares gradients for some inputs with slopes along random directions."""

    def __init__(self, moved: _Moved, values: Sequence[Tensor], seed: Tensor, found: list[Tensor]) -> None:
        self.moved, self.values, self.seed, self.found = moved, values, seed, [_exact(one) for one in found]
        self.base = moved.output(values)
        variables = [_exact(one) for one in [*_floating(values), *moved.stage.parameters()]]
        self.sizes = [float(one.square().mean().sqrt()) or 1.0 for one in variables]

    def verdict(self, place: int, step: float, dice: torch.Generator) -> bool | None:
        """Say whether a gradient is the slope along a direction; None where a step of this length cannot tell."""
        found = self.found[place]
        way = torch.randn(found.shape, generator=dice, dtype=torch.float64) * self.sizes[place]
        moved = [self.moved.output(self.values, place, sign * step * way) - self.base for sign in (1, -1)]
        ahead, back = (float((one * self.seed).sum()) / step for one in moved)
        told, slope, bend = float((found * way).sum()), (ahead - back) / 2, (ahead + back) / 2
        most = max(abs(told), abs(slope))
        if most <= _TINY * float(self.base.norm()):
            return True
        return None if abs(bend) > _GROSS / 2 * most else abs(slope - told) <= _GROSS * most


class _Moved:
    """Computes a stage, or its module in float64, from one state, with one of its variables moved."""

    def __init__(self, stage: StageProtocol, *, exact: bool) -> None:
        self.stage, self.exact = stage, exact
        if exact:
            stage.module.double()
        self._state = copy.deepcopy(stage.module.state_dict())
        self._dice = stage.generator, stage.cuda_generator

    def output(self, values: Sequence[Tensor], place: int = 0, by: Tensor | None = None) -> Tensor:
        """Return the output with `by` added to a variable, an input or a parameter. The next call undoes it."""
        stage = self.stage
        stage.module.load_state_dict(self._state)
        stage.generator, stage.cuda_generator = self._dice
        given = _double(values) if self.exact else [value.clone() for value in values]
        with torch.no_grad():
            if by is not None:
                variable = [*_floating(given), *stage.parameters()][place]
                variable.add_(by.to(variable))
            if self.exact:
                return _exact(_called(stage, stage.module, given))
            (found,) = stage.forward(given, _context(values))
        stage.forget()
        return _exact(found)


def _computes(make: Make, values: Sequence[Tensor], *, exact: bool) -> bool:
    """Say whether a stage's module, as it is or in float64, gives what the stage gives."""
    (shown,) = make().forward([value.clone() for value in values], _context(values))
    stage = make()
    with suppress(Exception), torch.no_grad():  # whatever a module raises: it is not used then
        if exact:
            return _near(shown, _called(stage, stage.module.double(), _double(values)), near=0.05)
        return _near(shown, _called(stage, stage.module, [value.clone() for value in values]))
    return False


def _by_autograd(
    stage: StageProtocol, module: nn.Module, trained: Sequence[Tensor], values: Sequence[Tensor], seed: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Return a module's output, and the gradients of inputs and parameters, drawing as a fresh stage does."""
    module.zero_grad()
    entered = [value.to(stage.device).detach().requires_grad_(value.is_floating_point()) for value in values]
    output = _called(stage, module, [value.clone() for value in entered])
    if output.requires_grad:
        output.backward(seed.to(output))  # type: ignore[no-untyped-call]
    return output, [torch.zeros_like(v) if v.grad is None else v.grad for v in [*_floating(entered), *trained]]


def _called(stage: StageProtocol, module: nn.Module, values: Sequence[Tensor]) -> Tensor:
    """Return what a module gives in training, with the draws of a stage, and its autocast unless in float64."""
    kind = None if any(value.dtype == torch.float64 for value in values) else getattr(stage, "autocast", None)
    with _dice(stage), torch.autocast(stage.device.type, dtype=kind) if kind else nullcontext():
        given = module.train()(*(value.to(stage.device) for value in values))
    if isinstance(given, Mapping):
        given = tuple(given.values())
    (found,) = given if isinstance(given, list | tuple) else (given,)
    if not isinstance(found, Tensor):
        raise TypeError(type(found).__name__)
    return found


def _gone_back(stage: StageProtocol, values: Sequence[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return a stage's output, the gradient it went back from, and those of floating inputs and of parameters."""
    (output,) = stage.forward([value.clone() for value in values], _context(values))
    seed = torch.randn(output.shape, generator=torch.Generator().manual_seed(99)).to(output)
    back = stage.backward([seed.clone()], _KEY)
    found = [gradient for gradient in back if gradient is not None]
    return output, seed, found + [torch.zeros_like(p) if p.grad is None else p.grad for p in stage.parameters()]


def _own_backward(output: Tensor) -> bool:
    """Say whether a backward that is not torch's own, in Python or C++, stands in the graph of a tensor."""
    seen, front = set(), list[Any]([output.grad_fn])
    while front:
        node = front.pop()
        if node is None or node in seen:
            continue
        if isinstance(node, BackwardCFunction) or "CppNode" in node.name():
            return True
        seen.add(node)
        front += [before for before, _ in node.next_functions]
    return False


def _names(stage: StageProtocol, values: Sequence[Tensor]) -> list[str]:
    """Return what variables are called: floating inputs, then the parameters that are trained."""
    names = {id(parameter): name for name, parameter in stage.module.named_parameters()}
    inputs = [f"input {place}" for place, value in enumerate(values) if value.is_floating_point()]
    return inputs + [f"parameter {names[id(parameter)]}" for parameter in stage.parameters()]


@contextmanager
def _dice(stage: StageProtocol) -> Iterator[None]:
    """Draw from a stage's generators, and leave them and torch's as they are."""
    with torch.random.fork_rng(devices=[stage.device] if stage.cuda_generator is not None else []):
        torch.set_rng_state(stage.generator)
        if stage.cuda_generator is not None:
            torch.cuda.set_rng_state(stage.cuda_generator, stage.device)
        yield


def _context(values: Sequence[Tensor]) -> Context:
    wanted = tuple(value.is_floating_point() for value in values)
    return Context(key=_KEY, batch=len(values[0]), training=True, wanted=wanted)


def _floating(values: Sequence[Tensor]) -> list[Tensor]:
    return [value for value in values if value.is_floating_point()]


def _double(values: Sequence[Tensor]) -> list[Tensor]:
    """Return copies, floating ones in float64."""
    return [value.to(torch.float64 if value.is_floating_point() else value.dtype, copy=True) for value in values]


def _exact(value: Tensor) -> Tensor:
    return value.detach().to("cpu", torch.float64)


def _near(one: Tensor, other: Tensor, most: float = 0.0, near: float = _NEAR) -> bool:
    """Say whether two tensors are alike, to `near` of the norm and 1e-6 of the largest norm of all."""
    mine, theirs = _exact(one), _exact(other)
    return mine.shape == theirs.shape and bool((mine - theirs).norm() <= near * theirs.norm() + 1e-6 * most)
