"""What a run was made with: versions, commit, memory."""

import platform
import resource
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("fgvc", "torch", "torchvision", "timm", "accelerate", "numpy")


def versions() -> dict[str, str]:
    """Python and the packages that decide what a run computes."""
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}


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


def commit() -> str | None:
    """Commit of the checkout fgvc is imported from, with "-dirty" where files differ; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # installed: git would find whatever repository lies around it
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def reset_peak_memory() -> None:
    """Start counting the peak afresh, so that a run in a sweep does not report the peak of the one before."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return  # not Linux, or not permitted: the peak then counts from the start of the process


def peak_memory_mb() -> float:
    """Peak memory in MiB since `reset_peak_memory`: of the GPU where one is used, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.split("VmHWM:")[1].split()[0]) / 2**10
    except (OSError, IndexError):
        kilobytes = 1 if sys.platform == "darwin" else 2**10  # ru_maxrss is in bytes on macOS
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobytes / 2**20
