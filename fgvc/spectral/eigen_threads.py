"""Eigendecomposition of a batch on the CPU: one thread per matrix, not several threads inside each matrix."""

import concurrent.futures
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

THREADS_PAY_FROM = 2**18
"""B d^3 from which threads are used; about 0.4 ms of work, where they break even on two cores that are free.

Right after a product that OpenMP shared out, its idle threads spin for some 10 ms, which takes a core from the workers:
work shorter than that then takes up to 1.4 times as long as a plain call, longer work 0.9 times. Where other processes
want the cores, it is the plain call that waits, 2 to 10 times as long; hence threads for short work as well.
"""

_pools: dict[int, ThreadPoolExecutor] = {}
_lock = threading.Lock()


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
