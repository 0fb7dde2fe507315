"""Eigendecomposition of a batch of symmetric matrices, with errors that name the matrix."""

import torch
from torch import Tensor


class EigendecompositionError(ArithmeticError):
    """A matrix could not be decomposed; the message names the batch items and what is wrong with them."""


def symmetric_eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (ascending) and eigenvectors of the symmetric part of each matrix.

    Args:
        matrix: (B, d, d); the two triangles are averaged first, so rounding in one of them does not decide.

    Returns:
        eigenvalues (B, d) and eigenvectors (B, d, d), one per column.

    Raises:
        EigendecompositionError: a matrix holds NaN or infinity (it never reaches LAPACK), or LAPACK did not converge.
    """
    finite = torch.isfinite(matrix).all(dim=-1).all(dim=-1)  # (B,)
    if not finite.all():
        items = (~finite).nonzero().flatten().tolist()
        raise EigendecompositionError(
            f"{len(items)} of {len(matrix)} matrices hold NaN or infinity (batch items {items[:10]}); "
            "the features that made them are not finite: lower the learning rate, clip gradients, or check the input"
        )
    try:
        eigenvalues, eigenvectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # torch has it, its stubs do not
        traces = matrix.diagonal(dim1=-2, dim2=-1).sum(-1).tolist()
        raise EigendecompositionError(f"no convergence (traces of the matrices {traces[:10]}): {error}") from error
    return eigenvalues, eigenvectors
