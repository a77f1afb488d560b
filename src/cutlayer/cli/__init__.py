"""The command line: one executable, `cutlayer`. torch and grpc are loaded only by commands that need them."""

from __future__ import annotations

__all__ = ["main"]


def main() -> None:
    """Run the command line and end the process with its exit code."""
    from cutlayer.cli.app import app

    app(prog_name="cutlayer")
