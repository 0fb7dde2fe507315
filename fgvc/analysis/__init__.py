"""Reading of finished runs and measures on what they saved; nothing here trains, draws or writes."""

from fgvc.analysis.confusion import (
    confusion_matrix,
    confusion_order,
    per_class,
    read_predictions,
    top_confusions,
)
from fgvc.analysis.csv_file import read_csv
from fgvc.analysis.method_spectra import (
    MethodSpectrum,
    SpectrumSummary,
    curve_table,
    load_curves,
    pool_spectra,
    summarise,
)
from fgvc.analysis.paired import McNemar, mcnemar
from fgvc.analysis.run_search import find_finished, find_runs
from fgvc.analysis.runs import Accuracy, History, Run, Spectrum, read_run
from fgvc.analysis.settings import Method, Setting, config_notes, group_runs, split_finished
from fgvc.analysis.smoothness_table import load_smoothness, summarise_smoothness
from fgvc.spectrum_measures import (
    EigenvalueCurve,
    condition_number,
    effective_rank,
    eigenvalue_curve,
    nonzero_condition_number,
    numerical_rank,
    participation_ratio,
    smallest_share,
)

__all__ = [
    "Accuracy",
    "EigenvalueCurve",
    "History",
    "McNemar",
    "Method",
    "MethodSpectrum",
    "Run",
    "Setting",
    "Spectrum",
    "SpectrumSummary",
    "condition_number",
    "config_notes",
    "confusion_matrix",
    "confusion_order",
    "curve_table",
    "effective_rank",
    "eigenvalue_curve",
    "find_finished",
    "find_runs",
    "group_runs",
    "load_curves",
    "load_smoothness",
    "mcnemar",
    "nonzero_condition_number",
    "numerical_rank",
    "participation_ratio",
    "per_class",
    "pool_spectra",
    "read_csv",
    "read_predictions",
    "read_run",
    "smallest_share",
    "split_finished",
    "summarise",
    "summarise_smoothness",
    "top_confusions",
]
