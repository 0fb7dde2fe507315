"""The vector that a classifier reads from a symmetric matrix, and the way back."""

import torch
from torch import Tensor

Positions = tuple[Tensor, Tensor]
_cache: dict[tuple[int, torch.device], Positions] = {}


def _positions(d: int, device: torch.device) -> Positions:
    """Index tensors of the upper triangle, row by row, of a (d, d) matrix.

    Returns:
        where each of its entries stands in the flattened matrix, (d (d + 1) / 2,), and where each entry of the
        flattened symmetric matrix stands in the triangle, (d * d,).
    """
    if (d, device) in _cache:
        return _cache[d, device]
    with torch.inference_mode(False):  # an inference tensor could not be saved for a later backward pass
        rows, columns = torch.triu_indices(d, d, device=device)
        index = torch.arange(d, device=device)
        low, high = torch.minimum(index[:, None], index), torch.maximum(index[:, None], index)
        # row `low` of the triangle begins after low rows of lengths d, d - 1, ...
        from_triangle = low * d - low * (low - 1) // 2 + high - low
        positions = rows * d + columns, from_triangle.flatten()
    if type(rows) is Tensor:  # not one of those that stand for it while a model is traced
        _cache[d, device] = positions
    return positions


def upper_triangle(matrix: Tensor) -> Tensor:
    """Upper triangle with the diagonal, row by row, as a vector: the published descriptor of a symmetric matrix.

    The off-diagonal entries are not scaled by sqrt(2), as in the released code.

    Args:
        matrix: (B, d, d).

    Returns:
        (B, d (d + 1) / 2), same dtype.
    """
    return matrix.flatten(-2).index_select(-1, _positions(matrix.shape[-1], matrix.device)[0])


def symmetric_from_triangle(vector: Tensor, d: int) -> Tensor:
    """The symmetric matrix with this upper triangle: (B, d (d + 1) / 2) -> (B, d, d), same dtype."""
    return vector.index_select(-1, _positions(d, vector.device)[1]).view(*vector.shape[:-1], d, d)
