"""Matrix square root by Newton-Schulz iteration: matrix products only, no eigendecomposition.

With A = S / tau, tau = tr S, the coupled iteration of Li, Xie, Wang, Gao (CVPR 2018, iSQRT-COV),

    Y_0 = A, Z_0 = I;  T = (3 I - Z Y) / 2, Y <- Y T, Z <- T Z;  result sqrt(tau) Y_N,

keeps all its matrices polynomials in A. In terms of the residual E = I - Z Y it reads

    E_0 = I - A;  E <- (3 E^2 + E^3) / 4,  P <- P (I + E / 2),

where P is Y from Y_0 = A, or Z from Z_0 = I. Two things follow. The derivative of a polynomial of a symmetric matrix
is its own adjoint, so the backward pass is the same recursion on tangents, and the sums of a product and its transpose
in it cost one product: 32 products for five iterations, forward and backward, instead of 36. And of each iteration only
E has to be kept. With fewer locations than channels, Z of the M x M Gram matrix gives the same result:
sqrt(tau) Y(S / tau) = Xc Z(Xc^T Xc / (M tau)) Xc^T / (M sqrt(tau)).
"""

from typing import Any, Literal

import torch
from torch import Tensor

from fgvc.spectral.covariance import batch_parts, centred, check_features, covariance, upper_triangle
from fgvc.spectral.descriptor import batch_gram, features_gradient, is_thin, symmetric_gradient
from fgvc.spectral.precision import (
    FirstDerivative,
    as_batch,
    check_iterations,
    full_precision,
    keep_for_backward,
    result_dtype,
    spectral_dtype,
)

Iterate = Literal["y", "z"]


def _identity(a: Tensor) -> Tensor:
    return torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)


def _first_iterate(a: Tensor, iterate: Iterate, square: Tensor) -> Tensor:
    if iterate == "y":
        return torch.add(1.5 * a, square, alpha=-0.5)
    return torch.add(1.5 * _identity(a), a, alpha=-0.5)


def iterate_forward(a: Tensor, iterations: int, iterate: Iterate) -> tuple[Tensor, list[Tensor]]:
    """P_N and the residuals E_1 ... E_{N-1} of symmetric A (B, n, n), each of that shape."""
    square = torch.bmm(a, a)
    p = _first_iterate(a, iterate, square)
    residuals: list[Tensor] = []
    for step in range(1, iterations):
        if step == 1:  # E_1 = (I - A)^2 (4 I - A) / 4 = I - 9/4 A + 3/2 A^2 - 1/4 A^3
            e = torch.baddbmm(1.5 * square - 2.25 * a + _identity(a), square, a, alpha=-0.25)
        else:
            square = torch.bmm(e, e)
            e = torch.baddbmm(square, square, e, beta=0.75, alpha=0.25)
        residuals.append(e)
        p = torch.baddbmm(p, p, e, alpha=0.5)
    return p, residuals


def iterate_tangent(a: Tensor, residuals: list[Tensor], direction: Tensor, iterate: Iterate) -> Tensor:
    """Derivative of P_N at A in a symmetric direction, (B, n, n); it is also the gradient for dLoss/dP_N = direction.

    [E^2]' = M + M^T and [E^3]' = X + X^T with M = E' E, X = (M + M^T / 2) E.
    """
    m = torch.bmm(direction, a)
    tangent = 1.5 * direction - 0.5 * (m + m.mT) if iterate == "y" else -0.5 * direction
    if not residuals:
        return tangent
    p = _first_iterate(a, iterate, torch.bmm(a, a) if iterate == "y" else a)
    x = torch.bmm(m + m.mT / 2, a)
    e_tangent = 1.5 * (m + m.mT) - 2.25 * direction - 0.25 * (x + x.mT)
    for step, e in enumerate(residuals):
        tangent = torch.baddbmm(torch.baddbmm(tangent, tangent, e, alpha=0.5), p, e_tangent, alpha=0.5)
        if step < len(residuals) - 1:
            p = torch.baddbmm(p, p, e, alpha=0.5)
            m = torch.bmm(e_tangent, e)
            x = torch.baddbmm(m, m + m.mT / 2, e, beta=0.75, alpha=0.25)
            e_tangent = x + x.mT
    return tangent


