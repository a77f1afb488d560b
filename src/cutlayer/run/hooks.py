"""What happens around a module that a user's own loop calls: its stage's generator, its metrics, a note that it ran."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cutlayer.core.parts import Loss
from cutlayer.engine.stage import ModuleStage
from cutlayer.engine.worker import Worker, check_loss
from cutlayer.run.measure import Cost, measured

__all__ = ["Hooks"]


class Hooks:
    """Hooks on the modules of a party's stages; none is left after `remove`.

    Each call of a stage's module draws from the stage's own generator, as the engine does, so that dropout gives the
    same bits; a call of a loss's module is added to its metrics. The ledger gets the FLOPs of each call.

    Args:
        worker: The party's.
        called: Stages whose modules are the user's own and not functions: only these can be noticed.
        began: Called in backward with a loss's name and the gradient that has come to it.
    """

    def __init__(self, worker: Worker, called: set[str], began: Callable[[str, Tensor], None]) -> None:
        """Put a hook before and after each module."""
        self._worker, self._called, self._began = worker, called, began
        self.lane: Callable[[], int] = lambda: 0  # of the present microbatch
        self._ran: dict[str, int] = {}
        self._outer: dict[str, list[Tensor]] = {}
        self._handles: list[RemovableHandle] = []
        self._costs: dict[tuple[str, bool, tuple[torch.Size, ...]], Cost] = {}
        for (name, lane), stage in worker.site.stages.items():
            if isinstance(stage, ModuleStage) and name in called:
                self._hook(name, lane, stage)

    def ran(self, stage: str) -> bool:
        """Say whether a stage has run once more since this was last asked of it."""
        if stage not in self._called:
            return True
        times = self._ran.get(stage, 0)
        self._ran[stage] = max(0, times - 1)
        return times > 0

    def forget(self) -> None:
        """Begin anew, at the start of a round."""
        self._ran.clear()

    def remove(self) -> None:
        """Take all hooks away."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str, lane: int, stage: ModuleStage) -> None:
        def before(module: nn.Module, inputs: Any) -> None:  # noqa: ANN401
            if module is not stage.module:
                return  # the copy that `measured` runs
            self._measure(name, stage, inputs)
            self._outer.setdefault(name, []).append(torch.get_rng_state())
            torch.set_rng_state(stage.generator)
            if stage.cuda_generator is not None:
                self._outer[name].append(torch.cuda.get_rng_state(stage.device))
                torch.cuda.set_rng_state(stage.cuda_generator, stage.device)

        def after(module: nn.Module, inputs: Any, output: Any) -> None:  # noqa: ANN401
            if module is not stage.module:
                return
            if stage.cuda_generator is not None:
                if module.training:
                    stage.cuda_generator = torch.cuda.get_rng_state(stage.device)
                torch.cuda.set_rng_state(self._outer[name].pop(), stage.device)
            if module.training:
                stage.generator = torch.get_rng_state()
            torch.set_rng_state(self._outer[name].pop())
            self._ran[name] = self._ran.get(name, 0) + 1
            self._count(name, lane, inputs, output)

        module = stage.module
        self._handles.append(module.register_forward_pre_hook(before))
        self._handles.append(module.register_forward_hook(after, always_call=True))

    def _measure(self, name: str, stage: ModuleStage, inputs: Any) -> None:  # noqa: ANN401
        """Note the FLOPs of a call and of its backward; a stage that cannot be run as the plan says counts nothing."""
        edges, graph = self._worker.graph.inputs_of[name], self._worker.graph
        if len(inputs) != len(edges) or not all(isinstance(value, Tensor) and value.dim() for value in inputs):
            return
        training = stage.module.training and torch.is_grad_enabled()
        key = (name, training, tuple(value.shape for value in inputs))
        if key not in self._costs:
            try:
                cost = measured(stage, graph, inputs, training=training)
            except Exception:
                if stage.ports is None:
                    raise  # of a loss: what the engine says helps more than torch's own words
                cost = Cost(0, 0, "")
            self._costs[key] = cost
            stage.scale = cost.scale
        cost = self._costs[key]
        self._worker.ledger.compute("forward", name, cost.forward)
        if training and graph.trained[name]:
            self._worker.ledger.compute("backward", name, cost.backward)

    def _count(self, name: str, lane: int, inputs: Any, output: Any) -> None:  # noqa: ANN401
        worker, part = self._worker, self._worker.graph.by_name[name]
        book, stage = worker.site.books.get((name, lane)), worker.site.stages[name, lane]
        if book is not None and isinstance(part, Loss) and isinstance(output, Tensor) and isinstance(inputs, tuple):
            check_loss(worker, name, output.detach(), "")
            if output.requires_grad:
                output.register_hook(partial(self._began, name))  # type: ignore[no-untyped-call]
            with torch.no_grad():
                scale = getattr(stage, "scale", "")
                size = len(inputs[0])
                book.update(output.detach(), list(inputs), size, part.reduction, scale, self.lane())
