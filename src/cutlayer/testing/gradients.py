"""Whether a stage's gradients are the slopes of what it computes, or those of a reference module."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cutlayer.engine.stage import Context, StageProtocol
from cutlayer.testing.expect import expect

__all__ = ["check_reference", "check_slopes"]

Make = Callable[[], StageProtocol]
Named = list[tuple[str, Tensor]]
_WAYS = 4  # random directions of each input and parameter
_NEAR = 1e-3  # of a gradient's norm; single precision keeps it, a wrong factor does not
_ROUGH = 0.05  # where slopes can be had in single precision only
_KEY = (0, 0)
_WIDE = (torch.float32, torch.float64)


@dataclass(frozen=True)
class _Probe:
    """Computes a stage's output when one of its variables (floating inputs, then parameters) is moved.

    Attributes:
        output: The variable's number and what is added to it -> output, in float64 or as the stage gives it.
        steps: Lengths of moves; a slope may be that of any: a long one may cross a kink, a short one drown in rounding.
        near: How much of its norm a gradient may be off.
        half: The stage computes in half precision, whose gradients are too noisy to be compared with slopes.
    """

    output: Callable[[int, Tensor], Tensor]
    steps: tuple[float, ...]
    near: float = _NEAR
    half: bool = False


def check_slopes(make: Make, samples: Sequence[Sequence[Tensor]]) -> None:
    """Expect gradients of inputs and parameters to be the slopes of the output, along some random directions.

    The slopes are those of the stage's module in float64, where this gives what the stage gives; else those of the
    stage itself. So neither the stage's backward nor one within its module has a say in them. In half precision the
    stage must give the gradients of its module by autograd, and these, in float64, must be the slopes. Where slopes can
    be had in single precision only, it is enough that one of the samples has them: another may lie at a kink.

    Raises:
        AssertionError: a gradient is another, or the stage is in half precision and its module cannot tell slopes.
    """
    told = [_fault(make, values) for values in samples]
    faults = [fault for fault, _ in told if fault]
    if faults and (len(faults) == len(told) or all(exact for _, exact in told)):
        raise AssertionError(faults[0])


def _fault(make: Make, values: Sequence[Tensor]) -> tuple[str, bool]:
    """Return which gradient of a sample is no slope ("": none), and whether slopes are exact here."""
    shown, seed, found = _gone_back(make(), values)
    probe = _module_probe(make, values, shown) or _stage_probe(make, values)
    if probe.half:
        check_reference(make, values, make().module, "its module by autograd")
        stage = make()
        _, theirs = _by_autograd(stage, stage.module.double(), _double(values), seed)
        found = [(name, _exact(gradient)) for name, gradient in theirs]
    dice, floor = torch.Generator().manual_seed(98), 1e-2 * probe.near * float(seed.norm())
    for place, (name, gradient) in enumerate(found):
        size = float(gradient.norm())
        for _ in range(_WAYS):
            way = torch.randn(gradient.shape, generator=dice, dtype=torch.float64)
            told, off = float((gradient * way).sum()), float("inf")
            for step in probe.steps:
                ends = [float((probe.output(place, sign * step * way) * seed).sum()) for sign in (1, -1)]
                off = min(off, abs((ends[0] - ends[1]) / (2 * step) - told))
            if not off <= probe.near * size + floor:
                what = f"expected the gradient of {name} to be the slope of the output, by differences"
                return f"{what}; it is off by {off:.2g}, and its norm is {size:.2g}", probe.near == _NEAR
    return "", probe.near == _NEAR


def check_reference(make: Make, values: Sequence[Tensor], reference: nn.Module, what: str = "the reference") -> None:
    """Expect output and gradients of a stage to be those that autograd gives of a module of equal weights.

    Raises:
        AssertionError: one of them is another.
    """
    shown, seed, found = _gone_back(make(), values)
    stage = make()
    kind = getattr(stage, "autocast", None)
    with torch.autocast(stage.device.type, dtype=kind) if kind else nullcontext():
        output, theirs = _by_autograd(stage, copy.deepcopy(reference).to(stage.device), values, seed)
    expect(_near(shown, output), f"the output to be that of {what}")
    expect(len(theirs) == len(found), f"{what} to have as many parameters as the stage, in its order")
    for (name, gradient), (_, due) in zip(found, theirs, strict=True):
        expect(_near(gradient, due), f"the gradient of {name} to be that of {what}")


def _by_autograd(
    stage: StageProtocol, module: nn.Module, values: Sequence[Tensor], seed: Tensor
) -> tuple[Tensor, Named]:
    """Return a module's output, and the gradients of inputs and parameters, drawing as a fresh stage does."""
    module.train().zero_grad()
    entered = [value.to(stage.device).detach().requires_grad_(value.is_floating_point()) for value in values]
    with _dice(stage):
        output = _single(module(*entered))
    output.backward(seed.to(output))  # type: ignore[no-untyped-call]
    variables = {f"input {place}": value for place, value in enumerate(entered) if value.requires_grad}
    variables |= {f"parameter {name}": p for name, p in module.named_parameters() if p.requires_grad}
    return output.detach(), [(n, v.grad if v.grad is not None else torch.zeros_like(v)) for n, v in variables.items()]


