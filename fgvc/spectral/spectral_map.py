"""The one autograd function behind every spectral layer: any map of the eigenvalues, any gradient rule."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fgvc.spectral.eigen import symmetric_eigh
from fgvc.spectral.maps import EigenvalueMap
from fgvc.spectral.precision import check_square, result_dtype, without_autocast
from fgvc.spectral.rules import GradientRule, clamp_eigenvalues, gradient_rule


def spectral_forward(matrix: Tensor, f: EigenvalueMap) -> tuple[Tensor, Tensor, Tensor]:
    """F(S) = U diag(f(l)) U^T with l clamped; returns F (B, d, d), eigenvalues l as found (B, d) and U (B, d, d)."""
    eigenvalues, eigenvectors = symmetric_eigh(matrix)
    value = f.value(clamp_eigenvalues(eigenvalues))
    return (eigenvectors * value[:, None, :]) @ eigenvectors.mT, eigenvalues, eigenvectors


def spectral_backward(
    grad: Tensor, eigenvalues: Tensor, eigenvectors: Tensor, f: EigenvalueMap, rule: GradientRule
) -> Tensor:
    """dLoss/dS (B, d, d), symmetric, for G = dLoss/dF (B, d, d): U inner U^T, see fgvc.spectral.rules."""
    symmetric = (grad + grad.mT) / 2
    projected = eigenvectors.mT @ symmetric @ eigenvectors  # P
    loewner = rule(f, eigenvalues)
    diagonal = loewner.pullback(projected.diagonal(dim1=-2, dim2=-1))
    inner = loewner.off_diagonal * projected
    inner.diagonal(dim1=-2, dim2=-1).copy_(diagonal)
    return eigenvectors @ inner @ eigenvectors.mT


class _SpectralMap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrix: Tensor, f: EigenvalueMap, rule: GradientRule) -> Tensor:
        result, eigenvalues, eigenvectors = spectral_forward(matrix, f)
        ctx.save_for_backward(eigenvalues, eigenvectors)
        ctx.f, ctx.rule = f, rule
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        eigenvalues, eigenvectors = ctx.saved_tensors
        return spectral_backward(grad, eigenvalues, eigenvectors, ctx.f, ctx.rule), None, None


def spectral_map(matrix: Tensor, f: EigenvalueMap, gradient: str = "exact") -> Tensor:
    """Apply a map of the eigenvalues to symmetric positive semi-definite matrices.

    Computes in float64 with autocast off. Differentiable once; a second derivative raises RuntimeError.

    Args:
        matrix: (B, d, d), any floating dtype; its symmetric part is used.
        f: map of the eigenvalues, e.g. `SQRT`.
        gradient: name of the rule in `GRADIENTS` that assembles the derivative.

    Returns:
        F(S), (B, d, d); float64 for float64 input, else float32.

    Raises:
        ValueError: wrong shape, or unknown `gradient`.
        TypeError: not floating point.
        EigendecompositionError: NaN or infinity in a matrix, or no convergence.
    """
    check_square(matrix)
    rule = gradient_rule(gradient)
    with without_autocast(matrix):
        result: Tensor = _SpectralMap.apply(matrix.double(), f, rule)
        return result.to(result_dtype(matrix))
