"""How far two versions of the same numbers are apart, and whether they are the same to the last bit."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from fgvc.errors import RunError


class Distance(NamedTuple):
    """Two versions of the numbers called `name`.

    Attributes:
        name: of a column, an array or a set of weights.
        total, differing: how many values (of weights: tensors), and how many are not the same to the last bit.
        largest: absolute difference; infinite where one side alone is not finite, is missing or is other text.
        relative: of an array, `largest` by the largest finite value; of weights, the norm of the difference by the
            norm; both of the first version. None for a column.
        where: the first epoch that differs, or the tensor that differs most; None where nothing does.
    """

    name: str
    total: int
    differing: int
    largest: float
    relative: float | None = None
    where: str | None = None


def array_distance(name: str, first: np.ndarray, second: np.ndarray) -> Distance:
    """Of two arrays of numbers. Raises RunError where they are not, or differ in shape or type."""
    if (first.shape, first.dtype) != (second.shape, second.dtype) or first.dtype.kind not in "biuf":
        raise RunError(f"{name} is {first.dtype} {first.shape} and {second.dtype} {second.shape}")
    differing, largest = _differing(first, second), _largest(first, second)
    scale = float(np.abs(first[np.isfinite(first)]).max(initial=0))
    return Distance(name, first.size, int(differing.sum()), largest, largest / scale if scale else None)


def weights_distance(name: str, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> Distance:
    """Of two sets of tensors. Raises RunError where they differ in names, shapes or types.

    Counters (of steps, in batch normalisation) count among those that differ, in `largest` only where no other does.
    """
    kinds = [{key: (tuple(t.shape), t.dtype) for key, t in tensors.items()} for tensors in (first, second)]
    if kinds[0] != kinds[1]:
        odd = sorted(key for key in {**first, **second} if kinds[0].get(key) != kinds[1].get(key))
        raise RunError(f"the {name} weights are of other tensors ({len(odd)}, the first {odd[0]})")
    most: tuple[bool, float, str | None] = (False, 0.0, None)
    differing = 0
    square, square_of_difference = 0.0, 0.0
    for key, before in first.items():
        a, b = (tensor.detach().to(torch.float64).numpy() for tensor in (before, second[key]))
        if before.is_floating_point():
            square += float((a**2).sum())
            square_of_difference += float(((b - a) ** 2).sum())
        if not _bits(before).equal(_bits(second[key])):
            differing += 1
            found = (before.is_floating_point(), _largest(a, b), key)
            most = max(most, found, key=lambda entry: entry[:2])
    relative = (square_of_difference / square) ** 0.5 if square else None
    return Distance(name, len(first), differing, most[1], relative, most[2])


def column_distance(first: pd.Series, second: pd.Series) -> Distance:
    """Of two columns of text, indexed by epoch: numbers where all of it are, an empty cell for NaN."""
    name, epochs = str(first.name), first.index.union(second.index, sort=False)
    a, b = (column.reindex(epochs, fill_value="missing") for column in (first, second))
    try:
        values = [column.replace("", "nan").astype(float).to_numpy() for column in (a, b)]
        differing, largest = _differing(*values), _largest(*values)
    except ValueError:
        differing = (a != b).to_numpy()
        largest = float("inf") if differing.any() else 0.0
    where = str(epochs[differing][0]) if differing.any() else None
    return Distance(name, len(epochs), int(differing.sum()), largest, where=where)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _differing(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Which values, of two arrays of one shape and type, are not the same to the last bit; one-dimensional."""
    a, b = (np.ascontiguousarray(array).reshape(-1, 1).view(np.uint8) for array in (first, second))
    differing: np.ndarray = (a != b).any(axis=1)
    return differing


def _largest(first: np.ndarray, second: np.ndarray) -> float:
    """Largest absolute difference; what is equal, or NaN on both sides, differs by nothing."""
    a, b = first.astype(np.float64), second.astype(np.float64)
    apart = ~((a == b) | (np.isnan(a) & np.isnan(b)))
    with np.errstate(invalid="ignore"):
        distances = np.abs(a[apart] - b[apart])
    return float(np.nan_to_num(distances, nan=np.inf, posinf=np.inf).max(initial=0))
