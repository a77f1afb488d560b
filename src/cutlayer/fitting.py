"""Five lines: a user's model, cut, and trained across data holders in one process, by the same programs as anywhere.

```python
split = cl.split(model, at="layer2", example=images, labels="client")
run = cl.fit(split, [loader_a, loader_b, loader_c], loss=nn.CrossEntropyLoss(), epochs=3)
print(run.summary())
run.report("report.html")
run.save("joined.safetensors")
```
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate

from cutlayer.core.parts import Training
from cutlayer.core.spec import TensorSpec
from cutlayer.data.collating import collated
from cutlayer.data.sources import again, sample_count
from cutlayer.engine.tensors import dtype_name
from cutlayer.errors import ConfigError, DataError
from cutlayer.run.checkpoint import write_atomic
from cutlayer.run.export import assemble
from cutlayer.run.outcome import Result
from cutlayer.run.party import Party
from cutlayer.run.prediction import predict
from cutlayer.run.results import write_results
from cutlayer.run.simulate import simulate

if TYPE_CHECKING:
    from cutlayer.models.split import Split

__all__ = ["Run", "adam", "fit"]

Data = Dataset[Any] | DataLoader[Any]


def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Return Adam with its usual settings: what `fit` trains with unless told otherwise."""
    return torch.optim.Adam(parameters)


@dataclass(frozen=True)
class Run:
    """What `fit` gives.

    Attributes:
        split: The model and its pieces.
        result: Metrics, ledgers and trained stages; see `Result`.
        parties: The server, then each data holder.
        label: What the label is called in the plan.
    """

    split: Split
    result: Result
    parties: tuple[Party, ...]
    label: str

    def summary(self) -> str:
        """Return the end of the run in a few lines."""
        return self.result.summary()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the trained weights of the uncut model, for its `load_state_dict(strict=True)`.

        They are those of the split's modules now, which a further `fit` of the split trains on.
        """
        return assemble(self.result)

    def predict(self, data: Data, *, batch_size: int = 64) -> Tensor:
        """Return the model's outputs for new samples, computed by the server and the first data holder.

        In evaluation mode; the modules have their own modes again afterwards. Runs of one split train the same modules:
        after a further `fit` of it, this predicts with the newer weights. Split a copy of the model to keep both.

        Args:
            data: A data set or a loader, as for `fit`; a label may be left out, and is not used. All samples of the
                data set are predicted, in its order; a loader's sampler is left out.
            batch_size: Samples in a batch, unless a loader says.

        Returns:
            Shape (samples, ...); the bits of the uncut model in evaluation mode, for the same batches.

        Raises:
            ConfigError: E236, this is no data set.
            DataError: E253, it has no samples, or does not give the model's inputs; E255, it has no length; E260, the
                outputs have several lengths.
        """
        server, client = self.parties[:2]
        (held,) = _listed([data])
        names = [*self.split.cut.inputs, self.label][: _parts(held, self.split)]
        if isinstance(held, DataLoader):
            batch_size = held.batch_size or batch_size
            held = again(held, batch_size=batch_size)
        plan = self.split.plan(client.name, label=self.label, training=Training(batch_size=batch_size))
        parties = [server, replace(client, prediction=held, fields=names)]
        (found,) = predict(plan, parties).values()
        return found

    def save(self, path: str | Path) -> None:
        """Write the trained weights of the uncut model as safetensors. A missing folder is made."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(Path(path), safetensors.torch.save(self.state_dict()))

    def report(self, path: str | Path = "report.html") -> Path:
        """Write the report, one file that loads nothing; return its path. A missing folder is made."""
        from cutlayer.report.write import write_report

        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            write_results(Path(folder), self.result)
            shutil.copyfile(write_report(folder, png=False).page, path)
        return Path(path)


