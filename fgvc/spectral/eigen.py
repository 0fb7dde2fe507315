"""Eigendecomposition of a batch of symmetric matrices: repaired where LAPACK fails, with errors that name the matrix.

On a CPU each thread decomposes matrices of its own; several threads inside one matrix gain little. On a GPU one flag is
read back, right after the decomposition, which waits for the device itself.

Shapes: B matrices of d x d. "Item" is the index of a matrix in its batch.
"""

import concurrent.futures
import functools
import logging
import math
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fgvc.spectral.covariance import batch_parts

JITTERS: tuple[float, ...] = (1e-14, 1e-12, 1e-10, 1e-8)
"""Amounts added in turn to the diagonal of a matrix that did not converge, in units of its largest absolute entry."""

DEVICES: tuple[str, ...] = ("auto", "cpu", "same")
"""Choices of where `symmetric_eigh` computes."""

THREADS_PAY_FROM = 2**18
"""B d^3 from which threads are used; about 0.4 ms of work, where they break even on two cores that are free.

Right after a product that OpenMP shared out, its idle threads spin for some 10 ms, which takes a core from the workers:
work shorter than that then takes up to 1.4 times as long as a plain call, longer work 0.9 times. Where other processes
want the cores, it is the plain call that waits, 2 to 10 times as long; hence threads for short work as well.
"""

_WITHOUT_FLOAT64 = frozenset({"mps"})
_LISTED = 10  # items that a message names
_log = logging.getLogger(__name__)
_LinAlgError: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]  # its stubs lack it


_pools: dict[int, ThreadPoolExecutor] = {}
_lock = threading.Lock()


