"""Three hospitals and a server train one network that none of them holds whole, on real images.

U-shaped: images and labels stay at the hospitals; so do the first and the last layers. The hospitals take turns and
hand all state on (relay); the server runs the middle. Each party is a process of its own, over mutual TLS.

    python examples/three_hospitals.py           (--quick: one epoch)

prints test accuracy beside that of the uncut network on the same batches (the same weights, bit for bit) and of each
hospital alone, bytes by cut, and where the results are. `build` is what a hospital writes; the rest is comparison.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn, optim
from torchmetrics.classification import MulticlassAccuracy

import cutlayer as cl
from cutlayer.core.batching import batch_slice, permutation
from cutlayer.data.bundled import mnist_5k
from cutlayer.run.config import Contract, dump_contract

HOSPITALS = {"hospital-a": slice(0, 2000), "hospital-b": slice(2000, 3200), "hospital-c": slice(3200, 4000)}
TEST = slice(4000, 5000)
EPOCHS, BATCH, SEED = 3, 32, 11


def head() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 16, 5, padding=2), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2))


def body() -> nn.Module:
    layers = (nn.Conv2d(16, 32, 5, padding=2), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 49, 64), nn.ReLU())


def tail() -> nn.Module:
    return nn.Linear(64, 10)


def adam(parameters: list[nn.Parameter]) -> optim.Optimizer:
    return optim.Adam(parameters, lr=1e-3)


def network() -> tuple[nn.Module, nn.Module, nn.Module]:
    torch.manual_seed(SEED)
    return head(), body(), tail()


@cache
def images() -> tuple[Tensor, Tensor]:
    x, y = mnist_5k()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order], y[order]


def plan(epochs: int) -> cl.Plan:
    return cl.u_shaped(
        list(HOSPITALS), "server",
        cut="float32[batch, 16, 14, 14]", back="float32[batch, 64]", output="float32[batch, 10]",
        epochs=epochs, batch_size=BATCH, seed=SEED,
    )  # fmt: skip


def build(name: str) -> cl.Party:
    """What each party brings: called in its own process, never sent anywhere."""
    first, middle, last = network()
    if name == "server":
        return cl.Party("server", modules={"body": middle}, optimizer=adam)
    x, y = images()
    rows = HOSPITALS[name]
    return cl.Party(
        name,
        modules={"head": first, "tail": last, "loss": nn.CrossEntropyLoss()},
        data=cl.TensorTable(x=x[rows], y=y[rows]),
        evaluation=cl.TensorTable(x=x[TEST], y=y[TEST]),
        optimizer=adam,
        metrics={"loss": lambda: {"accuracy": MulticlassAccuracy(10, average="micro")}},
    )


def uncut(rows: dict[int, slice], epochs: int) -> nn.Module:
    """The whole network in plain PyTorch: lanes (hospitals) one after another, the same batches."""
    whole = nn.Sequential(*network())
    optimizer, loss = adam(list(whole.parameters())), nn.CrossEntropyLoss()
    x, y = images()
    for epoch in range(1, epochs + 1):
        for lane, part in rows.items():
            own_x, own_y = x[part], y[part]
            order = torch.tensor(permutation(SEED, epoch, lane, len(own_x)))
            for step in range(-(-len(own_x) // BATCH)):
                chosen = order[batch_slice(step, len(own_x), BATCH)]
                optimizer.zero_grad()
                loss(whole.train()(own_x[chosen]), own_y[chosen]).backward()
                optimizer.step()
    return whole.eval()


def accuracy(model: nn.Module) -> float:
    x, y = images()
    with torch.no_grad():
        return float((model(x[TEST]).argmax(1) == y[TEST]).float().mean())


def run_parties(folder: Path, epochs: int, runs: Path) -> Path:
    """Write contract and party files, and let `cutlayer run --processes` start everybody."""
    contract = Contract(plan=plan(epochs), coordinator="server", addresses={"server": "127.0.0.1:7443"})
    (folder / "contract.toml").write_text(dump_contract(contract))
    files = []
    for name in contract.plan.parties:
        file = folder / f"{name}.toml"
        file.write_text(f'party = "{name}"\n[code]\nbuilder = "{Path(__file__).resolve().as_posix()}:build"\n')
        files.append(str(file))
    command = [sys.executable, "-m", "cutlayer", "run", "--processes", str(folder / "contract.toml"), *files]
    command += ["--folder", str(runs / f"{datetime.now(UTC):%Y%m%d-%H%M%S}-three-hospitals")]
    shown = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout  # noqa: S603 - cutlayer itself
    print(shown, end="")
    return Path(shown.strip().splitlines()[-1].removeprefix("results: ")).parent  # of the report


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one epoch: shows that it runs")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder for the results (runs)")
    chosen = parser.parse_args(words)
    epochs = 1 if chosen.quick else EPOCHS
    torch.set_num_threads(1)
    print(plan(epochs), "\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        results = run_parties(Path(folder), epochs, chosen.runs)
    summary = json.loads((results / "summary.json").read_text())
    whole = uncut(dict(enumerate(HOSPITALS.values())), epochs)
    split = assembled(results)
    same = all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), split.values(), strict=True))
    alone = {name: accuracy(uncut({lane: rows}, epochs)) for lane, (name, rows) in enumerate(HOSPITALS.items())}
    print("\ntest accuracy on 1,000 images")
    print(f"  split, three hospitals and a server  {summary['metrics']['evaluate']['loss']['accuracy']:.3f}")
    print(f"  uncut network, same batches          {accuracy(whole):.3f}")
    for name, value in alone.items():
        print(f"  {name + ' alone':<37}{value:.3f}")
    print(f"\nweights of split and uncut equal bit for bit: {same}")
    print("\nbytes by cut")
    for row in summary["cuts"]:
        print(f"  {row['from']:>10} -> {row['to']:<10} {row['cut']:<10} {row['direction']:<4} {row['payload']:>12,}")
    if not same:
        raise SystemExit(f"the split network differs from the uncut one; results: {results}")
    print(f"\nresults: {results}")


def assembled(results: Path) -> dict[str, Tensor]:
    """Put the stages' weights together in the uncut network's order."""
    hospital = safetensors.torch.load_file(results / "hospital-a.safetensors")
    server = safetensors.torch.load_file(results / "server.safetensors")
    found: dict[str, Tensor] = {}
    for place, (stage, weights) in enumerate((("head", hospital), ("body", server), ("tail", hospital))):
        for name in network()[place].state_dict():
            found[f"{place}.{name}"] = weights[f"{stage}.{name}"]
    return found


if __name__ == "__main__":
    main()
