"""Origin of a result: versions, commit, machine, and peak memory."""

import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from fgvc import __version__

if sys.platform != "win32":
    import resource

# torch is imported inside functions, since tables do not need it

_PACKAGES = ("torch", "torchvision", "timm", "accelerate", "numpy", "pillow")
_DIRTY = "-dirty"


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that determine a run's result."""
    return {"python": platform.python_version(), "fgvc": __version__, **{name: version(name) for name in _PACKAGES}}


def source_state() -> dict[str, Any]:
    """Return `commit` of the checkout that fgvc is imported from, and `dirty`: whether tracked files differ from it.

    Both are None outside a checkout.
    """
    unknown = {"commit": None, "dirty": None}
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():  # installed: git would find any repository around it
        return unknown
    # no lock: a process that ends meanwhile would leave it, and the user's next command of git fails
    command = ["git", "--no-optional-locks", "-C", str(root), "status", "--porcelain=v2", "--branch", "-uno"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return unknown
    lines = done.stdout.splitlines()
    commits = [line.removeprefix("# branch.oid ") for line in lines if line.startswith("# branch.oid ")]
    if not commits or commits[0] == "(initial)":  # a repository without a commit
        return unknown
    return {"commit": commits[0], "dirty": any(not line.startswith("#") for line in lines)}


def commit_label(record: Mapping[str, Any]) -> str | None:
    """Return the commit of a record with the keys of `source_state`, with "-dirty" if files differed from it.

    In records of earlier versions, the commit itself ends with "-dirty".
    """
    commit = record.get("commit")
    return f"{commit}{_DIRTY}" if isinstance(commit, str) and record.get("dirty") is True else commit


def machine_facts() -> dict[str, Any]:
    """Return the hardware that affects times and the rounding of sums; no names of hosts or users.

    `cpu_capability` is the widest instruction set of torch's own CPU kernels. `processes` is the number of processes
    that share the work.
    """
    import torch

    try:
        facts = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        facts = []  # not Linux
    names = [line.partition(":")[2].strip() for line in facts if line.startswith("model name")]
    affinity = getattr(os, "sched_getaffinity", None)  # absent on some systems
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return {
        "system": platform.platform(),
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "lapack": "MKL" if torch.backends.mkl.is_available() else "another library",  # type: ignore[no-untyped-call]
        "cores": os.cpu_count(),
        "cores_available": os.cpu_count() if affinity is None else len(affinity(0)),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "processes": torch.distributed.get_world_size() if distributed else 1,
    }


def tf32_allowed() -> dict[str, bool]:
    """Return whether torch may round the factors of float32 products to TF32 on a GPU that has it.

    These are torch's settings; fgvc does not change them. The default is yes for convolutions and no for matrix
    products. The spectral layers never use TF32, see `fgvc.spectral.precision.full_precision`. Not run on a GPU.
    """
    precision = float32_precision("cuda")
    return {name: precision[name] == "tf32" for name in ("matmul", "convolution")}


PRECISION_VARIABLES = (
    *("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "PYTORCH_MPS_FAST_MATH"),
    *("DNNL_DEFAULT_FPMATH_MODE", "ONEDNN_DEFAULT_FPMATH_MODE"),
)
"""Environment variables that change the precision of float32 products in cuBLAS, cuDNN, Metal and oneDNN."""


def float32_precision(device: str) -> dict[str, str]:
    """Return what torch rounds the factors of float32 products to on a kind of device, such as "cpu" or "cuda".

    Keys: "matmul" and "convolution", e.g. "tf32", "bf16", "ieee" or "none" (torch's default), "autocast", and
    those of `PRECISION_VARIABLES` that are set.
    """
    import torch

    backends: Any = torch.backends
    if hasattr(backends.cudnn, "conv"):  # torch >= 2.9, where the older names may raise
        cuda, cpu = (backends.cuda.matmul, backends.cudnn.conv), (backends.mkldnn.matmul, backends.mkldnn.conv)
        matmul, convolution = (backend.fp32_precision for backend in (cuda if device == "cuda" else cpu))
    else:
        older = (backends.cuda.matmul, backends.cudnn)
        matmul, convolution = ("tf32" if backend.allow_tf32 else "ieee" for backend in older)
    autocast = device in ("cpu", "cuda") and torch.is_autocast_enabled(device)
    return {
        "matmul": matmul,
        "convolution": convolution,
        "autocast": str(torch.get_autocast_dtype(device)) if autocast else "no",
        **{name: os.environ[name] for name in PRECISION_VARIABLES if os.environ.get(name)},
    }


def reset_peak_memory() -> None:
    """Reset the peak, so that a run in a sweep does not report the peak of an earlier run."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return  # not Linux, or not permitted: the peak counts from the start of the process


def peak_memory_mb() -> float:
    """Return the peak memory in MiB since `reset_peak_memory`: of the GPU if there is one, otherwise of this process.

    Other processes of the same run, and image-loading processes, are not counted.
    """
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.split("VmHWM:")[1].split()[0]) / 2**10
    except (OSError, IndexError):  # not Linux: the peak since the start of the process
        if sys.platform == "win32":
            return int(psutil.Process().memory_info().peak_wset) / 2**20
        unit = 1 if sys.platform == "darwin" else 2**10  # ru_maxrss is in bytes on macOS
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
