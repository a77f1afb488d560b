"""A party's optimizers: one for its unreplicated stages and one for each of its replicas (lanes)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from cutlayer.engine.stage import StageProtocol
from cutlayer.errors import ConfigError, ContractError

__all__ = ["Bundle", "load_stage_state", "stage_state"]

OptimizerFactory = Callable[[list[nn.Parameter]], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRScheduler]
_META_MAX = 64 * 1024


class _Numbers(msgspec.Struct, forbid_unknown_fields=True):
    """What a stage's state holds besides tensors."""

    optimizer: dict[str, Any] = msgspec.field(default_factory=dict)
    groups: list[dict[str, Any]] = msgspec.field(default_factory=list)
    scheduler: dict[str, Any] | None = None


class Bundle:
    """Stages that step together: their one optimizer and its learning-rate scheduler.

    Args:
        stages: Name -> stage.
        optimizer: Makes the optimizer from all their parameters; None: nothing here is trained.
        scheduler: Makes the scheduler from the optimizer; None: a constant learning rate.
    """

    def __init__(
        self,
        stages: Mapping[str, StageProtocol],
        optimizer: OptimizerFactory | None,
        scheduler: SchedulerFactory | None,
    ) -> None:
        """Build optimizer and scheduler over the parameters of all stages, each parameter once."""
        self.stages = dict(stages)
        unique = {id(p): p for stage in stages.values() for p in stage.parameters()}
        self.parameters = list(unique.values())
        self.optimizer: Optimizer | None = None
        self.scheduler: LRScheduler | None = None
        if self.parameters:
            if optimizer is None:
                raise ConfigError(
                    "a party has parameters to train and no optimizer",
                    where=f"stages {', '.join(stages)}",
                    remedy="give Party(optimizer=lambda params: ...), or set frozen=True on its stages",
                    code="E221",
                )
            self.optimizer = _checked(optimizer(self.parameters), stages)
            if not self.holds(self.parameters):
                raise ConfigError(
                    "the optimizer holds none of the parameters that it is made for",
                    where=f"stages {', '.join(stages)}",
                    expected="an optimizer over the parameters that its function is called with",
                    got="others, which are not trained here",
                    remedy="take the argument: lambda parameters: torch.optim.Adam(parameters, lr=1e-3)",
                    code="E221",
                )
            if _needs_closure(self.optimizer):
                raise ConfigError(
                    f"{type(self.optimizer).__name__} runs the whole network again within a step, which no party can "
                    "do alone",
                    where=f"stages {', '.join(stages)}",
                    expected="an optimizer whose step() can be called without a closure",
                    remedy="use one that needs gradients only, such as SGD or Adam",
                    code="E221",
                )
            self.scheduler = scheduler(self.optimizer) if scheduler else None
            if isinstance(self.scheduler, ReduceLROnPlateau):
                raise ConfigError(
                    "ReduceLROnPlateau needs a metric at each step, which not every party has",
                    where=f"stages {', '.join(stages)}",
                    remedy="use a scheduler that counts epochs or steps, such as CosineAnnealingLR",
                    code="E221",
                )

    def holds(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Whether the optimizer steps one or more of these parameters."""
        groups = self.optimizer.param_groups if self.optimizer is not None else []
        held = {id(p) for group in groups for p in group["params"]}
        return any(id(p) in held for p in parameters)

    def step(self, each_step: bool) -> None:
        """Update parameters, drop gradients; advance the scheduler if it counts steps.

        Raises `ConfigError` E221 for an optimizer that does not take sparse gradients, or those only.
        """
        if self.optimizer is None:
            return
        try:
            self.optimizer.step()
        except RuntimeError as error:
            if "sparse" not in str(error).lower():
                raise
            raise ConfigError(
                f"the optimizer {type(self.optimizer).__name__} does not take these gradients",
                where=f"stages {', '.join(self.stages)}",
                expected="dense gradients, or those of nn.Embedding(sparse=True), or both, as the optimizer says",
                got=str(error),
                remedy="use one that takes both, SGD or Adagrad, or leave sparse=True out",
                code="E221",
            ) from error
        _drop_gradients(self.optimizer)
        if each_step:
            self.advance()

    def advance(self) -> None:
        """Advance the scheduler, if there is one. Raises `ConfigError` E221 if it cannot go on, as `OneCycleLR`."""
        if self.scheduler is None:
            return
        try:
            self.scheduler.step()
        except ValueError as error:
            kind, total = type(self.scheduler).__name__, getattr(self.scheduler, "total_steps", None)
            raise ConfigError(
                f"the scheduler {kind} cannot be advanced any more",
                where=f"stages {', '.join(self.stages)}, step {self.scheduler.last_epoch} of the scheduler",
                expected="a scheduler for all steps of the run" if total is None else "total_steps for the whole run",
                got=str(error) if total is None else f"total_steps={total}",
                remedy="give it as many steps as there are: epochs * batches with scheduler_every='step', else epochs",
                code="E221",
            ) from error

    def drop_gradients(self) -> None:
        """Forget gradients, for a roll-back in mid-step."""
        if self.optimizer is not None:
            _drop_gradients(self.optimizer)


def _drop_gradients(optimizer: Optimizer) -> None:
    """Do what `zero_grad` does; where it is PyTorch's own, without what it notes for profilers."""
    if "zero_grad" in vars(optimizer) or type(optimizer).zero_grad is not Optimizer.zero_grad:
        optimizer.zero_grad(set_to_none=True)
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


def _checked(made: Any, stages: Iterable[str]) -> Optimizer:  # noqa: ANN401
    """Return what the function of the optimizer has given, if it is one. Raises `ConfigError` E221."""
    if all(hasattr(made, name) for name in ("step", "zero_grad", "param_groups", "state")):
        return made  # type: ignore[no-any-return]
    raise ConfigError(
        "the function that makes the optimizer gives none",
        where=f"stages {', '.join(stages)}",
        expected="a torch.optim.Optimizer over the parameters it is called with",
        got=type(made).__name__,
        remedy="return it: lambda parameters: torch.optim.Adam(parameters, lr=1e-3)",
        code="E221",
    )


def _needs_closure(optimizer: Optimizer) -> bool:
    """Whether `step` cannot be called without its closure, as that of LBFGS, whatever that argument is called."""
    step = inspect.signature(type(optimizer).step)  # the class's: a scheduler wraps its own
    _, *given = step.parameters.values()
    return any(one.default is one.empty and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD) for one in given)


