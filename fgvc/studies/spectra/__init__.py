"""Eigenvalues of the covariance: of methods, classes and layers, and over training."""

from fgvc.studies.spectra.measure import (
    MethodSpectrum,
    SpectrumSummary,
    curve_table,
    load_curves,
    pool_spectra,
    summarise,
)
from fgvc.studies.spectra.show import plot_eigenvalues, spectra_figure, spectra_markdown

__all__ = [
    "MethodSpectrum",
    "SpectrumSummary",
    "curve_table",
    "load_curves",
    "plot_eigenvalues",
    "pool_spectra",
    "spectra_figure",
    "spectra_markdown",
    "summarise",
]