def fit(
    split: Split,
    data: Data | Sequence[Data],
    *,
    loss: nn.Module | Callable[..., Tensor],
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] = adam,
    evaluation: Data | Sequence[Data] | None = None,
    party: Mapping[str, Any] | None = None,
    **training: Any,  # noqa: ANN401 - fields of Training, and label
) -> Run:
    """Train a split model with all parties in this process.

    The model is trained in place: afterwards it holds the weights of the first data holder and of the server.

    Args:
        split: What `cutlayer.split` gave.
        data: A loader or map-style data set, or one for each data holder. Items are tuples (inputs in the order of the
            model's forward, then the label), or dictionaries of the model's arguments and the label. `Run.label` says
            which field was taken for the label.
        loss: Called with (prediction, label); gives a scalar.
        optimizer: Makes each party's optimizer from its parameters.
        evaluation: The same as `data`, for evaluation. A loader's batch size may be another: all its samples are
            evaluated, in batches of the training's size, and metrics are those of the samples, whatever the batches.
        party: More arguments of every `Party`: metrics, scheduler, device... `autocast` is that of the split.
        training: Fields of `Training`: epochs, microbatches... `batch_size` and `drop_last` are those of the loaders,
            and `metrics_least` is 1, for all samples are in this process; unless given. `seed` makes a run the same to
            the bit: it orders samples, and is every party's own seed too, which `torch.manual_seed` is not; who knows
            it can draw a defence's noise again. A loader with a `generator` keeps its order. And `label`: its name in
            dictionaries, if not "label" or the one field that is no input.

    Raises:
        ConfigError: E235, the label is called as an argument of the model is; E236, a model that is not cut, an
            argument that neither `Training` nor `Party` has, or loaders that do not fit.
        DataError: E253, the data does not give the model's inputs and a label; E255, it has no length.
        StageError, NonFiniteError: a module failed, or a value is not finite.
    """
    _check_cut(split)
    held = _listed(data)
    names = ["client"] if len(held) == 1 else [f"client-{place + 1}" for place in range(len(held))]
    tried = _listed(evaluation) if evaluation is not None else [None] * len(held)
    if len(tried) != len(held):
        raise _odd("as many data sets for evaluation as for training", f"{len(tried)} and {len(held)}")
    if party is not None and not isinstance(party, Mapping):
        raise _odd("party={...}: names of Party's arguments -> their values", _kind(party), "give a dictionary")
    told = training.pop("label", "")
    _check_names(training, dict(party or {}))
    label, sample = _sample(next(one for one in held if sample_count(one)), split, told)
    chosen = Training(**{"metrics_least": 1, **_of_loaders(held, training), **training})
    spec = _label_spec(sample, split)
    plan = split.plan(names[0] if len(names) == 1 else names, label=label, label_spec=spec, training=chosen)
    given: dict[str, Any] = {"optimizer": optimizer, "fields": [*split.cut.inputs, label], "autocast": split.autocast}
    given = {**given, "seed": training.get("seed"), **(party or {})}
    server = {**given, "metrics": {}} if split.labels == "client" else given
    client = given if split.labels == "client" else {**given, "metrics": {}}
    parties = [Party("server", modules=_modules(split, "server", loss, copied=False), **server)]
    for place, (name, mine, other) in enumerate(zip(names, held, tried, strict=True)):
        modules = _modules(split, "client", loss, copied=place > 0)
        trained, tested = _batched(mine, chosen, drop_last=chosen.drop_last), _batched(other, chosen, drop_last=False)
        parties.append(Party(name, modules=modules, data=trained, evaluation=tested, **client))
    return Run(split, simulate(plan, parties), tuple(parties), label)


def _check_cut(split: object) -> None:
    from cutlayer.models.split import Split

    if not isinstance(split, Split):
        raise ConfigError(
            "fit trains a model that is cut, and this is none",
            where="fit, its first argument",
            expected="what cl.split gives",
            got=type(split).__name__,
            remedy="cut it first: cl.fit(cl.split(model, at=..., example=...), data, loss=...)",
            code="E236",
        )