def stage_state(stage: StageProtocol, bundle: Bundle) -> dict[str, Tensor]:
    """Return all state of a stage by name: what is handed on in a relay and saved in a checkpoint.

    `p.` parameters, `b.` buffers (BatchNorm), `o.` optimizer state of each parameter, `g.` the stage generators
    (dropout), `m` numbers of optimizer and scheduler as msgpack. Leave out any and the relay differs from the uncut
    model.

    Raises:
        ConfigError: the optimizer keeps something else than tensors and numbers.
    """
    state: dict[str, Tensor] = {f"p.{name}": p.detach() for name, p in stage.module.named_parameters()}
    state |= {f"b.{name}": b.detach() for name, b in stage.module.named_buffers()}
    numbers = _Numbers()
    if bundle.optimizer is not None:
        for name, parameter in stage.module.named_parameters():
            for key, value in bundle.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    state[f"o.{name}.{key}"] = value.detach()
                else:
                    numbers.optimizer |= {f"{name}.{key}": _number(stage, bundle.optimizer, key, value)}
        numbers.groups = [_plain(group) for group in bundle.optimizer.param_groups]
    if bundle.scheduler is not None:
        numbers.scheduler = _plain(bundle.scheduler.state_dict())
    state["g.cpu"] = stage.generator
    if stage.cuda_generator is not None:
        state["g.cuda"] = stage.cuda_generator
    state["m"] = torch.frombuffer(bytearray(msgspec.msgpack.encode(numbers)), dtype=torch.uint8)
    return state


