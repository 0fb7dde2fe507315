"""The named spectral layers: each is one map of the eigenvalues with one gradient rule."""

import torch
from torch import Tensor

from fgvc.spectral.maps import (
    LOG,
    SCALED_SQRT,
    SQRT,
    AmplifiedSquareRoot,
    EigenvalueMap,
    Keep,
    PadeRoot,
    Power,
    Reciprocal,
)
from fgvc.spectral.precision import as_batch, check_ridge, result_dtype, spectral_dtype
from fgvc.spectral.products import products_map, uses_products
from fgvc.spectral.rules import GradientRule, SignIteration
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
        cov: (B, d, d), or (..., d, d), any floating dtype.
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
        In the shape of `cov`; float64 for float64 input, else float32.

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
    ridge: float = 0.0,
    eigh_device: str = "auto",
    dtype: str | torch.dtype = torch.float64,
) -> Tensor:
    """Power (S + ridge I)^alpha of symmetric positive definite matrices, eigenvalues clamped to 2.2e-16 from below.

    alpha = -1/2 whitens; 1/2 is `matrix_sqrt`; -1 is the inverse. [Li, Xie, Wang, Zuo, ICCV 2017, for 0 < alpha < 1]

    Args:
        cov: (B, d, d), or (..., d, d), any floating dtype.
        alpha: any number from -10 to 10 but 0. With a negative one null eigenvalues dominate: give a ridge.
        ridge: number added to the diagonal, at least 0. Without one a null eigenvalue counts as 2.2e-16, with gradient
            0 under "exact". That is no error, as rounding decides whether a matrix is singular, and a look at it would
            wait for the device.
        gradient, eigh_device, dtype: as in `matrix_sqrt`.

    Returns:
        In the shape of `cov`; float64 for float64 input, else float32.

    Raises:
        As `spectral_map`, and ValueError for an alpha or a ridge out of range.
    """
    return _map_with_ridge(cov, Power(alpha), gradient, ridge, eigh_device, dtype)


def matrix_inverse_sqrt(
    cov: Tensor,
    gradient: str | GradientRule = "exact",
    *,
    ridge: float = 0.0,
    eigh_device: str = "auto",
    dtype: str | torch.dtype = torch.float64,
) -> Tensor:
    """Inverse square root (S + ridge I)^(-1/2) of symmetric positive definite matrices: whitening.

    Args:
        cov: (B, d, d), or (..., d, d), any floating dtype.
        gradient: "exact" or another rule, of the inverse root itself. "lyapunov" is MPA-Lya-Inv, forward and backward:
            the inverse of a Padé approximant of the root, with eight steps of the sign iteration as its gradient
            (`lyapunov(iterations)`: another number). The released backward pass divides by the norm of the whole batch;
            here it is that of each matrix. [Song, Sebe, Wang, ICLR 2022]
        ridge: as in `matrix_power`: without one, null eigenvalues become 6.7e7 (MPA-Lya-Inv: 11 / sqrt(||S||)).
        eigh_device, dtype: as in `matrix_sqrt`.

    Returns:
        In the shape of `cov`; float64 for float64 input, else float32.

    Raises:
        As `spectral_map`, and ValueError for a ridge out of range.
    """
    published = gradient == "lyapunov" or isinstance(gradient, SignIteration)
    f = Reciprocal(PadeRoot()) if published else Power(-0.5)
    return _map_with_ridge(cov, f, gradient, ridge, eigh_device, dtype)


def _map_with_ridge(
    cov: Tensor,
    f: EigenvalueMap,
    gradient: str | GradientRule,
    ridge: float,
    eigh_device: str,
    dtype: str | torch.dtype,
) -> Tensor:
    """F(S + ridge I), in the shape of S; the ridge is added in the working precision."""
    check_ridge(ridge)
    working = as_batch(cov).to(spectral_dtype(dtype))
    if ridge:
        working = working + ridge * torch.eye(working.shape[-1], dtype=working.dtype, device=working.device)
    result = spectral_map(working, f, gradient, eigh_device=eigh_device, dtype=dtype)
    return result.to(result_dtype(cov)).reshape(cov.shape)


def matrix_log(
    cov: Tensor,
    gradient: str | GradientRule = "exact",
    *,
    eigh_device: str = "auto",
    dtype: str | torch.dtype = torch.float64,
) -> Tensor:
    """Logarithm U diag(log l) U^T, l clamped to 2.2e-16 from below: the log-Euclidean map. [Ionescu et al., ICCV 2015]

    Args:
        cov: (B, d, d), or (..., d, d), any floating dtype. A null eigenvalue becomes -36.04, with
            gradient 0 under "exact".
        gradient, eigh_device, dtype: as in `matrix_sqrt`.

    Returns:
        In the shape of `cov`; float64 for float64 input, else float32.

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
        cov: (B, d, d), or (..., d, d), any floating dtype.
        gradient: rule in `GRADIENTS`; "ordinary" is the published one.
        eigh_device, dtype, solver: as in `matrix_sqrt`.

    Returns:
        In the shape of `cov`; float64 for float64 input, else float32.

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
        cov: (B, d, d), or (..., d, d), any floating dtype.
        gradient, eigh_device, dtype: as in `matrix_sqrt`.
        amplification: c, at least 0; 0 is `matrix_sqrt`.
        temperature: T, above 0: eigenvalues up to about T times their mean are raised.

    Returns:
        In the shape of `cov`; float64 for float64 input, else float32.

    Raises:
        As `spectral_map`, and ValueError for a negative c or a T that is not positive.
    """
    return spectral_map(
        cov, AmplifiedSquareRoot(amplification, temperature), gradient, eigh_device=eigh_device, dtype=dtype
    )
