"""Matrix square root by Newton-Schulz iteration: matrix products only, no eigendecomposition."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fgvc.spectral.precision import check_square, result_dtype, without_autocast


class _NewtonSchulz(torch.autograd.Function):
    """A -> Y_N with Y_0 = A, Z_0 = I; T = (3 I - Z Y) / 2, Y <- Y T, Z <- T Z, for matrices A (B, d, d).

    The backward pass is the recursion of Li et al. (CVPR 2018) with every sum folded into a product (baddbmm).
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, iterations: int) -> Tensor:
        three_halves = 1.5 * torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
        t = three_halves - a / 2  # Z_0 = I spares two products
        y, z = a @ t, t
        iterates = [a, t]
        for step in range(1, iterations):
            t = torch.baddbmm(three_halves, z, y, alpha=-0.5)
            iterates += [y, z, t]
            y = y @ t
            if step < iterations - 1:  # the last Z is never used
                z = t @ z
        ctx.save_for_backward(*iterates)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        a, t_0, *rest = ctx.saved_tensors
        grad_y, grad_z = grad, None
        for index in reversed(range(0, len(rest), 3)):
            y, z, t = rest[index : index + 3]
            if grad_z is None:
                grad_t = y.mT @ grad_y
                grad_z = grad_t @ y.mT * -0.5
            else:
                grad_t = torch.baddbmm(y.mT @ grad_y, grad_z, z.mT)
                grad_z = torch.baddbmm(t.mT @ grad_z, grad_t, y.mT, alpha=-0.5)
            grad_y = torch.baddbmm(grad_y @ t.mT, z.mT, grad_t, alpha=-0.5)
        grad_t = a.mT @ grad_y
        if grad_z is not None:
            grad_t = grad_t + grad_z
        return grad_y @ t_0.mT - grad_t / 2, None


def newton_schulz_sqrt(cov: Tensor, iterations: int = 5) -> Tensor:
    """Approximate square root by coupled Newton-Schulz iteration, pre-scaled and re-scaled by the trace (iSQRT-COV).

    A = S / tr S, Y_0 = A, Z_0 = I; T = (3 I - Z Y) / 2, Y <- Y T, Z <- T Z; result sqrt(tr S) Y. Li, Xie, Wang, Gao
    (CVPR 2018). A zero matrix gives a zero result and a zero gradient. Computes in float64 with autocast off.
    Differentiable once; a second derivative raises RuntimeError.

    Args:
        cov: symmetric positive semi-definite, (B, d, d), any floating dtype.
        iterations: number of iterations, at least 1.

    Returns:
        (B, d, d); float64 for float64 input, else float32.

    Raises:
        ValueError: wrong shape, or `iterations` below 1.
        TypeError: not floating point.
    """
    check_square(cov)
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    with without_autocast(cov):
        matrix = cov.double()
        trace = matrix.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]  # (B, 1, 1)
        positive = trace > 0
        # the slope of sqrt at 0 is infinite: a zero matrix takes a path without it
        safe_trace = torch.where(positive, trace, 1)
        y: Tensor = _NewtonSchulz.apply(matrix / safe_trace, iterations)
        root = torch.where(positive, safe_trace.sqrt(), 0) * y
        return root.to(result_dtype(cov))
