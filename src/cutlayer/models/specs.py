"""What crosses each cut of a model: dtype and shape of every tensor, and whether a gradient comes back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cutlayer.core.spec import DTYPES, TensorSpec
from cutlayer.engine.tensors import dtype_name
from cutlayer.errors import CutlayerError, PlanError, StageError
from cutlayer.models.attributes import as_before
from cutlayer.models.check import run_pieces
from cutlayer.models.cut import Cut, Piece
from cutlayer.models.example import Arguments, undisturbed
from cutlayer.models.reach import reached
from cutlayer.models.sizes import BATCHES

__all__ = ["Ports", "input_specs", "port_specs"]


@dataclass(frozen=True)
class Ports:
    """The outputs of one piece: port -> spec, in order; the ports that no gradient comes back to; frozen parameters."""

    specs: Mapping[str, TensorSpec]
    detached: tuple[str, ...]
    still: frozenset[str] = frozenset()

    @property
    def trained(self) -> bool:
        """Whether a gradient comes back to any of them: else nothing trains the piece."""
        return any(spec.floating and port not in self.detached for port, spec in self.specs.items())

    def check_still(self, piece: Piece, stage: str) -> None:
        """Refuse to train what was frozen when it was cut: the gradients for it might not come back.

        Raises:
            PlanError: E333, a parameter that needed no gradient needs one now, and a port has none.
        """
        moved = [name for name, one in piece.module.named_parameters() if one.requires_grad and name in self.still]
        if moved and self.detached:
            raise PlanError(
                f"the weight {moved[0]!r} was frozen when the model was cut, and is to be trained now",
                where=f"stage {stage}, output {', '.join(self.detached)}: no gradient comes back to it",
                expected="requires_grad as it was, or True before the cut",
                remedy="cut the model again, with cl.split, each time that a part of it is unfrozen",
                code="E333",
            )


def port_specs(
    cut: Cut,
    arguments: Arguments,
    *,
    autocast: torch.dtype | None = None,
    longest: Mapping[str, int] | None = None,
) -> tuple[Ports, ...]:
    """Return what each piece gives, found by running the pieces on the example with two batch sizes.

    Leaves modules, random generators and gradients as they were.

    Args:
        cut: The cut model.
        arguments: The example: inputs of shape (batch, ...).
        autocast: Run under `torch.autocast` with this dtype.
        longest: Input of shape (batch, length, ...) -> most that its length may be; found by a third, shorter run.

    Raises:
        StageError: E319, a tensor that crosses does not begin with the batch, or has a dtype that cannot cross; E322,
            a piece works for the example's length only; E325, the pieces do not take the inputs in `longest` shorter.
    """
    inputs = _inputs(arguments.resized(BATCHES[0]))
    with _training(cut, inputs, autocast):
        trained, large = reached(cut, inputs)
    small = _run(cut, arguments.resized(BATCHES[1]), autocast)
    lengths = _Lengths.of(arguments, longest or {})
    short = _shorter(cut, arguments, lengths, autocast) if lengths.names else large
    return tuple(
        Ports(
            {
                port: _spec(port, (first, second, third), lengths)
                for port, first, second, third in zip(
                    piece.outputs, large[index], small[index], short[index], strict=True
                )
            },
            tuple(
                port
                for port, value in zip(piece.outputs, large[index], strict=True)
                if value.is_floating_point() and f"{index}.{port}" not in trained
            ),
            frozenset(name for name, one in piece.module.named_parameters() if not one.requires_grad),
        )
        for index, piece in enumerate(cut.pieces)
    )


def input_specs(arguments: Arguments, longest: Mapping[str, int] | None = None) -> dict[str, TensorSpec]:
    """Return the spec of each of the model's inputs. Raises `StageError` E319 as `port_specs` does."""
    large, small = (arguments.resized(batch).tensors for batch in BATCHES)
    lengths = _Lengths.of(arguments, longest or {})
    short = lengths.shorter(arguments.resized(BATCHES[0])).tensors
    return {
        name: _spec(f"data.{name}", (value, small[name], short[name]), lengths)  # type: ignore[arg-type]
        for name, value in large.items()
        if value is not None
    }


