"""Normalisations of a covariance that are no maps of its eigenvalues: its Cholesky factor and its sparse inverse.

A `MatrixMap` knows its value and its pullback; the one autograd function below makes a layer of either, of matrices or
fused from the features to the upper triangle. Between the passes a layer keeps its input alone. The backward pass
computes the rest once more, on a CPU for one part of the batch after the other.

Shapes: S, F(S) and their gradients are symmetric, (B, d, d).
"""

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fgvc.spectral.covariance import batch_parts, check_features, upper_triangle
from fgvc.spectral.descriptor import batch_gram, features_gradient, symmetric_gradient
from fgvc.spectral.newton_schulz import dot, iterate_forward, iterate_tangent, safe_trace
from fgvc.spectral.precision import (
    FirstDerivative,
    as_batch,
    check_ridge,
    check_whole_number,
    full_precision,
    is_number,
    keep_for_backward,
    result_dtype,
    spectral_dtype,
)


class MatrixMap(Protocol):
    """A function of symmetric positive semi-definite matrices; those below are hashable and can be pickled."""

    def value(self, s: Tensor) -> Tensor:
        """F(S)."""

    def pullback(self, s: Tensor, grad: Tensor) -> Tensor:
        """dLoss/dS for G = dLoss/dF."""


def _diagonal(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1)


@dataclass(frozen=True)
class LogCholesky:
    """F(S) = M + M^T, M the Cholesky factor L of S + ridge I with log L_ii on its diagonal. [Chen et al., ICLR 2025]

    8 eps tr(S) is added to the ridge, more than the rounding errors of S, so that L exists for every rank: next to
    nothing in float64, 1e-6 tr(S) in float32. A matrix without L, such as one with NaN, gives NaN.

    Raises:
        ValueError: `ridge` is not above 0, or not finite.
    """

    ridge: float = 1e-6

    def __post_init__(self) -> None:
        check_ridge(self.ridge)
        if self.ridge == 0:
            raise ValueError("the ridge must be above 0: a singular matrix has the logarithm of 0 in it")

    def _factor(self, s: Tensor) -> Tensor:
        shifted = s.clone()
        _diagonal(shifted).add_(self._rounding(s) * _diagonal(s).sum(-1, keepdim=True) + self.ridge)
        factor, failed = torch.linalg.cholesky_ex(shifted)
        return torch.where(failed[:, None, None] == 0, factor, math.nan)

    @staticmethod
    def _rounding(s: Tensor) -> float:
        return 8 * torch.finfo(s.dtype).eps

    def value(self, s: Tensor) -> Tensor:
        factor = self._factor(s)
        lower = factor.tril(-1)
        return lower + lower.mT + torch.diag_embed(2 * _diagonal(factor).log())

    def pullback(self, s: Tensor, grad: Tensor) -> Tensor:
        factor = self._factor(s)
        to_factor = 2 * grad.tril(-1) + torch.diag_embed(2 * _diagonal(grad) / _diagonal(factor))
        # dL = L Phi(L^-1 dS L^-T), Phi the lower triangle with half of the diagonal, and so its transpose
        inner = torch.bmm(factor.mT, to_factor).tril()
        _diagonal(inner).mul_(0.5)
        half = torch.linalg.solve_triangular(factor.mT, inner, upper=True)
        to_s = torch.linalg.solve_triangular(factor, half, upper=False, left=False)
        to_s = torch.lerp(to_s, to_s.mT, 0.5)
        _diagonal(to_s).add_(self._rounding(s) * _diagonal(to_s).sum(-1, keepdim=True))
        return to_s


ROOT_STEPS = 7
"""Newton-Schulz steps of an inverse in `SparseInverse`, as released; null eigenvalues become 1.5^14 / tr."""


def _inverse(matrix: Tensor) -> Tensor:
    """Z^2 / tau, an approximate inverse of a matrix: Z of Newton-Schulz steps on A = matrix / tau, tau its trace."""
    trace, _ = safe_trace(matrix)
    z, _ = iterate_forward(matrix / trace, ROOT_STEPS, "z")
    return torch.bmm(z, z).div_(trace)


