"""What the spectral layers share: the precision they compute in, checks of their arguments, their one derivative."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

SPECTRAL_DTYPES: dict[str, torch.dtype] = {"float64": torch.float64, "float32": torch.float32}
"""Working precisions of the spectral layers by name; the first is the default, and what the papers use."""


def spectral_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The working precision of this name; a dtype that is one of them is returned unchanged.

    Raises:
        ValueError: no such precision; the message lists the names.
    """
    found = SPECTRAL_DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise ValueError(f"unknown dtype {dtype!r} of a spectral layer; choose one of {', '.join(SPECTRAL_DTYPES)}")
    return found


EIGENVALUE_FLOOR: float = torch.finfo(torch.float64).eps
"""Eigenvalues up to this value are set to it in the forward pass, as in the released layers (2.2e-16)."""


def eigenvalue_floor(dtype: torch.dtype) -> float:
    """`EIGENVALUE_FLOOR` for eigenvalues that carry the rounding noise of `dtype`: 1.2e-7 in float32.

    Null eigenvectors of a float32 decomposition lean into the range of the matrix by about 1e-7; the published
    gradients let the slope of the map at the floor through to them, 3e7 for the square root at 2.2e-16.
    """
    return torch.finfo(dtype).eps


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """Context with autocast off on the device of `x`: a half-precision product would destroy small eigenvalues."""
    return torch.autocast(device_type=x.device.type, enabled=False)


@contextlib.contextmanager
def full_precision(x: Tensor, dtype: torch.dtype) -> Iterator[None]:
    """Context in which products in `dtype` on the device of `x` are computed in that precision.

    Autocast is off, and products of float32 matrices use neither TF32 nor bfloat16, whatever the program allows.
    A backward pass has to enter it itself: one that is started under autocast stays under autocast.
    """
    with without_autocast(x), _full_float32() if dtype == torch.float32 else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _full_float32() -> Iterator[None]:
    """Full float32 products on CPU and CUDA. The settings hold for the whole process; not run on CUDA."""
    if torch.compiler.is_exporting():  # a graph holds no settings of a process
        yield
        return
    restore = _forbid_narrow_products()
    try:
        yield
    finally:
        restore()


def _forbid_narrow_products() -> Callable[[], None]:
    """Forbid products of float32 matrices in a narrower format; returns a function that restores the settings."""
    if not hasattr(torch.backends.mkldnn, "matmul"):  # torch before 2.9
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        return lambda: torch.set_float32_matmul_precision(before)
    backends: list[Any] = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]
    allowed = [backend.fp32_precision for backend in backends]

    def allow(precisions: list[str]) -> None:
        for backend, precision in zip(backends, precisions, strict=True):
            backend.fp32_precision = precision

    allow(["ieee", "ieee"])
    return lambda: allow(allowed)


def result_dtype(x: Tensor) -> torch.dtype:
    """Dtype of a layer's result: float64 for float64 input, float32 for everything narrower."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_whole_number(name: str, value: int, least: int, most: int = 10_000) -> None:
    """Raise ValueError where `value`, called `name` in the message, is no whole number from `least` to `most`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    if value > most:
        raise ValueError(f"{name} must be at most {most:,}, got {value!r}")


def check_iterations(value: int) -> None:
    """Raise ValueError where `value` is no number of Newton-Schulz iterations, from 1 to 100.

    Each keeps a matrix, and 60 of them have converged at any condition that float64 resolves.
    """
    check_whole_number("iterations", value, least=1, most=100)


def is_number(value: object, limit: float = 1e30) -> bool:
    """Whether `value` is a number, and no bool, of at most `limit` in size: larger ones overflow on the way."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= limit


def check_ridge(ridge: float) -> None:
    """Raise ValueError where `ridge` is no finite number of at least 0."""
    if not (is_number(ridge) and ridge >= 0):
        raise ValueError(f"the ridge must be a number of at least 0, got {ridge!r}")


def as_batch(matrix: Tensor) -> Tensor:
    """Square matrices (..., d, d) as one batch (B, d, d); one matrix (d, d) is a batch of one.

    Raises:
        ValueError: the shape is not (..., d, d).
        TypeError: the dtype is not floating point.
    """
    if matrix.dim() < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(f"expected symmetric matrices of shape (B, d, d) or (..., d, d), got {tuple(matrix.shape)}")
    if not matrix.is_floating_point():
        raise TypeError(f"expected a floating-point matrix, got {matrix.dtype}")
    return matrix if matrix.dim() == 3 else matrix.reshape(matrix.shape[:-2].numel(), *matrix.shape[-2:])


def keep_for_backward(ctx: Any, x: Tensor, *intermediates: Tensor) -> None:
    """Save the input and what the forward pass made on the way, which no gradient goes through."""
    ctx.mark_non_differentiable(*intermediates)
    ctx.set_materialize_grads(False)  # no zeros in place of their gradients
    ctx.save_for_backward(x, *intermediates)


class FirstDerivative(torch.autograd.Function):
    """Base of the backward pass of a layer: dLoss/dx as a function of dLoss/dF, of x and of what the layer saved.

    A function of its own, so that a graph that is made of it (create_graph=True) leads on to x and to dLoss/dF. Whoever
    asks for a second derivative then meets the error below, whether or not dLoss/dF requires a gradient.
    """

    @classmethod
    def of(cls, grad: Tensor | None, *arguments: Any) -> Tensor | None:
        """dLoss/dx, None where no gradient arrives."""
        return None if grad is None else cls.apply(grad, *arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(*_: Any) -> Any:
        raise RuntimeError(
            "a spectral layer is differentiable once (matrix_sqrt, matrix_power and matrix_log with gradient 'exact': "
            "twice), and this asks for one derivative more; "
            "compute the layer with plain torch operations, e.g. torch.linalg.eigh, where you need one"
        )