def _modules(
    split: Split, place: str, loss: nn.Module | Callable[..., Tensor], *, copied: bool
) -> dict[str, nn.Module | Callable[..., Tensor]]:
    found: dict[str, nn.Module | Callable[..., Tensor]] = dict(split.modules(place, copied=copied))
    return {**found, "loss": loss} if split.labels == place else found


def _listed(data: Data | Sequence[Data]) -> list[Data]:
    """Return one data set for each holder. Raises `ConfigError` E236 and `DataError` E253, E255 for what is none."""
    held: list[Any] = list(data) if isinstance(data, list | tuple) else [data]
    if any(isinstance(one, tuple | Mapping | Tensor) for one in held):
        wrong = f"a list of {_kind(held[0])}"
        raise _odd("a data set, or a list of data sets: one for each data holder", wrong, "make it a data set first")
    if not held:
        raise _odd("a data set, or one for each data holder", "an empty list", "give at least one")
    given = [one for one in held if one is not None]
    for one in given:
        if isinstance(one, DataLoader) and one.batch_size is None:
            raise _odd(
                "loaders with a batch_size",
                "one that has its own batches, or none",
                "give batch_size, and a sampler if any",
            )
    if not sum(sample_count(one) for one in given):
        raise DataError(
            "the data has no samples",
            where="data",
            expected="a sample or more",
            got="0",
            remedy="look at what the data set was made from",
            code="E253",
        )
    return held


