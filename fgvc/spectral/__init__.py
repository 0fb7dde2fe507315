"""Differentiable functions of symmetric positive semi-definite matrices: tensors in, tensors out, torch only.

Shapes in this package: B images, C = d channels, M = H * W locations; covariances and their maps are (B, d, d).
"""

from fgvc.spectral.covariance import covariance, upper_triangle
from fgvc.spectral.eigen import EigendecompositionError
from fgvc.spectral.maps import EIGENVALUE_FLOOR, SCALED_SQRT, SQRT, EigenvalueMap
from fgvc.spectral.newton_schulz import newton_schulz_sqrt
from fgvc.spectral.operators import matrix_sqrt, scaling_eigen_branch
from fgvc.spectral.rules import GRADIENTS
from fgvc.spectral.spectral_map import spectral_map

__all__ = [
    "EIGENVALUE_FLOOR",
    "GRADIENTS",
    "SCALED_SQRT",
    "SQRT",
    "EigendecompositionError",
    "EigenvalueMap",
    "covariance",
    "matrix_sqrt",
    "newton_schulz_sqrt",
    "scaling_eigen_branch",
    "spectral_map",
    "upper_triangle",
]