def load_stage_state(stage: StageProtocol, bundle: Bundle, state: Mapping[str, Tensor], where: str) -> None:
    """Take over what `stage_state` gave of a replica of the same stage. Checks all of it before it changes anything.

    Raises:
        ContractError: names, shapes, dtypes or parameter groups are not those of this stage.
    """
    parameters = dict(stage.module.named_parameters())
    own: dict[str, Tensor] = {f"p.{name}": p for name, p in parameters.items()}
    own |= {f"b.{name}": b for name, b in stage.module.named_buffers()}
    _check_same(own, {name: t for name, t in state.items() if name[:2] in ("p.", "b.")}, where)
    slots = _optimizer_slots(parameters, state, where)
    numbers = _numbers(state, where)
    generator = state.get("g.cpu")
    if generator is None or generator.dtype != torch.uint8 or generator.shape != stage.generator.shape:
        raise ContractError(
            "a stage's state has no generator that fits",
            where=where,
            remedy="use the same releases of cutlayer and torch, and the same kind of device, at all replicas",
            code="E524",
        )
    if bundle.optimizer is not None and len(numbers.groups) != len(bundle.optimizer.param_groups):
        raise ContractError(
            "a stage's state has other parameter groups",
            where=where,
            remedy="use the same optimizer at all replicas of the stage",
            code="E524",
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])
    stage.generator = generator.clone()
    if stage.cuda_generator is not None and "g.cuda" in state:
        stage.cuda_generator = state["g.cuda"].clone()
    if bundle.optimizer is not None:
        _load_optimizer(bundle.optimizer, parameters, slots, numbers)
    if bundle.scheduler is not None and numbers.scheduler is not None:
        bundle.scheduler.load_state_dict(_merged(bundle.scheduler.state_dict(), _decoded(numbers.scheduler)))


def _load_optimizer(
    optimizer: Optimizer,
    parameters: Mapping[str, nn.Parameter],
    slots: Mapping[str, dict[str, Tensor]],
    numbers: _Numbers,
) -> None:
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in parameters.items():
        if id(parameter) not in trained:
            continue
        fresh: dict[str, Any] = {
            # A step counter stays on the CPU; what has the parameter's shape goes to the parameter's device.
            key: tensor.to(parameter.device) if tensor.shape == parameter.shape and tensor.ndim else tensor.clone()
            for key, tensor in slots.get(name, {}).items()
        }
        for full, value in numbers.optimizer.items():
            owner, _, key = full.rpartition(".")
            if owner == name:
                fresh[key] = _decoded(value)
        optimizer.state[parameter].clear()
        optimizer.state[parameter].update(fresh)
    for group, values in zip(optimizer.param_groups, numbers.groups, strict=True):
        group.update({key: _decoded(value) for key, value in values.items() if key in group and key != "params"})


def _check_same(own: Mapping[str, Tensor], given: Mapping[str, Tensor], where: str) -> None:
    expected = {name: (t.dtype, t.shape) for name, t in own.items()}
    got = {name: (t.dtype, t.shape) for name, t in given.items()}
    if expected != got:
        names = sorted(name for name in expected.keys() | got.keys() if expected.get(name) != got.get(name))
        raise ContractError(
            "the state received for a stage is not that of the same module",
            where=f"{where}, {', '.join(names[:5])}",
            remedy="use the same module at all replicas of the stage",
            code="E524",
        )


def _optimizer_slots(
    parameters: Mapping[str, nn.Parameter], state: Mapping[str, Tensor], where: str
) -> dict[str, dict[str, Tensor]]:
    slots: dict[str, dict[str, Tensor]] = {}
    for full, tensor in state.items():
        if not full.startswith("o."):
            continue
        name, _, key = full[2:].rpartition(".")
        fits = name in parameters and tensor.numel() <= max(1, parameters[name].numel())
        if not fits:
            raise ContractError(
                "the optimizer state received for a stage does not fit its parameters",
                where=f"{where}, {full}",
                remedy="use the same optimizer at all replicas of the stage",
                code="E524",
            )
        slots.setdefault(name, {})[key] = tensor.clone()
    return slots


