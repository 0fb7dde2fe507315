"""Square root and Scaling Eigen Branch with their exact gradients by matrix products alone, in float64.

The square root is a coupled Newton-Schulz iteration, A = S / n with n = ||S||_F,

    Y_0 = A, Z_0 = I;  T = a (3 I - a^2 Z Y) / 2, Y <- Y T, Z <- T Z;  S^{1/2} = sqrt(n) Y,

scaled to converge: on the eigenvalues x^2 of Z Y it is x <- a x (3 - (a x)^2) / 2, and a^2 = 3 / (1 + l + l^2) maps
[l, 1] to the shortest interval that ends at 1 [Chen, Chow, 2014]. l starts at the smallest x that a stated condition
number allows, so that the number of steps is known before any eigenvalue is: 15 for 1e8 at d = 256, where a = 1 takes
30. The gradient C of the square root solves Q C + C Q = G. It is the corner of sign [[Q, G], [0, -Q]], by the same
steps [Roberts, 1980; Lin, Maji, BMVC 2017].

Nothing here depends on a value: no branch, and no wait for the device. So it cannot refuse either. What is singular or
beyond the condition number gives a finite result with a larger error, and a `ConditionWarning` at the next call.
"""

import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fgvc.spectral.covariance import batch_parts, check_features, upper_triangle
from fgvc.spectral.descriptor import batch_gram, features_gradient, symmetric_gradient
from fgvc.spectral.maps import SCALED_SQRT, SQRT, EigenvalueMap, Keep
from fgvc.spectral.precision import (
    EIGENVALUE_FLOOR,
    FirstDerivative,
    as_batch,
    full_precision,
    keep_for_backward,
    result_dtype,
    spectral_dtype,
)
from fgvc.spectral.rules import GRADIENTS, GradientRule

SOLVERS: tuple[str, ...] = ("eigh", "products")
"""Ways to compute a spectral layer: by an eigendecomposition, or by matrix products where there are such."""

CONDITION = 1e8
"""Condition number up to which the products give what an eigendecomposition gives."""

MOST_SQUARINGS = 20
"""Number of squarings in exp(-S), which bounds ||S||_F by 2^19; an error of 2^-53 grows by 2^20 at most."""

_CONVERGED = 1e-11  # of an eigenvalue of the last Y, relative
_MOST_SHORT = 1e-2  # tr(I - Z Y) before the last step, which squares what is left of it


class ConditionWarning(RuntimeWarning):
    """Covariances of an earlier call were outside of what solver "products" is made for."""


class ProductLayer(NamedTuple):
    """What is computed by products.

    Attributes:
        scaled: Whether it is the Scaling Eigen Branch, (1 + t) S^{1/2}, and not the square root.
        fused: Whether it leads from features to the upper triangle, and not from matrix to matrix.
        condition: Condition number that the number of steps is chosen for.
    """

    scaled: bool
    fused: bool = False
    condition: float = CONDITION


def uses_products(
    solver: str,
    f: EigenvalueMap,
    gradient: str | GradientRule,
    keep: Keep | None = None,
    dtype: str | torch.dtype = torch.float64,
) -> bool:
    """Whether a layer is computed by products.

    Raises:
        ValueError: unknown solver, or "products" of a layer other than the square root and the Scaling Eigen Branch of
            all eigenvalues, with another gradient than the exact one, or in float32.
    """
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}; choose one of {', '.join(SOLVERS)}")
    if solver == "eigh":
        return False
    if f not in (SQRT, SCALED_SQRT) or keep is not None:
        raise ValueError("solver 'products' has the square root and the Scaling Eigen Branch of all eigenvalues only")
    if gradient not in ("exact", GRADIENTS["exact"]):
        raise ValueError(f"solver 'products' has the exact gradient only, got {gradient!r}; give gradient='exact'")
    if spectral_dtype(dtype) != torch.float64:
        raise ValueError(f"solver 'products' computes in float64 only, got dtype {dtype}")
    return True


