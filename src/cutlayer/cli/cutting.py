"""`cutlayer cut`: where a model can be cut, and what each cut would cost.

| code | error | meaning |
| --- | --- | --- |
| E210 | ConfigError | inputs that do not go together |
| E237 | ConfigError | the function gives no model, or no example of its inputs |
| E317 | StageError | the model gives several outputs, and none is chosen |
| E318 | StageError | the model has no parameter to train |
| E325 | StageError | the example does not fit the model's forward |
| E328 | StageError | the model can be cut nowhere |
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from cutlayer.cli.console import Output, error_document, exit_code
from cutlayer.errors import ConfigError, CutlayerError, StageError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from cutlayer.models.costs import CutCost

__all__ = ["show_cuts"]

_HEAD = ("cut after", "up", "down", "client params", "client FLOPs", "client memory", "server FLOPs", "what crosses")
_NOWHERE = ("E317", "E318", "E325")  # what is so at every cut point
_REASONS = 4  # of those why a model can be cut nowhere, in its error
_STEPS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def show_cuts(text: str, inputs: Sequence[str], output: Output, *, batch: int, refused: bool, pick: str = "") -> None:
    """Print a table of cuts: those that can be, and on request those that cannot, with the reason.

    Args:
        text: The function that gives the model.
        inputs: Specs of the inputs, each "NAME=SPEC", "ARGUMENT.KEY=SPEC" or "SPEC".
        output: Where to write.
        batch: Samples in a step.
        refused: Whether to say where it cannot be cut.
        pick: Field or index of what the model returns; empty if that is one tensor.

    Raises:
        CutlayerError: there is nothing to cut (E237), the model can be cut nowhere as it is (E317, E318, E325) or at
            all (E328, which comes after the reasons).
    """
    from cutlayer.models.costs import costs

    model, example = _model(text, inputs)
    rows: list[CutCost] = []
    errors: list[CutCost] = []
    key = int(pick) if pick.removeprefix("-").isdecimal() else pick or None
    for one in costs(model, example, batch=batch, output=key):
        if one.error is not None and one.error.code in _NOWHERE:
            raise one.error
        (errors if one.error is not None else rows).append(one)
        if output.verbose:
            output.note(f"{one.point}: {'cannot be cut' if one.error else 'can be cut'}")
    if rows:
        output.say(f"{type(model).__name__}: a step of {batch} samples, forwards and backwards")
        output.say(_table([_HEAD, *(_cells(one) for one in rows)]))
    if any(one.raw for one in rows):
        output.say("  RAW: the server gets this input as it is: cl.split refuses that (E331) unless release=[NAME]")
    for one in errors if refused else ():
        output.say(f"  not after {one.point}: {one.error.code} {one.error.what}" if one.error else "")
    document: dict[str, Any] = {"model": type(model).__name__, "batch": batch, "cuts": [_row(one) for one in rows]}
    document["refused"] = [{"point": one.point, **error_document(one.error)} for one in errors if one.error]
    if not rows:
        error = _nowhere(type(model).__name__, [one.error for one in errors if one.error])
        output.fail(error, document)
        raise typer.Exit(exit_code(error))
    output.document(document)
    hint = "" if refused or not errors else f"; {len(errors)} more cannot be: --refused says why"
    output.last(f"{len(rows)} places to cut{hint}")


def _model(text: str, inputs: Sequence[str]) -> tuple[nn.Module, Any]:
    """Call the function, and return a model with an example of its inputs."""
    from torch import nn

    from cutlayer.run.partyfile import call_function

    found = call_function(text, Path.cwd())
    model, example = found if isinstance(found, tuple) and len(found) == 2 else (found, None)
    if inputs:
        example = _example(inputs)
    if not isinstance(model, nn.Module) or example is None:
        raise ConfigError(
            "there is no model to cut, or no example of its inputs",
            where=text,
            expected="a function that gives the model, or (model, example); --input 'float32[batch, 3, 32, 32]'",
            got=f"{type(model).__name__}, {'no example' if example is None else 'an example'}",
            remedy="give --input for each argument of forward: --input NAME=SPEC",
            code="E237",
        )
    return model, example


def _nowhere(model: str, errors: Sequence[CutlayerError]) -> StageError:
    """Return the error of a model that can be cut nowhere, with each reason once."""
    codes = Counter(error.code for error in errors)
    first = {error.code: error.what for error in reversed(errors)}
    reasons = [f"{code} {first[code]}{f' ({count} such)' if count > 1 else ''}" for code, count in codes.items()]
    return StageError(
        "the model can be cut nowhere",
        where=model,
        expected="a submodule after which it can be cut",
        got="; ".join(reasons[:_REASONS]) or "a model without submodules",
        remedy="change what the reasons name (--refused lists them all), or write the stages as modules of their own",
        code="E328",
    )


def _example(inputs: Sequence[str]) -> tuple[Tensor, ...] | dict[str, Tensor | dict[str, Tensor]]:
    """Return the inputs as an example: by name, or in the order of forward's arguments if none has a name.

    "ARGUMENT.KEY" names an entry of an argument that is a dictionary.
    """
    read = [_input(one) for one in inputs]
    names = [name for name, _ in read]
    whole, parted = ({name.partition(".")[0] for name in names if ("." in name) is part} for part in (False, True))
    if any(names) and ("" in names or len(set(names)) < len(names) or whole & parted):
        raise ConfigError(
            "inputs that do not go together",
            where="--input",
            expected="each with another name, or all without, in the order of forward's arguments",
            got=", ".join(name or "no name" for name in names),
            remedy="give each argument of forward once: --input NAME=SPEC; or each entry of an argument that is a "
            "dictionary: --input ARGUMENT.KEY=SPEC",
            code="E210",
        )
    if not any(names):
        return tuple(value for _, value in read)
    example: dict[str, Any] = {}
    for name, value in read:
        argument, dot, key = name.partition(".")
        if dot:
            example.setdefault(argument, {})[key] = value
        else:
            example[argument] = value
    return example


def _input(text: str) -> tuple[str, Tensor]:
    """Return name and example tensor of "NAME=SPEC" or "SPEC": random numbers; zeros for whole ones."""
    import torch

    from cutlayer.core.spec import TensorSpec
    from cutlayer.engine.tensors import torch_dtype

    name, _, spec = text.rpartition("=") if "=" in text.partition("[")[0] else ("", "", text)
    parsed = TensorSpec.parse(spec, f"--input {text!r}")
    dice, shape = torch.Generator().manual_seed(0), parsed.concrete(3)
    value = torch.randn(shape, generator=dice) if parsed.floating else torch.zeros(shape)
    return name.strip(), value.to(torch_dtype(parsed.dtype))


def _row(one: CutCost) -> dict[str, Any]:
    row = asdict(one)
    del row["error"]
    return row


def _cells(one: CutCost) -> tuple[str, ...]:
    client, server = one.client, one.server
    sides = ("", "", "", "")
    if client is not None and server is not None:
        sides = (_short(client.parameters), _short(client.flops), f"{_short(client.memory)}B", _short(server.flops))
    crossing = (*one.tensors, *(f"RAW {name}: {spec}" for name, spec in one.raw.items()))
    return (one.point, f"{_short(one.up)}B", f"{_short(one.down)}B", *sides, ", ".join(crossing))


def _short(number: int) -> str:
    for size, name in _STEPS:
        if number >= size:
            return f"{number / size:.3g} {name}"
    return f"{number} "


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:-1], widths[1:], strict=True)), row[-1]]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)
