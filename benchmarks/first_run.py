"""What a newcomer does, measured: from an empty folder to an open report, in commands and seconds, for each template.

    python benchmarks/first_run.py

The first command fetches the template's data from the Python index. The third, which opens the report, is not run: the
page's presence is checked instead.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cutlayer.cli.creating import templates


def command(*words: str, folder: Path) -> tuple[float, str]:
    """Run `cutlayer` with these words in a folder; return seconds and the last line."""
    begin = time.perf_counter()
    line = [sys.executable, "-m", "cutlayer", *words]
    done = subprocess.run(line, cwd=folder, check=True, capture_output=True, text=True, timeout=600)  # noqa: S603 - ours
    return time.perf_counter() - begin, done.stdout.strip().splitlines()[-1]


def main() -> None:
    """Measure each template and print a table."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        for template in templates():
            made, _ = command("new", template, "--template", template, folder=home)
            ran, last = command("run", folder=home / template)
            page = home / template / last.removeprefix("results: ")
            if page.name != "report.html" or not page.is_file():
                raise SystemExit(f"{template}: no report at {page}")
            rows.append(f"| {template} | 3 | {made:.1f} | {ran:.1f} | {made + ran:.1f} |")
    head = ["| template | commands | new, s | run, s | together, s |", "| --- | --- | --- | --- | --- |"]
    sys.stdout.write("\n".join([*head, *rows]) + f"\nresults: {len(rows)} templates, report.html there for each\n")


if __name__ == "__main__":
    main()
