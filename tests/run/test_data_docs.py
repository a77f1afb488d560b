"""The pages on data and on missing rows run as they stand, and each loss of the table takes what the table says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from cutlayer.core.spec import DTYPES
from cutlayer.engine.metrics import MetricBook

DOCS = Path(__file__).parents[2] / "docs"


def run_page(name: str) -> dict[str, object]:
    text = (DOCS / name).read_text()
    blocks = re.findall(r"(?ms)^```python\n(.*?)^```$", text)
    assert len(blocks) * 2 == text.count("```")
    names: dict[str, object] = {}
    torch.manual_seed(0)
    exec(compile("\n".join(blocks), name, "exec"), names)  # noqa: S102 - our own page
    return names


def test_the_page_on_missing_rows_runs(capsys: pytest.CaptureFixture[str]):
    names = run_page("how-to/missing-rows.md")
    assert "float32[rows<=batch, 4]" in capsys.readouterr().out
    assert names["scores"].shape == (6, 2)  # type: ignore[attr-defined]


SIZES = {"batch": 6, "C": 3, "H": 4, "W": 4, "time": 5, "V": 7}
NAMES = {
    "two classes": "two classes", "one of several classes": "classes", "several labels": "labels", "a number": "number",
    "a count": "count", "segmentation": "segmentation", "language": "language",
}  # fmt: skip


def made(spec: str, task: str) -> torch.Tensor:
    dtype, dims = re.fullmatch(r"(\w+)\[(.*)\]", spec).groups()  # type: ignore[union-attr]
    shape = [SIZES[dim.strip()] for dim in dims.split(",")]
    if dtype == "int64":
        return torch.randint(0, 3, shape)
    return torch.randint(0, 2, shape).float() if "class" in task or "label" in task else torch.rand(shape)


def test_the_page_on_data_runs_and_its_table_is_true():
    page = (DOCS / "reference" / "data.md").read_text()
    names = run_page("reference/data.md")
    assert names["result"].metrics("train")["loss"]["loss"] > 0  # type: ignore[attr-defined]
    assert all(f"{dtype}" in page for dtype in DTYPES)
    rows = re.findall(r"(?m)^\| ([a-z ]+) \| `(\w+\[[^`]*\])`, `(\w+\[[^`]*\])` \|", page)
    assert [task for task, *_ in rows] == list(NAMES)
    for task, prediction, label in rows:
        loss, metrics = names["tasks"][NAMES[task]]  # type: ignore[index]
        x, y = made(prediction, "").requires_grad_(), made(label, task)
        value = loss(x, y)
        value.backward()
        book = MetricBook("loss", metrics, shared=True)
        book.update(value, [x, y], len(x))
        assert len(book.values()) > 1
