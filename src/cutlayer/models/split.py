"""A user's model, cut and placed: which pieces run at the data holders, which at the server.

| code | error | meaning |
| --- | --- | --- |
| E330 | PlanError | the number of cut points does not fit where the labels are |
| E331 | PlanError | a piece at another party needs a raw input, and no release allows it |
| E333 | PlanError | weights were frozen when the model was cut, and are to be trained now |
| E335 | PlanError | an attribute of a module that is cut apart has changed since |
| E326 | StageError | there is no example |
| E235 | ConfigError | the labels are neither at the client nor at the server, or called as an input is |
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypedDict, Unpack

from torch import nn

from cutlayer.core.parts import STATE_LIMIT, Loss, Release, Stage
from cutlayer.core.plan import Plan, settings
from cutlayer.core.spec import TensorSpec
from cutlayer.engine.copies import copy_of
from cutlayer.engine.tensors import torch_dtype
from cutlayer.errors import ConfigError, PlanError, StageError
from cutlayer.models.attributes import as_before
from cutlayer.models.cut import Cut, cut, refuse_compiled
from cutlayer.models.example import Arguments, Example, arguments_of
from cutlayer.models.kept import Kept
from cutlayer.models.names import Point, points_of
from cutlayer.models.output import Key
from cutlayer.models.shared import check_ties, check_trained
from cutlayer.models.specs import Ports, input_specs, port_specs
from cutlayer.models.tail import check_tail, with_tail

__all__ = ["Split", "split"]

CLIENT, SERVER = "client", "server"
_NAMES = {2: ("head", "body"), 3: ("head", "body", "tail")}


@dataclass(frozen=True, eq=False)
class Split:
    """A model cut into stages, each at the client (a data holder) or at the server.

    Attributes:
        model: The user's model; the pieces use its own parameters.
        cut: Its pieces.
        names: Stage name of each piece.
        places: "client" or "server", of each piece.
        ports: What each piece gives.
        inputs: Name of a model input -> its spec; the data has fields of these names.
        labels: Where the labels and the loss are: "client" or "server".
        release: Model inputs that may leave the client, for pieces at the server.
        longest: Model input of shape (batch, length, ...) -> most that its length may be.
        autocast: "bfloat16" or "float16", if the parties are to run under it; else empty.
        kept: Attributes of the modules that are cut apart, as they were. `plan` and `modules` refuse others (E335).
    """

    model: nn.Module
    cut: Cut
    names: tuple[str, ...]
    places: tuple[str, ...]
    ports: tuple[Ports, ...]
    inputs: dict[str, TensorSpec]
    labels: str
    release: tuple[str, ...] = ()
    longest: Mapping[str, int] = field(default_factory=dict)
    autocast: str = ""
    kept: Kept | None = None

    def plan(
        self,
        clients: str | Sequence[str] = CLIENT,
        server: str = SERVER,
        *,
        label: str = "label",
        label_spec: TensorSpec | str = "int64[batch]",
        name: str = "split",
        **training: object,
    ) -> Plan:
        """Return the plan of this split.

        Args:
            clients: The data holder, or several: a replica of the client's stages at each.
            server: The other party.
            label: The data's field with the labels.
            label_spec: Its spec; with labels="server" the label is released to the server.
            name: The plan's name.
            **training: How it is trained, as for `cl.u_shaped`: `epochs=3, batch_size=8`, or `training=Training(...)`;
                and `preprocessing`.

        Raises:
            ConfigError: E235, the label is called as an input of the model is.
            PlanError: E333, weights were frozen when the model was cut, and need a gradient now;
                E335, an attribute, a submodule or a weight of a module that is cut apart was changed since then.
        """
        self._check_kept()
        if label in self.cut.inputs:
            raise ConfigError(
                f"the label and an input of the model are both called {label!r}",
                where=f"forward of {type(self.model).__name__}",
                expected=f"another name than {', '.join(self.cut.inputs)}",
                got=repr(label),
                remedy="give the label a name of its own: label='target' in fit or plan",
                code="E235",
            )
        at = {CLIENT: clients if isinstance(clients, str) else tuple(clients), SERVER: server}
        stages: list[Stage | Loss] = [self._stage(index, at[place]) for index, place in enumerate(self.places)]
        away = self.labels == SERVER
        field = f"data.{label}@{self.names[0]}" if away else f"data.{label}"
        stages.append(Loss("loss", at=at[self.labels], inputs=[self.names[-1], field]))
        releases = [Release(label, at=self.names[0], to=server, spec=label_spec)] if away else []
        sent = {text for i, p in enumerate(self.places) if p == SERVER for text in self.cut.pieces[i].inputs}
        releases += [
            Release(field, at=self.names[0], to=server, spec=self.inputs[field])
            for field in self.release
            if f"data.{field}" in sent
        ]
        return Plan(stages, **settings(training), releases=releases, name=name)

    def modules(self, place: str, *, copied: bool = False) -> dict[str, nn.Module]:
        """Return stage -> module for "client" or "server". `copied`: with parameters of their own, ties kept.

        Raises:
            PlanError: E335, as `plan`.
        """
        self._check_kept()
        memo: dict[int, object] = {}
        found = {
            n: piece.module for n, p, piece in zip(self.names, self.places, self.cut.pieces, strict=True) if p == place
        }
        return {n: copy_of(module, memo) for n, module in found.items()} if copied else found

    def _check_kept(self) -> None:
        if self.kept is not None:
            self.kept.check()

    def _stage(self, index: int, at: str | tuple[str, ...]) -> Stage:
        piece, ports = self.cut.pieces[index], self.ports[index]
        ports.check_still(piece, self.names[index])
        single = len(ports.specs) == 1
        detached = [""] if single and ports.detached else list(ports.detached)
        frozen = not (ports.trained and any(parameter.requires_grad for parameter in piece.module.parameters()))
        return Stage(
            self.names[index],
            at=at,
            inputs=[self._input(text, self.places[index]) for text in piece.inputs],
            output=next(iter(ports.specs.values())) if single else dict(ports.specs),
            detached=[] if frozen and single and not index else detached,
            frozen=frozen,
            state_limit=max(STATE_LIMIT, _state_bound(piece.module)),
        )

    def _input(self, text: str, place: str) -> str:
        owner, _, port = text.partition(".")
        if owner == "data":
            return text if place == CLIENT else f"{text}@{self.names[0]}"
        name = self.names[int(owner)]
        return f"{name}.{port}" if len(self.ports[int(owner)].specs) > 1 else name


class Options(TypedDict, total=False):
    """Further arguments of `split`, by name.

    Attributes:
        output: Field or index of what the model returns, if that is not one tensor: "pred", 0. The loss gets this one;
            `logits` is taken by itself.
        autocast: "bfloat16" or "float16", if the parties are to run under it: `cutlayer.fit` lets them; by hand it is
            `Party(autocast=...)`.
        longest: Inputs of shape (batch, length, ...) that are padded to another length in each batch -> most that it
            may be, such as {"words": 512, "padding": 512}. Else all lengths are those of the example.
    """

    output: Key
    autocast: str
    longest: Mapping[str, int] | None


def split(
    model: nn.Module,
    at: Point | Sequence[Point],
    *,
    example: Example,
    labels: str = CLIENT,
    release: Iterable[str] = (),
    **options: Unpack[Options],
) -> Split:
    """Cut a model and place its pieces in turn at the client and at the server, beginning with the client.

    Args:
        model: The model. Its `forward` names the data's fields. It is trained in place where its pieces run here. A
            stage that no gradient comes back to (`torch.no_grad()`, `detach()`) is frozen: it runs in train mode, and
            its parameters need no gradient from then on. Attributes of modules that are cut apart (numbers, texts,
            submodules) are read once, now: who changes one later splits again, or is refused by `plan` (E335).
        at: One cut point or several, by name, index or the submodule itself; see `cutlayer.models.cut`. With
            labels="client" and one cut point, the tail begins before the last layer with weights that outputs pass.
        example: Inputs as a loader gives them, without labels: a tensor, a tuple, or a dict; see `cutlayer.models.cut`.
        labels: "client": a U-shape, loss and labels stay with the data. "server": the labels are released to it.
        release: Inputs that pieces at the server need, and that may leave the client.
        **options: `output`, `autocast` and `longest`; see `Options`.

    Raises:
        StageError: E31x, the model cannot be cut there; the text names the operation and what to do.
        PlanError: E330 to E332 and E334, the pieces cannot be placed so.
    """
    output, autocast, longest = _read(**options)
    _check_asked(model, example, labels)
    points = points_of(model, at)
    chosen = labels == CLIENT and len(points) == 1
    if not chosen and len(points) % 2 == (labels == CLIENT):
        raise PlanError(
            f"{len(points)} cut points with the labels at the {labels}",
            where=f"at={tuple(points)!r}",
            expected="an even number with labels='client' (the last piece is there), an odd one with labels='server'",
            remedy="add or leave out a cut point",
            code="E330",
        )
    make, arguments = partial(cut, model, example=example, output=output), arguments_of(model, example)
    made = with_tail(model, points[0], make, arguments) if chosen else make(points)
    places = tuple((CLIENT, SERVER)[index % 2] for index in range(len(made.pieces)))
    _check_inputs(made, places, tuple(release))
    check_ties(made, places, labels)
    if labels == CLIENT and not chosen:
        check_tail(model, made, places, arguments)
    return Split(
        model=model,
        cut=made,
        names=_NAMES.get(len(places)) or tuple(f"part-{index}" for index in range(len(places))),
        places=places,
        ports=_ports(model, made, arguments, autocast, longest),
        inputs=input_specs(arguments, longest),
        labels=labels,
        release=tuple(release),
        longest=dict(longest or {}),
        autocast=autocast,
        kept=Kept(model, [piece.module for piece in made.pieces], made.moved),
    )


def _read(
    output: Key = None, autocast: str = "", longest: Mapping[str, int] | None = None
) -> tuple[Key, str, Mapping[str, int] | None]:
    """Return the options in order, each with its default."""
    return output, autocast, longest


def _state_bound(module: nn.Module) -> int:
    """Return the most bytes that a piece's state is expected to have when it is handed on.

    For each parameter its value and three tensors of the optimizer (Adam with amsgrad), each in float32 or wider; the
    buffers; names and step counters of each parameter; the generator and the optimizer's numbers.
    """
    parameters = list(module.parameters())
    tensors = sum(4 * one.numel() * max(4, one.element_size()) for one in parameters)
    buffers = sum(one.numel() * one.element_size() for one in module.buffers())
    return tensors + buffers + 1024 * len(parameters) + 2**20


def _check_asked(model: nn.Module, example: Example | None, labels: str) -> None:
    if labels not in (CLIENT, SERVER):
        raise ConfigError(
            "unknown place of the labels",
            where="labels=...",
            expected=f"{CLIENT} or {SERVER}",
            got=str(labels),
            remedy="choose one of the two",
            code="E235",
        )
    if example is None:
        raise StageError(
            "an example of the inputs is needed",
            where=f"example of {type(model).__name__}",
            expected="inputs as a loader gives them, without labels: a tensor, a tuple, or a dict by argument name",
            got="None",
            remedy="pass example=, such as the inputs of a first batch: they give the shapes of what crosses",
            code="E326",
        )
    refuse_compiled(model)


def _check_inputs(made: Cut, places: Sequence[str], release: Sequence[str]) -> None:
    stray = [name for name in release if name not in made.inputs]
    if stray:
        raise PlanError(
            f"the model has no input {stray[0]!r} to release",
            where=f"release={list(release)!r}",
            expected=f"one of {', '.join(made.inputs)}",
            remedy="name an argument of its forward",
            code="E331",
        )
    for index, piece in enumerate(made.pieces):
        raw = [text.removeprefix("data.") for text in piece.inputs if text.startswith("data.")]
        needed = [name for name in raw if name not in release]
        if places[index] == SERVER and needed:
            raise PlanError(
                f"the piece after {made.points[index - 1]!r} runs at the server and needs the raw input {needed[0]!r}",
                where=f"piece {index} ({places[index]})",
                expected="pieces at the server that need only what other pieces give",
                remedy=f"cut after its last use, or allow it to leave: release=[{needed[0]!r}]",
                code="E331",
            )


def _ports(
    model: nn.Module, made: Cut, arguments: Arguments, autocast: str, longest: Mapping[str, int] | None
) -> tuple[Ports, ...]:
    with as_before(model):
        ports = port_specs(made, arguments, autocast=torch_dtype(autocast) if autocast else None, longest=longest)
    check_trained(made, ports)
    return ports
