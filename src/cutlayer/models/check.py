"""Comparing the pieces with the model, on the example, in train mode and in evaluation."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from traceback import walk_tb
from typing import Any

import torch
from torch import Tensor, nn

from cutlayer.engine.scoring import shown
from cutlayer.errors import CutlayerError, StageError
from cutlayer.models.example import Arguments, undisturbed
from cutlayer.models.pieces import Piece
from cutlayer.models.slopes import Slopes
from cutlayer.models.steps import PieceModule

__all__ = ["check", "check_backward_hooks", "run_pieces", "run_whole"]

_UNSEEN = (
    "the model's forward does something that tracing does not see (global state, a type that code of another file asks "
    "for); do it in a submodule of its own, cut elsewhere, or hand in the stages by hand"
)


def run_pieces(pieces: Sequence[Piece], inputs: Mapping[str, Tensor]) -> list[tuple[Tensor, ...]]:
    """Run the pieces one after another; return the outputs of each.

    Args:
        pieces: The pieces in order.
        inputs: The model's inputs by argument name, each of shape (batch, ...).
    """
    outputs: list[tuple[Tensor, ...]] = []
    known: dict[str, Tensor] = {f"data.{name}": value for name, value in inputs.items()}
    for index, piece in enumerate(pieces):
        found = piece.module(*(known[source] for source in piece.inputs))
        outputs.append(found if isinstance(found, tuple) else (found,))
        known |= {f"{index}.{port}": value for port, value in zip(piece.outputs, outputs[-1], strict=True)}
    return outputs


def run_whole(model: nn.Module, arguments: Arguments, inputs: Mapping[str, Tensor | None]) -> Any:  # noqa: ANN401
    """Run the whole model on the example. Raises `StageError` E325 if it does not take it."""
    try:
        return model(**arguments.called(_copies(inputs)))
    except Exception as error:
        if _hooked([model]) and _runs_unhooked(model, arguments, inputs):
            raise StageError(
                "a hook on the model itself does not take the example, which forward takes",
                where=f"hook of {type(model).__name__}, called with the arguments of forward by name",
                expected="a model without hooks of its own: the pieces do not call them",
                got=f"{type(error).__name__}: {error}",
                remedy="remove the hook before the cut; do in forward what it does to values",
                code="E325",
            ) from error
        if _takes_mapping(model, arguments):
            kind = type(arguments.mapping).__name__
            raise StageError(
                f"the model's forward takes a {kind}, and no plain dictionary with its entries",
                where=f"forward of {type(model).__name__}, argument {arguments.dictionary}",
                expected="entries that are read by their keys",
                got=f"{type(error).__name__}: {error}",
                remedy=f"read them so in forward, {arguments.dictionary}[{next(iter(inputs))!r}]; or cut a module "
                f"whose forward takes each tensor as an argument of its own and calls this model with a {kind} of them",
                code="E325",
            ) from error
        called = lambda: model(**arguments.called(_copies(inputs)))  # noqa: E731
        if not torch.is_grad_enabled() and _runs_with_gradients(called):
            raise _takes_gradients(f"forward of {type(model).__name__}", error) from error
        raise StageError(
            "the example does not fit the model's forward",
            where=f"forward of {type(model).__name__}",
            expected="an example of the inputs as a loader gives them, in shapes and dtypes that forward takes",
            got=f"{shown([value for value in inputs.values() if value is not None])}; {type(error).__name__}: {error}",
            remedy="correct the example, or --input; call the model on it alone first",
            code="E325",
        ) from error


def _takes_gradients(where: str, error: Exception) -> StageError:
    return StageError(
        "the model's forward takes gradients itself, and cannot run without",
        where=where,
        expected="a forward that runs under torch.no_grad() too: evaluation and prediction do",
        got=f"{type(error).__name__}: {error}",
        remedy="take them within `with torch.enable_grad():`, in a submodule that is not cut apart",
        code="E325",
    )


def check(model: nn.Module, pieces: Sequence[Piece], arguments: Arguments, pick: Callable[[Any], Any]) -> None:
    """Run model and pieces from the same random state and compare: outputs bit for bit on the CPU, and gradients.

    Raises:
        StageError: the outputs differ, or in train mode the gradients by more than rounding (E321).
    """
    inputs = arguments.resized(3).tensors
    modules = [piece.module for piece in pieces]
    for mode in (False, True):
        slopes = Slopes(model, inputs) if mode else None
        as_model, as_pieces = (partial(_in_mode, mode, who, [model, *modules]) for who in ([model], modules))
        whole = _run(lambda given: pick(run_whole(model, arguments, given)), inputs, slopes, as_model)
        got = _run(partial(_run_pieces, model, pieces), inputs, slopes, as_pieces)
        if not _same(whole, got):
            hooked = _hooked(_left_out(model, modules))
            with as_model(), torch.no_grad(), _unhooked(hooked):
                blamed = hooked and _same(pick(run_whole(model, arguments, inputs)), got)
            raise _other_output(model, hooked if blamed else [], mode, _difference(whole, got))
        if slopes is not None:
            slopes.compare(type(model).__name__)


def _run_pieces(model: nn.Module, pieces: Sequence[Piece], inputs: Mapping[str, Tensor | None]) -> Tensor:
    """Run the pieces on inputs that the model takes. Raises `StageError` if they fail (E321, E325)."""
    try:
        return run_pieces(pieces, _copies(inputs))[-1][0]
    except CutlayerError:
        raise
    except Exception as error:
        steps = [
            f.f_locals["step"] for f, _ in walk_tb(error.__traceback__) if f.f_code is PieceModule.forward.__code__
        ]
        where = f"{type(model).__name__}{', ' * bool(steps)}{''.join(map(str, steps[-1:]))}"
        if not torch.is_grad_enabled() and _runs_with_gradients(lambda: run_pieces(pieces, _copies(inputs))):
            raise _takes_gradients(where, error) from error
        raise StageError(
            "the pieces do not run where the model does",
            where=where,
            expected="operations that run outside of the model's forward too",
            got=f"{type(error).__name__}: {error}",
            remedy=_UNSEEN,
            code="E321",
        ) from error


@contextmanager
def _in_mode(mode: bool, who: Sequence[nn.Module], everything: Sequence[nn.Module]) -> Iterator[None]:
    """Put modules into train mode or evaluation; at the end all is as it was."""
    with undisturbed(*everything):
        for module in who:
            module.train(mode)
        yield


def _run(
    call: Callable[[Mapping[str, Tensor | None]], Tensor],
    inputs: Mapping[str, Tensor | None],
    slopes: Slopes | None,
    ready: Callable[[], AbstractContextManager[None]],
) -> Tensor:
    """Return an output, found with gradients where `slopes` is given and the model can be run so."""
    if slopes is not None and slopes.failure is None:
        with ready():
            output = slopes.run(call)
        if output is not None:
            return output
    with ready(), torch.no_grad():
        return call(inputs)


def check_backward_hooks(model: nn.Module, pieces: Sequence[Piece]) -> None:
    """Refuse backward hooks that no piece calls: what they do to gradients shows in no output.

    Raises:
        StageError: E321, a module that is cut apart, or the model itself, has one.
    """
    left = set(_left_out(model, [piece.module for piece in pieces]))
    names = [
        name or "the model itself"
        for name, module in model.named_modules()
        if module in left and (module._backward_hooks or module._backward_pre_hooks)
    ]
    if names:
        raise StageError(
            "the pieces do not call a backward hook",
            where=f"{type(model).__name__}, backward hook or pre-hook of {', '.join(names)}",
            expected="backward hooks on modules that stay whole, or on tensors within forward",
            remedy="remove the hook before the cut, or put it on submodules that are not cut apart",
            code="E321",
        )


def _other_output(model: nn.Module, blamed: Sequence[nn.Module], mode: bool, difference: str) -> StageError:
    if blamed:
        names = [name or "the model itself" for name, one in model.named_modules() if one in blamed]
        return StageError(
            "the pieces do not call a hook that changes what the model gives",
            where=f"{type(model).__name__}, forward hook or pre-hook of {', '.join(names)}",
            expected="the same output for the example with and without it",
            got=difference,
            remedy="remove the hook before the cut, and do in forward what it does to values",
            code="E321",
        )
    return StageError(
        "the pieces do not give what the model gives",
        where=f"{type(model).__name__} in {'train mode' if mode else 'evaluation'}",
        expected="the same output for the example",
        got=difference,
        remedy=_UNSEEN,
        code="E321",
    )


def _left_out(model: nn.Module, pieces: Sequence[nn.Module]) -> list[nn.Module]:
    """Return the modules that no piece has as they are: the model itself, and containers whose parts are cut apart."""
    kept = {module for piece in pieces for module in piece.modules()}
    return [module for module in model.modules() if module not in kept]


def _hooked(modules: Sequence[nn.Module]) -> list[nn.Module]:
    return [module for module in modules if module._forward_hooks or module._forward_pre_hooks]


def _takes_mapping(model: nn.Module, arguments: Arguments) -> bool:
    if arguments.mapping is None:
        return False
    try:
        model(**{**arguments.constants, arguments.dictionary: copy.copy(arguments.mapping)})
    except Exception:
        return False
    return True


def _runs_with_gradients(call: Callable[[], object]) -> bool:
    try:
        with torch.enable_grad():
            call()
    except Exception:
        return False
    return True


def _runs_unhooked(model: nn.Module, arguments: Arguments, inputs: Mapping[str, Tensor | None]) -> bool:
    try:
        with _unhooked([model]):
            model(**arguments.called(_copies(inputs)))
    except Exception:
        return False
    return True


@contextmanager
def _unhooked(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Take the forward hooks of modules away, until the end."""
    before = [(module, module._forward_hooks, module._forward_pre_hooks) for module in modules]
    for module in modules:
        module._forward_hooks, module._forward_pre_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for module, after, first in before:
            module._forward_hooks, module._forward_pre_hooks = after, first


def _copies(inputs: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in inputs.items() if value is not None}


def _same(whole: Tensor, got: Tensor) -> bool:
    if whole.shape != got.shape or whole.dtype != got.dtype:
        return False
    if got.device.type == "cpu":
        return torch.allclose(whole, got, rtol=0, atol=0, equal_nan=True)
    return torch.allclose(whole, got, rtol=1e-3, atol=1e-5, equal_nan=True)  # kernels there may add in any order


def _difference(whole: Any, got: Any) -> str:  # noqa: ANN401
    if not isinstance(got, Tensor):
        return f"a {type(got).__name__}"
    if whole.shape != got.shape:
        return f"shape {list(got.shape)} instead of {list(whole.shape)}"
    return f"outputs that differ by up to {(whole.double() - got.double()).abs().max().item():.3g}"
