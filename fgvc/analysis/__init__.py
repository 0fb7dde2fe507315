"""Reading of finished runs and measures on what they saved; nothing here trains, draws or writes."""

from fgvc.analysis.confusion import confusion_matrix, confusion_order, per_class, top_confusions
from fgvc.analysis.method_spectra import (
    MethodSpectrum,
    SpectrumSummary,
    curve_table,
    load_curves,
    pool_spectra,
    summarise,
)
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
    "EigenvalueCurve",
    "MethodSpectrum",
    "SpectrumSummary",
    "condition_number",
    "confusion_matrix",
    "confusion_order",
    "curve_table",
    "effective_rank",
    "eigenvalue_curve",
    "load_curves",
    "load_smoothness",
    "nonzero_condition_number",
    "numerical_rank",
    "participation_ratio",
    "per_class",
    "pool_spectra",
    "smallest_share",
    "summarise",
    "summarise_smoothness",
    "top_confusions",
]
