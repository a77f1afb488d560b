"""Draw the pictures of docs/how-to/read-the-report.md from the folder of a run.

make demo
python scripts/report_pictures.py runs/<the folder that it named>
"""

from __future__ import annotations

import sys
from pathlib import Path

from cutlayer.report.charts import time_bars
from cutlayer.report.page import render_svg
from cutlayer.report.planview import draw_plan
from cutlayer.report.record import read_record

HOW_TO = Path(__file__).resolve().parents[1] / "docs" / "how-to"


def main(folder: Path) -> None:
    """Write the drawings of the plan and of time."""
    record = read_record(folder)
    for name, scene in (("plan", draw_plan(record)), ("time", time_bars(record))):
        path = HOW_TO / f"report-{name}.svg"
        path.write_text(render_svg(scene), encoding="utf-8")
        print(f"wrote {path}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
