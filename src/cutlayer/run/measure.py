"""What a call of a stage costs, for a loop that calls modules itself: the engine counts a call of a copy."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from cutlayer.core.graph import Graph
from cutlayer.engine.stage import Context, ModuleStage

__all__ = ["Cost", "measured"]


@dataclass(frozen=True)
class Cost:
    """FLOPs of a forward and its backward; `scale`: how a loss makes probabilities of its first input."""

    forward: int
    backward: int
    scale: str


def measured(stage: ModuleStage, graph: Graph, inputs: Sequence[Tensor], *, training: bool) -> Cost:
    """Run a copy of a stage on copies of its inputs, forwards and, in training, backwards; count as the engine does.

    A loop's backward goes through several stages at once, so its own operations cannot be told apart. Weights,
    gradients and random generators stay as they are.

    Raises:
        StageError: what the engine raises if the module fails, or gives something else than the plan says.
    """
    twin = ModuleStage(stage.name, copy.deepcopy(stage.module), ports=stage.ports, seed=0, device=stage.device)
    wanted = tuple(edge.trained for edge in graph.inputs_of[stage.name])
    context = Context(key=(0, 0), batch=len(inputs[0]), training=training, wanted=wanted)
    outputs = twin.forward([value.detach().clone() for value in inputs], context)
    forward, backward = twin.spent, 0
    if training and graph.trained[stage.name]:
        taken = {edge.source.port for edge in graph.consumers_of[stage.name] if edge.trained}
        ports = stage.ports or {}
        seeds = [output if port in taken else None for port, output in zip(ports, outputs, strict=False)]
        twin.backward(seeds if stage.ports is not None else 1.0, (0, 0))
        backward = twin.spent
    return Cost(forward, backward, twin.scale)
