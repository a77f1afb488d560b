"""The examples on real data run, give the uncut network's weights, and say where their results are."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from tests.data.sets import need
from tests.scripts import importing

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
EQUAL = "weights of split and uncut equal bit for bit: True"
# example -> the data set that it needs, what the split reaches, and what it must beat: with the least margin
SHOWN = {
    "thyroid_vertical": ("thyroid", "auroc, split, clinic and laboratory", "auroc, laboratory alone", 0.005),
    "clothing_reviews": ("clothing_reviews", "auroc, split, text and table", "auroc, table alone", 0.002),
    "fashion_resnet": (
        "fashion_mnist", "accuracy, split, three shops and a server", "accuracy, shop 1 alone, 8,000 pictures", 0.003
    ),
    "mri_segmentation": ("brain_slices", "grey, split, two hospitals and a server", "grey, two thresholds", 0.05),
    "shakespeare_gpt": (
        "shakespeare", "loss, library alone, its own layers", "loss, split, library and server", 0.05
    ),  # a loss: the lower the better
}  # fmt: skip


@pytest.fixture
def example() -> Iterator[Callable[[str], ModuleType]]:
    with importing(EXAMPLES) as load:
        yield load


def results_of(shown: str) -> Path:
    """The folder that the last line names."""
    return Path(shown.strip().splitlines()[-1].removeprefix("results: "))


def metrics_of(shown: str, model: str) -> list[str]:
    return re.search(rf"(?m)^  {model}[^.]*?((?: +[\d.–]+)+)$", shown)[1].split()


@pytest.mark.parametrize("name", SHOWN)
def test_a_quick_run_gives_the_uncut_networks_bits(name, example, tmp_path, capsys):
    need(SHOWN[name][0])
    found = example(name).main(["--quick", "--runs", str(tmp_path)])
    shown = capsys.readouterr().out
    assert EQUAL in shown
    assert metrics_of(shown, "split") == metrics_of(shown, "uncut")
    folder = results_of(shown)
    assert folder.parent == tmp_path
    assert json.loads((folder / "numbers.json").read_text()) == found
    cuts = json.loads((folder / "summary.json").read_text())["cuts"]
    assert all(f"{row['payload']:,}" in shown for row in cuts)
    assert len(cuts) >= 4


def test_three_hospitals_in_processes_of_their_own(tmp_path):
    need("mnist_5k")
    words = [sys.executable, str(EXAMPLES / "three_hospitals.py"), "--quick", "--runs", str(tmp_path)]
    shown = subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True, timeout=110).stdout
    assert EQUAL in shown
    assert metrics_of(shown, "split") == metrics_of(shown, "uncut")
    assert json.loads((results_of(shown) / "summary.json").read_text())["cuts"]


def test_one_bit_too_many_is_seen(example, tmp_path):
    common = example("common")
    whole, split = (nn.ModuleDict({"head": nn.BatchNorm1d(3)}) for _ in range(2))
    assert common.same_bits(split, whole)
    with torch.no_grad():
        split["head"].running_mean[1] = torch.nextafter(torch.zeros(()), torch.ones(()))
    assert not common.same_bits(split, whole)


def test_a_run_that_differs_ends_with_an_error(example, tmp_path, monkeypatch):
    need("thyroid")
    module = example("thyroid_vertical")
    monkeypatch.setattr(module, "same_bits", lambda split, whole: False)
    with pytest.raises(SystemExit, match="the split network differs from the uncut one"):
        module.main(["--quick", "--runs", str(tmp_path)])


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", SHOWN)
def test_a_full_run_shows_what_it_says(name, tmp_path):
    data, better, worse, margin = SHOWN[name]
    need(data)
    words = [sys.executable, str(EXAMPLES / f"{name}.py"), "--runs", str(tmp_path)]
    shown = subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True, timeout=390).stdout
    assert EQUAL in shown
    numbers = json.loads((results_of(shown) / "numbers.json").read_text())
    assert numbers[better] > numbers[worse] + margin
