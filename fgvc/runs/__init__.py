"""Runs on disk: configuration, folder, typed summary, and which runs may be compared."""

from fgvc.runs.config import RunConfig
from fgvc.runs.folder import RunFolder
from fgvc.runs.settings import Method, Setting, group_runs
from fgvc.runs.spectra import Spectrum
from fgvc.runs.summary import (
    Accuracy,
    Run,
    find_finished,
    read_predictions,
    read_run,
    split_finished,
)

__all__ = [
    "Accuracy",
    "Method",
    "Run",
    "RunConfig",
    "RunFolder",
    "Setting",
    "Spectrum",
    "find_finished",
    "group_runs",
    "read_predictions",
    "read_run",
    "split_finished",
]
