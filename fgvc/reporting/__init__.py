"""What is made from many runs: tables by name, calibrations, predictions, one page on everything."""

from fgvc.reporting.registry import make_tables

__all__ = ["make_tables"]
