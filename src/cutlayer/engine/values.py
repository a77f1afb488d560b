"""Values and gradients of one step at one party, by where they come from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cutlayer.core.graph import Edge, Graph

__all__ = ["Values", "own_fields"]


class Values:
    """Holds activations, data fields and gradients between the instructions of a step.

    A value is kept once per source, however many stages take it; a gradient once per edge.
    """

    def __init__(self, graph: Graph, party: str) -> None:
        """Begin empty."""
        self.graph, self.party = graph, party
        self._values: dict[tuple[str, int, int], Tensor] = {}
        self._outputs = {stage.name: tuple(_output(stage.name, port) for port in stage.ports) for stage in graph.stages}
        self._trained = {
            stage.name: [
                [
                    e.index
                    for e in graph.last_first
                    if e.trained and (e.source.stage, e.source.port) == (stage.name, port)
                ]
                for port in stage.ports
            ]
            for stage in graph.stages
        }
        self._gradients: dict[tuple[int, int, int], Tensor] = {}
        self._shared: dict[tuple[int, int], bool] = {}
        self._keys: dict[tuple[int, int], str] = {}
        self._inputs: dict[tuple[str, int], list[str]] = {}

    def put_field(self, name: str, lane: int, micro: int, value: Tensor) -> None:
        """Keep a field of this party's own data, shape (microbatch, ...)."""
        self._values[f"data.{name}@{self.party}", lane, micro] = value

    def put_outputs(self, stage: str, lane: int, micro: int, values: Sequence[Tensor]) -> None:
        """Keep a stage's outputs, given in the order of its ports."""
        for name, value in zip(self._outputs[stage], values, strict=True):
            self._values[name, lane, micro] = value

    def drop_outputs(self, stage: str, lane: int, micro: int) -> None:
        """Forget a stage's outputs: its backward is next, so all its consumers have run."""
        for name in self._outputs[stage]:
            self._values.pop((name, lane, micro), None)

    def put(self, edge: Edge, lane: int, micro: int, value: Tensor) -> None:
        """Keep a value that came over a cut."""
        self._values[self._key(edge, lane), lane, micro] = value

    def has(self, edge: Edge, lane: int, micro: int) -> bool:
        """Whether the value of an edge is here."""
        return (self._key(edge, lane), lane, micro) in self._values

    def get(self, edge: Edge, lane: int, micro: int) -> Tensor:
        """Return the value of an edge."""
        return self._values[self._key(edge, lane), lane, micro]

    def inputs(self, stage: str, lane: int, micro: int) -> list[Tensor]:
        """Return a stage's inputs, in the order of its arguments."""
        keys = self._inputs.get((stage, lane))
        if keys is None:
            keys = self._inputs[stage, lane] = [self._key(edge, lane) for edge in self.graph.inputs_of[stage]]
        return [self._values[key, lane, micro] for key in keys]

    def put_gradient(self, edge: int, lane: int, micro: int, value: Tensor) -> None:
        """Keep the gradient at an edge."""
        self._gradients[edge, lane, micro] = value

    def take_gradient(self, edge: int, lane: int, micro: int) -> Tensor:
        """Return the gradient at an edge, and forget it."""
        return self._gradients.pop((edge, lane, micro))

    def added(self, stage: str, lane: int, micro: int, device: torch.device) -> list[Tensor | None]:
        """Return, for each port of a stage, the sum of its consumers' gradients, the last one's first; None: no one."""
        sums = list[Tensor | None]()
        for edges in self._trained[stage]:
            total: Tensor | None = None
            for edge in edges:
                value = self._gradients.pop((edge, lane, micro))
                if value.device != device:
                    value = value.to(device)
                total = value if total is None else total + value
            sums.append(total)
        return sums

    def used_here(self, edge: Edge, lane: int) -> bool:
        """Whether a stage of this party takes the same value as `edge`."""
        if (edge.index, lane) not in self._shared:
            self._shared[edge.index, lane] = any(
                other.source == edge.source and self.graph.place(other.target, lane) == self.party
                for other in self.graph.edges
            )
        return self._shared[edge.index, lane]

    def clear(self) -> None:
        """Forget all."""
        self._values.clear()
        self._gradients.clear()

    def _key(self, edge: Edge, lane: int) -> str:
        key = self._keys.get((edge.index, lane))
        if key is None:
            source = edge.source
            field = f"data.{source.field}@{self.graph.origin(edge, lane)}"
            key = self._keys[edge.index, lane] = _output(source.stage, source.port) if source.stage else field
        return key


def own_fields(values: Values, lane: int, micro: int) -> dict[str, Tensor]:
    """Return the party's own data of a microbatch, field -> shape (microbatch, ...)."""
    end = f"@{values.party}"
    return {
        key.removeprefix("data.").removesuffix(end): value
        for (key, *place), value in values._values.items()
        if key.startswith("data.") and key.endswith(end) and place == [lane, micro]
    }


def _output(stage: str, port: str) -> str:
    return f"{stage}.{port}" if port else stage