def _inverse_pullback(matrix: Tensor, grad: Tensor) -> Tensor:
    """dLoss/dmatrix for G = dLoss/d`_inverse`."""
    trace, positive = safe_trace(matrix)
    a = matrix / trace
    z, residuals = iterate_forward(a, ROOT_STEPS, "z")
    half = torch.bmm(grad, z)
    to_a = iterate_tangent(a, residuals, (half + half.mT).div_(trace), "z")
    through_trace = (dot(half, z) / trace + dot(to_a, a)).mul_(positive)  # <G, Z^2> is <G Z, Z>
    _diagonal(to_a).sub_(through_trace[:, :, 0])
    return to_a.div_(trace)


@dataclass(frozen=True)
class SparseInverse:
    """F(S) = Theta / sqrt(tr Theta), Theta a sparse inverse of C = S / tr S (iSICE). [Rahman et al., CVPR 2023]

    `steps` proximal steps of min -log det Theta + tr(Theta C) + sparsity ||Theta||_1 from C^-1, in which positive and
    negative entries move apart; step i of size rate (1 - i / (steps - 1)), so that the last moves nothing. Inverses are
    approximated as in the released code, which adds random numbers up to 1e-9 to them; here are none. S = 0 gives 0.
    The backward pass takes the steps once more and holds Theta and two masks of each while it lasts.

    Raises:
        ValueError: fewer than 2 steps, `sparsity` negative, `rate` not above 0, or one of them no number.
    """

    steps: int = 5
    sparsity: float = 0.01
    rate: float = 1.0

    def __post_init__(self) -> None:
        check_whole_number("steps", self.steps, least=2, most=100)  # the backward pass keeps a matrix of each
        if not (is_number(self.sparsity) and self.sparsity >= 0):
            raise ValueError(f"the sparsity must be a number of at least 0, got {self.sparsity!r}")
        if not (is_number(self.rate) and self.rate > 0):
            raise ValueError(f"the rate must be a number above 0, got {self.rate!r}")

    def _size(self, step: int) -> float:
        return self.rate * (1 - step / (self.steps - 1))

    def _steps(self, c: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Theta_0 ... Theta_{steps - 1}, each with its positive and its negative part before they are made symmetric.

        The step that would follow moves nothing.
        """
        theta = _inverse(c)
        yield theta, theta, theta
        for size in map(self._size, range(self.steps - 1)):
            move = (c - _inverse(theta)).mul_(size)  # along the slope of -log det Theta + tr(Theta C)
            plus, minus = torch.relu(theta) - move, torch.relu(-theta) + move
            plus, minus = (torch.relu_(part.sub_(size * self.sparsity)) for part in (plus, minus))
            theta = plus - minus
            theta = torch.lerp(theta, theta.mT, 0.5)
            yield theta, plus, minus

    def value(self, s: Tensor) -> Tensor:
        trace, positive = safe_trace(s)
        theta, *_ = deque(self._steps(s / trace), maxlen=1).pop()
        of_theta, theta_positive = safe_trace(theta)
        return theta.mul_(torch.where(positive & theta_positive, of_theta.rsqrt(), 0))

    def pullback(self, s: Tensor, grad: Tensor) -> Tensor:
        trace, positive = safe_trace(s)
        c = s / trace
        steps = [(theta, plus > 0, minus > 0) for theta, plus, minus in self._steps(c)]
        last = steps[-1][0]
        of_last, last_positive = safe_trace(last)
        to_theta = grad * torch.where(last_positive, of_last.rsqrt(), 0)
        _diagonal(to_theta).sub_((dot(to_theta, last) / (2 * of_last))[:, :, 0])
        to_c = torch.zeros_like(c)
        for step in reversed(range(self.steps - 1)):
            theta, (_, plus, minus) = steps[step][0], steps[step + 1]
            to_slope = to_theta * (plus.to(c.dtype) + minus) * -self._size(step)
            to_c.add_(to_slope)
            kept = torch.where(theta > 0, plus, minus & (theta < 0))
            to_theta = to_theta * kept - _inverse_pullback(theta, to_slope)
        to_c.add_(_inverse_pullback(c, to_theta))
        _diagonal(to_c).sub_(dot(to_c, c)[:, :, 0])
        return to_c.mul_(positive / trace)


class MatrixLayer(NamedTuple):
    """What a layer is: its map, its working precision, and whether it leads from features to the upper triangle."""

    f: MatrixMap
    dtype: torch.dtype
    fused: bool

    def matrices(self, x: Tensor) -> Tensor:
        """S of features (B, d, ...) or of matrices (B, d, d)."""
        return batch_gram(x, self.dtype, thin=False) if self.fused else torch.lerp(x, x.mT, 0.5)


class _MatrixMap(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, layer: MatrixLayer) -> tuple[Tensor]:
        d = x.shape[1]
        shape = (x.shape[0], d * (d + 1) // 2) if layer.fused else x.shape
        result = torch.empty(shape, dtype=result_dtype(x), device=x.device)
        for part in batch_parts(x.shape, x.device):
            value = layer.f.value(layer.matrices(x[part]))
            result[part] = upper_triangle(value.to(result.dtype)) if layer.fused else value
        return (result,)  # torch.compile takes nothing but a tuple

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, MatrixLayer], _: tuple[Tensor]) -> None:
        x, ctx.layer = inputs
        keep_for_backward(ctx, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None]:
        return _MatrixMapGradient.of(grad, *ctx.saved_tensors, ctx.layer), None


class _MatrixMapGradient(FirstDerivative):
    @staticmethod
    def forward(grad: Tensor, x: Tensor, layer: MatrixLayer) -> Tensor:
        result = torch.empty_like(x)
        with full_precision(grad, layer.dtype):
            for part in batch_parts(x.shape, x.device):
                if layer.fused:
                    symmetric = symmetric_gradient(grad[part], x.shape[1], layer.dtype)
                else:
                    symmetric = torch.lerp(grad[part], grad[part].mT, 0.5)
                gradient = layer.f.pullback(layer.matrices(x[part]), symmetric)
                if layer.fused:
                    gradient = features_gradient(gradient, x[part])
                result[part] = gradient.view(result[part].shape)
        return result


def matrix_map(cov: Tensor, f: MatrixMap, *, dtype: str | torch.dtype = torch.float64) -> Tensor:
    """Apply a `MatrixMap` to symmetric positive semi-definite matrices. Differentiable once.

    Args:
        cov: (B, d, d), or (..., d, d), any floating dtype; its symmetric part is used.
        f: `LogCholesky` or `SparseInverse`.
        dtype: working precision, float64 or float32, forward and backward.

    Returns:
        F(S), in the shape of `cov`; float64 for float64 input, else float32.

    Raises:
        ValueError: wrong shape, or another `dtype`.
        TypeError: not floating point.
    """
    batch, working = as_batch(cov), spectral_dtype(dtype)
    with full_precision(cov, working):
        result: Tensor = _MatrixMap.apply(batch.to(working), MatrixLayer(f, working, fused=False))[0]
        return result.to(result_dtype(cov)).reshape(cov.shape)


def matrix_descriptor(x: Tensor, f: MatrixMap, *, dtype: str | torch.dtype = torch.float64) -> Tensor:
    """Upper triangle of `matrix_map` of the covariance of local features, as one fused layer. Differentiable once.

    Args:
        x: local features, (B, d, H, W) or (B, d, M), any floating dtype.
        f, dtype: as in `matrix_map`.

    Returns:
        (B, d (d + 1) / 2); float64 for float64 input, else float32.

    Raises:
        ValueError, TypeError: as `covariance`, and ValueError for another `dtype`.
    """
    check_features(x)
    working = spectral_dtype(dtype)
    with full_precision(x, working):
        result: Tensor = _MatrixMap.apply(x, MatrixLayer(f, working, fused=True))[0]
        return result