def _of_loaders(held: Sequence[Data], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the batch size and drop_last of the loaders, which must be alike unless they are given."""
    loaders = [one for one in held if isinstance(one, DataLoader)]
    names = [name for name in ("batch_size", "drop_last") if loaders and name not in given]
    found = {tuple(getattr(one, name) for name in names) for one in loaders}
    if len(found) > 1:
        values = "; ".join(str(list(one)) for one in sorted(found))
        raise _odd(f"loaders with one {' and '.join(names)}", values, f"make them alike, or fit(..., {names[0]}=...)")
    return dict(zip(names, found.pop(), strict=True)) if found else {}


def _batched(data: Any, training: Training, *, drop_last: bool) -> Any:  # noqa: ANN401 - a data set, or None
    """Return the data; a loader of other batches as one of the training's, with its sampler."""
    if not isinstance(data, DataLoader) or (data.batch_size, data.drop_last) == (training.batch_size, drop_last):
        return data
    if type(data).__iter__ is not DataLoader.__iter__:
        return data  # one that makes its batches in its own way: it is refused if they are others (E256)
    return again(
        data, batch_size=training.batch_size, sampler=data.sampler, drop_last=drop_last, generator=data.generator
    )


def _sample(data: Data, split: Split, told: str) -> tuple[str, Tensor]:
    """Return the name of the label and the labels of two samples, after a look at what the data gives.

    Args:
        data: A data set or loader.
        split: Names the inputs.
        told: The label's name, if the user gave it. Else it is the one field of a dictionary that is no input of the
            model; of a tuple, "label", or a free name.

    Raises:
        DataError: E253, inputs or label are missing, or what was taken for the label cannot be one.
    """
    name = told or "label"
    batch = _first(data, () if name in split.cut.inputs else (*split.cut.inputs, name))
    others = [str(one) for one in batch if one not in split.cut.inputs] if isinstance(batch, Mapping) else []
    alone = len(others) == 1 and not told
    if alone:
        (name,) = others
    while not told and name in split.cut.inputs:
        name = "target" if name == "label" else f"{name}_"
    wanted = [*split.cut.inputs, name]
    if isinstance(batch, Mapping):
        label, fits = batch.get(name), all(one in batch for one in wanted)
        got = f"fields {', '.join(map(str, batch))}"
    else:
        values = list(batch) if isinstance(batch, tuple | list) else [batch]
        label, fits, got = values[-1], len(values) == len(wanted), f"{len(values)} values"
    if not fits:
        raise DataError(
            "the data does not give the model's inputs and a label",
            where="the first items of the data",
            expected=f"a tuple ({', '.join(wanted)}), or a dictionary of these",
            got=got,
            remedy="let the data set give these, named as in the model's forward; fit(label=...) names the label",
            code="E253",
        )
    if not isinstance(label, Tensor) or label.shape[:1] != (2,):
        taken = f"{name!r}, the one field that is no input of the model" if alone else f"{name!r}"
        kind = (
            _kind(label) if not isinstance(label, Tensor) else f"a tensor of shape {tuple(label.shape)} for 2 samples"
        )
        raise DataError(
            f"what was taken for the label cannot be one: {taken}",
            where="the first items of the data",
            expected="a number or tensor for each sample",
            got=kind,
            remedy="give labels as numbers or tensors; fit(label=...) names the label of a dictionary",
            code="E253",
        )
    return name, label


def _first(data: Data, taken: Sequence[str]) -> Any:  # noqa: ANN401 - whatever the data gives
    """Return a batch of the first two samples, or of the only one twice; `taken`: see `collated`."""
    dataset: Any = data.dataset if isinstance(data, DataLoader) else data
    collate = data.collate_fn if isinstance(data, DataLoader) else default_collate
    samples = [dataset[0], dataset[min(1, len(dataset) - 1)]]
    try:  # torch's own says nothing of what to do
        return collated(samples, taken=taken) if collate is default_collate else collate(samples)
    except DataError as error:
        error.within("the first items of the data")
        raise


def _parts(data: Data, split: Split) -> int:
    """Return how many parts a sample has: the model's inputs, or these and a label. Raises `DataError` E253."""
    inputs = split.cut.inputs
    batch = _first(data, inputs)
    if isinstance(batch, Mapping):
        number, got = len(inputs), f"fields {', '.join(map(str, batch))}"
        fits = all(name in batch for name in inputs)
    else:
        number = len(batch) if isinstance(batch, tuple | list) else 1
        fits, got = number in (len(inputs), len(inputs) + 1), f"{number} values"
    if not fits:
        raise DataError(
            "the data does not give the model's inputs",
            where="the first items of the data",
            expected=f"a tuple ({', '.join(inputs)}), with a label or without, or a dictionary of these",
            got=got,
            remedy="let the data set give these; the names are those of the model's forward",
            code="E253",
        )
    return number


def _label_spec(label: Tensor, split: Split) -> TensorSpec:
    """Return the spec of the labels; those of shape (batch, length, ...) are as long as the inputs that are padded."""
    shape: tuple[int | str, ...] = ("batch", *label.shape[1:])
    if split.longest and label.dim() > 1:
        shape = ("batch", f"time<={next(iter(split.longest.values()))}", *label.shape[2:])
    return TensorSpec(dtype_name(label.dtype), shape)


def _check_names(training: Mapping[str, Any], party: Mapping[str, Any]) -> None:
    known = {field.name for field in fields(Training)}
    own = {field.name for field in fields(Party)} - {"name", "modules", "data", "evaluation", "optimizer", "_"}
    for given, allowed, what in ((training, known, "fit"), (party, own, "party")):
        stray = sorted(given.keys() - allowed)
        if stray:
            hint = "give it in party={...}" if stray[0] in own else "correct its name"
            raise ConfigError(
                f"{what} has no setting {stray[0]!r}",
                where=f"fit(..., {stray[0]}=...)" if what == "fit" else f"fit(party={{{stray[0]!r}: ...}})",
                expected=f"one of {', '.join(sorted(allowed | ({'label'} if what == 'fit' else set())))}",
                got=", ".join(stray),
                remedy=hint,
                code="E236",
            )


def _odd(expected: str, got: str, remedy: str = "make them alike") -> ConfigError:
    return ConfigError(
        "these data cannot be used so",
        where="fit, its data sets",
        expected=expected,
        got=got,
        remedy=remedy,
        code="E236",
    )


def _kind(value: object) -> str:
    kind = type(value).__name__
    return f"{kind} of {type(value[0]).__name__}" if isinstance(value, list | tuple) and value else kind
