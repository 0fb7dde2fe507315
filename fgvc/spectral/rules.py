"""Gradient rules of a spectral map: how the derivative is assembled from the eigenvalues.

For S = U diag(lam) U^T, F(S) = U diag(f(lam)) U^T and G = dLoss/dF the gradient is (Daleckii-Krein)

    dLoss/dS = U inner U^T,   inner_ij = L_ij P_ij (i != j),   inner_ii = (J_f^T diag P)_i,   P = U^T sym(G) U.

A rule says what L is off the diagonal and which pullback stands on it. The published methods replace
1 / (lam_i - lam_j) by an approximation K~ and so have L_ij = K~_ij (f_i - f_j): such a method is one function
lam -> K~ in `_K_RULES`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fgvc.spectral.maps import EIGENVALUE_FLOOR, EigenvalueMap


class Loewner(NamedTuple):
    """The derivative of a spectral map in the eigenbasis.

    Attributes:
        off_diagonal: L, (B, d, d); its diagonal is not used.
        pullback: v -> J_f^T v, (B, d) -> (B, d), applied to the diagonal of P.
    """

    off_diagonal: Tensor
    pullback: Callable[[Tensor], Tensor]


GradientRule = Callable[[EigenvalueMap, Tensor], Loewner]
"""(map, eigenvalues (B, d) as eigh returns them, not clamped) -> the derivative in the eigenbasis."""


def clamp_eigenvalues(eigenvalues: Tensor) -> Tensor:
    """Eigenvalues as the maps see them: no smaller than `EIGENVALUE_FLOOR`."""
    return eigenvalues.clamp(min=EIGENVALUE_FLOOR)


def exact(f: EigenvalueMap, eigenvalues: Tensor) -> Loewner:
    """The derivative of f after the clamp: finite at repeated eigenvalues, zero for a clamped one.

    For f = sqrt this is the Lyapunov gradient of Lin and Maji (BMVC 2017), L_ij = 1 / (sqrt lam_i + sqrt lam_j).
    """
    lam = clamp_eigenvalues(eigenvalues)
    divided = f.divided_differences(lam)
    kept = eigenvalues > EIGENVALUE_FLOOR
    if not kept.all():
        # chain rule through the clamp c: its divided difference is 1 between kept eigenvalues, 0 between clamped ones
        rise = lam[:, :, None] - lam[:, None, :]
        run = eigenvalues[:, :, None] - eigenvalues[:, None, :]
        both_kept = kept[:, :, None] & kept[:, None, :]
        slope = torch.where(run == 0, 0, rise / torch.where(run == 0, 1, run))
        divided = divided * torch.where(both_kept, 1, slope)
    return Loewner(divided, lambda v: f.pullback(lam, v) * kept)


def _reciprocal_gaps(lam: Tensor) -> Tensor:
    # a tie would give 1/0; whatever finite number stands there is multiplied by f_i - f_j = 0
    gap = lam[:, :, None] - lam[:, None, :]
    return torch.where(gap == 0, 0, 1 / torch.where(gap == 0, 1, gap))


_K_RULES: dict[str, Callable[[Tensor], Tensor]] = {
    "ordinary": _reciprocal_gaps,  # the textbook gradient of the SVD; loses the 1 / (2 sqrt lam) of a tie
}


def _published(reciprocal_gaps: Callable[[Tensor], Tensor]) -> GradientRule:
    """The published chain: K~ off the diagonal, and the slope of f at clamped eigenvalues let through as it is."""

    def rule(f: EigenvalueMap, eigenvalues: Tensor) -> Loewner:
        lam = clamp_eigenvalues(eigenvalues)
        value = f.value(lam)
        rise = value[:, :, None] - value[:, None, :]
        return Loewner(reciprocal_gaps(lam) * rise, lambda v: f.pullback(lam, v))

    return rule


GRADIENTS: dict[str, GradientRule] = {
    "exact": exact,
    **{name: _published(reciprocal_gaps) for name, reciprocal_gaps in _K_RULES.items()},
}
"""Gradient rules by the name that `matrix_sqrt` and the poolings take."""


def gradient_rule(name: str) -> GradientRule:
    """The rule called `name`.

    Raises:
        ValueError: no such rule; the message lists the names.
    """
    if name not in GRADIENTS:
        raise ValueError(f"unknown gradient {name!r}; choose one of {', '.join(GRADIENTS)}")
    return GRADIENTS[name]