def dot(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> of each pair of matrices, (B, n, m) -> (B, 1, 1)."""
    product: Tensor = torch.linalg.vecdot(a.flatten(1), b.flatten(1))
    return product[:, None, None]


def safe_trace(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The trace (B, 1, 1), 1 where it is not positive, and whether it was: the slope of sqrt at 0 is infinite."""
    trace = matrix.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    positive = trace > 0
    return torch.where(positive, trace, 1), positive


def sqrt_forward(matrix: Tensor, iterations: int) -> tuple[Tensor, list[Tensor]]:
    """F = sqrt(tau) Y_N of symmetric S (B, d, d), and the residuals that `sqrt_backward` needs, each (B, d, d)."""
    trace, positive = safe_trace(matrix)
    y, residuals = iterate_forward(matrix / trace, iterations, "y")
    return y.mul_(torch.where(positive, trace.sqrt(), 0)), residuals


def sqrt_backward(grad: Tensor, matrix: Tensor, result: Tensor, residuals: list[Tensor]) -> Tensor:
    """dLoss/dS (B, d, d) for symmetric G = dLoss/dF (B, d, d), F = `result`."""
    trace, positive = safe_trace(matrix)
    root = trace.sqrt()
    a = matrix / trace
    to_a = iterate_tangent(a, residuals, grad, "y")  # without the factor sqrt(tau)
    through_trace = dot(grad, result) / (2 * trace) - dot(to_a, a) / root
    to_a.div_(root).diagonal(dim1=-2, dim2=-1).add_(through_trace[:, :, 0])
    return to_a.mul_(positive)


def thin_forward(x: Tensor, gram: Tensor, iterations: int) -> tuple[Tensor, list[Tensor]]:
    """F = sqrt(tau) Y_N of the covariance (B, d, d) from features (B, d, ...) and their Gram matrix (B, M, M).

    The second result is what `thin_backward` needs, each (B, M, M): Z scaled so that F = Xc Z Xc^T, and the residuals.
    """
    trace, positive = safe_trace(gram)
    z, residuals = iterate_forward(gram / trace, iterations, "z")
    features = centred(x, gram.dtype)  # (B, d, M)
    z = z.mul_(torch.where(positive, trace.rsqrt() / features.shape[-1], 0))
    return torch.bmm(torch.bmm(features, z), features.mT), [z, *residuals]


def thin_backward(grad: Tensor, x: Tensor, gram: Tensor, z: Tensor, residuals: list[Tensor]) -> Tensor:
    """dLoss/dXc (B, d, M) for symmetric G = dLoss/dF (B, d, d)."""
    trace, positive = safe_trace(gram)
    a, features = gram / trace, centred(x, gram.dtype)
    locations = features.shape[-1]
    half = torch.bmm(grad, features)
    to_z = torch.bmm(features.mT, half)  # gradient of the scaled Z
    to_a = iterate_tangent(a, residuals, to_z, "z").mul_(torch.where(positive, trace.rsqrt() / locations, 0))
    through_trace = -dot(to_z, z) / (2 * trace) - dot(to_a, a) / trace
    to_gram = to_a.div_(trace)
    to_gram.diagonal(dim1=-2, dim2=-1).add_(through_trace[:, :, 0])
    return torch.baddbmm(torch.bmm(half, z), features, to_gram, beta=2, alpha=2 / locations)


def _room(like: Tensor, count: int) -> Tensor:
    """(B, n, n) for each of `count` matrices to keep, as one tensor (count, B, n, n)."""
    return like.new_empty(count, *like.shape)


def _keep(room: Tensor, part: slice, matrices: list[Tensor]) -> None:
    for kept, matrix in zip(room, matrices, strict=True):
        kept[part] = matrix


class _NewtonSchulz(torch.autograd.Function):
    @staticmethod
    def forward(matrix: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
        symmetric = torch.lerp(matrix, matrix.mT, 0.5)
        result, room = torch.empty_like(symmetric), _room(symmetric, iterations - 1)
        for part in batch_parts(matrix.shape, matrix.device):
            result[part], residuals = sqrt_forward(symmetric[part], iterations)
            _keep(room, part, residuals)
        return result, room

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: tuple[Tensor, Tensor]) -> None:
        result, room = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(room)
        ctx.save_for_backward(inputs[0], result, room)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, None]:
        return _NewtonSchulzGradient.of(grad, *ctx.saved_tensors), None


class _NewtonSchulzGradient(FirstDerivative):
    @staticmethod
    def forward(grad: Tensor, matrix: Tensor, result: Tensor, room: Tensor) -> Tensor:
        gradient = torch.empty_like(result)
        with full_precision(grad, matrix.dtype):
            for part in batch_parts(matrix.shape, matrix.device):
                symmetric, to_result = (torch.lerp(m[part], m[part].mT, 0.5) for m in (matrix, grad))
                gradient[part] = sqrt_backward(to_result, symmetric, result[part], [e[part] for e in room])
        return gradient


