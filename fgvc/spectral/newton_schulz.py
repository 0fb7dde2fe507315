"""Matrix square root by Newton-Schulz iteration: matrix products only, no eigendecomposition."""

import torch
from torch import Tensor

from fgvc.spectral.precision import check_square, result_dtype, without_autocast


def newton_schulz_sqrt(cov: Tensor, iterations: int = 5) -> Tensor:
    """Approximate square root by coupled Newton-Schulz iteration, pre-scaled and re-scaled by the trace (iSQRT-COV).

    A = S / tr S, Y_0 = A, Z_0 = I; T = (3 I - Z Y) / 2, Y <- Y T, Z <- T Z; result sqrt(tr S) Y. Li, Xie, Wang, Gao
    (CVPR 2018). A zero matrix gives a zero result and a zero gradient. Computes in float64 with autocast off.

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
        identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        y = matrix / safe_trace
        t = (3 * identity - y) / 2  # Z_0 = I spares the first product
        y, z = y @ t, t
        for _ in range(iterations - 1):
            t = (3 * identity - z @ y) / 2
            y, z = y @ t, t @ z
        root = torch.where(positive, safe_trace.sqrt() * y, 0)
        return root.to(result_dtype(cov))
