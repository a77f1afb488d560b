"""A stage at work: what the engine asks of it, and the implementation by a torch module and autograd."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Protocol, TypeVar, runtime_checkable

import msgspec
import torch
from torch import Tensor, nn

from cutlayer.core.spec import TensorSpec
from cutlayer.engine.advice import after_failure, for_other_tensor
from cutlayer.engine.autograd import Hooks, enter, go_back, hooks_of, hooks_to, put_last, tell_writes
from cutlayer.engine.flops import FlopCounter
from cutlayer.engine.scoring import LEFT_OUT, Pairs, check_reach, loss_error, no_gradient
from cutlayer.engine.tensors import check_spec, torch_dtype
from cutlayer.engine.tied import Tied
from cutlayer.errors import CutlayerError, StageError

__all__ = ["Context", "Gradients", "ModuleStage", "StageProtocol"]

Key = tuple[int, int]  # lane, micro
Gradients = Sequence[Tensor | None] | float  # one per port; a number for the scalar of a loss
_Shapes = tuple[tuple[int, ...], ...]
_T = TypeVar("_T")


class Context(msgspec.Struct, frozen=True, kw_only=True):
    """What a stage must know of a forward.

    Attributes:
        key: Lane and microbatch; a backward names the same.
        batch: Samples in the microbatch.
        training: Train mode, with gradients; else evaluation mode, without.
        wanted: For each input, whether its gradient will be asked for.
        after: The stage whose output is the one wanted input, if both may be one graph of autograd; see `goes_on`.
    """

    key: Key
    batch: int
    training: bool
    wanted: tuple[bool, ...]
    after: ModuleStage | None = None


@runtime_checkable
class StageProtocol(Protocol):
    """What the engine asks of a stage. Values are tensors; a stage sees only those of its own party.

    `forward` gives the outputs, in the order of the stage's ports, for the inputs. `backward` takes the gradients at
    the outputs (None where there is none) and gives those at the inputs (None where not wanted), and keeps gradients
    of its parameters until the party's optimizer steps.

    Attributes:
        name: As in the plan.
        module: Holds all parameters and buffers; what is handed on, saved and given back is its state.
        device: Where outputs are, and gradients at them are wanted.
        generator: State of the stage's own random generator (uint8, as `torch.Generator.get_state` gives it), which is
            handed on and saved with it.
        cuda_generator: The same for a CUDA device, or None.
        spent: Floating-point operations of the last call.
    """

    name: str
    module: nn.Module
    device: torch.device
    generator: Tensor
    cuda_generator: Tensor | None
    spent: int

    def forward(self, inputs: Sequence[Tensor], context: Context) -> tuple[Tensor, ...]:
        """Return the outputs."""

    def backward(self, gradients: Gradients, context_key: Key) -> Sequence[Tensor | None]:
        """Return gradients at the inputs of the forward with that key."""

    def parameters(self) -> Sequence[nn.Parameter]:
        """Return the parameters that an optimizer trains."""

    def forget(self) -> None:
        """Drop what forwards have kept, for a roll-back in mid-step."""


class _Kept(msgspec.Struct):
    """What a forward leaves for its backward."""

    outputs: tuple[Tensor, ...]
    wanted: tuple[bool, ...]
    leaves: list[Tensor]
    sink: list[Tensor | None]
    shapes: _Shapes
    after: ModuleStage | None
    catching: list[Hooks]
    reached: list[bool]  # of a graph that goes on in the stage before: not empty once a backward has come there
    back: Callable[..., None] | None = None


class ModuleStage:
    """A stage made of an `nn.Module` and autograd.

    Args:
        name: The stage's name, for errors.
        module: Called with the inputs in plan order; gives a tensor, or, for several ports, a dictionary by port or a
            tuple in their order.
        ports: What the outputs must look like; None for a loss, which must give a scalar.
        seed: Seeds the stage's own generator (dropout and the like), which travels with its state.
        device: Where it runs.
        autocast: Run forwards under `torch.autocast` with this dtype ("bfloat16", "float16"); empty: as they are.

    Raises:
        StageError: the module fails, or gives something else than `ports` says; of a loss, E307, E309 and E341 as well.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        *,
        ports: Mapping[str, TensorSpec] | None,
        seed: int,
        device: torch.device,
        autocast: str = "",
    ) -> None:
        """Move the module to its device and give it a generator of its own."""
        self.name, self.ports, self.device = name, ports, device
        self._ports = tuple(ports) if ports is not None else ("",)
        self.autocast = torch_dtype(autocast) if autocast else None
        self.module = module.to(device)
        self.generator = torch.Generator().manual_seed(seed).get_state()
        self.cuda_generator: Tensor | None = None
        if device.type == "cuda":
            self.cuda_generator = torch.Generator(device).manual_seed(seed).get_state()
        self.spent, self.scale = 0, ""  # scale: of a loss, how it makes probabilities of its first input; see `Pairs`
        self._flops: dict[tuple[str, _Shapes], int] = {}
        self._kept: dict[Key, _Kept] = {}
        self.own: frozenset[int] | None = None  # of a loss: its party's parameters, by id; None: not looked at
        self.tied = Tied()  # replaced by who has other stages with the same weights

    def parameters(self) -> list[nn.Parameter]:
        """Return the trainable parameters, in the module's order."""
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def forward(self, inputs: Sequence[Tensor], context: Context) -> tuple[Tensor, ...]:
        """Run the module on inputs of shape (batch, ...); return its outputs, detached, of the ports' specs.

        They are seen by the stage's own party, and by the parties of the cuts that the plan derives from it.
        """
        training = context.training
        if self.module.training != training:
            self.module.train(training)
        if torch.is_grad_enabled() == training:
            return self._run(inputs, context)
        with torch.set_grad_enabled(training):
            return self._run(inputs, context)

    def _run(self, inputs: Sequence[Tensor], context: Context) -> tuple[Tensor, ...]:
        """Run the module in the mode that is set; keep what a backward needs."""
        training, sink = context.training, list[Tensor | None]([None] * len(inputs))
        leaves, entered, catching, reached = list[Tensor](), list[Tensor](), dict[int, Hooks](), list[bool]()
        shapes: _Shapes = tuple([value.shape for value in inputs])
        live, after = None, context.after
        if after is not None and training and ("backward", shapes) in self._flops:  # alone until its FLOPs are known
            live = after.live(context.key)
        for place, (value, wanted) in enumerate(zip(inputs, context.wanted, strict=True)):
            leaf = (value if value.device == self.device else value.to(self.device)).detach()
            leaves.append(leaf)
            if wanted and training:
                catching[place] = hooks_to(sink, place) if live is None else hooks_of(reached)
                leaf = enter(leaf.requires_grad_() if live is None else live, catching[place])
            entered.append(leaf)
        mode = "forward" if training else "evaluate"
        given = self._guarded(mode, shapes, entered, _with_generator, self, entered, training)
        tell_writes(leaves, entered, catching)
        outputs = self._named(given, context.batch, shapes)
        if training:
            if self.own is not None and ("backward", shapes) not in self._flops:
                check_reach(self.name, outputs, self.own)
            after = None if live is None else after
            hooks = [*catching.values()]
            self._kept[context.key] = _Kept(outputs, context.wanted, leaves, sink, shapes, after, hooks, reached)
        return tuple([output.detach() for output in outputs])

    def backward(self, gradients: Gradients, context_key: Key) -> list[Tensor | None]:
        """Run backwards from `gradients` (shapes and dtypes of the outputs; a number for a scalar output).

        Returns the gradients at the inputs, each of its input's shape and dtype; None where not wanted.
        """
        kept = self._kept.pop(context_key, None)
        if kept is None:
            raise StageError(
                f"stage {self.name!r} has no forward to go back from",
                where=f"lane {context_key[0]}, microbatch {context_key[1]}",
                remedy="call backward once for each forward, in program order",
                code="E303",
            )
        roots, seeds = self._roots(kept, gradients)
        put_last(kept.catching)
        if kept.after is not None:
            self.spent = self._flops["backward", kept.shapes]
            kept.after.goes_on(context_key, roots[0], partial(_through, self, kept))
            return [seeds[0] if one else None for one in kept.wanted]
        if roots or self.tied.later:
            work = self.tied.go_back
            self._guarded("backward", kept.shapes, kept.leaves, work, context_key, roots, seeds, kept.back or go_back)
        for place, gradient in enumerate(kept.sink):
            if gradient is None and kept.wanted[place]:
                kept.sink[place] = torch.zeros_like(kept.leaves[place])  # an input that the module did not use
        return kept.sink

    def live(self, key: Key) -> Tensor | None:
        """Return a forward's one output as autograd knows it; None: no gradient goes back, or FLOPs are not known."""
        kept = self._kept[key]
        return kept.outputs[0] if kept.outputs[0].requires_grad and ("backward", kept.shapes) in self._flops else None

    def goes_on(self, key: Key, root: Tensor, back: Callable[..., None]) -> None:
        """Let a forward's graph end at `root`, a loss of this stage's output, whose seed its backward is to be given.

        The gradients are those of a backward for each, with one run of autograd's engine fewer. `back` is that run.
        """
        kept = self._kept[key]
        kept.outputs, kept.back = (root,), back

    def forget(self) -> None:
        """Drop what forwards have kept, for a roll-back in mid-step."""
        self._kept.clear()
        self.tied.forget()

    def _roots(self, kept: _Kept, gradients: Gradients) -> tuple[list[Tensor], list[Tensor]]:
        """Return the outputs to go back from, and the gradient at each. Raises `StageError` E305, E340."""
        if isinstance(gradients, int | float):
            output = kept.outputs[0]
            if not output.requires_grad and any(kept.wanted):
                raise no_gradient(self.name)
            return ([output], [torch.full_like(output, gradients)]) if output.requires_grad else ([], [])
        roots, seeds = list[Tensor](), list[Tensor]()
        for output, gradient in zip(kept.outputs, gradients, strict=True):
            if gradient is None or not output.requires_grad:
                continue
            if gradient.shape != output.shape:
                raise StageError(
                    f"the gradient at stage {self.name!r} has another shape than its output",
                    where=f"stage {self.name}, inputs of shapes {_lists(kept.shapes)}",
                    expected=f"shape {list(output.shape)}",
                    got=f"shape {list(gradient.shape)}",
                    remedy="the party that takes this output sent it back otherwise: compare plan and release with it",
                    code="E305",
                )
            roots.append(output)
            alike = gradient.dtype == output.dtype and gradient.device == self.device
            seeds.append(gradient if alike else gradient.to(device=self.device, dtype=output.dtype))
        return roots, seeds

    def _guarded(
        self,
        kind: str,
        shapes: _Shapes,
        inputs: list[Tensor],
        work: Callable[..., _T],
        *given: Any,  # noqa: ANN401
    ) -> _T:
        """Do the work; count its FLOPs the first time these shapes are seen; name the stage if it fails."""
        try:
            flops = self._flops.get((kind, shapes))
            if flops is None:
                watch = Pairs(self.name, inputs) if self.ports is None and kind != "backward" else None
                with watch or nullcontext(), FlopCounter() as counter:
                    result = work(*given)
                self.spent = self._flops[kind, shapes] = counter.total
                self.scale = watch.scale if watch else self.scale
                return result
            self.spent = flops
            return work(*given)
        except CutlayerError:
            raise
        except Exception as error:
            raise _failed(self, kind, shapes, inputs, error) from error

    def _named(self, given: object, batch: int, shapes: _Shapes) -> tuple[Tensor, ...]:
        """Return what the module gave in the order of the ports, checked against their specs."""
        ports = self._ports
        if isinstance(given, Tensor):
            values: tuple[object, ...] = (given,)
        elif isinstance(given, Mapping):
            values = tuple(given.get(port) for port in ports) if set(given) == set(ports) else ()
        else:
            values = tuple(given) if isinstance(given, list | tuple) else (given,)
        outputs = tuple([value for value in values if isinstance(value, Tensor)])
        if len(outputs) != len(ports):
            raise _other_values(self.name, ports, given)
        for port, output in zip(ports, outputs, strict=True):
            _check_output(self, port, output, batch, shapes)
        return outputs


