"""What each cut of a model would cost its two sides: bytes, operations, parameters, memory. Measured on an example."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cutlayer.core.spec import TensorSpec
from cutlayer.engine.flops import FlopCounter
from cutlayer.errors import CutlayerError
from cutlayer.models.attributes import as_before
from cutlayer.models.cut import Cut, Piece, cut, refuse_compiled
from cutlayer.models.example import Arguments, Example, arguments_of, undisturbed
from cutlayer.models.output import Key
from cutlayer.models.specs import input_specs, port_specs

__all__ = ["CutCost", "Side", "candidates", "costs"]


@dataclass(frozen=True)
class Side:
    """What one side of a cut has and does.

    Attributes:
        parameters: Numbers it trains or holds.
        flops: Operations of a step (forward and backward) for the batch; a multiplication with an addition is two.
        memory: Bytes: weights, gradients, Adam's two moments, and what the batch's forward keeps for the backward.
    """

    parameters: int
    flops: int
    memory: int


@dataclass(frozen=True)
class CutCost:
    """One cut: after `point`, the client before it, the server after it.

    Attributes:
        point: Qualified name of the submodule.
        error: Why the model cannot be cut there; None if it can. The other fields are empty then.
        tensors: What crosses of what the client computes, as texts such as "float32[batch, 64, 8, 8]".
        raw: Inputs that the server needs, and that cross as they are: name -> text. `cl.split` refuses them (E331)
            unless `release` names them.
        up: Bytes of values that cross in a step, raw inputs among them.
        down: Bytes of gradients that come back.
        client: The side with the data.
        server: The other.
    """

    point: str
    error: CutlayerError | None = None
    tensors: tuple[str, ...] = field(default=())
    raw: Mapping[str, str] = field(default_factory=dict)
    up: int = 0
    down: int = 0
    client: Side | None = None
    server: Side | None = None


def candidates(model: nn.Module, example: Example, *, output: Key = None) -> list[str]:
    """Return the names of the submodules after which the model can be cut, in the order in which they are registered.

    Args:
        model: The model; it is not changed.
        example: Inputs as a loader gives them, without labels.
        output: As in `cutlayer.models.cut`.
    """
    return [one.point for one in costs(model, example, output=output, measure=False) if one.error is None]


def costs(
    model: nn.Module, example: Example, *, batch: int = 32, output: Key = None, measure: bool = True
) -> Iterator[CutCost]:
    """Try a cut after each submodule, and give what it would cost; those that cannot be with their reason.

    Args:
        model: The model; it is not changed, and runs on the example.
        example: Inputs as a loader gives them, without labels: shape (any batch, ...). Samples are repeated.
        batch: Samples in a step.
        output: As in `cutlayer.models.cut`.
        measure: Whether to run the pieces; else only whether they can be cut is found out.
    """
    refuse_compiled(model)
    arguments = arguments_of(model, example)
    for name, module in model.named_modules(remove_duplicate=False):
        if not name or isinstance(module, nn.ModuleList | nn.ModuleDict):
            continue
        try:
            made = cut(model, name, example=example, output=output)
            ports, raw = port_specs(made, arguments)[0], _raw(made, arguments)
        except CutlayerError as error:
            yield CutCost(name, error)
            continue
        specs = ports.specs
        back = [spec for port, spec in specs.items() if spec.floating and port not in ports.detached]
        client, server = _sides(made, arguments.resized(batch)) if measure else (None, None)
        yield CutCost(
            name,
            tensors=tuple(str(spec) for spec in specs.values()),
            raw={name: str(spec) for name, spec in raw.items()},
            up=sum(spec.nbytes(batch) for spec in (*specs.values(), *raw.values())),
            down=sum(spec.nbytes(batch) for spec in back),
            client=client,
            server=server,
        )


def _raw(made: Cut, arguments: Arguments) -> dict[str, TensorSpec]:
    """Return the spec of each input that the second piece needs. Raises `StageError` E319, it has no batch."""
    names = [text.removeprefix("data.") for text in made.pieces[1].inputs if text.startswith("data.")]
    return input_specs(Arguments({name: arguments.tensors[name] for name in names}, {}, arguments.batch))


def _sides(made: Cut, arguments: Arguments) -> tuple[Side, Side]:
    inputs = {f"data.{name}": value for name, value in arguments.tensors.items() if value is not None}
    modules = [piece.module for piece in made.pieces]
    with undisturbed(*modules), as_before(*modules):
        for module in modules:
            module.train(True)
        first, given = _measured(made.pieces[0], inputs)
        known = inputs | {f"0.{port}": value for port, value in zip(made.pieces[0].outputs, given, strict=True)}
        second, _ = _measured(made.pieces[1], known)
    return first, second


def _measured(piece: Piece, known: Mapping[str, Tensor]) -> tuple[Side, list[Tensor]]:
    """Run one piece forwards, and backwards as far as a run does: to what crossed a cut, not to the data."""
    leaves = [
        known[source].detach().requires_grad_(known[source].is_floating_point() and not source.startswith("data."))
        for source in piece.inputs
    ]
    entered = [leaf.clone() for leaf in leaves]  # an in-place ReLU may come first
    kept: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in piece.module.parameters()}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with FlopCounter() as counter:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            found: Any = piece.module(*entered)
        outputs = list(found) if isinstance(found, tuple) else [found]
        roots = [one for one in outputs if one.requires_grad]
        if roots:
            torch.autograd.backward(roots, [torch.ones_like(one) for one in roots])
    sizes = [(p.numel(), p.element_size(), p.requires_grad) for p in piece.module.parameters()]
    weights = sum(number * size * (4 if trained else 1) for number, size, trained in sizes)
    side = Side(sum(number for number, _, _ in sizes), counter.total, weights + sum(kept.values()))
    return side, [one.detach() for one in outputs]