class EigendecompositionError(ArithmeticError):
    """A matrix could not be decomposed; the message names the batch items and what is wrong with them.

    Attributes:
        items: All of these batch items; the message may name only the first ones.
    """

    def __init__(self, message: str = "", items: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.items = list(items)


class EigendecompositionWarning(RuntimeWarning):
    """A matrix could be decomposed only with jitter or on the CPU; the message names the batch items and the amount."""


@torch.no_grad()
def symmetric_eigh(matrix: Tensor, device: str = "auto") -> tuple[Tensor, Tensor]:
    """Eigenvalues (ascending) and eigenvectors of the symmetric part of each matrix.

    Carries no gradient: the spectral layers bring their own. A matrix on which the library fails, or returns NaN,
    infinity or eigenvectors that are not orthogonal, is tried again in float64 with growing `JITTERS` on its diagonal,
    which are taken off its eigenvalues afterwards, and then on the CPU; the other matrices of the batch are left alone.
    On the CPU the batch is shared out among threads. Nothing here has been run on a GPU.

    In `torch.compile` and on tensors without data it is one operator of the graph, `fgvc::symmetric_eigh`.

    Args:
        matrix: (B, d, d), B and d may be 0; float32 is computed as float32. The two triangles are averaged first, so
            rounding in one of them does not decide.
        device: "auto": where the matrix is, or the CPU if that is faster (CUDA before torch 2.12) or there is no
            float64 there (MPS); "cpu": the CPU, as the papers do; "same": where the matrix is, without exception.

    Returns:
        eigenvalues (B, d) and eigenvectors (B, d, d), one per column, on the device and in the dtype of `matrix`.

    Raises:
        ValueError: unknown `device`.
        EigendecompositionError: a matrix holds NaN or infinity (it never reaches LAPACK), or LAPACK did not converge
            even with jitter; the message gives trace, rank and condition number.
    """
    if device not in DEVICES:
        raise ValueError(f"unknown device {device!r} for the eigendecomposition; choose one of {', '.join(DEVICES)}")
    if torch.compiler.is_exporting():  # an exported program has to run without fgvc
        values, vectors = torch.linalg.eigh(torch.lerp(matrix, matrix.mT, 0.5))
        return values, vectors
    # eager mode goes without the operator, which costs some 50 us a call
    if torch.compiler.is_compiling() or isinstance(matrix, FakeTensor):
        found: tuple[Tensor, Tensor] = _eigh_operator(matrix, device)
        return found
    return _checked_eigh(matrix, device)


@torch.library.custom_op("fgvc::symmetric_eigh", mutates_args=())
def _eigh_operator(matrix: Tensor, device: str) -> tuple[Tensor, Tensor]:
    """`symmetric_eigh` as one operator, which tracing does not look into."""
    return _checked_eigh(matrix, device)


@_eigh_operator.register_fake
def _(matrix: Tensor, device: str) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    return matrix.new_empty(matrix.shape[:-1]), matrix.new_empty(matrix.shape).mT  # the layout LAPACK writes


def _checked_eigh(matrix: Tensor, device: str) -> tuple[Tensor, Tensor]:
    """As `symmetric_eigh`, for a matrix with data and a `device` that was checked."""
    # lerp is the average in one pass; (A + A^T) / 2 makes two temporaries
    symmetric = torch.lerp(matrix, matrix.mT, 0.5).to(_computing_device(matrix, device))
    finite = _by_part(_is_finite, symmetric)
    if symmetric.device.type == "cpu":
        _refuse_non_finite(finite)
    else:  # to read the flags here would wait for the device once more: the one reading below names them
        symmetric = torch.where(finite[:, None, None], symmetric, 0)
    cause = None
    try:
        eigenvalues, eigenvectors = batched_eigh(symmetric)
    except _LinAlgError as error:
        cause = error
        eigenvalues, eigenvectors = _one_by_one(symmetric)
    sound = finite & _by_part(_is_sound, eigenvectors, eigenvalues)
    if not sound.all():
        _refuse_non_finite(finite)
        _repair(symmetric, _items(~sound), eigenvalues, eigenvectors, cause)
    return eigenvalues.to(matrix.device), eigenvectors.to(matrix.device)


def _computing_device(matrix: Tensor, choice: str) -> torch.device:
    """Where the eigendecomposition of a matrix is computed, see `symmetric_eigh`."""
    there = matrix.device
    if choice == "cpu" or (choice == "auto" and there.type in _WITHOUT_FLOAT64):
        return torch.device("cpu")
    # cuSOLVER's batched routines end at 32 rows; before 2.12 torch calls the plain one for each larger matrix
    if choice == "auto" and there.type == "cuda" and matrix.shape[-1] > 32 and torch.__version__ < "2.12":
        _say_cpu_once()
        return torch.device("cpu")
    return there


@functools.cache
def _say_cpu_once() -> None:
    _log.warning(
        "torch %s decomposes matrices of more than 32 rows one by one on a GPU: eigendecompositions run on the CPU; "
        "install torch 2.12 or newer, or set eigh_device=same to keep them on the GPU",
        torch.__version__,
    )


def _refuse_non_finite(finite: Tensor) -> None:
    """Raise EigendecompositionError for the items whose flag (B,) is false."""
    items = _items(~finite)
    if items:
        raise EigendecompositionError(
            f"{len(items)} of {len(finite)} matrices hold NaN or infinity (batch items {items[:_LISTED]}); "
            "the features that made them are not finite: lower the learning rate, clip gradients, or check the input",
            items,
        )


def _items(flags: Tensor) -> list[int]:
    """Items whose flag (B,) is true."""
    return [i for i, flag in enumerate(flags.tolist()) if flag]


def _by_part(check: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """`check` of each item of (B, d, d) and others, (B,) bool, in parts whose temporaries stay in the cache."""
    flags = tensors[0].new_empty(len(tensors[0]), dtype=torch.bool)
    for part in batch_parts(tensors[0].shape, tensors[0].device):
        flags[part] = check(*(tensor[part] for tensor in tensors))
    return flags


def _is_finite(tensor: Tensor) -> Tensor:
    """(B,) bool: all of (B, ...) is finite; a sum of the entries themselves may overflow."""
    return (0 * tensor).flatten(1).sum(dim=-1) == 0


def _is_sound(eigenvectors: Tensor, eigenvalues: Tensor) -> Tensor:
    """(B,) bool: eigenvectors (B, d, d) finite and orthogonal, eigenvalues (B, d) finite.

    U U^T v = v is checked for one vector v in place of U U^T = I: two passes over U, where a product takes d. Only an
    error whose rows are all orthogonal to v goes unseen.
    """
    d = eigenvalues.shape[-1]
    count = eigenvalues.new_ones(d, dtype=torch.int64).cumsum(0)
    v = eigenvalues.new_ones(d) + count / d  # from 1 to 2: no two entries are the same
    # no matrix products: in a forked child their threads would wait for ever
    projected = (eigenvectors.mT * v).sum(dim=-1)
    error = (eigenvectors * projected[:, None, :]).sum(dim=-1) - v
    # a NaN is not below anything
    orthogonal = error.abs() < 10 * max(d, 1) * torch.finfo(v.dtype).eps
    return orthogonal.all(dim=-1) & _is_finite(eigenvalues)


def batched_eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """torch.linalg.eigh of (B, d, d), the batch shared out among torch.get_num_threads() threads.

    LAPACK's dsyevd gains little from threads inside one matrix and, where cores are busy, loses a multiple by waiting
    for them. Each worker therefore computes with one thread. The call is plain off the CPU, for one matrix, with one
    thread, and below `THREADS_PAY_FROM`.

    Args:
        matrix: (B, d, d), symmetric, without gradient; the lower triangle is read.

    Returns:
        eigenvalues (B, d), ascending, and eigenvectors (B, d, d), one per column.

    Raises:
        torch.linalg.LinAlgError: a matrix did not converge, in whichever thread; all threads are done by then.
    """
    threads = torch.get_num_threads()
    work = matrix.numel() * matrix.shape[-1]
    if matrix.device.type != "cpu" or min(threads, len(matrix)) < 2 or work < THREADS_PAY_FROM:
        eigenvalues, eigenvectors = torch.linalg.eigh(matrix)
        return eigenvalues, eigenvectors
    eigenvalues = matrix.new_empty(matrix.shape[:-1])
    eigenvectors = torch.empty_like(matrix, memory_format=torch.contiguous_format).mT  # the layout LAPACK writes
    inference = torch.is_inference_mode_enabled()  # belongs to the thread: an inference tensor is written only inside

    def decompose(part: Tensor, *out: Tensor) -> None:
        with torch.inference_mode(inference):
            torch.linalg.eigh(part, out=out)

    # writing into slices: a torch.cat afterwards would be another pass over both, threaded, for nothing
    parts = zip(*(x.tensor_split(min(threads, len(x))) for x in (matrix, eigenvalues, eigenvectors)), strict=True)
    pool = _pool(threads)
    futures = [pool.submit(decompose, *part) for part in parts]
    concurrent.futures.wait(futures)  # before an error is raised: nobody may still write into the results then
    for future in futures:
        future.result()
    return eigenvalues, eigenvectors


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
    """Eigenvalues (d,) and eigenvectors (d, d) of one matrix (d, d), or None where there is none that `_is_sound`."""
    try:
        eigenvalues, eigenvectors = torch.linalg.eigh(item)
    except _LinAlgError:
        return None
    return (eigenvalues, eigenvectors) if _is_sound(eigenvectors[None], eigenvalues[None]) else None


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
        stacklevel=5,  # the caller of symmetric_eigh; torch.no_grad is one frame
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
    """Trace, rank and condition number of (d, d); "unknown" where the eigenvalues cannot be computed either."""
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


def _pool(threads: int) -> ThreadPoolExecutor:
    """The pool with this many workers, made on first use and kept."""
    with _lock:
        if threads not in _pools:
            _pools[threads] = _start_pool(threads)
        return _pools[threads]


def _start_pool(threads: int) -> ThreadPoolExecutor:
    """A pool whose workers compute with one thread each; thread counts elsewhere are as before on return.

    torch.set_num_threads sets the count of the calling thread and the default of all threads that have not asked for
    theirs yet. So every worker asks first, which fixes its own count, and the default is put back by a thread that
    ends there: the caller's count may differ from the default and stays alone. A thread that another part of the
    program starts within these microseconds may see a default of 1.

    Raises:
        RuntimeError: the system refuses a thread.
    """
    together = threading.Barrier(threads)  # also keeps a worker from taking two of the tasks

    def settle() -> int:
        default = torch.get_num_threads()
        together.wait()
        torch.set_num_threads(1)
        together.wait()
        return default

    pool = ThreadPoolExecutor(threads, thread_name_prefix="fgvc-eigh")
    try:
        settled = [pool.submit(settle) for _ in range(threads)]
        default = settled[0].result()  # by then all of them have set theirs
    except BaseException:
        together.abort()  # workers that did start would wait for the others for ever
        pool.shutdown(wait=False)
        raise
    restore = threading.Thread(target=torch.set_num_threads, args=(default,))
    restore.start()
    restore.join()
    return pool


def _forget_pools() -> None:
    """In a forked child (a DataLoader worker): the threads stayed in the parent, and the lock may have been held."""
    global _lock
    _pools.clear()
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pools)