def scalings(d: int, condition: float) -> tuple[float, ...]:
    """The factors a of each step for d x d matrices of this condition number.

    Raises:
        ValueError: `condition` is below 1 or not finite.
    """
    if not 1 <= condition < math.inf:
        raise ValueError(f"the condition number must be a number of at least 1, got {condition!r}")
    smallest = (condition * math.sqrt(d)) ** -0.5  # ||S||_F is at most sqrt(d) times the largest eigenvalue
    factors: list[float] = []
    while not factors or 1 - smallest > _CONVERGED:
        a = math.sqrt(3 / (1 + smallest + smallest**2))
        factors.append(a)
        smallest = a * smallest * (3 - (a * smallest) ** 2) / 2
    return tuple(factors)


def _step(z: Tensor, y: Tensor, identity: Tensor, a: float) -> Tensor:
    """T = a (3 I - a^2 Z Y) / 2."""
    return torch.baddbmm(identity, z, y, beta=1.5 * a, alpha=-(a**3) / 2)


def square_root(matrix: Tensor, factors: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """S^{1/2} (B, d, d) of symmetric S, n (B, 1, 1), 0 where S is null, and the shortness (B,) of the last step.

    The shortness is what tr(Z Y) lacked before that step. Channels without variance do not count: their rows and
    columns are null in S and in S^{1/2}.
    """
    norm = torch.linalg.matrix_norm(matrix, keepdim=True)
    norm = torch.where(norm > EIGENVALUE_FLOOR, norm, 0)
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    y, a = matrix / _or_one(norm), factors[0]
    z = t = torch.add(1.5 * a * identity, y, alpha=-(a**3) / 2)  # Z Y = A for Z = I
    y = torch.bmm(y, t)
    for left, a in enumerate(factors[1:], start=2 - len(factors)):
        t = _step(z, y, identity, a)
        y = torch.bmm(y, t)
        if left:
            z = torch.bmm(t, z)
    traced = (3 * len(identity) - 2 / a * _diagonal(t).sum(-1)) / a**2  # tr(Z Y)
    short = _varies(_diagonal(matrix), norm).sum(-1) - traced
    return torch.lerp(y, y.mT, 0.5).mul_(norm.sqrt()), norm, short * (norm > 0).flatten()


def lyapunov(root: Tensor, norm: Tensor, grad: Tensor, factors: tuple[float, ...]) -> Tensor:
    """The C with Q C + C Q = G (B, d, d) for symmetric G, Q = S^{1/2} and n of S as `square_root` returns them.

    sign [[B, C], [0, -B]] = [[I, 2 C], [0, -I]] by the steps b <- b T, c <- a (3 c - a^2 (b^2 c + c b^2 - b c b)) / 2.
    """
    identity = torch.eye(root.shape[-1], dtype=root.dtype, device=root.device)
    scale = _or_one(norm).rsqrt()
    b, c = root * scale, grad * scale
    for left, a in enumerate(factors, start=1 - len(factors)):
        m = torch.bmm(c, b)
        m = torch.add(m, m.mT, alpha=-0.5)  # (m b) and its transpose: b^2 c + c b^2 - b c b
        half = torch.baddbmm(c, m, b, beta=0.75 * a, alpha=-(a**3) / 2)
        c = half + half.mT
        if left:
            b = torch.bmm(b, _step(b, b, identity, a))
    # between a channel without variance and another one the corner is C itself: the sign of a zero is zero
    varies = _varies(root.square().sum(-1), norm)  # the diagonal of S
    return c.mul_(torch.where(varies[:, :, None] == varies[:, None, :], 0.5, 1.0)).mul_(norm > 0)


def inverse_exponential(matrix: Tensor, norm: Tensor) -> Tensor:
    """exp(-S) (B, d, d) by the Taylor polynomial of degree 15 at S / 2^k, 2^k >= 2 n, and k squarings.

    The error of the polynomial is 2^-16 / 16! = 7e-19. `torch.linalg.matrix_exp` chooses its degree by the norm, for
    which it waits for the device.
    """
    squarings = torch.ceil(torch.log2(2 * norm)).clamp(min=0)
    x = -matrix * torch.exp2(-squarings)
    square = torch.bmm(x, x)
    powers = (torch.eye(x.shape[-1], dtype=x.dtype, device=x.device), x, square, torch.bmm(square, x))
    fourth, result = torch.bmm(square, square), torch.zeros_like(x)
    for degree in (12, 8, 4, 0):
        result = torch.bmm(result, fourth)
        for i, power in enumerate(powers):
            result = torch.add(result, power, alpha=1 / math.factorial(degree + i))
    counted = torch.arange(MOST_SQUARINGS, device=x.device) < squarings[..., None]
    for counts in counted.unbind(-1):
        result = torch.where(counts, torch.bmm(result, result), result)
    return result


def branch_scale(matrix: Tensor, root: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """t = ||Q exp(-S)||_F (B, 1, 1) of the Scaling Eigen Branch and dt/dS (B, d, d), 0 where t = 0.

    dt/dS = exp(-2 S) (I - 2 S) / (2 t). Both are made of exp(-S) and Q exp(-S), in which large eigenvalues vanish, and
    with them their rounding errors.
    """
    decay = inverse_exponential(matrix, norm)
    product = torch.bmm(root, decay)
    t = torch.linalg.matrix_norm(product, keepdim=True)
    slope = torch.baddbmm(torch.bmm(decay, decay), product, product.mT, alpha=-2)
    return t, slope.mul_(torch.where(t > 0, 0.5 / t, 0))


def _or_one(norm: Tensor) -> Tensor:
    return torch.where(norm > 0, norm, 1)


def _varies(variances: Tensor, norm: Tensor) -> Tensor:
    """Which channels have a variance (B, d) above rounding noise."""
    return variances > EIGENVALUE_FLOOR * norm[:, :, 0]


def _diagonal(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1)


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, layer: ProductLayer) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        items, d = x.shape[:2]
        factors = scalings(d, layer.condition)
        shape = (items, d * (d + 1) // 2) if layer.fused else (items, d, d)
        result = torch.empty(shape, dtype=result_dtype(x), device=x.device)
        sizes = (d, 1, 1, d) if layer.scaled else (d, 1, 0, 0)
        roots, norms, scales, slopes = (x.new_empty(items, size, size, dtype=torch.float64) for size in sizes)
        beyond = x.new_empty(items, dtype=torch.bool)
        for part in batch_parts(x.shape, x.device):
            if layer.fused:
                matrix = batch_gram(x[part], torch.float64, thin=False)
            else:
                matrix = torch.lerp(x[part], x[part].mT, 0.5)
            root, norm, short = square_root(matrix, factors)
            roots[part], norms[part] = root, norm
            beyond[part] = ~(short < _MOST_SHORT)  # NaN is, too
            if layer.scaled:
                t, slopes[part] = branch_scale(matrix, root, norm)
                scales[part], root = t, root * (1 + t)
                beyond[part] |= norm.flatten() > 2.0 ** (MOST_SQUARINGS - 1)
            result[part] = upper_triangle(root.to(result.dtype)) if layer.fused else root
        return result, beyond, roots, norms, scales, slopes

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ProductLayer], output: tuple[Tensor, ...]) -> None:
        x, ctx.layer = inputs
        keep_for_backward(ctx, x, *output[2:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, None]:
        return _ProductsGradient.of(grad, *ctx.saved_tensors, ctx.layer), None


class _ProductsGradient(FirstDerivative):
    @staticmethod
    def forward(
        grad: Tensor, x: Tensor, roots: Tensor, norms: Tensor, scales: Tensor, slopes: Tensor, layer: ProductLayer
    ) -> Tensor:
        d, result = x.shape[1], torch.empty_like(x)
        factors = scalings(d, layer.condition)
        with full_precision(grad, torch.float64):
            for part in batch_parts(x.shape, x.device):
                if layer.fused:
                    symmetric = symmetric_gradient(grad[part], d)
                else:
                    symmetric = torch.lerp(grad[part], grad[part].mT, 0.5)
                gradient = lyapunov(roots[part], norms[part], symmetric, factors)
                if layer.scaled:
                    along = (symmetric * roots[part]).sum(dim=(-2, -1), keepdim=True)  # <G, Q>
                    gradient.mul_(1 + scales[part]).add_(along * slopes[part])
                if layer.fused:
                    gradient = features_gradient(gradient, x[part])
                result[part] = gradient.view(result[part].shape)
        return result


class _Pending:
    """The flag of one call, on its way from the device to a later call."""

    def __init__(self) -> None:
        self.flag: Tensor | None = None
        self.arrived: torch.Event | None = None

    def show(self, beyond: Tensor) -> None:
        """Warn if the flag of an earlier call is up; then keep this one. Never waits for a device."""
        if torch.compiler.is_compiling() or type(beyond) is not Tensor:  # a stand-in, while a model is traced
            return
        if self.flag is not None:
            if self.arrived is not None and not self.arrived.query():
                return
            if bool(self.flag):
                warnings.warn(
                    "an earlier call had covariances that are singular, beyond the condition number that solver "
                    f"'products' is made for ({CONDITION:.0e} by default), not finite, or (Scaling Eigen Branch) of a "
                    f"norm above 2^{MOST_SQUARINGS - 1}: it is inexact there; use solver 'eigh', or fewer channels",
                    ConditionWarning,
                    stacklevel=4,
                )
        self.flag, self.arrived = beyond.any(), None
        if beyond.is_cuda:  # not run: there was no GPU
            self.flag = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(self.flag, non_blocking=True)
            self.arrived = torch.Event(beyond.device)
            self.arrived.record()


_pending = _Pending()


def _apply(x: Tensor, layer: ProductLayer) -> Tensor:
    with full_precision(x, torch.float64):
        result: Tensor
        result, beyond, *_ = _Products.apply(x, layer)
        _pending.show(beyond)
        return result


def products_map(cov: Tensor, f: EigenvalueMap = SQRT, *, condition: float = CONDITION) -> Tensor:
    """The square root or the Scaling Eigen Branch of symmetric positive definite matrices, with the exact gradient.

    As `spectral_map` with gradient "exact", for condition numbers up to `condition`; docs/spectral.md has the errors
    beyond. A null eigenvalue, which gets no gradient there, gets a large finite one here. Differentiable once.

    Args:
        cov: (B, d, d), or (..., d, d), any floating dtype; its symmetric part is used.
        f: `SQRT` or `SCALED_SQRT`.
        condition: condition number that the number of steps is chosen for.

    Returns:
        In the shape of `cov`; float64 for float64 input, else float32.

    Raises:
        ValueError: wrong shape, another map, or a condition number below 1.
        TypeError: not floating point.
    """
    uses_products("products", f, "exact")
    result = _apply(as_batch(cov).double(), ProductLayer(f == SCALED_SQRT, condition=condition))
    return result.to(result_dtype(cov)).reshape(cov.shape)


def products_descriptor(x: Tensor, f: EigenvalueMap = SQRT, *, condition: float = CONDITION) -> Tensor:
    """Upper triangle of `products_map` of the covariance of local features, as one fused layer.

    Args:
        x: local features, (B, d, H, W) or (B, d, M), any floating dtype. The covariance is singular for M <= d.
        f, condition: as in `products_map`.

    Returns:
        (B, d (d + 1) / 2); float64 for float64 input, else float32.

    Raises:
        ValueError, TypeError: as `covariance`, and ValueError as `products_map`.
    """
    uses_products("products", f, "exact")
    check_features(x)
    return _apply(x, ProductLayer(f == SCALED_SQRT, fused=True, condition=condition))
