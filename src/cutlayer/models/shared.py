"""Refusing cuts between uses of one weight, each of which would be trained apart.

| code | error | meaning |
| --- | --- | --- |
| E332 | PlanError | weights are tied across parties, or between a stage that trains and one that does not |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cutlayer.errors import PlanError
from cutlayer.models.cut import Cut
from cutlayer.models.specs import Ports
from cutlayer.models.steps import PieceModule

__all__ = ["check_ties", "check_trained"]


def check_ties(made: Cut, places: Sequence[str], labels: str) -> None:
    """Refuse weights that pieces of two parties share.

    Args:
        made: The cut model.
        places: "client" or "server", of each piece.
        labels: Where the labels are, "client" or "server".

    Raises:
        PlanError: E332, pieces of two parties have one weight.
    """
    for first, one, second, other in made.ties:
        if places[one] != places[other]:
            which = f"{first!r} and {second!r} are" if first != second else f"two uses of {first!r} are"
            spans = [f"piece {piece} ({places[piece]}, {_span(made, piece)})" for piece in (one, other)]
            raise PlanError(
                f"{which} one weight, at two parties",
                where=" and ".join(spans),
                expected="tied weights in pieces of one party",
                got=", ".join(_fetches(made, {one: first, other: second})),
                remedy=", or ".join(_ways(made, places, labels, (first, one, second, other))),
                code="E332",
            )


def _ways(made: Cut, places: Sequence[str], labels: str, tie: tuple[str, int, str, int]) -> list[str]:
    """Return what a user can do about a weight at two parties."""
    first, one, second, other = tie
    user = _user(first, made.points) if first == second else ""
    if user:
        return [f"cut before {user!r}, which uses it in several of its parts, or after it"]
    layer = first == second and not _fetches(made, {one: first, other: second})
    once = "where forward calls a layer for several inputs, call it once for all: layer(torch.stack([left, right], 1))"
    ways = ["cut so that both are at one party", once if layer else "give each its own weight"]
    if other == len(places) - 1 and labels == "server" and places[one] == "client":
        ways.insert(0, "keep the last layers at the client (a U-shape: labels='client')")
    if other == len(places) - 1 and labels == "client" and places[one] == "server":
        ways.insert(
            0, f"let the server have the labels too: labels='server', without the cut after {made.points[-1]!r}"
        )
    if len(_fetches(made, {one: first, other: second})) == 1:
        ways.append(
            f"let forward read or write {second!r} by itself only where its layer runs, on that side of the cut (an L2 "
            "penalty is the optimizer's weight_decay)"
        )
    return ways


def _fetches(made: Cut, uses: Mapping[int, str]) -> list[str]:
    """Say where forward uses a weight by itself, not through the layer that has it. `uses`: piece -> its name there."""
    found: dict[str, None] = {}
    for piece, weight in uses.items():
        module = made.pieces[piece].module
        for routine in module.routines.values() if isinstance(module, PieceModule) else ():
            fetched = {step.name: step for step in routine.steps if step.op == "state" and step.target == weight}
            found |= dict.fromkeys(f"piece {piece} fetches it at {step.line}" for step in fetched.values())
    return list(found)


def _user(weight: str, points: Sequence[str]) -> str:
    """Return the submodule whose forward uses a weight of its own, or of its child, if cut points lie inside it."""
    child = weight.rpartition(".")[0]
    for path in (child, child.rpartition(".")[0]):
        if path and any(point.startswith(f"{path}.") for point in points):
            return path
    return ""


def check_trained(made: Cut, ports: Sequence[Ports]) -> None:
    """Refuse a weight in a piece that trains and in one that does not. Raises `PlanError` E332."""
    for first, one, second, other in made.ties:
        still, moves = (one, other) if ports[other].trained else (other, one)
        weight = dict(made.pieces[one].module.named_parameters()).get(first)
        if weight is not None and weight.requires_grad and ports[moves].trained and not ports[still].trained:
            raise PlanError(
                f"a stage trains the weight {second!r}, and another, to which no gradient comes back, has it too",
                where=f"piece {still} ({_span(made, still)}) and piece {moves} ({_span(made, moves)})",
                expected="a weight in one of them: all that runs under torch.no_grad() or is detached is frozen",
                remedy="cut so that both uses are in one piece, or give each its own weight",
                code="E332",
            )


def _span(made: Cut, piece: int) -> str:
    """Return where in the model a piece is: behind which cut and up to which."""
    begin = f"after {made.points[piece - 1]!r}" if piece else ""
    end = f"up to {made.points[piece]!r}" if piece < len(made.points) else ""
    return " ".join(part for part in (begin, end) if part)
