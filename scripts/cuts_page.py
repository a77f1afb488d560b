"""Write docs/reference/cuts.md: after which submodules of known models one can cut, and where not: minutes, on a CPU.

    python scripts/cuts_page.py

The models are those of tests/models/zoo.py: small, with random weights. Every submodule is tried.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from cutlayer.models.costs import CutCost, costs  # noqa: E402 - the path comes first
from tests.models.zoo import SUBJECTS, Subject  # noqa: E402

PAGE = ROOT / "docs" / "reference" / "cuts.md"
TITLES = {
    "resnet18": "ResNet-18 (He et al. 2015)",
    "densenet121": "DenseNet-121 of MONAI",
    "unet": "A U-Net with two levels and long skips",
    "lstm": "Embedding, two-layer bidirectional LSTM, linear",
    "writer": "A forward that makes a module, and writes into slices",
    "aliases": "Layers that a model holds under two names each",
    "dynunet": "DynUNet of MONAI, three levels",
    "basicunet": "BasicUNet of MONAI, five levels",
    "tied": "A language model whose embedding and last layer are one weight",
    "transformer": "`nn.Transformer` of two layers each way, with a mask",
    "encoder": "`nn.TransformerEncoder` of three layers, without a last norm",
    "gpt2": "GPT-2 of Hugging Face, three blocks",
    "llama": "Llama of Hugging Face, three blocks",
    "bert": "BERT of Hugging Face with a classifier, three blocks",
    "phi": "Phi of Hugging Face, three blocks",
    "granite": "Granite of Hugging Face, three blocks, whose forward scales the embeddings",
    "bloom": "Bloom of Hugging Face with a classifier of words, three blocks",
    "modernbert": "ModernBERT of Hugging Face with a classifier, three blocks, two kinds of attention",
    "deberta": "DeBERTa-v2 of Hugging Face with a classifier, three blocks",
    "deberta-relative": "DeBERTa-v2 with `relative_attention`: all blocks use one table",
    "vit": "ViT of Hugging Face with a classifier, three blocks",
    "swin": "Swin of Hugging Face with a classifier, two stages of two blocks",
    "clip": "CLIP's text encoder of Hugging Face with a classifier, three blocks",
    "states": "BERT of Hugging Face with a classifier on the hidden states of several blocks",
    "bart": "BART of Hugging Face with a classifier, two blocks each way, a table of words for each",
    "t5": "T5 of Hugging Face, two blocks each way, a table of words for each",
}
HEAD = """# What can be cut

`cl.split(model, at=NAME)` cuts after a submodule. Below, each submodule of each model was tried: the model was cut
there, and the pieces compared with it, bit for bit. `tests/models/test_zoo.py` trains many of these cuts and compares
the weights. Numbers stand for each other: `layer1.[0,1].conv1` is two places. Ask for your own model with
[`cutlayer cut`](cli.md#cutlayer-cut-model).

| model | places | not there |
| --- | --- | --- |
{rows}

Refused in any model, with the operation named and what to do: control flow by the values of data or by the batch size
([E314](errors/E314.md)), values that are no tensors ([E315](errors/E315.md)), a write in place whose effect the other
side would miss ([E316](errors/E316.md)), other values across the cut in evaluation than in training
([E320](errors/E320.md)), tensors that do not begin with the batch ([E319](errors/E319.md)), raw inputs that the server
would need, unless `release=` lets them go ([E331](errors/E331.md)), and weights tied across parties
([E332](errors/E332.md)).

"""


def section(name: str, subject: Subject) -> tuple[str, str]:
    """Return a row of the table, and a section of the page."""
    found = list(costs(subject.make(), dict(subject.inputs), measure=False))
    good = [one for one in found if one.error is None]
    bad = [one for one in found if one.error is not None]
    row = f"| [{TITLES[name]}](#{name}) | {len(good)} | {len(bad)} |"
    lines = [f"## {name}", "", f"{TITLES[name]}.", "", "After: " + _listed(good) + ".", ""]
    for names in sorted({tuple(one.raw) for one in good if one.raw}):
        mine = [one for one in good if tuple(one.raw) == names]
        lines += [f"- [E331](errors/E331.md) without `release={list(names)}`, after: {_listed(mine)}."]
    for code in sorted({one.error.code for one in bad if one.error}):
        mine = [one for one in bad if one.error and one.error.code == code]
        lines += [f"- [{code}](errors/{code}.md), not after: {_listed(mine)}."]
    return row, "\n".join(lines).rstrip() + "\n"


def _listed(found: Iterable[CutCost]) -> str:
    """Return the names, numbers of places that differ only in them put together."""
    groups: dict[str, list[str]] = {}
    for one in found:
        groups.setdefault(re.sub(r"\d+", "#", one.point), []).append(one.point)
    return ", ".join(f"`{_together(names)}`" for names in groups.values())


def _together(names: list[str]) -> str:
    parts = [re.split(r"(\d+)", name) for name in names]
    return "".join(
        column[0] if len(set(column)) == 1 else f"[{_numbers({int(number) for number in column})}]"
        for column in zip(*parts, strict=True)
    )


def _numbers(numbers: set[int]) -> str:
    ordered = sorted(numbers)
    whole = ordered == list(range(ordered[0], ordered[-1] + 1)) and len(ordered) > 2
    return f"{ordered[0]}-{ordered[-1]}" if whole else ",".join(map(str, ordered))


def page(names: Iterable[str] = tuple(TITLES)) -> str:
    """Return the page."""
    made = [section(name, SUBJECTS[name]) for name in names]
    text = HEAD.format(rows="\n".join(row for row, _ in made)) + "\n".join(text for _, text in made)
    return text + "\nMade by `python scripts/cuts_page.py`.\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
