"""Values and gradients of one step at one party, by where they come from."""

from __future__ import annotations

import torch
from torch import Tensor

from cutlayer.core.graph import Edge, Graph

__all__ = ["Values"]


class Values:
    """Holds activations, data fields and gradients between the instructions of a step.

    A value is kept once per source, however many stages take it; a gradient once per edge.
    """

    def __init__(self, graph: Graph, party: str) -> None:
        """Begin empty."""
        self.graph, self.party = graph, party
        self._values: dict[tuple[str, int, int], Tensor] = {}
        self._gradients: dict[tuple[int, int, int], Tensor] = {}
        self._shared: dict[tuple[int, int], bool] = {}

    def put_field(self, name: str, lane: int, micro: int, value: Tensor) -> None:
        """Keep a field of this party's own data, shape (microbatch, ...)."""
        self._values[f"data.{name}@{self.party}", lane, micro] = value

    def put_output(self, stage: str, lane: int, micro: int, value: Tensor) -> None:
        """Keep a stage's output."""
        self._values[stage, lane, micro] = value

    def drop_output(self, stage: str, lane: int, micro: int) -> None:
        """Forget a stage's output: its backward is next, so all its consumers have run."""
        self._values.pop((stage, lane, micro), None)

    def put(self, edge: Edge, lane: int, micro: int, value: Tensor) -> None:
        """Keep a value that came over a cut."""
        self._values[self._key(edge, lane), lane, micro] = value

    def get(self, edge: Edge, lane: int, micro: int) -> Tensor:
        """Return the value of an edge."""
        return self._values[self._key(edge, lane), lane, micro]

    def put_gradient(self, edge: int, lane: int, micro: int, value: Tensor) -> None:
        """Keep the gradient at an edge."""
        self._gradients[edge, lane, micro] = value

    def take_gradient(self, edge: int, lane: int, micro: int) -> Tensor:
        """Return the gradient at an edge, and forget it."""
        return self._gradients.pop((edge, lane, micro))

    def added(self, stage: str, lane: int, micro: int, device: torch.device) -> Tensor:
        """Return the sum of the gradients of all consumers of a stage, added in plan order."""
        values = [
            self.take_gradient(edge.index, lane, micro).to(device)
            for edge in self.graph.consumers_of[stage]
            if edge.trained
        ]
        total = values[0]
        for value in values[1:]:
            total = total + value
        return total

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
        return edge.source.stage or f"data.{edge.source.field}@{self.graph.origin(edge, lane)}"
