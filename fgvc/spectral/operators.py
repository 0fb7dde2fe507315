"""The named spectral layers: each is one map of the eigenvalues with one gradient rule."""

from torch import Tensor

from fgvc.spectral.maps import SCALED_SQRT, SQRT
from fgvc.spectral.spectral_map import spectral_map


def matrix_sqrt(cov: Tensor, gradient: str = "exact") -> Tensor:
    """Square root of symmetric positive semi-definite matrices, U diag(sqrt l) U^T.

    Args:
        cov: (B, d, d), any floating dtype.
        gradient: rule in `GRADIENTS`. "exact" is the Lyapunov gradient of Lin and Maji (BMVC 2017); "ordinary" the
            textbook SVD chain of MPN-COV (Li et al., ICCV 2017).

    Returns:
        (B, d, d); float64 for float64 input, else float32.

    Raises:
        As `spectral_map`.
    """
    return spectral_map(cov, SQRT, gradient)


def scaling_eigen_branch(cov: Tensor, gradient: str = "ordinary") -> Tensor:
    """Scaling Eigen Branch: (1 + t) Q with Q = S^{1/2}, t = ||Q exp(-S)||_F. [Song, Sebe, Wang, T-PAMI 2022]

    As in the released layer, t is one number per image: the ratios of the eigenvalues stay those of the square root,
    only scale and gradient change.

    Args:
        cov: (B, d, d), any floating dtype.
        gradient: rule in `GRADIENTS`; "ordinary" is the published one.

    Returns:
        (B, d, d); float64 for float64 input, else float32.

    Raises:
        As `spectral_map`.
    """
    return spectral_map(cov, SCALED_SQRT, gradient)
