"""The named spectral layers: each is one map of the eigenvalues with one gradient rule."""

import torch
from torch import Tensor

from fgvc.spectral.maps import LOG, SCALED_SQRT, SQRT, AmplifiedSquareRoot, Keep, Power
from fgvc.spectral.products import products_map, uses_products
from fgvc.spectral.rules import GradientRule
from fgvc.spectral.spectral_map import spectral_map


def matrix_sqrt(
    cov: Tensor,
    gradient: str | GradientRule = "exact",
    *,
    keep: Keep | None = None,
    eigh_device: str = "auto",
    dtype: str | torch.dtype = torch.float64,
    solver: str = "eigh",
) -> Tensor:
    """Square root of symmetric positive semi-definite matrices, U diag(sqrt l) U^T.

    Args:
        cov: (B, d, d), any floating dtype.
        gradient: rule in `GRADIENTS`, or a rule. "exact" is the Lyapunov gradient of Lin and Maji (BMVC 2017);
            "ordinary" the textbook SVD chain of MPN-COV (Li et al., ICCV 2017); "trunc", "taylor", "pade", "newton"
            those of Song, Sebe, Wang (ICCV 2021); "power_iteration" that of Wang et al. (NeurIPS 2019).
        keep: square root of the `keep` largest eigenvalues only, or of a band (start, stop) as in `spectral_map` (the
            others are set to 2.2e-16), with the exact gradient of that unless `gradient` says otherwise;
            "topn_published" is the one of the released SVD-TopN.
        eigh_device: "auto", "same" or "cpu", see `fgvc.spectral.eigen.symmetric_eigh`.
        dtype: working precision, as in `spectral_map`.
        solver: "eigh", or "products" for full rank and gradient "exact", see `fgvc.spectral.products`.

    Returns:
        (B, d, d); float64 for float64 input, else float32.

    Raises:
        As `spectral_map`, and ValueError for an unknown solver or what "products" does not have.
    """
    if uses_products(solver, SQRT, gradient, keep, dtype):
        return products_map(cov, SQRT)
    return spectral_map(cov, SQRT, gradient, keep=keep, eigh_device=eigh_device, dtype=dtype)


def matrix_power(
    cov: Tensor,
    alpha: float,
    gradient: str | GradientRule = "exact",
    *,
    eigh_device: str = "auto",
    dtype: str | torch.dtype = torch.float64,
) -> Tensor:
    """Power U diag(l^alpha) U^T of symmetric positive definite matrices, l clamped to 2.2e-16 from below.

    alpha = -1/2 whitens; 1/2 is `matrix_sqrt`. [Li, Xie, Wang, Zuo, ICCV 2017, for 0 < alpha < 1]

    Args:
        cov: (B, d, d), any floating dtype.
        alpha: any finite number but 0. With a negative one the null eigenvalues dominate: add a ridge to `cov` first.
        gradient, eigh_device, dtype: as in `matrix_sqrt`.

    Returns:
        (B, d, d); float64 for float64 input, else float32.

    Raises:
        As `spectral_map`, and ValueError for an alpha that is 0 or not finite.
    """
    return spectral_map(cov, Power(alpha), gradient, eigh_device=eigh_device, dtype=dtype)


def matrix_log(
    cov: Tensor,
    gradient: str | GradientRule = "exact",
    *,
    eigh_device: str = "auto",
    dtype: str | torch.dtype = torch.float64,
) -> Tensor:
    """Logarithm U diag(log l) U^T, l clamped to 2.2e-16 from below: the log-Euclidean map. [Ionescu et al., ICCV 2015]

    Args:
        cov: (B, d, d), any floating dtype. A null eigenvalue becomes -36.04, with gradient 0 under "exact".
        gradient, eigh_device, dtype: as in `matrix_sqrt`.

    Returns:
        (B, d, d); float64 for float64 input, else float32.

    Raises:
        As `spectral_map`.
    """
    return spectral_map(cov, LOG, gradient, eigh_device=eigh_device, dtype=dtype)


def scaling_eigen_branch(
    cov: Tensor,
    gradient: str | GradientRule = "ordinary",
    *,
    eigh_device: str = "auto",
    dtype: str | torch.dtype = torch.float64,
    solver: str = "eigh",
) -> Tensor:
    """Scaling Eigen Branch: (1 + t) Q with Q = S^{1/2}, t = ||Q exp(-S)||_F. [Song, Sebe, Wang, T-PAMI 2022]

    As in the released layer, t is one number per image: the ratios of the eigenvalues stay those of the square root,
    only scale and gradient change.

    Args:
        cov: (B, d, d), any floating dtype.
        gradient: rule in `GRADIENTS`; "ordinary" is the published one.
        eigh_device, dtype, solver: as in `matrix_sqrt`.

    Returns:
        (B, d, d); float64 for float64 input, else float32.

    Raises:
        As `matrix_sqrt`.
    """
    if uses_products(solver, SCALED_SQRT, gradient, None, dtype):
        return products_map(cov, SCALED_SQRT)
    return spectral_map(cov, SCALED_SQRT, gradient, eigh_device=eigh_device, dtype=dtype)


def seb_spectral(
    cov: Tensor,
    gradient: str | GradientRule = "exact",
    *,
    amplification: float = 1.0,
    temperature: float = 1.0,
    eigh_device: str = "auto",
    dtype: str | torch.dtype = torch.float64,
) -> Tensor:
    """Square root with amplified small eigenvalues, f(l) = sqrt(l) (1 + c exp(-l / (T mean l))). Ours, not published.

    Args:
        cov: (B, d, d), any floating dtype.
        gradient, eigh_device, dtype: as in `matrix_sqrt`.
        amplification: c, at least 0; 0 is `matrix_sqrt`.
        temperature: T, above 0: eigenvalues up to about T times their mean are raised.

    Returns:
        (B, d, d); float64 for float64 input, else float32.

    Raises:
        As `spectral_map`, and ValueError for a negative c or a T that is not positive.
    """
    return spectral_map(
        cov, AmplifiedSquareRoot(amplification, temperature), gradient, eigh_device=eigh_device, dtype=dtype
    )
