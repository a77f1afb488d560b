"""What the examples share: the uncut model's loop, the comparison of bits, and what a run prints at its end."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import Metric

import cutlayer as cl
from cutlayer.core.batching import batch_slice, permutation
from cutlayer.run.results import results_folder, write_results

Fields = Mapping[str, Tensor]  # field -> (samples, ...)


@dataclass(frozen=True)
class Options:
    """How an example is to run. `quick`: a small part of the data and a few steps, in seconds."""

    quick: bool
    runs: Path


def options(about: str | None, words: Sequence[str] | None = None) -> Options:
    """Read the command line (or `words`) of an example, and let torch use one thread, as each party does."""
    parser = argparse.ArgumentParser(description=(about or "").partition("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="a small part of the data, a few steps: shows that it runs"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder for the results (runs)")
    torch.set_num_threads(1)
    return Options(**vars(parser.parse_args(words)))


@dataclass(frozen=True)
class Recipe:
    """How parameters are trained: the same at every party, and for the uncut model. `vars(recipe)` suits `cl.Party`."""

    optimizer: Callable[[list[nn.Parameter]], Optimizer]
    scheduler: Callable[[Optimizer], LRScheduler] | None = None
    scheduler_every: str = "epoch"


def train_uncut(
    model: nn.Module,
    loss_of: Callable[[Fields], Tensor],
    lanes: Mapping[int, Fields],
    training: cl.Training,
    recipe: Recipe,
) -> None:
    """Train a model in plain PyTorch on the plan's batches: in each epoch, one hospital (lane) after another."""
    optimizer = recipe.optimizer(list(model.parameters()))
    scheduler = recipe.scheduler(optimizer) if recipe.scheduler else None
    model.train()
    for epoch in range(1, training.epochs + 1):
        for lane, fields in lanes.items():
            for rows in batches(training, epoch, lane, len(next(iter(fields.values())))):
                optimizer.zero_grad()
                loss_of({name: values[rows] for name, values in fields.items()}).backward()
                optimizer.step()
                if scheduler and recipe.scheduler_every == "step":
                    scheduler.step()
        if scheduler and recipe.scheduler_every == "epoch":
            scheduler.step()
    model.eval()


def batches(training: cl.Training, epoch: int, lane: int, count: int) -> Iterator[Tensor]:
    """The places of the samples of each batch, in the plan's public order."""
    order = torch.tensor(permutation(training.seed, epoch, lane, count))
    for step in range(-(-count // training.batch_size)):
        yield order[batch_slice(step, count, training.batch_size)]


def same_bits(split: Mapping[str, nn.Module], whole: Mapping[str, nn.Module]) -> bool:
    """Whether all weights and buffers of the stages are those of the uncut model's parts, to the last bit."""
    states = [(split[name].state_dict(), whole[name].state_dict()) for name in whole]
    return all(a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in states)


def measured(metrics: Mapping[str, Metric], prediction: Tensor, label: Tensor) -> dict[str, float]:
    """The value of each metric on data held out."""
    return {name: float(metric(prediction, label)) for name, metric in metrics.items()}


def show(title: str, rows: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> dict[str, float]:
    """Print a row of numbers for each model; return them as "name, model"."""
    print(f"{title:<36}" + "".join(f"{name:>12}" for name in names))
    for model, values in rows.items():
        print(
            f"  {model:<34}" + "".join(f"{values[name]:>12.3f}" if name in values else f"{'–':>12}" for name in names)
        )
    return {
        f"{name}, {model}": float(values[name]) for model, values in rows.items() for name in names if name in values
    }


def finish(
    result: cl.Result, name: str, runs: Path, found: Mapping[str, float], then: Callable[[Path], None] | None = None
) -> None:
    """Write weights, summary and the example's numbers into a new folder; print bytes by cut, and where that is.

    `then` writes more into the folder.
    """
    with results_folder(None, runs, name) as folder:
        cuts = write_results(folder, result)["cuts"]
        (folder / "numbers.json").write_text(json.dumps(found, indent=2) + "\n")
        if then:
            then(folder)
    print(f"\nweights of split and uncut equal bit for bit: {bool(found['equal'])}")
    print("\nbytes by cut, all rounds")
    for row in cuts:
        print(f"  {row['from']:>12} -> {row['to']:<12} {row['cut']:<24} {row['direction']:<4} {row['payload']:>14,}")
    if not found["equal"]:
        raise SystemExit(f"the split network differs from the uncut one; results: {folder}")
    print(f"\nresults: {folder}")
