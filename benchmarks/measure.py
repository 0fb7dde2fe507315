"""Time, peak memory and operators of a forward and a backward pass."""

import contextlib
import gc
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from cases import Case
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

# kineto's lines on start, stop and the GPU that is not there; whether it recorded anything is checked below
os.environ.setdefault("KINETO_LOG_LEVEL", "6")

Times = tuple[list[float], list[float]]
"""Milliseconds of forward and backward, one entry a round; the second is empty without a backward pass."""


def run_case(case: Case) -> Tensor | None:
    """One forward and backward pass; returns the gradient of the features, None without a backward pass."""
    with torch.set_grad_enabled(case.grad is not None):
        result = case.layer(case.x)
    if case.grad is None:
        return None
    (gradient,) = torch.autograd.grad(result, case.x, case.grad)
    return gradient


def interleaved_times(cases: Sequence[Case], repetitions: int, warm_up: int, seed: int) -> list[Times]:
    """Time every case once a round, in an order drawn anew for each, so that a slow moment hits all alike."""
    for case in cases:
        for _ in range(warm_up):
            run_case(case)
    times: list[Times] = [([], []) for _ in cases]
    order = random.Random(seed)
    for _ in range(repetitions):
        with _no_garbage_collection():
            for i in order.sample(range(len(cases)), len(cases)):
                spent = _time_case(cases[i])
                for values, milliseconds in zip(times[i], spent, strict=False):
                    values.append(milliseconds)
    return times


def _time_case(case: Case) -> list[float]:
    """Milliseconds of the forward and, where there is one, of the backward pass."""
    with torch.set_grad_enabled(case.grad is not None):
        start = _now(case.x.device)
        result = case.layer(case.x)
        middle = _now(case.x.device)
    if case.grad is None:
        return [(middle - start) * 1e3]
    # the gradient is held until the clock is read: giving it back is not part of the pass
    held = torch.autograd.grad(result, case.x, case.grad)
    end = _now(case.x.device)
    del held
    return [(middle - start) * 1e3, (end - middle) * 1e3]


def _now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A collection takes tens of milliseconds with torch loaded and would hit one candidate of a round."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """torch computes with one thread inside."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def case_peak_bytes(case: Case) -> int:
    """Peak of what a forward and backward pass has allocated at once, its result and the gradient of x included."""
    run_case(case)  # tables that are kept from the first call on are not a cost of every call
    if case.x.device.type == "cuda":  # not run: there is no GPU where this was written
        torch.cuda.reset_peak_memory_stats(case.x.device)
        before = torch.cuda.memory_allocated(case.x.device)
        run_case(case)
        return torch.cuda.max_memory_allocated(case.x.device) - before
    return peak_bytes(lambda: run_case(case))


def peak_bytes(run: Callable[[], object]) -> int:
    """Peak of the memory that torch's CPU allocator has handed out during `run` and not taken back.

    Counts tensors and the workspaces that torch allocates for LAPACK (that of eigh is 2 d^2 numbers, one matrix at a
    time), not what MKL allocates inside a call. The profiler sees no allocation of a thread other than the caller's,
    therefore `run` gets one thread: fgvc shares eigendecompositions out among threads otherwise.
    """
    with one_thread(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    if not events:
        raise RuntimeError("the profiler recorded no allocation; KINETO_LOG_LEVEL=0 may show why")
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def operator_table(case: Case, rows: int = 25) -> str:
    """torch.profiler's table of the operators of one forward and backward pass, most expensive first.

    With one thread, so that the times add up to that of the pass and eigendecompositions in threads are not missed.
    """
    run_case(case)
    activities = [ProfilerActivity.CPU]
    if case.x.device.type == "cuda":  # not run: there is no GPU where this was written
        activities.append(ProfilerActivity.CUDA)
    with one_thread(), profile(activities=activities) as profiler:
        run_case(case)
    table: str = profiler.key_averages().table(
        sort_by="self_cpu_time_total", row_limit=rows, max_name_column_width=45, max_src_column_width=0
    )
    return table