def _gone_back(stage: StageProtocol, values: Sequence[Tensor]) -> tuple[Tensor, Tensor, Named]:
    """Return a stage's output, the gradient it went back from, and those of all variables by name; all in float64."""
    (output,) = stage.forward([value.clone() for value in values], _context(values))
    seed = torch.randn(output.shape, generator=torch.Generator().manual_seed(99)).to(output)
    back = stage.backward([seed.clone()], _KEY)
    found = [(f"input {place}", gradient) for place, gradient in enumerate(back) if gradient is not None]
    names = {id(parameter): name for name, parameter in stage.module.named_parameters()}
    for parameter in stage.parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        found.append((f"parameter {names[id(parameter)]}", gradient))
    return _exact(output), _exact(seed), [(name, _exact(gradient)) for name, gradient in found]


def _module_probe(make: Make, values: Sequence[Tensor], shown: Tensor) -> _Probe | None:
    """Return a probe by the stage's module in float64; None if that does not give what the stage gives."""

    def output(place: int, by: Tensor) -> Tensor:
        stage = make()
        module, given = stage.module.double().train(), [value.to(stage.device) for value in _double(values)]
        _move([v for v in given if v.is_floating_point()] + list(stage.parameters()), place, by)
        with torch.no_grad(), _dice(stage):
            return _exact(_single(module(*given)))

    try:
        plain = output(0, torch.zeros(()))
    except Exception:  # whatever a module raises in float64: it is not used then
        return None
    if plain.shape != shown.shape:
        return None
    off, steps = float((plain - shown).norm() / (plain.norm() + 1e-12)), (1e-6, 1e-7)
    if off > _ROUGH:
        return None
    return _Probe(output, steps, half=off > 1e-2 * _ROUGH)


def _stage_probe(make: Make, values: Sequence[Tensor]) -> _Probe:
    """Return a probe by the stage's own forwards. Raises `AssertionError` if their precision tells no slopes."""

    def output(place: int, by: Tensor) -> Tensor:
        stage, given = make(), [value.clone() for value in values]
        _move([v for v in given if v.is_floating_point()] + list(stage.parameters()), place, by)
        (found,) = stage.forward(given, _context(values))
        return _exact(found)

    stage = make()
    (raw,) = stage.forward([value.clone() for value in values], _context(values))
    held = [raw, *stage.parameters(), *(value for value in values if value.is_floating_point())]
    half = any(one.dtype not in _WIDE for one in held)
    expect(not half, "a reference=MODULE to compare with: in half precision no slopes can be seen")
    return _Probe(output, (1e-2, 1e-3), _ROUGH)


def _move(variables: Sequence[Tensor], place: int, by: Tensor) -> None:
    if variables:
        with torch.no_grad():
            variables[place].add_(by.to(variables[place]))


def _context(values: Sequence[Tensor]) -> Context:
    wanted = tuple(value.is_floating_point() for value in values)
    return Context(key=_KEY, batch=len(values[0]), training=True, wanted=wanted)


@contextmanager
def _dice(stage: StageProtocol) -> Iterator[None]:
    """Draw from a stage's generators, and leave them and torch's as they are."""
    with torch.random.fork_rng(devices=[stage.device] if stage.cuda_generator is not None else []):
        torch.set_rng_state(stage.generator)
        if stage.cuda_generator is not None:
            torch.cuda.set_rng_state(stage.cuda_generator, stage.device)
        yield


def _double(values: Sequence[Tensor]) -> list[Tensor]:
    """Return copies, floating ones in float64."""
    return [value.to(torch.float64 if value.is_floating_point() else value.dtype, copy=True) for value in values]


def _single(given: object) -> Tensor:
    if isinstance(given, Mapping):
        given = tuple(given.values())
    (found,) = given if isinstance(given, list | tuple) else (given,)
    if not isinstance(found, Tensor):
        raise TypeError(type(found).__name__)
    return found


def _exact(value: Tensor) -> Tensor:
    return value.detach().to("cpu", torch.float64)


def _near(one: Tensor, other: Tensor) -> bool:
    half = other.dtype not in _WIDE
    mine, theirs = _exact(one), _exact(other)
    return mine.shape == theirs.shape and bool(
        (mine - theirs).norm() <= (0.02 if half else _NEAR) * theirs.norm() + 1e-6
    )
