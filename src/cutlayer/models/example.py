"""Example inputs of a model, and running a model on them without a trace left in it."""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from cutlayer.errors import StageError
from cutlayer.models.steps import every_module

__all__ = ["Arguments", "Example", "arguments_of", "undisturbed"]

Example = Tensor | Sequence[Any] | Mapping[str, Any]
_EACH = "give each tensor as an argument of its own, named in forward, with at least one sample"
_ENTRIES = (
    "let forward take all tensors in one dictionary, each under a text, and none beside it or deeper; or each tensor "
    "as an argument of its own"
)


@dataclass(frozen=True)
class Arguments:
    """What a model's `forward` is called with, by name.

    Attributes:
        tensors: The inputs: tensors that have a batch, by the name of the argument of `forward`, in its order. None
            stands for a tensor that is not known (no example was given).
        constants: All other arguments that are given.
        batch: Samples in the tensors; 0 where they are not known.
        dictionary: Name of the one argument that gets all tensors as a dictionary, if forward takes them so: `tensors`
            is then by its keys, and `constants` has its other entries, under None where a tensor goes.
        mapping: What the example has for that dictionary, if it is of another type than dict.
    """

    tensors: dict[str, Tensor | None]
    constants: dict[str, Any]
    batch: int
    dictionary: str = ""
    mapping: Mapping[str, Any] | None = None

    def called(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of a call of forward with these tensors, or what stands for them; by name."""
        if self.dictionary:
            return {**self.constants, self.dictionary: {**self.constants[self.dictionary], **tensors}}
        return {**self.constants, **tensors}

    def resized(self, batch: int) -> Arguments:
        """Return the same arguments with another number of samples; samples are repeated if there are too few."""
        tensors = {}
        for name, value in self.tensors.items():
            index = torch.arange(batch, device=value.device) % self.batch if value is not None else None
            tensors[name] = value if value is None or not _batched(value, self.batch) else value.detach()[index].clone()
        return replace(self, tensors=tensors, batch=batch)


def arguments_of(model: nn.Module, example: Example | None) -> Arguments:
    """Sort out an example: which tensors the model's `forward` gets, under which names.

    Args:
        model: The model.
        example: One tensor; or the positional arguments as a tuple or list; or the arguments by name. Tensors of shape
            (batch, ...). A forward that takes one dictionary of tensors gets it as `({...},)`. Without an example,
            every argument of `forward` that has no default is taken for a tensor.

    Raises:
        StageError: the example does not fit `forward`, or holds no tensor with a batch (E325).
    """
    signature = inspect.signature(model.forward)
    if example is None:
        kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        free = [p.name for p in signature.parameters.values() if p.default is p.empty and p.kind not in kinds]
        return Arguments(dict.fromkeys(free), {}, 0)
    given = _bind(signature, example)
    dictionary = _dictionary(given)
    mapping = given.pop(dictionary) if dictionary else None
    inputs = given if mapping is None else dict(mapping)
    for name, value in [*given.items(), *inputs.items()]:
        if isinstance(value, np.ndarray):
            raise _misfit(f"{name!r} is a numpy array", "make it a tensor: torch.from_numpy(array)")
        if not isinstance(value, Tensor) and _holds_tensor(value):
            raise _misfit(
                f"{name!r} is a {type(value).__name__} that holds tensors",
                _ENTRIES if isinstance(value, Mapping) else "",
            )
    tensors: dict[str, Tensor | None] = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    sizes = [value.shape[0] for value in tensors.values() if value is not None and value.dim()]
    if not sizes or not sizes[0]:
        raise _misfit("no tensor with a batch in the example")
    constants = {name: value for name, value in given.items() if not isinstance(value, Tensor)}
    if dictionary:
        constants[dictionary] = {name: None if name in tensors else value for name, value in inputs.items()}
    return Arguments(tensors, constants, sizes[0], dictionary, None if type(mapping) is dict else mapping)


def _dictionary(given: Mapping[str, Any]) -> str:
    """Return the argument that is a dictionary of tensors by name, where it is the only one with tensors; else ""."""
    found = [name for name, value in given.items() if isinstance(value, Tensor) or _holds_tensor(value)]
    if len(found) != 1 or not isinstance(given[found[0]], Mapping):
        return ""
    return found[0] if all(isinstance(name, str) for name in given[found[0]]) else ""


def _bind(signature: inspect.Signature, example: Example) -> dict[str, Any]:
    try:
        if isinstance(example, Mapping):
            bound = signature.bind(**example)
        else:
            bound = signature.bind(*([example] if isinstance(example, Tensor | np.ndarray) else example))
    except TypeError as error:
        remedy = (
            f"{_EACH}; or, if forward takes one dictionary of tensors, example=({{...}},), or --input ARGUMENT.KEY=SPEC"
        )
        raise _misfit(str(error), remedy if isinstance(example, Mapping) else "") from None
    given: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            given |= value
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            raise _misfit(
                f"forward takes its inputs as *{name}, without names",
                f"{_EACH}; of a wrapper, such as nn.DataParallel or AveragedModel, cut what it wraps: model.module",
            )
        else:
            given[name] = value
    return given


def _holds_tensor(value: object) -> bool:
    if isinstance(value, Mapping):
        return any(_holds_tensor(item) for item in value.values())
    if isinstance(value, list | tuple):
        return any(_holds_tensor(item) for item in value)
    return isinstance(value, Tensor)


def _batched(value: Tensor, batch: int) -> bool:
    return value.dim() > 0 and value.shape[0] == batch


def _misfit(got: str, remedy: str = "") -> StageError:
    return StageError(
        "the example does not fit the model's forward",
        where="example",
        expected="one tensor, a tuple of positional arguments, or a dict of arguments by name, tensors with the batch "
        "first",
        got=got,
        remedy=remedy or _EACH,
        code="E325",
    )


def dice(*, torchs: bool) -> tuple[object, ...]:
    """Return where global random generators stand, to be compared: torch's (on the CPU), or Python's and NumPy's."""
    if torchs:
        return (torch.get_rng_state().numpy().tobytes(),)
    kind, keys, *rest = np.random.get_state()
    return random.getstate(), kind, np.asarray(keys).tobytes(), *rest


@contextmanager
def undisturbed(*modules: nn.Module) -> Iterator[None]:
    """Put back, at the end, all that running a model may change.

    These are: train mode of each submodule, values of parameters and buffers, gradients of parameters and whether they
    need one, and the state of the random generators (of torch on the CPU and on the devices in use, of numpy, of
    Python). Parameters and buffers are copied for as long as this lasts.
    """
    everything = {module: module.training for owner in modules for module in every_module(owner)}
    buffers = {(module, name): value for module in everything for name, value in module._buffers.items()}
    parameters = list({id(one): one for module in everything for one in module.parameters(recurse=False)}.values())
    kept = [_Kept.of(value) for value in [*parameters, *buffers.values()] if value is not None and not is_lazy(value)]
    gradients = [(parameter.grad, parameter.requires_grad) for parameter in parameters]
    devices = sorted({p.device.index for p in parameters if p.device.type == "cuda" and p.device.index is not None})
    python, numpy = random.getstate(), np.random.get_state()
    for parameter in parameters:
        parameter.grad = None
    try:
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for module, training in everything.items():
            module.training = training
        for (module, name), value in buffers.items():
            module._buffers[name] = value
        for one in kept:
            one.put_back()
        for parameter, (gradient, needs_one) in zip(parameters, gradients, strict=True):
            parameter.requires_grad_(needs_one)
            parameter.grad = gradient


@dataclass(frozen=True)
class _Kept:
    """A parameter or buffer, its memory (`x.data = ...` gives it another), and its values."""

    tensor: Tensor
    memory: Tensor
    values: Tensor

    @classmethod
    def of(cls, tensor: Tensor) -> _Kept:
        return cls(tensor, tensor.data, tensor.detach().clone())

    def put_back(self) -> None:
        if self.tensor.data_ptr() != self.memory.data_ptr() or self.tensor.shape != self.memory.shape:
            self.tensor.data = self.memory
        if not self.tensor.is_meta and not torch.equal(self.memory, self.values):
            with torch.no_grad():
                self.tensor.copy_(self.values)