def _numbers(state: Mapping[str, Tensor], where: str) -> _Numbers:
    packed = state.get("m")
    if packed is None or packed.dtype != torch.uint8 or packed.numel() > _META_MAX:
        raise ContractError(
            "a stage's state has no numbers, or too many",
            where=where,
            remedy="use the same optimizer and module at all replicas of the stage",
            code="E524",
        )
    try:
        return msgspec.msgpack.decode(packed.numpy().tobytes(), type=_Numbers)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise ContractError(
            "the numbers of a stage's state cannot be read",
            where=where,
            remedy="use the same optimizer and module at all replicas of the stage",
            code="E524",
        ) from None


def _number(stage: StageProtocol, optimizer: Optimizer, key: str, value: Any) -> Any:  # noqa: ANN401 - plain values
    if not _codable(value):
        raise ConfigError(
            f"the state of {type(optimizer).__name__} cannot be handed on or saved",
            where=f"stage {stage.name}, {key!r}",
            expected="tensors and numbers",
            got=type(value).__name__,
            remedy="use an optimizer that keeps its state in tensors, such as Adam",
            code="E221",
        )
    return _coded(value)


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Keep what is a number, text, None, or a list, tuple or dict of these; one-element tensors become numbers."""
    return {key: _coded(value) for key, value in values.items() if key != "params" and _codable(value)}


def _codable(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1
    if isinstance(value, list | tuple):
        return all(_codable(item) for item in value)
    plain = isinstance(value, int | float | str | bool | None)
    return plain or (type(value) is dict and all(isinstance(key, str) for key in value))


def _coded(value: Any) -> Any:  # noqa: ANN401 - plain values
    """Mark tuples and dicts, which msgpack would give back as lists, or take for marks."""
    if isinstance(value, Tensor):
        return value.item()
    if isinstance(value, dict):
        return {"dict": _plain(value)}
    if isinstance(value, list | tuple):
        items = [_coded(item) for item in value]
        return {"tuple": items} if isinstance(value, tuple) else items
    return value


def _decoded(value: Any) -> Any:  # noqa: ANN401 - plain values
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    if isinstance(value, dict):
        if isinstance(value.get("tuple"), list):
            return tuple(_decoded(item) for item in value["tuple"])
        inner = value.get("dict", value)
        return {key: _decoded(item) for key, item in inner.items()} if isinstance(inner, dict) else None
    return value


def _merged(own: Any, given: Any) -> Any:  # noqa: ANN401 - plain values
    """Put given values in the place of own ones, key by key; what only one side has stays with its owner."""
    if isinstance(own, dict) and isinstance(given, dict):
        return {key: _merged(value, given[key]) if key in given else value for key, value in own.items()}
    if isinstance(own, list) and isinstance(given, list) and len(own) == len(given):
        return [_merged(mine, theirs) for mine, theirs in zip(own, given, strict=True)]
    return given


def squared_norm(parameters: Iterable[nn.Parameter]) -> float:
    """Return the sum of squares of all gradients, in float64, parameter by parameter in order."""
    total = 0.0
    for parameter in parameters:
        if (gradient := parameter.grad) is not None:
            gradient = gradient.coalesce().values() if gradient.is_sparse else gradient
            total += float(torch.linalg.vector_norm(gradient, dtype=torch.float64).square())
    return total


def clip_own(parameters: list[nn.Parameter], largest: float) -> None:
    """Scale gradients as `clip_grad_norm_` does; it takes no sparse ones: with these by the norm of `squared_norm`."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if any(gradient.is_sparse for gradient in gradients):
        factor = min(1.0, largest / (squared_norm(parameters) ** 0.5 + 1e-6))
        for gradient in gradients:
            gradient.mul_(factor)
    else:
        nn.utils.clip_grad_norm_(parameters, largest)
