"""Sample covariance of local features."""

import torch
from torch import Tensor

from fgvc.spectral.precision import full_precision


def covariance(x: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Covariance of the local features of each image: S = Xc Xc^T / M with Xc = X (I - 11^T / M).

    Divides by M, not M - 1, as in Li et al. (ICCV 2017, MPN-COV) and Song et al. (ICCV 2021). The features are centred
    in the working precision; the released code centres in float32, which differs by about 5e-5 relative where S is
    rank-deficient. rank(S) <= min(C, M - 1).

    Args:
        x: local features, (B, C, H, W) or (B, C, M), any floating dtype.
        dtype: working precision and dtype of the result. The papers use float64, as condition numbers reach 1e14.

    Returns:
        (B, C, C) in `dtype`, symmetric positive semi-definite up to rounding.

    Raises:
        ValueError: the shape is neither (B, C, H, W) nor (B, C, M), or M = 0.
        TypeError: `x` is not floating point.
    """
    check_features(x)
    with full_precision(x, dtype):
        features = centred(x, dtype)
        return features @ features.mT / features.shape[-1]


def check_features(x: Tensor) -> None:
    """Raise where `x` is not a batch of local features.

    Raises:
        ValueError: the shape is neither (B, C, H, W) nor (B, C, M), or M = 0.
        TypeError: `x` is not floating point.
    """
    if x.dim() not in (3, 4):
        raise ValueError(f"expected features of shape (B, C, H, W) or (B, C, M), got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"expected floating-point features, got {x.dtype}")
    if 0 in x.shape[1:]:
        raise ValueError(f"the features have no channels or no locations: shape {tuple(x.shape)}")


def centred(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Xc = X (I - 11^T / M): (B, C, H, W) or (B, C, M) -> (B, C, M) in `dtype`, the mean over locations taken off."""
    features = x.flatten(2).to(dtype)
    return features - features.mean(dim=-1, keepdim=True)
