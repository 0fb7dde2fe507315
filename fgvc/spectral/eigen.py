"""Eigendecomposition of a batch of symmetric matrices: repaired where LAPACK fails, with errors that name the matrix.

Shapes: B matrices of d x d. "Item" is the index of a matrix in its batch.
"""

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from fgvc.spectral.eigen_threads import batched_eigh

JITTERS: tuple[float, ...] = (1e-14, 1e-12, 1e-10, 1e-8)
"""What is added to the diagonal of a matrix that did not converge, in turn, in units of its largest absolute entry."""

DEVICES: tuple[str, ...] = ("auto", "cpu", "same")
"""Choices of where `symmetric_eigh` computes."""

_WITHOUT_FLOAT64 = frozenset({"mps"})
_LISTED = 10  # items that a message names
_LinAlgError: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]  # its stubs lack it


class EigendecompositionError(ArithmeticError):
    """A matrix could not be decomposed; the message names the batch items and what is wrong with them.

    Attributes:
        items: all of these batch items, of which the message may name only the first.
    """

    def __init__(self, message: str = "", items: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.items = list(items)


class EigendecompositionWarning(RuntimeWarning):
    """A matrix could be decomposed only with jitter or on the CPU; the message names the batch items and the amount."""


@torch.no_grad()
def symmetric_eigh(matrix: Tensor, device: str = "auto") -> tuple[Tensor, Tensor]:
    """Eigenvalues (ascending) and eigenvectors of the symmetric part of each matrix.

    Carries no gradient: the spectral layers bring their own. A matrix on which LAPACK fails, or returns NaN or
    infinity, is tried again in float64 with growing `JITTERS` on its diagonal, which are taken off its eigenvalues
    afterwards, and then on the CPU; the other matrices of the batch are left alone. On the CPU the batch is shared out
    among threads. Nothing here has been run on a GPU.

    Args:
        matrix: (B, d, d), B and d may be 0; float32 is computed as float32. The two triangles are averaged first, so
            rounding in one of them does not decide.
        device: "auto": where the matrix is, or the CPU if there is no float64 there (MPS); "cpu": the CPU, as the
            papers do; "same": where the matrix is, without exception.

    Returns:
        eigenvalues (B, d) and eigenvectors (B, d, d), one per column, on the device and in the dtype of `matrix`.

    Raises:
        ValueError: unknown `device`.
        EigendecompositionError: a matrix holds NaN or infinity (it never reaches LAPACK), or LAPACK did not converge
            even with jitter; the message gives trace, rank and condition number.
    """
    if device not in DEVICES:
        raise ValueError(f"unknown device {device!r} for the eigendecomposition; choose one of {', '.join(DEVICES)}")
    if torch.compiler.is_exporting():  # a graph has no branches: it goes without checks and further attempts
        values, vectors = torch.linalg.eigh(torch.lerp(matrix, matrix.mT, 0.5))
        return values, vectors
    items = _non_finite_items(matrix)
    if items:
        raise EigendecompositionError(
            f"{len(items)} of {len(matrix)} matrices hold NaN or infinity (batch items {items[:_LISTED]}); "
            "the features that made them are not finite: lower the learning rate, clip gradients, or check the input",
            items,
        )
    on_cpu = device == "cpu" or (device == "auto" and matrix.device.type in _WITHOUT_FLOAT64)
    # lerp is the average in one pass; (A + A^T) / 2 makes two temporaries
    symmetric = torch.lerp(matrix, matrix.mT, 0.5).to("cpu" if on_cpu else matrix.device)
    cause = None
    try:
        eigenvalues, eigenvectors = batched_eigh(symmetric)
    except _LinAlgError as error:
        cause = error
        eigenvalues, eigenvectors = _one_by_one(symmetric)
    items = _non_finite_items(eigenvalues, eigenvectors)
    if items:
        _repair(symmetric, items, eigenvalues, eigenvectors, cause)
    return eigenvalues.to(matrix.device), eigenvectors.to(matrix.device)


def _non_finite_items(*tensors: Tensor) -> list[int]:
    """Items of which some entry of some tensor (B, ...) is NaN or infinite."""
    # a finite sum has finite terms and costs a tenth of isfinite; the reverse fails where a sum overflows
    sums = torch.stack([t.sum(dim=tuple(range(1, t.dim()))) for t in tensors])  # (number of tensors, B)
    clean: list[bool] = sums.isfinite().all(dim=0).tolist()
    return [i for i, ok in enumerate(clean) if not ok and not all(t[i].isfinite().all() for t in tensors)]


def _one_by_one(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (B, d) and eigenvectors (B, d, d), NaN where a matrix of (B, d, d) did not converge."""
    eigenvalues = symmetric.new_full(symmetric.shape[:-1], math.nan)
    eigenvectors = torch.full_like(symmetric, math.nan)
    for i, item in enumerate(symmetric):
        result = _eigh_or_none(item)
        if result is not None:
            eigenvalues[i], eigenvectors[i] = result
    return eigenvalues, eigenvectors


def _eigh_or_none(item: Tensor) -> tuple[Tensor, Tensor] | None:
    """Eigenvalues (d,) and eigenvectors (d, d) of one matrix (d, d), or None for no convergence, NaN or infinity."""
    try:
        eigenvalues, eigenvectors = torch.linalg.eigh(item)
    except _LinAlgError:
        return None
    return None if _non_finite_items(eigenvalues[None], eigenvectors[None]) else (eigenvalues, eigenvectors)


def _repair(
    symmetric: Tensor, items: list[int], eigenvalues: Tensor, eigenvectors: Tensor, cause: RuntimeError | None
) -> None:
    """Write the decompositions of these items of (B, d, d) into eigenvalues (B, d) and eigenvectors (B, d, d).

    Raises:
        EigendecompositionError: from `cause`, an item for which nothing helped.
    """
    lost, repaired = [], []
    for i in items:
        for device, jitter in _attempts(symmetric.device):
            found = _with_jitter(symmetric[i], device, jitter)
            if found is not None:
                eigenvalues[i], eigenvectors[i] = found
                repaired.append(f"item {i} with {jitter:g} on {device}")
                break
        else:
            lost.append(i)
    count = len(symmetric)
    if lost:
        raise EigendecompositionError(
            f"no convergence for {len(lost)} of {count} matrices, not even with {JITTERS[-1]:.0e} of the largest entry "
            f"added to the diagonal: {_listed([_diagnosis(i, symmetric[i]) for i in lost[:_LISTED]], len(lost))}",
            lost,
        ) from cause
    warnings.warn(
        f"no convergence for {len(items)} of {count} matrices at first; decomposed with this part of the largest entry "
        f"added to the diagonal and taken off the eigenvalues: {_listed(repaired[:_LISTED], len(repaired))}",
        EigendecompositionWarning,
        stacklevel=4,  # the caller of symmetric_eigh; torch.no_grad is one frame
    )


def _attempts(device: torch.device) -> list[tuple[torch.device, float]]:
    """Device and jitter, in turn, for a matrix that did not converge on `device` as it is."""
    attempts = [(device, jitter) for jitter in JITTERS]
    if device.type != "cpu":
        attempts += [(torch.device("cpu"), jitter) for jitter in (0.0, *JITTERS)]
    return attempts


def _with_jitter(item: Tensor, device: torch.device, jitter: float) -> tuple[Tensor, Tensor] | None:
    """As `_eigh_or_none` of item + jitter max|item| I, (d, d), with the shift taken off the eigenvalues."""
    # in float32 the smaller jitters would be lost in rounding
    work = item.to(device) if device.type in _WITHOUT_FLOAT64 else item.to(device).double()
    shift = jitter * work.abs().amax()
    result = _eigh_or_none(work + torch.diag_embed(shift.expand(len(work))))
    return None if result is None else (result[0] - shift, result[1])


def _diagnosis(i: int, item: Tensor) -> str:
    """Trace, rank and condition number of (d, d), as far as eigenvalues alone can be had."""
    rank = condition = "unknown"
    matrix = item.cpu().double()
    try:
        eigenvalues = torch.linalg.eigvalsh(matrix)
    except _LinAlgError:
        eigenvalues = torch.full((len(item),), math.nan)
    if eigenvalues.isfinite().all():
        sizes = eigenvalues.abs()
        largest, smallest = float(sizes.max()), float(sizes.min())
        rank = str(int((eigenvalues > len(item) * torch.finfo(item.dtype).eps * largest).sum()))
        condition = f"{largest / smallest:.1e}" if smallest > 0 else "inf"
    return f"item {i} (trace {float(matrix.trace()):.3e}, rank {rank} of {len(item)}, condition number {condition})"


def _listed(texts: list[str], total: int) -> str:
    """Joined by semicolons, with the number of those left out."""
    return "; ".join([*texts, *([f"and {total - len(texts)} more"] if total > len(texts) else [])])
