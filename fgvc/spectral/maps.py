"""Maps of eigenvalues f: R^d -> R^d that turn S = U diag(lam) U^T into F(S) = U diag(f(lam)) U^T.

A map knows three things about itself, all of them exact: its values, the transpose of its Jacobian, and its divided
differences in a form without cancellation. How a gradient is assembled from them is a rule (fgvc.spectral.rules).
Eigenvalues arrive clamped to `EIGENVALUE_FLOOR` from below, so every map may divide by them. Shapes: lam, v (B, d).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

EIGENVALUE_FLOOR: float = torch.finfo(torch.float64).eps
"""Eigenvalues up to this value are set to it in the forward pass, as in the released layers (2.2e-16)."""


@dataclass(frozen=True)
class EigenvalueMap:
    """A map of the eigenvalues together with its exact derivatives.

    Attributes:
        value: lam -> f(lam), (B, d) -> (B, d).
        pullback: (lam, v) -> J_f(lam)^T v, (B, d), (B, d) -> (B, d); f'(lam) v where f acts on each eigenvalue alone.
        divided_differences: lam -> (f_i - f_j) / (lam_i - lam_j), (B, d) -> (B, d, d), with the limit on ties. Its
            diagonal is not used: the pullback stands there.
    """

    value: Callable[[Tensor], Tensor]
    pullback: Callable[[Tensor, Tensor], Tensor]
    divided_differences: Callable[[Tensor], Tensor]


def _sqrt_divided_differences(lam: Tensor) -> Tensor:
    # (sqrt a - sqrt b) / (a - b) = 1 / (sqrt a + sqrt b): nothing cancels, ties are no special case
    root = lam.sqrt()
    return 1 / (root[:, :, None] + root[:, None, :])


SQRT = EigenvalueMap(
    value=torch.sqrt,
    pullback=lambda lam, v: v / (2 * lam.sqrt()),
    divided_differences=_sqrt_divided_differences,
)
"""f(lam) = sqrt(lam): the matrix square root."""


def seb_scale(lam: Tensor) -> Tensor:
    """t = ||Q E^T||_F = sqrt(sum_i lam_i exp(-2 lam_i)), Q = U lam^{1/2} U^T, E = U exp(-lam) U^T; (B, d) -> (B, 1).

    Q and E share their eigenvectors, so no matrix product is needed. [Song, Sebe, Wang, T-PAMI 2022]
    """
    return (lam * torch.exp(-2 * lam)).sum(dim=-1, keepdim=True).sqrt()


def _seb_pullback(lam: Tensor, v: Tensor) -> Tensor:
    root, t = lam.sqrt(), seb_scale(lam)
    # exp(-2 lam) underflows for a large spectrum: t = 0 then, and so is its derivative
    slope = torch.where(t > 0, torch.exp(-2 * lam) * (1 - 2 * lam) / (2 * t), 0)  # dt/dlam
    return (1 + t) * v / (2 * root) + (v * root).sum(dim=-1, keepdim=True) * slope


SCALED_SQRT = EigenvalueMap(
    value=lambda lam: (1 + seb_scale(lam)) * lam.sqrt(),
    pullback=_seb_pullback,
    divided_differences=lambda lam: (1 + seb_scale(lam))[..., None] * _sqrt_divided_differences(lam),
)
"""f(lam) = (1 + t(lam)) sqrt(lam): the Scaling Eigen Branch, one scalar per image times the square root."""
