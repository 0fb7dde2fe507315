"""Where large and small eigenvalues look: attribution of a class's score to the pixels of an image.

docs/attribution.md holds the definitions and sources.
"""

from fgvc.studies.attribution.explain import explain, explain_bands
from fgvc.studies.attribution.methods import METHODS, band_energy, eigenvector_maps
from fgvc.studies.truncation.bands import parse_band, restrict_spectrum

__all__ = [
    "METHODS",
    "band_energy",
    "eigenvector_maps",
    "explain",
    "explain_bands",
    "parse_band",
    "restrict_spectrum",
]
