"""What the layers are measured against: the same mathematics as it is usually written, under torch's autograd.

Both chains take (B, C, H, W), compute in float64 and return the upper triangle (B, C (C + 1) / 2) in the dtype of the
features, as the layers of fgvc do. They share no code with fgvc.
"""

import torch
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


def _triangle(matrix: Tensor) -> Tensor:
    """(B, C, C) -> (B, C (C + 1) / 2), row by row."""
    rows, columns = torch.triu_indices(matrix.shape[-1], matrix.shape[-1], device=matrix.device)
    return matrix[:, rows, columns]