class _NewtonSchulzDescriptor(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, iterations: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        gram = batch_gram(x, dtype, thin=is_thin(x))
        d, room = x.shape[1], _room(gram, iterations)
        result = torch.empty(x.shape[0], d * (d + 1) // 2, dtype=result_dtype(x), device=x.device)
        for part in batch_parts(x.shape, x.device):
            if is_thin(x):
                matrix, kept = thin_forward(x[part], gram[part], iterations)
            else:
                matrix, residuals = sqrt_forward(gram[part], iterations)
                kept = [matrix, *residuals]
            _keep(room, part, kept)
            result[part] = upper_triangle(matrix.to(result.dtype))
        return result, gram, room

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int, torch.dtype], output: tuple[Tensor, Tensor, Tensor]) -> None:
        keep_for_backward(ctx, inputs[0], *output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, None, None]:
        return _NewtonSchulzDescriptorGradient.of(grad, *ctx.saved_tensors), None, None


class _NewtonSchulzDescriptorGradient(FirstDerivative):
    @staticmethod
    def forward(grad: Tensor, x: Tensor, gram: Tensor, room: Tensor) -> Tensor:
        result = torch.empty_like(x)
        with full_precision(grad, gram.dtype):
            for part in batch_parts(x.shape, x.device):
                symmetric = symmetric_gradient(grad[part], x.shape[1], gram.dtype)
                first, *residuals = (matrix[part] for matrix in room)
                if is_thin(x):
                    gradient = thin_backward(symmetric, x[part], gram[part], first, residuals)
                else:
                    gradient = features_gradient(sqrt_backward(symmetric, gram[part], first, residuals), x[part])
                result[part] = gradient.view(result[part].shape)
        return result


def _plain_sqrt(matrix: Tensor, iterations: int) -> Tensor:
    """sqrt(tau) Y_N in operations that every exporter knows."""
    trace = matrix.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    y, _ = iterate_forward(matrix / torch.where(trace > 0, trace, 1), iterations, "y")
    return trace.clamp(min=0).sqrt() * y


def newton_schulz_sqrt(cov: Tensor, iterations: int = 5, *, dtype: str | torch.dtype = torch.float64) -> Tensor:
    """Approximate square root by coupled Newton-Schulz iteration, pre-scaled and re-scaled by the trace (iSQRT-COV).

    A = S / tr S, Y_0 = A, Z_0 = I; T = (3 I - Z Y) / 2, Y <- Y T, Z <- T Z; result sqrt(tr S) Y. Li, Xie, Wang, Gao
    (CVPR 2018). A zero matrix gives a zero result and a zero gradient. Computes in `dtype` with autocast off.
    Differentiable once; a second derivative raises RuntimeError. `torch.onnx.export` can export it.

    Args:
        cov: symmetric positive semi-definite, (B, d, d) or (..., d, d), any floating dtype; its symmetric part is used.
        iterations: number of iterations, from 1 to 100.
        dtype: working precision, float64 or float32, forward and backward.

    Returns:
        In the shape of `cov`; float64 for float64 input, else float32.

    Raises:
        ValueError: wrong shape, `iterations` out of range, or another `dtype`.
        TypeError: not floating point.
    """
    batch = as_batch(cov)
    check_iterations(iterations)
    working = spectral_dtype(dtype)
    if torch.compiler.is_exporting():
        return _plain_sqrt(batch.to(working), iterations).to(result_dtype(cov)).reshape(cov.shape)
    with full_precision(cov, working):
        result: Tensor = _NewtonSchulz.apply(batch.to(working), iterations)[0]
        return result.to(result_dtype(cov)).reshape(cov.shape)


def newton_schulz_descriptor(x: Tensor, iterations: int = 5, *, dtype: str | torch.dtype = torch.float64) -> Tensor:
    """Upper triangle of the Newton-Schulz square root of the covariance of local features, as one fused layer.

    The same as `upper_triangle(newton_schulz_sqrt(covariance(x), iterations))` and its gradient, in less time and
    memory; with fewer locations than channels it iterates on the M x M Gram matrix. Differentiable once.

    Args:
        x: local features, (B, d, H, W) or (B, d, M), any floating dtype.
        iterations: number of iterations, from 1 to 100.
        dtype: working precision, float64 or float32, forward and backward.

    Returns:
        (B, d (d + 1) / 2); float64 for float64 input, else float32.

    Raises:
        ValueError: wrong shape, `iterations` out of range, or another `dtype`.
        TypeError: not floating point.
    """
    check_features(x)
    check_iterations(iterations)
    working = spectral_dtype(dtype)
    if torch.compiler.is_exporting():
        return upper_triangle(_plain_sqrt(covariance(x, working), iterations)).to(result_dtype(x))
    with full_precision(x, working):
        result: Tensor = _NewtonSchulzDescriptor.apply(x, iterations, working)[0]
        return result
