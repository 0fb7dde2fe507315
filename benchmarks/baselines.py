"""What the layers are measured against: the same mathematics as it is usually written, or as its authors released it.

All chains take (B, C, H, W), compute in float64 and return the upper triangle (B, C (C + 1) / 2) in the dtype of the
features, as the layers of fgvc do. They share no code with fgvc.
"""

import math
from typing import Any

import torch
from numpy.polynomial import Polynomial
from torch import Tensor

NEWTON_SCHULZ_ITERATIONS = 5


def plain_covariance(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, C) float64, divided by the number of locations."""
    features = x.flatten(2).double()
    features = features - features.mean(dim=-1, keepdim=True)
    return torch.bmm(features, features.mT) / features.shape[-1]


def eigh_alone(covariances: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of (B, C, C), nothing else: the least that a method with a spectrum can take."""
    eigenvalues, eigenvectors = torch.linalg.eigh(covariances)
    return eigenvalues, eigenvectors


def svd_chain(x: Tensor) -> Tensor:
    """The textbook chain: covariance, SVD, square roots on a diagonal, two products, triangle.

    Autograd's gradient of the SVD divides by differences of singular values and that of the square root by the root, so
    it need not be finite where a covariance is rank-deficient.
    """
    vectors, values, _ = torch.linalg.svd(plain_covariance(x))
    root = torch.bmm(torch.bmm(vectors, torch.diag_embed(values.sqrt())), vectors.mT)
    return _triangle(root).to(x.dtype)


def newton_schulz_chain(x: Tensor) -> Tensor:
    """iSQRT-COV with the iteration unrolled as published, each step on autograd's tape."""
    cov = plain_covariance(x)
    trace = cov.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    a = cov / trace
    three = 3 * torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    zy = 0.5 * (three - a)
    y, z = torch.bmm(a, zy), zy
    for _ in range(NEWTON_SCHULZ_ITERATIONS - 2):
        zy = 0.5 * (three - torch.bmm(z, y))
        y, z = torch.bmm(y, zy), torch.bmm(zy, z)
    y = 0.5 * torch.bmm(y, three - torch.bmm(z, y))
    return _triangle(y * trace.sqrt()).to(x.dtype)


def sqrth_chain(x: Tensor) -> Tensor:
    """PyTorch's own square root of a Hermitian matrix (torch 2.14): its gradient is NaN for a singular covariance."""
    return _triangle(torch.linalg.matrix_sqrth(plain_covariance(x))).to(x.dtype)


def pade_chain(x: Tensor) -> Tensor:
    """MPA-Lya as released: products and one linear solve forward, products backward. [Song, Sebe, Wang, ICLR 2022]"""
    return _triangle(_LyapunovRoot.apply(plain_covariance(x), True)).to(x.dtype)


def taylor_chain(x: Tensor) -> Tensor:
    """MTP-Lya as released: products alone. [Song, Sebe, Wang, ICLR 2022]"""
    return _triangle(_LyapunovRoot.apply(plain_covariance(x), False)).to(x.dtype)


class _LyapunovRoot(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cov: Tensor, pade: bool) -> Tensor:
        norm = torch.linalg.matrix_norm(cov, keepdim=True)
        z = torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device) - cov / norm
        if pade:
            # w ((1 + w)^11 + (1 - w)^11) / ((1 + w)^11 - (1 - w)^11), w^2 = 1 - z, is the approximant [5/5] at z = 0
            above, below = ([math.comb(11, 2 * k + odd) / 2**10 for k in range(6)] for odd in (0, 1))
            root = torch.linalg.solve(_polynomial(Polynomial(below), z), _polynomial(Polynomial(above), z))
        else:
            powers = [-math.comb(2 * k, k) / (4**k * (2 * k - 1)) for k in range(11)]
            root = _polynomial(Polynomial(powers)(Polynomial([1, -1])), z)
        root = root * norm.sqrt()
        ctx.save_for_backward(root, norm)
        return root

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        root, norm = ctx.saved_tensors
        three = 3 * torch.eye(root.shape[-1], dtype=root.dtype, device=root.device)
        b, c = root / norm.sqrt(), grad / norm.sqrt()
        for _ in range(8):
            square = torch.bmm(b, b)
            c = 0.5 * (torch.bmm(c, three - square) - torch.bmm(square, c) + torch.bmm(torch.bmm(b, c), b))
            b = 0.5 * torch.bmm(b, three - square)
        return 0.5 * c, None


def _polynomial(in_ratio: Polynomial, z: Tensor) -> Tensor:
    """A polynomial in I - Z by the powers of Z, as the released code sums it."""
    first, *others = in_ratio(Polynomial([1, -1])).coef
    result = torch.diag_embed(torch.full_like(z[..., 0], float(first)))
    power = z
    for number, coefficient in enumerate(others, start=1):
        result = result + float(coefficient) * power
        if number < len(others):
            power = torch.bmm(power, z)
    return result


def _triangle(matrix: Tensor) -> Tensor:
    """(B, C, C) -> (B, C (C + 1) / 2), row by row."""
    rows, columns = torch.triu_indices(matrix.shape[-1], matrix.shape[-1], device=matrix.device)
    return matrix[:, rows, columns]