def _lists(shapes: _Shapes) -> list[list[int]]:
    return [list(shape) for shape in shapes]


def _through(loss: ModuleStage, kept: _Kept, roots: tuple[Tensor, ...], seeds: tuple[Tensor, ...]) -> None:
    """Go back through a loss and the stage before it, whose errors are its own once a gradient has come there."""
    try:
        go_back(roots, seeds)
    except Exception as error:
        if kept.reached:
            raise
        raise _failed(loss, "backward", kept.shapes, kept.leaves, error) from error


def _failed(stage: ModuleStage, kind: str, shapes: _Shapes, inputs: list[Tensor], error: Exception) -> StageError:
    if stage.ports is None and not isinstance(error, torch.OutOfMemoryError):
        ignored = getattr(stage.module, "ignore_index", LEFT_OUT)
        return loss_error(stage.name, inputs, error, ignored)
    return StageError(
        f"stage {stage.name!r} failed in its {kind}",
        where=f"stage {stage.name}, inputs of shapes {_lists(shapes)}",
        got=f"{type(error).__name__}: {error}",
        remedy=after_failure(stage.module, inputs, error),
        code="E304",
    )


def _check_output(stage: ModuleStage, port: str, output: Tensor, batch: int, shapes: _Shapes) -> None:
    spec = stage.ports[port] if stage.ports is not None else None
    if spec is not None:
        wrong = check_spec(output, spec, batch)
    else:
        wrong = "" if output.numel() == 1 else f"shape {list(output.shape)}"
    if wrong:
        raise StageError(
            f"stage {stage.name!r} gives another tensor than the plan says",
            where=f"stage {stage.name}{f', port {port}' if port else ''}, inputs of shapes {_lists(shapes)}",
            expected=f"{spec or 'a scalar'} for {batch} samples",
            got=wrong,
            remedy=for_other_tensor(spec, output, batch, stage.autocast)
            if spec is not None
            else "let the loss give one number: reduction='mean', or .mean() at its end",
            code="E301",
        )


