"""The worker: fulfils the instructions of one party's program with local modules, data and optimizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from cutlayer.core.graph import Edge
from cutlayer.core.parts import Loss
from cutlayer.core.plan import Plan
from cutlayer.core.program import Backward, Forward, Load, Mode, Recv, Send, Step
from cutlayer.core.spec import TensorSpec
from cutlayer.engine.blame import blamed, with_classes
from cutlayer.engine.coder import Coder
from cutlayer.engine.ledger import Ledger
from cutlayer.engine.metrics import MetricBook
from cutlayer.engine.optim import clip_own
from cutlayer.engine.preprocess import unread
from cutlayer.engine.site import Batches, Parts, Site, stage_seed
from cutlayer.engine.stage import Context, Gradients, ModuleStage, StageProtocol
from cutlayer.engine.tensors import check_finite, check_spec, dtype_name, from_payload, memory_order, to_payload
from cutlayer.engine.values import Values
from cutlayer.engine.wire import Buffer
from cutlayer.errors import ContractError, CutlayerError, DataError, NonFiniteError, StageError

__all__ = ["Batches", "Parcel", "Parts", "Worker", "check_loss", "stage_seed"]


class Parcel(msgspec.Struct, frozen=True):
    """A tensor on its way in or out: dtype, shape, bytes, and its dimensions as they follow in them (() is C order)."""

    dtype: str
    shape: tuple[int, ...]
    payload: Buffer
    order: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Role:
    """What calls of a stage need, found once. `book`, `reduction`, `after` (see `Context`): of a loss."""

    stage: StageProtocol
    edges: tuple[Edge, ...]
    wanted: tuple[bool, ...]
    book: MetricBook | None
    reduction: str
    after: ModuleStage | None


class Worker:
    """Runs one party's instructions, called in program order by the party's driver.

    Args:
        plan: The plan, known to all.
        parts: This party's modules, data and optimizer.
        site: What the party has, if it is there already: workers of served sessions share it.

    Raises:
        ConfigError: a stage of this party has no module, or parameters have no optimizer.
    """

    def __init__(self, plan: Plan, parts: Parts, site: Site | None = None) -> None:
        """Build the site, if none is given."""
        self.plan, self.parts, self.graph = plan, parts, plan.graph
        self.party = parts.party
        self.site = site or Site(plan, parts)
        self.coder = Coder(self.graph, self.party, parts.plugs, parts.seed)
        self.ledger = Ledger(parts.party)
        self.history: list[dict[str, Any]] = []
        self.predictions: dict[tuple[str, int], list[Tensor]] = {}  # (stage or stage.port, lane)
        self.mode: Mode = "start"
        self.round = 0
        self.values = Values(self.graph, self.party)  # of the step that is under way
        self._read: dict[tuple[int, int], dict[str, Tensor]] = {}  # batches of the step that comes next
        self._roles: dict[tuple[str, int], _Role] = {}
        self.trained = False

    def begin(self, mode: Mode, number: int) -> None:
        """Begin a round of a mode: metrics start at zero, stages are told to train or to evaluate, all of them anew.

        So one round's modes do not depend on whether another came before it. Predictions leave that to the stages'
        forwards: those of a server are shared by sessions that begin at any time.
        """
        self.mode, self.round = mode, number
        for stage in self.site.stages.values() if mode in ("train", "evaluate") else ():
            stage.module.train(mode == "train")
        for book in self.site.books.values():
            book.reset()
        self.site.preprocess.begin()
        self.clear()

    def load(self, job: Load, index: int, *, ahead: bool = False) -> bool:
        """LOAD: read the lane's `index`-th batch of this round and cut it into microbatches.

        With `ahead`, only keep it for its LOAD, which comes in the next step and is answered with True.
        """
        read = self._read.pop((job.lane, index), None)
        fields = _fields(self, job, index) if read is None else read
        if ahead:
            self._read[job.lane, index] = fields
            return False
        for name, value in fields.items():
            parts = torch.split(value, list(job.sizes)) if len(job.sizes) > 1 else (value,)
            for micro, part in enumerate(parts):
                self.values.put_field(name, job.lane, micro, part)
        return read is not None

    def forward(self, job: Forward) -> None:
        """FORWARD: run a stage on its inputs; keep the output for the consumers, and a loss for its metrics."""
        _settle(self)  # before a module writes to what metrics are given; nor is that of many microbatches held
        role = self._role(job.stage, job.lane)
        inputs = self.values.inputs(job.stage, job.lane, job.micro)
        key, training = (job.lane, job.micro), self.mode == "train"
        context = Context(key=key, batch=job.size, training=training, wanted=role.wanted, after=role.after)
        try:
            outputs = role.stage.forward(inputs, context)
        except StageError as error:
            error.within(_place(self, job))
            raise with_classes(error, role.edges, self.site.preprocess.agreed) from error.__cause__
        self.ledger.compute("forward", job.stage, role.stage.spent)
        if role.book is not None:
            try:
                check_loss(self, job.stage, outputs[0], f", microbatch {job.micro} of lane {job.lane}")
            except NonFiniteError as error:
                raise _blamed(self, error, job, inputs) from None
            scale = getattr(role.stage, "scale", "")
            role.book.late.append((outputs[0], inputs, job.size, role.reduction, scale, job.lane))
            return
        self.values.put_outputs(job.stage, job.lane, job.micro, outputs)
        if self.mode == "predict" and job.stage in self.graph.outputs:
            for port, output in zip(self.graph.by_name[job.stage].ports, outputs, strict=True):
                if port in self.graph.output_ports[job.stage]:
                    name = f"{job.stage}.{port}" if port else job.stage
                    self.predictions.setdefault((name, job.lane), []).append(output.cpu())

    def backward(self, job: Backward) -> None:
        """BACKWARD: add the consumers' gradients, run the stage backwards, keep its inputs' gradients."""
        role = self._role(job.stage, job.lane)
        gradients: Gradients = job.scale
        if role.book is None:
            self.values.drop_outputs(job.stage, job.lane, job.micro)
            gradients = self.values.added(job.stage, job.lane, job.micro, role.stage.device)
        try:
            found = role.stage.backward(gradients, (job.lane, job.micro))
        except StageError as error:
            error.within(_place(self, job))
            raise
        self.ledger.compute("backward", job.stage, role.stage.spent)
        for edge, value in zip(role.edges, found, strict=True):
            if edge.trained and value is not None:
                self.values.put_gradient(edge.index, job.lane, job.micro, value)

    def parcel(self, job: Send, step: int) -> Parcel:
        """SEND: return the value or gradient of an edge as bytes, defended and encoded; `step` counts in the round.

        Raises:
            ContractError: it is not what the plan says. NonFiniteError: it holds a NaN or an infinity.
        """
        edge = self.graph.edges[job.edge]
        if job.direction == "down":
            value = self.values.take_gradient(job.edge, job.lane, job.micro)
        else:
            value = self.values.get(edge, job.lane, job.micro)
            if self.values.used_here(edge, job.lane):
                value = value.clone()  # an in-place operation of a consumer here must not reach bytes on their way
        return self.packed(job, step, value)

    def packed(self, job: Send, step: int, value: Tensor) -> Parcel:
        """Return a value or gradient as it leaves: checked, defended, encoded. Raises what `parcel` raises."""
        edge = self.graph.edges[job.edge]
        try:
            _check_leaving(self, job, value, edge.spec)
        except NonFiniteError as error:
            raise _blamed(self, error, job, [value]) from None
        if edge.crossing is not None:
            place = f"{self.mode}:{self.round}:{step}:{job.lane}:{job.micro}"
            value = self.coder.leaving(edge, job.direction, value, place)
            _check_leaving(self, job, value, edge.wire(job.direction))
        order = memory_order(value)
        return Parcel(dtype_name(value.dtype), tuple(value.shape), to_payload(value, order), order)

    def deliver(self, job: Recv, parcel: Parcel) -> None:
        """RECV: take in the value or gradient of an edge. Raises `NonFiniteError` if it holds a NaN or an infinity."""
        value = self.opened(job, parcel)
        if job.direction == "down":
            self.values.put_gradient(job.edge, job.lane, job.micro, value)
        else:
            self.values.put(self.graph.edges[job.edge], job.lane, job.micro, value)

    def opened(self, job: Recv, parcel: Parcel) -> Tensor:
        """Return the value or gradient of a parcel: decoded, checked. Raises what `deliver` raises."""
        edge = self.graph.edges[job.edge]
        value = from_payload(parcel.payload, parcel.dtype, parcel.shape, self.parts.device, parcel.order)
        if edge.crossing is not None:
            value = self.coder.coming(edge, job.direction, value, job.size)
        if self.parts.finite:
            check_finite(value, lambda: f"party {self.party}, from {job.source} at {edge.label}")
        return value

    def step(self, job: Step) -> None:
        """STEP: clip, and update parameters."""
        _settle(self)  # what a stage gives may be its parameters
        training, bundles = self.plan.training, self.site.stepping(job.lanes)
        if training.clip_norm is not None and training.clip == "party":
            clip_own([p for bundle in bundles for p in bundle.parameters], training.clip_norm)
        for bundle in bundles:
            bundle.step(self.parts.scheduler_every == "step")

    def end_step(self) -> None:
        """Drop all values of a step: none is needed after it."""
        _settle(self)
        self.trained = self.trained or self.mode == "train"
        self.values.clear()
        for stage in self.site.stages.values():
            stage.forget()

    def end_round(self) -> None:
        """Advance schedulers that count epochs; note the metrics."""
        self.site.preprocess.end(self.mode)
        if self.mode == "train" and self.parts.scheduler_every == "epoch":
            for bundle in self.site.bundles.values():
                bundle.advance()
        for (stage, lane), book in self.site.books.items():
            values = book.values()
            if values:
                row = {"mode": self.mode, "round": self.round, "loss": stage, "lane": lane, "metrics": values}
                own = book.own() if self.graph.lanes > 1 else []  # of one lane alone both are the same
                own = [{"client": self.graph.lane_names[one["lane"]], **one} for one in own]
                self.history.append({**row, "own": own} if own else row)

    def clear(self) -> None:
        """Forget everything of an unfinished step, for a roll-back."""
        self.values.clear()
        self._read.clear()
        self.site.clear()

    def _role(self, stage: str, lane: int) -> _Role:
        role = self._roles.get((stage, lane))
        if role is None:
            place, edges, part = self.site.place(stage, lane), self.graph.inputs_of[stage], self.graph.by_name[stage]
            role = self._roles[stage, lane] = _Role(
                stage=self.site.stages[place],
                edges=tuple(edges),
                wanted=tuple(edge.trained for edge in edges),
                book=self.site.books.get(place),
                reduction=part.reduction if isinstance(part, Loss) else "",
                after=_joined(self, stage, lane) if isinstance(part, Loss) else None,
            )
        return role


def _settle(worker: Worker) -> None:
    """Add losses, and what metrics make of their inputs, to the round's: once others have what they wait for.

    Raises:
        StageError: E308, a metric does not take the inputs.
    """
    for book in worker.site.books.values():
        book.settle()


def _joined(worker: Worker, loss: str, lane: int) -> ModuleStage | None:
    """Return the stage that a loss may be one graph with: one output, which only the loss takes, and at this party."""
    graph, stages, own = worker.graph, worker.site.stages, worker.site.stages[worker.site.place(loss, lane)]
    trained = [edge for edge in graph.inputs_of[loss] if edge.trained]
    if len(trained) != 1 or graph.is_cut(trained[0], lane) or not isinstance(own, ModuleStage):
        return None
    source = trained[0].source.stage
    stage = stages[worker.site.place(source, lane)]
    alone = len(graph.consumers_of[source]) == len(graph.by_name[source].ports) == 1
    alone = alone and not own.tied.earlier  # else the loss has a backward of its own, which adds in another order
    return stage if alone and isinstance(stage, ModuleStage) and stage.device == own.device else None


def _blamed(worker: Worker, error: NonFiniteError, job: Forward | Send, seen: Sequence[Tensor]) -> NonFiniteError:
    modules = [module for stage in worker.site.stages.values() for module in stage.module.modules()]
    mixed = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in modules)
    trained = worker.trained or (worker.mode == "train" and worker.round > 1)
    return blamed(error, worker.values, job.lane, job.micro, seen, trained=trained, mixed=mixed)


def _place(worker: Worker, job: Forward | Backward) -> str:
    lane = f" of {worker.graph.lane_names[job.lane]}" if worker.graph.lanes > 1 else ""
    return f"party {worker.party}, {worker.mode} round {worker.round}, microbatch {job.micro}{lane}"


def check_loss(worker: Worker, loss: str, value: Tensor, place: str) -> None:
    """Raise `NonFiniteError` E351 for a loss that would ruin the weights of this party before anything crosses.

    `place` follows party and round in the message.
    """
    if worker.mode == "train" and worker.parts.finite and not isfinite(value.item()):
        raise NonFiniteError(
            f"the loss {loss!r} is a NaN or an infinity",
            where=f"party {worker.party}, train round {worker.round}{place}",
            expected="a finite number",
            remedy="lower the learning rate; or look for bad samples, and for microbatches with no label that counts "
            "(ignore_index): use fewer of them",
            code="E351",
        )


def _check_leaving(worker: Worker, job: Send, value: Tensor, spec: TensorSpec | None) -> None:
    edge = worker.graph.edges[job.edge]

    def where() -> str:
        return f"party {worker.party}, cut {edge.label}, {worker.mode} round {worker.round}, microbatch {job.micro}"

    wrong = check_spec(value, spec, job.size) if spec else "no spec"
    if wrong:
        raise ContractError(
            "a tensor about to leave is not what the plan says",
            where=where(),
            expected=str(spec),
            got=wrong,
            remedy="correct the spec in the plan, or the data",
            code="E522",
        )
    if worker.parts.finite:
        check_finite(value, where)


def _fields(worker: Worker, job: Load, index: int) -> dict[str, Tensor]:
    source = worker.parts.batches.get(worker.mode)
    where = f"party {worker.party}, {worker.mode} round {worker.round}, batch {index}"
    if source is None:
        raise DataError(
            f"party {worker.party!r} has no data for {worker.mode}",
            where=where,
            remedy=f"give Party({worker.party!r}, ...) a data set for it: data, evaluation or prediction",
            code="E252",
        )
    epoch = worker.round if worker.mode == "train" else 0
    try:
        batch = source.load(lane=job.lane, epoch=epoch, index=index, size=sum(job.sizes))
    except DataError as error:
        error.within(where)
        raise
    except CutlayerError:
        raise
    except Exception as error:
        raise unread(error, where) from error
    taken = {name: batch[name] for name in job.fields if name in batch}  # in a prediction the labels are not
    batch = {**batch, **worker.site.preprocess.prepare(taken, where)}
    return {name: _field(batch, name, sum(job.sizes), where) for name in job.fields}


def _field(batch: Mapping[str, Tensor], name: str, size: int, where: str) -> Tensor:
    value: Any = batch.get(name)
    if isinstance(value, Tensor) and value.ndim and value.shape[0] == size:
        return value
    if isinstance(value, Tensor):
        got, remedy = f"shape {list(value.shape)}", "let the data set give this field one row a sample"
    elif name in batch:
        got = f"a {type(value).__name__}"
        remedy = "let the data set give tensors; or declare texts in the plan's preprocessing, as categories"
    else:
        got = f"fields {', '.join(str(key) for key in batch)}"
        remedy = "let the data set give this field; name tuple items with Party(fields=[...])"
    raise DataError(
        f"the batch has no usable field {name!r}",
        where=where,
        expected=f"a tensor of {size} samples",
        got=got,
        remedy=remedy,
        code="E253",
    )
