"""What a run leaves for people to read: a page, drawings and tables made from its folder; and loggers of its events."""

from __future__ import annotations

from cutlayer.report.write import Report, write_report

__all__ = ["Report", "write_report"]
