"""The pooling modules on a covariance. Each takes (B, C, H, W) and states its descriptor's width as `out_features`."""

import torch
from torch import Tensor, nn

from fgvc.spectral import (
    EigenvalueMap,
    GradientRule,
    Keep,
    covariance,
    covariance_eigenvalues,
    newton_schulz_descriptor,
    newton_schulz_sqrt,
)
from fgvc.spectral.descriptor import layer_descriptor
from fgvc.spectral.eigen import symmetric_eigh
from fgvc.spectral.precision import check_whole_number, result_dtype, spectral_dtype
from fgvc.spectral.spectral_map import apply_layer, spectral_layer


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
    """Base of the poolings whose descriptor is the upper triangle of a normalised covariance.

    (B, C, H, W) -> (B, C (C + 1) / 2). Computes in float64, or float32 by option, with autocast off; the result is
    float32, or float64 for float64 input.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.out_features = channels * (channels + 1) // 2

    def normalise(self, cov: Tensor) -> Tensor:
        """The normalisation alone, (B, C, C) -> (B, C, C)."""
        raise NotImplementedError


class SpectralPooling(CovariancePooling):
    """Covariance normalised by a map of its eigenvalues; see `fgvc.spectral.spectral_descriptor`.

    Args:
        channels: C.
        f, gradient, keep, eigh_device, dtype: as in `spectral_descriptor`.

    Raises:
        ValueError: unknown gradient, one that does not apply to `f`, `keep` below 1 or no band, or another `dtype`.
    """

    def __init__(
        self,
        channels: int,
        f: EigenvalueMap,
        gradient: str | GradientRule,
        *,
        keep: Keep | None = None,
        eigh_device: str = "auto",
        dtype: str | torch.dtype = torch.float64,
    ) -> None:
        super().__init__(channels)
        self.layer = spectral_layer(f, gradient, keep, eigh_device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return layer_descriptor(x, self.layer)

    def normalise(self, cov: Tensor) -> Tensor:
        return apply_layer(cov, self.layer)


class NewtonSchulzPooling(CovariancePooling):
    """Covariance normalised by Newton-Schulz iteration (iSQRT-COV); see `fgvc.spectral.newton_schulz_descriptor`.

    Raises:
        ValueError: `iterations` below 1, or another `dtype`.
    """

    def __init__(self, channels: int, iterations: int, dtype: str | torch.dtype = torch.float64) -> None:
        super().__init__(channels)
        check_whole_number("iterations", iterations, least=1)
        self.iterations = iterations
        self.dtype = spectral_dtype(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return newton_schulz_descriptor(x, self.iterations, dtype=self.dtype)

    def normalise(self, cov: Tensor) -> Tensor:
        return newton_schulz_sqrt(cov, self.iterations, dtype=self.dtype)


@torch.no_grad()
def pooling_spectrum(pool: Pooling, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Eigenvalues of the covariance that a pooling sees, and of the matrix it hands on.

    Args:
        pool: any pooling.
        x: its input, (B, C, H, W).

    Returns:
        before: (B, C) float64, descending, eigenvalues of the covariance of `x`; see `covariance_eigenvalues`.
        after: the same of the normalised matrix, or None for a pooling without one (GAP, B-CNN, CBP).
    """
    before = covariance_eigenvalues(x)
    if not isinstance(pool, CovariancePooling):
        return before, None
    return before, symmetric_eigh(pool.normalise(covariance(x)))[0].flip(-1)
