"""Differentiable functions of symmetric positive semi-definite matrices: tensors in, tensors out, torch only.

Shapes in this package: B images, C = d channels, M = H * W locations; covariances and their maps are (B, d, d).
"""

from fgvc.spectral.covariance import covariance, symmetric_from_triangle, upper_triangle
from fgvc.spectral.descriptor import covariance_eigenvalues, spectral_descriptor
from fgvc.spectral.eigen import EigendecompositionError, EigendecompositionWarning
from fgvc.spectral.maps import (
    LOG,
    SCALED_SQRT,
    SQRT,
    AmplifiedSquareRoot,
    Band,
    EigenvalueMap,
    Keep,
    Logarithm,
    PadeRoot,
    Power,
    Reciprocal,
    Rescaled,
    TaylorRoot,
)
from fgvc.spectral.matrix_map import LogCholesky, MatrixMap, SparseInverse, matrix_descriptor, matrix_map
from fgvc.spectral.newton_schulz import newton_schulz_descriptor, newton_schulz_sqrt
from fgvc.spectral.operators import (
    matrix_inverse_sqrt,
    matrix_log,
    matrix_power,
    matrix_sqrt,
    scaling_eigen_branch,
    seb_spectral,
)
from fgvc.spectral.precision import EIGENVALUE_FLOOR
from fgvc.spectral.products import ConditionWarning
from fgvc.spectral.rules import GRADIENTS, GradientRule, lyapunov, newton, power_iteration, taylor, trunc
from fgvc.spectral.spectral_map import spectral_map

__all__ = [
    "EIGENVALUE_FLOOR",
    "GRADIENTS",
    "LOG",
    "SCALED_SQRT",
    "SQRT",
    "AmplifiedSquareRoot",
    "Band",
    "ConditionWarning",
    "EigendecompositionError",
    "EigendecompositionWarning",
    "EigenvalueMap",
    "GradientRule",
    "Keep",
    "LogCholesky",
    "Logarithm",
    "MatrixMap",
    "PadeRoot",
    "Power",
    "Reciprocal",
    "Rescaled",
    "SparseInverse",
    "TaylorRoot",
    "covariance",
    "covariance_eigenvalues",
    "lyapunov",
    "matrix_descriptor",
    "matrix_inverse_sqrt",
    "matrix_log",
    "matrix_map",
    "matrix_power",
    "matrix_sqrt",
    "newton",
    "newton_schulz_descriptor",
    "newton_schulz_sqrt",
    "power_iteration",
    "scaling_eigen_branch",
    "seb_spectral",
    "spectral_descriptor",
    "spectral_map",
    "symmetric_from_triangle",
    "taylor",
    "trunc",
    "upper_triangle",
]
