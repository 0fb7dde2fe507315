"""What the spectral layers share: the precision they compute in, and checks of their arguments."""

import contextlib

import torch
from torch import Tensor


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """Context with autocast off on the device of `x`: a half-precision product would destroy small eigenvalues."""
    return torch.autocast(device_type=x.device.type, enabled=False)


def result_dtype(x: Tensor) -> torch.dtype:
    """Precision a layer hands on: float64 for float64 input, float32 for everything narrower."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_whole_number(name: str, value: int, least: int) -> None:
    """Raise ValueError where `value`, called `name` in the message, is no whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")


def check_square(matrix: Tensor) -> None:
    """Raise where `matrix` is not a batch of square floating-point matrices.

    Raises:
        ValueError: the shape is not (B, d, d).
        TypeError: the dtype is not floating point.
    """
    if matrix.dim() != 3 or matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(f"expected symmetric matrices of shape (B, d, d), got {tuple(matrix.shape)}")
    if not matrix.is_floating_point():
        raise TypeError(f"expected a floating-point matrix, got {matrix.dtype}")