@dataclass(frozen=True)
class _Lengths:
    """Inputs whose second dimension is a length: `size` in the example, `bound` at most."""

    names: frozenset[str]
    size: int = 0
    bound: int = 0

    @classmethod
    def of(cls, arguments: Arguments, longest: Mapping[str, int]) -> _Lengths:
        if not longest:
            return cls(frozenset())
        given = {name: arguments.tensors.get(name) for name in longest}
        sizes = {value.shape[1] if value is not None and value.dim() > 1 else 0 for value in given.values()}
        if len(sizes) > 1 or len(set(longest.values())) > 1 or not 1 < min(sizes) <= min(longest.values()):
            raise StageError(
                "the inputs named in `longest` have no common length",
                where=f"longest={dict(longest)!r}",
                expected="inputs of shape (batch, length, ...), of one length of 2 or more, and one bound for it",
                got=f"lengths {sorted(sizes)} in the example, bounds {sorted(set(longest.values()))}",
                remedy="name the inputs that are padded together, as in longest={'words': 512, 'padding': 512}",
                code="E325",
            )
        return cls(frozenset(longest), sizes.pop(), next(iter(longest.values())))

    def shorter(self, arguments: Arguments) -> Arguments:
        """Return the arguments, one shorter."""
        tensors = {
            name: value[:, :-1].contiguous() if value is not None and name in self.names else value
            for name, value in arguments.tensors.items()
        }
        return replace(arguments, tensors=tensors)

    def dim(self, size: int, shorter: int) -> int | str:
        """Return a dimension's size, or its bound if it follows the length."""
        grows = size - shorter
        if not grows:
            return size
        name = "time" if size == self.size and grows == 1 else "length"
        return f"{name}<={size + grows * (self.bound - self.size)}"


def _shorter(
    cut: Cut, arguments: Arguments, lengths: _Lengths, autocast: torch.dtype | None
) -> list[tuple[Tensor, ...]]:
    """Run the pieces with inputs one shorter. Raises `StageError` E325 if they fail, as where one of two is named."""
    try:
        return _run(cut, lengths.shorter(arguments.resized(BATCHES[0])), autocast)
    except CutlayerError:
        raise
    except Exception as error:
        alike = [
            name
            for name, value in arguments.tensors.items()
            if value is not None and value.dim() > 1 and value.shape[1] == lengths.size
        ]
        every = f"longest={dict.fromkeys(alike, lengths.bound)!r}"
        raise StageError(
            "the model does not take the inputs named in `longest` in another length",
            where=f"longest={dict.fromkeys(sorted(lengths.names), lengths.bound)!r}",
            expected="all inputs that are padded together",
            got=f"those of length {lengths.size} in the example are {', '.join(alike)}; {error}",
            remedy=f"name all that are padded together: {every}"
            if set(alike) - lengths.names
            else "leave longest out and pad to one length, or write a forward that takes other lengths",
            code="E325",
        ) from error


def _run(cut: Cut, arguments: Arguments, autocast: torch.dtype | None) -> list[tuple[Tensor, ...]]:
    inputs = _inputs(arguments)
    with _training(cut, inputs, autocast):
        return run_pieces(cut.pieces, inputs)


def _inputs(arguments: Arguments) -> dict[str, Tensor]:
    return {name: value for name, value in arguments.tensors.items() if value is not None}


@contextmanager
def _training(cut: Cut, inputs: Mapping[str, Tensor], autocast: torch.dtype | None) -> Iterator[None]:
    """Put the pieces into train mode; at the end all is as it was."""
    modules = [piece.module for piece in cut.pieces]
    device = next(iter(inputs.values())).device.type
    with (
        undisturbed(*modules),
        as_before(*modules),
        torch.autocast(device, dtype=autocast, enabled=autocast is not None),
    ):
        for module in modules:
            module.train(True)
        yield


def _spec(port: str, runs: tuple[Tensor, Tensor, Tensor], lengths: _Lengths) -> TensorSpec:
    first, second, shorter = runs
    dtype, (large, small) = dtype_name(first.dtype), BATCHES
    begins = first.dim() and second.dim() and (first.shape[0], second.shape[0]) == (large, small)
    alike = first.shape[1:] == second.shape[1:] and first.dim() == shorter.dim()
    if dtype not in DTYPES:
        raise StageError(
            "a tensor that would cross the cut has a dtype that cannot cross",
            where=port,
            expected=f"one of {', '.join(DTYPES)}",
            got=dtype,
            remedy="let torch.view_as_real(x) cross, as the result of a submodule, and take torch.view_as_complex of "
            "it after the cut; or cut elsewhere"
            if first.is_complex()
            else "convert it in forward before the cut, or cut elsewhere",
            code="E319",
        )
    if not begins or not alike or shorter.shape[0] != large:
        raise StageError(
            "a tensor that would cross the cut does not begin with the batch",
            where=port,
            expected="shape [batch, ...]",
            got=f"{dtype}{list(first.shape)} for {large} samples, {list(second.shape)} for {small}",
            remedy="cut elsewhere, or let what a submodule gives to all samples cross for each: x.expand(batch, ...) "
            "in it, or in a forward hook of it"
            if first.shape == second.shape and first.shape[:1] == (1,)
            else "cut elsewhere, or hand in the stages by hand",
            code="E319",
        )
    dims = zip(first.shape[1:], shorter.shape[1:], strict=True)
    return TensorSpec(dtype, ("batch", *(lengths.dim(size, less) for size, less in dims)))
