"""The pooling modules. Each takes (B, C, H, W) and states the width of its descriptor as `out_features`."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fgvc.spectral import covariance, upper_triangle
from fgvc.spectral.eigen import symmetric_eigh
from fgvc.spectral.precision import result_dtype


class Pooling(nn.Module):
    """Base of the poolings: (B, channels, H, W) -> (B, out_features)."""

    channels: int
    out_features: int

    def extra_repr(self) -> str:
        return f"channels={self.channels}, out_features={self.out_features}"


class GlobalAveragePooling(Pooling):
    """Mean over the locations: (B, C, H, W) -> (B, C), float32 (float64 for float64 input)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = self.out_features = channels

    def forward(self, x: Tensor) -> Tensor:
        return x.to(result_dtype(x)).mean(dim=(2, 3))


class CovariancePooling(Pooling):
    """Covariance of the local features, normalised, its upper triangle as the descriptor.

    (B, C, H, W) -> (B, C (C + 1) / 2). Computes in float64 with autocast off; the result is float32, or float64 for
    float64 input.

    Args:
        channels: C.
        normalise: (B, C, C) -> (B, C, C) in float64, e.g. `fgvc.spectral.matrix_sqrt`.
    """

    def __init__(self, channels: int, normalise: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.channels = channels
        self.out_features = channels * (channels + 1) // 2
        self.normalise = normalise

    def forward(self, x: Tensor) -> Tensor:
        return upper_triangle(self.normalise(covariance(x))).to(result_dtype(x))


@torch.no_grad()
def pooling_spectrum(pool: Pooling, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Eigenvalues of the covariance that a pooling sees, and of the matrix it hands on.

    Args:
        pool: any pooling.
        x: its input, (B, C, H, W).

    Returns:
        before: (B, C) float64, descending, eigenvalues of the covariance of `x`.
        after: the same of the normalised matrix, or None for a pooling without one (GAP).
    """
    cov = covariance(x)
    before = symmetric_eigh(cov)[0].flip(-1)
    if not isinstance(pool, CovariancePooling):
        return before, None
    return before, symmetric_eigh(pool.normalise(cov))[0].flip(-1)
