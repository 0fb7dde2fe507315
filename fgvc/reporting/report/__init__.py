"""Runs as one page of HTML that needs nothing else: tables, plots, pictures, configurations."""

from fgvc.reporting.report.collect import Collected, collect
from fgvc.reporting.report.page import Report, make_report

__all__ = ["Collected", "Report", "collect", "make_report"]
