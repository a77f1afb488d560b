"""Write the report of a run's folder into it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cutlayer.report.charts import curves, grid, time_bars
from cutlayer.report.page import render_page, render_svg
from cutlayer.report.planview import draw_plan
from cutlayer.report.raster import available, save_png
from cutlayer.report.record import read_record
from cutlayer.report.tables import costs_csv, curves_csv, cuts_csv
from cutlayer.run.disk import named

__all__ = ["Report", "write_report"]


@dataclass(frozen=True)
class Report:
    """A report that was written.

    Attributes:
        page: `report.html`.
        files: What lies beside it, in `report/`.
        drawn: Whether the drawings are there as PNG too, which needs matplotlib.
    """

    page: Path
    files: tuple[Path, ...]
    drawn: bool


def write_report(folder: str | Path, *, png: bool = True) -> Report:
    """Write `report.html` and `report/` into the folder of a run that has ended, from the files in it alone.

    `report.html` is one file that loads nothing. Beside it: `curves.csv`, `costs.csv`, `cuts.csv`, and the drawings
    `plan`, `curves` and `time` as SVG and, if matplotlib is installed and `png` is true, as PNG. What is there of an
    earlier report is replaced.

    Raises:
        ConfigError: E281, the folder holds no summary of a run; E282, it cannot be read.
    """
    record = read_record(Path(folder))
    plan, panels, time = draw_plan(record), curves(record), time_bars(record)
    beside = record.folder / "report"
    beside.mkdir(exist_ok=True)
    texts = {
        "curves.csv": curves_csv(record),
        "costs.csv": costs_csv(record),
        "cuts.csv": cuts_csv(record),
    }
    drawings = {"plan": plan, "time": time}
    if panels:
        drawings["curves"] = grid(panels, "Metrics by round")
    texts |= {f"{name}.svg": render_svg(scene) for name, scene in drawings.items()}
    for name, text in texts.items():
        with named(beside / name):
            (beside / name).write_text(text, encoding="utf-8")
    drawn = png and available()
    for name, scene in drawings.items() if drawn else ():
        with named(beside / f"{name}.png"):
            save_png(scene, beside / f"{name}.png")
    page = record.folder / "report.html"
    with named(page):
        page.write_text(render_page(record, plan, panels, time), encoding="utf-8")
    names = [*texts, *(f"{name}.png" for name in drawings if drawn)]
    return Report(page, tuple(beside / name for name in sorted(names)), drawn)
