"""What is made from many runs: tables by name, calibrations, predictions, one page on everything."""

from fgvc.reporting.accuracy import accuracy_table, load_published
from fgvc.reporting.registry import TABLES, make_tables

__all__ = ["TABLES", "accuracy_table", "load_published", "make_tables"]
