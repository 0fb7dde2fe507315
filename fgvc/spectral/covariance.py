"""Sample covariance of local features, the upper triangle that a classifier reads, and batches in parts.

Shapes: B images, C = d channels, M = H * W locations.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fgvc.spectral.precision import full_precision, spectral_dtype

_CACHE_NUMBERS = 1 << 17
"""Numbers (1 MB of float64) that one temporary of a part of a batch may hold."""

Positions = tuple[Tensor, Tensor]
_positions_by_size: dict[tuple[int, torch.device], Positions] = {}


def covariance(x: Tensor, dtype: torch.dtype | str = torch.float64) -> Tensor:
    """Covariance of the local features of each image: S = Xc Xc^T / M with Xc = X (I - 11^T / M).

    Divides by M, not M - 1, as in Li et al. (ICCV 2017, MPN-COV) and Song et al. (ICCV 2021). The features are centred
    in the working precision; the released code centres in float32, which differs by about 5e-5 relative where S is
    rank-deficient. rank(S) <= min(C, M - 1).

    Args:
        x: local features, (B, C, H, W) or (B, C, M), any floating dtype.
        dtype: working precision and dtype of the result, float64 or float32, also by name. The papers use float64, as
            condition numbers reach 1e14.

    Returns:
        (B, C, C) in `dtype`, symmetric positive semi-definite up to rounding.

    Raises:
        ValueError: the shape is neither (B, C, H, W) nor (B, C, M), or M = 0; or another `dtype`.
        TypeError: `x` is not floating point.
    """
    check_features(x)
    dtype = spectral_dtype(dtype)
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


def batch_parts(shape: torch.Size, device: torch.device) -> Iterator[slice]:
    """Slices that cover a batch of features (B, d, ...) or of matrices (B, d, d).

    On a CPU neither the features of a part nor its d x d matrices leave the cache, and only one part's temporaries
    exist at a time. On other devices one slice covers all. So it does in `torch.export`, whose graph must hold for a
    batch of any size.
    """
    if torch.compiler.is_exporting():
        return iter((slice(None),))
    items, d, locations = shape[0], shape[1], math.prod(shape[2:])
    size = items if device.type != "cpu" else _CACHE_NUMBERS // max(d * max(d, locations), 1)
    size = max(size, 1)
    return (slice(start, start + size) for start in range(0, items, size))


def upper_triangle(matrix: Tensor) -> Tensor:
    """Upper triangle with the diagonal, row by row, as a vector: the published descriptor of a symmetric matrix.

    The off-diagonal entries are not scaled by sqrt(2), as in the released code.

    Args:
        matrix: (B, d, d).

    Returns:
        (B, d (d + 1) / 2), same dtype.

    Raises:
        ValueError: the matrices are not square.
    """
    if matrix.dim() < 2 or matrix.shape[-2] != matrix.shape[-1]:
        raise ValueError(f"expected square matrices (B, d, d), got {tuple(matrix.shape)}")
    return matrix.flatten(-2).index_select(-1, _positions(matrix.shape[-1], matrix)[0])


def symmetric_from_triangle(vector: Tensor, d: int) -> Tensor:
    """The symmetric matrix with this upper triangle: (B, d (d + 1) / 2) -> (B, d, d), same dtype.

    Raises:
        ValueError: another number of entries than d (d + 1) / 2.
    """
    if vector.shape[-1] != d * (d + 1) // 2:
        raise ValueError(f"expected {d * (d + 1) // 2} entries of a triangle for d={d}, got {tuple(vector.shape)}")
    return vector.index_select(-1, _positions(d, vector)[1]).view(*vector.shape[:-1], d, d)


def _positions(d: int, indexed: Tensor) -> Positions:
    """Index tensors of the upper triangle, row by row, of a (d, d) matrix, for a tensor on its device.

    Returns:
        Place of each entry of the triangle in the flattened matrix, (d (d + 1) / 2,), and place of each entry of the
        flattened symmetric matrix in the triangle, (d * d,).
    """
    device, kept = indexed.device, type(indexed) is Tensor and not torch.compiler.is_compiling()
    if kept and (d, device) in _positions_by_size:  # not for a stand-in while a model is traced
        return _positions_by_size[d, device]
    with torch.inference_mode(False):  # an inference tensor could not be saved for a later backward pass
        rows, columns = torch.triu_indices(d, d, device=device)
        index = torch.arange(d, device=device)
        low, high = torch.minimum(index[:, None], index), torch.maximum(index[:, None], index)
        # row `low` of the triangle begins after low rows of lengths d, d - 1, ...
        from_triangle = low * d - low * (low - 1) // 2 + high - low
        positions = rows * d + columns, from_triangle.flatten()
    if kept and type(rows) is Tensor:
        _positions_by_size[d, device] = positions
    return positions
