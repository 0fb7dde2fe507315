"""From local features to the descriptor of their covariance in one layer with one hand-written backward pass.

    x (B, d, H, W)  ->  Xc (B, d, M), centred  ->  S = Xc Xc^T / M  ->  F(S)  ->  upper triangle (B, d (d + 1) / 2)

Two paths with one result. With M >= d locations the covariance itself is decomposed. With fewer, S = U diag(l) U^T has
rank r <= M - 1 and the M x M Gram matrix Xc^T Xc / M = V diag(l) V^T gives it in O(M^3) instead of O(d^3): U = Xc V
/ sqrt(M l), F(S) = f_0 I + U (f(l) - f_0) U^T with f_0 the value of a null eigenvalue.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fgvc.spectral.covariance import centred, check_features
from fgvc.spectral.eigen import symmetric_eigh
from fgvc.spectral.maps import EigenvalueMap
from fgvc.spectral.parts import batch_parts
from fgvc.spectral.precision import result_dtype, without_autocast
from fgvc.spectral.rules import GradientRule, Spectrum
from fgvc.spectral.spectral_map import SpectralLayer, map_backward, map_forward, spectral_layer
from fgvc.spectral.triangle import symmetric_from_triangle, upper_triangle


def covariance_in_parts(x: Tensor) -> Tensor:
    """As `covariance`, without a float64 copy of all the features: (B, d, ...) -> (B, d, d) float64."""
    d, locations = x.shape[1], math.prod(x.shape[2:])
    result = torch.empty(len(x), d, d, dtype=torch.float64, device=x.device)
    for part in batch_parts(len(x), math.prod(x.shape[1:]), x.device):
        features = centred(x[part])
        torch.bmm(features, features.mT, out=result[part])
    return result.div_(locations)


def features_gradient(matrix_gradient: Tensor, x: Tensor) -> Tensor:
    """dLoss/dx = 2 dLoss/dS Xc / M, of the shape and dtype of x, for a symmetric dLoss/dS (B, d, d)."""
    result = torch.empty_like(x, memory_format=torch.contiguous_format)
    scale = 2 / math.prod(x.shape[2:])
    # centring again costs less than keeping the float64 features from the forward pass would
    for part in batch_parts(len(x), math.prod(x.shape[1:]), x.device):
        gradient = torch.bmm(matrix_gradient[part], centred(x[part]).mul_(scale))
        result[part] = gradient.view(result[part].shape)
    return result


def symmetric_gradient(triangle_gradient: Tensor, d: int) -> Tensor:
    """sym(dLoss/dF) (B, d, d) float64 from the gradient of the upper triangle (B, d (d + 1) / 2)."""
    gradient = symmetric_from_triangle(triangle_gradient, d).double()
    # each off-diagonal number of the triangle stands for two entries of the matrix
    gradient.mul_(0.5).diagonal(dim1=-2, dim2=-1).mul_(2)
    return gradient


def thin_forward(x: Tensor, layer: SpectralLayer) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """F(S) (B, d, d) from the Gram matrix, and what the backward pass needs: l (B, r), U (B, d, r), V (B, M, r).

    r = M - 1. Directions of an eigenvalue below the numerical rank, l <= d eps l_max, count as null: l = 0, U = 0.
    """
    features = centred(x)  # (B, d, M)
    d, locations = features.shape[1:]
    eigenvalues, gram_vectors = symmetric_eigh(features.mT @ features / locations, layer.eigh_device)
    eigenvalues, gram_vectors = eigenvalues[:, 1:], gram_vectors[:, :, 1:]  # the first is zero: centring took it
    largest = eigenvalues[:, -1:] if locations > 1 else eigenvalues
    nonzero = eigenvalues > d * torch.finfo(torch.float64).eps * largest
    eigenvalues = torch.where(nonzero, eigenvalues, 0)
    lengths = torch.where(nonzero, (locations * eigenvalues).rsqrt(), 0)
    vectors = (features @ gram_vectors).mul_(lengths[:, None, :])  # U
    del features
    value = layer.f.value(Spectrum(_with_nulls(eigenvalues, d), layer.keep).clipped)
    null_value = value[:, :1]
    weights = value[:, d - locations + 1 :] - null_value
    result = (vectors * weights[:, None, :]) @ vectors.mT
    result.diagonal(dim1=-2, dim2=-1).add_(null_value)
    return result, (eigenvalues, vectors, gram_vectors)


def _with_nulls(eigenvalues: Tensor, d: int) -> Tensor:
    """All d eigenvalues of the covariance, ascending, from the r that may be non-zero."""
    return torch.nn.functional.pad(eigenvalues, (d - eigenvalues.shape[1], 0))


def thin_backward(grad: Tensor, saved: tuple[Tensor, Tensor, Tensor], layer: SpectralLayer) -> Tensor:
    """dLoss/dXc (B, d, M) for a symmetric G = dLoss/dF (B, d, d).

    dLoss/dXc = 2 dLoss/dS Xc / M with Xc = U diag(sqrt(M l)) V^T, so only dLoss/dS U is needed:
    dLoss/dS U = U (L o P) + (G U - U P) diag(c), P = U^T G U, c_j = L between a null eigenvalue and l_j.
    All null eigenvalues are equal, so one of them stands for all; their own block never reaches the features.
    """
    eigenvalues, vectors, gram_vectors = saved
    d, rank, locations = vectors.shape[1], vectors.shape[2], gram_vectors.shape[1]
    grad_vectors = grad @ vectors  # G U, (B, d, r)
    projected = vectors.mT @ grad_vectors  # P, (B, r, r)
    diagonal = projected.diagonal(dim1=-2, dim2=-1)
    null = d - rank - 1  # index of the null eigenvalue that stands for all
    loewner = layer.rule(layer.f, Spectrum(_with_nulls(eigenvalues, d), layer.keep, first=null))
    all_diagonal = _with_nulls(diagonal, d)
    all_diagonal[:, null] = grad.diagonal(dim1=-2, dim2=-1).sum(-1) - diagonal.sum(-1)
    del grad
    to_null = loewner.off_diagonal[:, 0, 1:]  # c
    own = loewner.pullback(all_diagonal)[:, null + 1 :] - diagonal * to_null
    inner = loewner.off_diagonal[:, 1:, 1:].sub_(to_null[:, None, :]).mul_(projected)
    inner.diagonal(dim1=-2, dim2=-1).copy_(own)
    scale = (eigenvalues / locations).sqrt() * 2  # 2 sqrt(M l) / M
    inner = inner * scale[:, None, :]
    grad_vectors.mul_((to_null * scale)[:, None, :])
    return torch.baddbmm(grad_vectors, vectors, inner) @ gram_vectors.mT


class _SpectralDescriptor(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: SpectralLayer) -> Tensor:
        ctx.layer = layer
        ctx.thin = math.prod(x.shape[2:]) < x.shape[1]
        if ctx.thin:
            result, saved = thin_forward(x, layer)
            ctx.like = x.shape, x.dtype
            ctx.save_for_backward(*saved)
        else:
            result, eigenvalues, eigenvectors = map_forward(covariance_in_parts(x), layer)
            ctx.save_for_backward(x, eigenvalues, eigenvectors)
        return upper_triangle(result.to(result_dtype(x)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if ctx.thin:
            shape, dtype = ctx.like
            saved = ctx.saved_tensors
            features_grad = thin_backward(symmetric_gradient(grad, shape[1]), saved, ctx.layer)
            return features_grad.to(dtype).view(shape), None
        x, eigenvalues, eigenvectors = ctx.saved_tensors
        matrix_grad = map_backward(symmetric_gradient(grad, x.shape[1]), eigenvalues, eigenvectors, ctx.layer)
        return features_gradient(matrix_grad, x), None


def spectral_descriptor(
    x: Tensor,
    f: EigenvalueMap,
    gradient: str | GradientRule = "exact",
    *,
    keep: int | None = None,
    eigh_device: str = "auto",
) -> Tensor:
    """Upper triangle of F(S), S the covariance of the local features, as one fused layer.

    The same as `upper_triangle(spectral_map(covariance(x), ...))` and its gradient, in less time and memory. With fewer
    locations than channels it works on the M x M Gram matrix, and eigenvalues up to d eps l_max count as null.
    Computes in float64 with autocast off. Differentiable once; a second derivative raises RuntimeError.

    Args:
        x: local features, (B, d, H, W) or (B, d, M), any floating dtype.
        f, gradient, keep, eigh_device: as in `spectral_map`.

    Returns:
        (B, d (d + 1) / 2), row by row, off-diagonal entries not scaled; float64 for float64 input, else float32.

    Raises:
        ValueError: wrong shape, unknown `gradient` or one that does not apply to `f`, or `keep` below 1.
        TypeError: not floating point.
        EigendecompositionError: NaN or infinity in the features of an image, or no convergence.
    """
    return layer_descriptor(x, spectral_layer(f, gradient, keep, eigh_device))


def layer_descriptor(x: Tensor, layer: SpectralLayer) -> Tensor:
    """As `spectral_descriptor`, for a layer that is made once and used often."""
    check_features(x)
    with without_autocast(x):
        result: Tensor = _SpectralDescriptor.apply(x, layer)
        return result
