"""The one autograd function behind every spectral layer: any map of the eigenvalues, any gradient rule."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fgvc.spectral.covariance import batch_parts
from fgvc.spectral.eigen import symmetric_eigh
from fgvc.spectral.maps import Band, EigenvalueMap, Eigenvalues, Keep, band, has_curvature
from fgvc.spectral.precision import (
    FirstDerivative,
    as_batch,
    full_precision,
    keep_for_backward,
    result_dtype,
    spectral_dtype,
)
from fgvc.spectral.rules import GRADIENTS, GradientRule, exact


class SpectralLayer(NamedTuple):
    """What a spectral layer is: a map of the eigenvalues, its gradient rule, and the options of both.

    Attributes:
        f: Map of the eigenvalues.
        rule: Rule that assembles the derivative.
        keep: Band of eigenvalues that the map sees, None for all; the others are set to the floor.
        eigh_device: Device of the eigendecomposition, see `fgvc.spectral.eigen.symmetric_eigh`.
        dtype: Working precision, forward and backward.
    """

    f: EigenvalueMap
    rule: GradientRule
    keep: Band | None = None
    eigh_device: str = "auto"
    dtype: torch.dtype = torch.float64


def spectral_layer(
    f: EigenvalueMap,
    gradient: str | GradientRule,
    keep: Keep | None = None,
    eigh_device: str = "auto",
    dtype: str | torch.dtype = torch.float64,
) -> SpectralLayer:
    """A layer with its rule looked up and its options checked.

    Raises:
        ValueError: unknown gradient, one that does not apply to this map, `keep` below 1 or no band, or a `dtype` that
            is not in `SPECTRAL_DTYPES`.
    """
    if not callable(gradient) and gradient not in GRADIENTS:
        raise ValueError(f"unknown gradient {gradient!r}; choose one of {', '.join(GRADIENTS)}")
    rule, kept = gradient if callable(gradient) else GRADIENTS[gradient], band(keep)
    rule(f, Eigenvalues(torch.ones(1, 2), kept))  # refuses here what it would refuse in the backward pass
    return SpectralLayer(f, rule, kept, eigh_device, spectral_dtype(dtype))


def map_forward(eigenvalues: Tensor, eigenvectors: Tensor, layer: SpectralLayer) -> Tensor:
    """F(S) = U diag(f(l)) U^T (B, d, d) from the eigenvalues that were found (B, d) and U (B, d, d)."""
    value = layer.f.value(Eigenvalues(eigenvalues, layer.keep).clipped)
    return torch.bmm(eigenvectors * value[:, None, :], eigenvectors.mT)


def map_backward(grad: Tensor, eigenvalues: Tensor, eigenvectors: Tensor, layer: SpectralLayer) -> Tensor:
    """dLoss/dS (B, d, d), symmetric, for a symmetric G = dLoss/dF (B, d, d): U inner U^T, see fgvc.spectral.rules."""
    projected = torch.bmm(eigenvectors.mT, torch.bmm(grad, eigenvectors))  # P
    loewner = layer.rule(layer.f, Eigenvalues(eigenvalues, layer.keep))
    diagonal = loewner.pullback(projected.diagonal(dim1=-2, dim2=-1))
    inner = loewner.off_diagonal.mul_(projected)
    inner.diagonal(dim1=-2, dim2=-1).copy_(diagonal)
    return torch.bmm(torch.bmm(eigenvectors, inner), eigenvectors.mT)


def second_differences(eigenvalues: Tensor, layer: SpectralLayer) -> Tensor:
    """f[l_i, l_j, l_k] (d, d, d) of the exact rule for eigenvalues (d,), from first differences or, near ties, f''."""
    seen = Eigenvalues(eigenvalues[None])
    loewner = layer.rule(layer.f, seen)
    first, lam = loewner.off_diagonal[0], seen.clipped[0]
    first.diagonal().copy_(loewner.pullback(torch.ones_like(seen.clipped))[0])
    index = torch.arange(len(lam), device=lam.device)
    low, middle, high = torch.stack(torch.meshgrid(index, index, index, indexing="ij")).sort(dim=0).values
    gap = eigenvalues[high] - eigenvalues[low]
    quotient = (first[middle, high] - first[low, middle]) / gap
    # the quotient's error is eps / gap, that of f'' in the middle gap^2
    near = gap <= torch.finfo(lam.dtype).eps ** (1 / 3) * lam[high]
    curvature: Tensor = layer.f.curvature((lam[low] + lam[middle] + lam[high]) / 3)  # type: ignore[attr-defined]
    return torch.where(near, curvature / 2 * seen.kept[0][low], quotient)


class _SpectralMap(torch.autograd.Function):
    @staticmethod
    def forward(matrix: Tensor, layer: SpectralLayer) -> tuple[Tensor, Tensor, Tensor]:
        eigenvalues, eigenvectors = symmetric_eigh(matrix, layer.eigh_device)
        result = torch.empty_like(matrix, memory_format=torch.contiguous_format)
        for part in batch_parts(matrix.shape, matrix.device):
            result[part] = map_forward(eigenvalues[part], eigenvectors[part], layer)
        return result, eigenvalues, eigenvectors

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, SpectralLayer], output: tuple[Tensor, Tensor, Tensor]) -> None:
        matrix, ctx.layer = inputs
        keep_for_backward(ctx, matrix, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, None]:
        return _SpectralMapGradient.of(grad, *ctx.saved_tensors, ctx.layer), None


class _SpectralMapGradient(FirstDerivative):
    @staticmethod
    def forward(grad: Tensor, _: Tensor, eigenvalues: Tensor, eigenvectors: Tensor, layer: SpectralLayer) -> Tensor:
        result = torch.empty_like(grad, memory_format=torch.contiguous_format)
        with full_precision(grad, layer.dtype):
            for part in batch_parts(grad.shape, grad.device):
                symmetric = torch.lerp(grad[part], grad[part].mT, 0.5)
                result[part] = map_backward(symmetric, eigenvalues[part], eigenvectors[part], layer)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], _: Tensor) -> None:
        *tensors, ctx.layer = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, to_gradient: Tensor) -> tuple[Tensor | None, ...]:
        layer: SpectralLayer = ctx.layer
        if layer.rule is not exact or layer.keep is not None or not has_curvature(layer.f):
            FirstDerivative.backward()
        return (*_SecondGradient.apply(to_gradient, *ctx.saved_tensors, layer), None, None, None)


class _SecondGradient(FirstDerivative):
    """Of <H, dLoss/dS>: the gradients for G = dLoss/dF and for S, the second with d^3 numbers a matrix."""

    @staticmethod
    def forward(
        to_gradient: Tensor, grad: Tensor, _: Tensor, eigenvalues: Tensor, u: Tensor, layer: SpectralLayer
    ) -> tuple[Tensor, Tensor]:
        with full_precision(grad, layer.dtype):
            h, g = (torch.lerp(matrix, matrix.mT, 0.5) for matrix in (to_gradient, grad))
            p, q = (torch.bmm(u.mT, torch.bmm(matrix, u)) for matrix in (g, h))
            inner = torch.empty_like(p)
            for item, found in enumerate(eigenvalues):
                inner[item] = torch.einsum("ijk,ij,jk->ik", second_differences(found, layer), p[item], q[item])
            return map_backward(h, eigenvalues, u, layer), torch.bmm(torch.bmm(u, inner + inner.mT), u.mT)


def spectral_map(
    matrix: Tensor,
    f: EigenvalueMap,
    gradient: str | GradientRule = "exact",
    *,
    keep: Keep | None = None,
    eigh_device: str = "auto",
    dtype: str | torch.dtype = torch.float64,
) -> Tensor:
    """Apply a map of the eigenvalues to symmetric positive semi-definite matrices.

    Computes in `dtype` with autocast off. Differentiable once; a second derivative raises RuntimeError, except that of
    the exact gradient of `SQRT`, `Power`, `Logarithm` and their `Rescaled`. It takes d^3 numbers a matrix: for small d.

    Args:
        matrix: (B, d, d), or (..., d, d), any floating dtype; its symmetric part is used.
        f: map of the eigenvalues, e.g. `SQRT`.
        gradient: name of the rule in `GRADIENTS` that assembles the derivative, or a rule, e.g. `taylor(degree=50)`.
        keep: the map sees the `keep` largest eigenvalues, or of a pair (start, stop) those from index `start` to before
            `stop` in descending order, counted from 0; stop None means to the smallest. The others are set to
            `EIGENVALUE_FLOOR`. None keeps all.
        eigh_device: "auto", "same" or "cpu", see `fgvc.spectral.eigen.symmetric_eigh`.
        dtype: working precision, float64 or float32, forward and backward; what it costs is in docs/precision.md.

    Returns:
        F(S), in the shape of `matrix`; float64 for float64 input, else float32.

    Raises:
        ValueError: wrong shape, unknown `gradient` or one that does not apply to `f`, `keep` below 1 or no band, or
            another `dtype`.
        TypeError: not floating point.
        EigendecompositionError: NaN or infinity in a matrix, or no convergence.
    """
    return apply_layer(matrix, spectral_layer(f, gradient, keep, eigh_device, dtype))


def apply_layer(matrix: Tensor, layer: SpectralLayer) -> Tensor:
    """As `spectral_map`, for a layer that is made once and used often."""
    batch = as_batch(matrix)
    with full_precision(matrix, layer.dtype):
        result: Tensor = _SpectralMap.apply(batch.to(layer.dtype), layer)[0]
        return result.to(result_dtype(matrix)).reshape(matrix.shape)
