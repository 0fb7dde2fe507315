"""Runs as one page of HTML that needs nothing else: tables, plots, pictures, configurations."""

from fgvc.reporting.report.page import Report, make_report
from fgvc.reporting.report.results import Results, collect

__all__ = ["Report", "Results", "collect", "make_report"]