def _other_values(name: str, ports: tuple[str, ...], given: object) -> StageError:
    return StageError(
        f"stage {name!r} gave other values than the plan says",
        where=f"stage {name}",
        expected="one tensor" if ports == ("",) else f"tensors {', '.join(ports)}: a dictionary, or a tuple",
        got=", ".join(str(key) for key in given) if isinstance(given, Mapping) else _kinds(given),
        remedy="let its module return the tensors that the plan names; cut it differently otherwise",
        code="E302",
    )


def _with_generator(stage: ModuleStage, inputs: list[Tensor], advance: bool) -> object:
    """Run the module with the stage's own generator in place of torch's; evaluation does not advance it."""
    dice = torch.default_generator
    outer = dice.get_state()
    outer_cuda = torch.cuda.get_rng_state(stage.device) if stage.cuda_generator is not None else None
    dice.set_state(stage.generator)
    if stage.cuda_generator is not None:
        torch.cuda.set_rng_state(stage.cuda_generator, stage.device)
    try:
        output = _called(stage, inputs)
        if advance:
            stage.generator = dice.get_state()
            if stage.cuda_generator is not None:
                stage.cuda_generator = torch.cuda.get_rng_state(stage.device)
    finally:
        dice.set_state(outer)
        if outer_cuda is not None:
            torch.cuda.set_rng_state(outer_cuda, stage.device)
    return output


def _called(stage: ModuleStage, inputs: list[Tensor]) -> object:
    if stage.autocast is None:
        return stage.module(*inputs)
    with torch.autocast(stage.device.type, dtype=stage.autocast):
        return stage.module(*inputs)


def _kinds(given: object) -> str:
    if isinstance(given, list | tuple):
        return f"{len(given)} values: {', '.join(type(value).__name__ for value in given)}"
    return type(given).__name__
