"""The command line: one executable, `cutlayer`. torch and grpc are loaded only by commands that need them."""

from __future__ import annotations

import os
import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line and end the process with its exit code."""
    from cutlayer.cli.app import app

    try:
        app(prog_name="cutlayer")
    except SystemExit as end:
        _leave(end)
        raise


def _leave(end: SystemExit) -> None:
    """End at once if a check of the doctor that took too long still runs: Python would wait for it, or abort."""
    rows = sys.modules.get("cutlayer.run.doctor_rows")
    if rows is not None and rows.still_looking():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else 1)
