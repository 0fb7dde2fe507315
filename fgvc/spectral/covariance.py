"""Sample covariance of local features, and the vector that a classifier reads from a symmetric matrix."""

import torch
from torch import Tensor

from fgvc.spectral.precision import without_autocast


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
    if x.dim() not in (3, 4):
        raise ValueError(f"expected features of shape (B, C, H, W) or (B, C, M), got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"expected floating-point features, got {x.dtype}")
    with without_autocast(x):
        features = x.flatten(2).to(dtype)  # (B, C, M)
        locations = features.shape[-1]
        if locations == 0:
            raise ValueError(f"the features have no locations: shape {tuple(x.shape)}")
        centred = features - features.mean(dim=-1, keepdim=True)
        return centred @ centred.mT / locations


def upper_triangle(matrix: Tensor) -> Tensor:
    """Upper triangle with the diagonal, row by row, as a vector: the published descriptor of a symmetric matrix.

    The off-diagonal entries are not scaled by sqrt(2), as in the released code.

    Args:
        matrix: (B, d, d).

    Returns:
        (B, d (d + 1) / 2), same dtype.
    """
    d = matrix.shape[-1]
    rows, columns = torch.triu_indices(d, d, device=matrix.device)
    return matrix.flatten(-2).index_select(-1, rows * d + columns)
