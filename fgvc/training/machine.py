"""The machine a run is made on, and its memory."""

import os
import platform
import sys
from pathlib import Path
from typing import Any

import psutil
import torch

if sys.platform != "win32":
    import resource


def tf32_allowed(device: torch.device) -> dict[str, bool] | None:
    """Whether torch may round the factors of float32 products to TF32 on a GPU that has it; None off CUDA.

    torch's own settings, which fgvc leaves alone: by default yes for convolutions, no for matrix products. The spectral
    layers forbid it to themselves, see `fgvc.spectral.precision.full_precision`. Not run on a GPU.
    """
    if device.type != "cuda":
        return None
    backends: dict[str, Any] = {"matmul": torch.backends.cuda.matmul, "convolution": torch.backends.cudnn}
    if hasattr(torch.backends.cudnn, "conv"):  # torch from 2.9 on; there the older names may raise
        backends["convolution"] = torch.backends.cudnn.conv
        return {name: backend.fp32_precision == "tf32" for name, backend in backends.items()}
    return {name: bool(backend.allow_tf32) for name, backend in backends.items()}


def machine_facts() -> dict[str, Any]:
    """What times, and the rounding of sums, depend on beside the software; no names of hosts or users.

    `cpu_capability` is the widest instruction set that torch's own CPU kernels use, `processes` how many share the
    work.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # not everywhere
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return {
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "lapack": "MKL" if torch.backends.mkl.is_available() else "another library",  # type: ignore[no-untyped-call]
        "cores": os.cpu_count(),
        "cores_available": os.cpu_count() if affinity is None else len(affinity(0)),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "processes": torch.distributed.get_world_size() if distributed else 1,
    }


def _cpu_name() -> str:
    try:
        facts = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        facts = []  # not Linux
    names = [line.partition(":")[2].strip() for line in facts if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def reset_peak_memory() -> None:
    """Start counting the peak afresh, so that a run in a sweep does not report the peak of the one before."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return  # not Linux, or not permitted: the peak then counts from the start of the process


def peak_memory_mb() -> float:
    """Peak memory in MiB since `reset_peak_memory`: of the GPU where one is used, else of this process alone.

    Other processes of the same run, and those that load images, are not counted.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.split("VmHWM:")[1].split()[0]) / 2**10
    except (OSError, IndexError):
        return _peak_of_process() / 2**20


def _peak_of_process() -> int:
    """Bytes since the start of the process, where the system is not Linux."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    unit = 1 if sys.platform == "darwin" else 2**10  # ru_maxrss is in bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
