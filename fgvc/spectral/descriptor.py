"""From local features to the descriptor of their covariance in one layer with one hand-written backward pass.

    x (B, d, H, W)  ->  Xc (B, d, M), centred  ->  S = Xc Xc^T / M  ->  F(S)  ->  upper triangle (B, d (d + 1) / 2)

Two paths with one result. With M >= d locations the covariance itself is decomposed. With fewer, S = U diag(l) U^T has
rank r <= M - 1 and the M x M Gram matrix Xc^T Xc / M = V diag(l) V^T gives it in O(M^3) instead of O(d^3): U = Xc V
/ sqrt(M l), F(S) = f_0 I + U (f(l) - f_0) U^T with f_0 the value of a null eigenvalue.

Everything except the eigendecomposition is computed for one part of the batch after the other: on a CPU the temporaries
then stay in the cache.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fgvc.spectral.covariance import batch_parts, centred, check_features, symmetric_from_triangle, upper_triangle
from fgvc.spectral.eigen import symmetric_eigh
from fgvc.spectral.maps import EigenvalueMap, Eigenvalues, Keep
from fgvc.spectral.precision import FirstDerivative, full_precision, keep_for_backward, result_dtype, spectral_dtype
from fgvc.spectral.rules import GradientRule
from fgvc.spectral.spectral_map import SpectralLayer, map_backward, map_forward, spectral_layer


def is_thin(x: Tensor) -> bool:
    """Whether (B, d, ...) has fewer locations than channels."""
    return math.prod(x.shape[2:]) < x.shape[1]


def batch_gram(x: Tensor, dtype: torch.dtype, *, thin: bool) -> Tensor:
    """Xc^T Xc / M (B, M, M) if `thin`, else Xc Xc^T / M (B, d, d), in `dtype`, from features (B, d, ...)."""
    d, locations = x.shape[1], math.prod(x.shape[2:])
    size = locations if thin else d
    result = torch.empty(x.shape[0], size, size, dtype=dtype, device=x.device)
    for part in batch_parts(x.shape, x.device):
        features = centred(x[part], dtype)
        left, right = (features.mT, features) if thin else (features, features.mT)
        torch.bmm(left, right, out=result[part])
    return result.div_(locations)


def symmetric_gradient(triangle_gradient: Tensor, d: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """sym(dLoss/dF) (B, d, d) in `dtype` from the gradient of the upper triangle (B, d (d + 1) / 2)."""
    gradient = symmetric_from_triangle(triangle_gradient, d).to(dtype)
    # each off-diagonal number of the triangle stands for two entries of the matrix
    gradient.mul_(0.5).diagonal(dim1=-2, dim2=-1).mul_(2)
    return gradient


def features_gradient(matrix_gradient: Tensor, x: Tensor) -> Tensor:
    """dLoss/dXc = 2 dLoss/dS Xc / M (B, d, M) for a symmetric dLoss/dS (B, d, d), in its precision.

    It needs no centring: its rows sum to zero as those of Xc do.
    """
    # centring again costs less than keeping the features as they were centred in the forward pass would
    features = centred(x, matrix_gradient.dtype)
    return torch.bmm(matrix_gradient, features.mul_(2 / features.shape[-1]))


def null_as_zero(eigenvalues: Tensor, d: int) -> Tensor:
    """Ascending eigenvalues (B, n) of a d x d covariance, those up to d eps of the largest set to 0.

    d eps, the tolerance of `numpy.linalg.matrix_rank`, bounds the worst case; the noise that is there is about eps, of
    float32 features at most 3.4 eps (d = 64 and 256). float64 has digits to give away. float32 has not: features of
    real images have non-zero eigenvalues of 11 eps, whose directions would get no gradient. There it is sqrt(d) eps.
    """
    part = (d if eigenvalues.dtype == torch.float64 else math.sqrt(d)) * torch.finfo(eigenvalues.dtype).eps
    threshold = part * eigenvalues[:, -1:]
    return torch.where(eigenvalues > threshold.clamp(min=0), eigenvalues, 0)


def thin_forward(x: Tensor, eigenvalues: Tensor, gram_vectors: Tensor, layer: SpectralLayer) -> tuple[Tensor, Tensor]:
    """F(S) (B, d, d) and U (B, d, r) from features (B, d, ...) and l (B, r), V (B, M, r) of their Gram matrix.

    U = Xc V / sqrt(M l), zero where l = 0.
    """
    d, rank = x.shape[1], eigenvalues.shape[1]
    features = centred(x, eigenvalues.dtype)
    lengths = torch.where(eigenvalues > 0, (features.shape[-1] * eigenvalues).rsqrt(), 0)
    vectors = torch.bmm(features, gram_vectors).mul_(lengths[:, None, :])
    all_eigenvalues = pad(eigenvalues, (d - rank, 0))  # (B, d): the null ones come first
    value = layer.f.value(Eigenvalues(all_eigenvalues, layer.keep, nulls_known=True).clipped)
    null_value = value[:, :1]
    result = torch.bmm(vectors * (value[:, d - rank :] - null_value)[:, None, :], vectors.mT)
    result.diagonal(dim1=-2, dim2=-1).add_(null_value)
    return result, vectors


def thin_backward(
    grad: Tensor, eigenvalues: Tensor, vectors: Tensor, gram_vectors: Tensor, layer: SpectralLayer
) -> Tensor:
    """dLoss/dXc (B, d, M) for a symmetric G = dLoss/dF (B, d, d).

    dLoss/dXc = 2 dLoss/dS Xc / M with Xc = U diag(sqrt(M l)) V^T, so only dLoss/dS U is needed:
    dLoss/dS U = U (L o P) + (G U - U P) diag(c), P = U^T G U, c_j = L between a null eigenvalue and l_j.
    All null eigenvalues are equal, so one of them stands for all; their own block never reaches the features.
    """
    d, rank, locations = vectors.shape[1], vectors.shape[2], gram_vectors.shape[1]
    grad_vectors = torch.bmm(grad, vectors)  # G U, (B, d, r)
    projected = torch.bmm(vectors.mT, grad_vectors)  # P, (B, r, r)
    diagonal = projected.diagonal(dim1=-2, dim2=-1)
    null = d - rank - 1  # index of the null eigenvalue that stands for all
    all_eigenvalues = pad(eigenvalues, (d - rank, 0))
    loewner = layer.rule(layer.f, Eigenvalues(all_eigenvalues, layer.keep, first=null, nulls_known=True))
    all_diagonal = pad(diagonal, (d - rank, 0))
    all_diagonal[:, null] = grad.diagonal(dim1=-2, dim2=-1).sum(-1) - diagonal.sum(-1)
    to_null = loewner.off_diagonal[:, 0, 1:]  # c
    own = loewner.pullback(all_diagonal)[:, null + 1 :] - diagonal * to_null
    inner = loewner.off_diagonal[:, 1:, 1:].sub_(to_null[:, None, :]).mul_(projected)
    inner.diagonal(dim1=-2, dim2=-1).copy_(own)
    scale = (eigenvalues / locations).sqrt() * 2  # 2 sqrt(M l) / M
    inner = inner * scale[:, None, :]
    grad_vectors.mul_((to_null * scale)[:, None, :])
    return torch.bmm(torch.baddbmm(grad_vectors, vectors, inner), gram_vectors.mT)


@torch.no_grad()
def covariance_eigenvalues(x: Tensor, dtype: str | torch.dtype = torch.float64) -> Tensor:
    """Eigenvalues of the covariance of the local features of each image, by the shorter of the two paths.

    Args:
        x: local features, (B, d, H, W) or (B, d, M), any floating dtype.
        dtype: working precision, float64 or float32.

    Returns:
        (B, d) in `dtype`, descending. With fewer locations than channels, null ones are 0, see
            `null_as_zero`; otherwise they are what LAPACK returns, rounding noise of either sign.

    Raises:
        ValueError, TypeError: as `covariance`.
        EigendecompositionError: NaN or infinity in the features of an image, or no convergence.
    """
    check_features(x)
    d, thin = x.shape[1], is_thin(x)
    working = spectral_dtype(dtype)
    with full_precision(x, working):
        eigenvalues = symmetric_eigh(batch_gram(x, working, thin=thin))[0]
    if thin:
        eigenvalues = pad(null_as_zero(eigenvalues, d), (d - eigenvalues.shape[1], 0))
    return eigenvalues.flip(-1)


class _SpectralDescriptor(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, layer: SpectralLayer) -> tuple[Tensor, ...]:
        d, thin = x.shape[1], is_thin(x)
        eigenvalues, eigenvectors = symmetric_eigh(batch_gram(x, layer.dtype, thin=thin), layer.eigh_device)
        result = torch.empty(x.shape[0], d * (d + 1) // 2, dtype=result_dtype(x), device=x.device)
        if not thin:
            for part in batch_parts(x.shape, x.device):
                matrix = map_forward(eigenvalues[part], eigenvectors[part], layer)
                result[part] = upper_triangle(matrix.to(result.dtype))
            return result, eigenvalues, eigenvectors, eigenvectors.new_empty(0)
        # the first one of the Gram matrix is left out: centring made it zero
        eigenvalues, gram_vectors = null_as_zero(eigenvalues, d)[:, 1:], eigenvectors[:, :, 1:]
        vectors = gram_vectors.new_empty(x.shape[0], d, gram_vectors.shape[-1])
        for part in batch_parts(x.shape, x.device):
            matrix, vectors[part] = thin_forward(x[part], eigenvalues[part], gram_vectors[part], layer)
            result[part] = upper_triangle(matrix.to(result.dtype))
        return result, eigenvalues, vectors, gram_vectors

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, SpectralLayer], output: tuple[Tensor, ...]) -> None:
        x, ctx.layer = inputs
        keep_for_backward(ctx, x, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, None]:
        return _SpectralDescriptorGradient.of(grad, *ctx.saved_tensors, ctx.layer), None


class _SpectralDescriptorGradient(FirstDerivative):
    @staticmethod
    def forward(
        grad: Tensor, x: Tensor, eigenvalues: Tensor, vectors: Tensor, gram_vectors: Tensor, layer: SpectralLayer
    ) -> Tensor:
        result = torch.empty_like(x)
        with full_precision(grad, layer.dtype):
            for part in batch_parts(x.shape, x.device):
                symmetric = symmetric_gradient(grad[part], x.shape[1], layer.dtype)
                values, u = eigenvalues[part], vectors[part]
                if is_thin(x):
                    gradient = thin_backward(symmetric, values, u, gram_vectors[part], layer)
                else:
                    gradient = features_gradient(map_backward(symmetric, values, u, layer), x[part])
                result[part] = gradient.view(result[part].shape)
        return result


def spectral_descriptor(
    x: Tensor,
    f: EigenvalueMap,
    gradient: str | GradientRule = "exact",
    *,
    keep: Keep | None = None,
    eigh_device: str = "auto",
    dtype: str | torch.dtype = torch.float64,
) -> Tensor:
    """Upper triangle of F(S), S the covariance of the local features, as one fused layer.

    The same as `upper_triangle(spectral_map(covariance(x), ...))` and its gradient, in less time and memory. With fewer
    locations than channels it works on the M x M Gram matrix, and eigenvalues up to d eps of the largest, in float32
    sqrt(d) eps, count as null. Computes in `dtype` with autocast off. Differentiable once; a second derivative raises
    RuntimeError.

    Args:
        x: local features, (B, d, H, W) or (B, d, M), any floating dtype.
        f, gradient, keep, eigh_device, dtype: as in `spectral_map`.

    Returns:
        (B, d (d + 1) / 2), row by row, off-diagonal entries not scaled; float64 for float64 input, else float32.

    Raises:
        ValueError: wrong shape, unknown `gradient` or one that does not apply to `f`, `keep` below 1 or no band, or
            another `dtype`.
        TypeError: not floating point.
        EigendecompositionError: NaN or infinity in the features of an image, or no convergence.
    """
    return layer_descriptor(x, spectral_layer(f, gradient, keep, eigh_device, dtype))


def layer_descriptor(x: Tensor, layer: SpectralLayer) -> Tensor:
    """As `spectral_descriptor`, for a layer that is made once and used often."""
    check_features(x)
    with full_precision(x, layer.dtype):
        result: Tensor = _SpectralDescriptor.apply(x, layer)[0]
        return result
