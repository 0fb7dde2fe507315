"""The machine a benchmark ran on, as its result records it."""

import os
import platform
from pathlib import Path
from typing import Any

import torch

from fgvc.training.machine import versions


def machine_facts(device: str = "cpu") -> dict[str, Any]:
    """Processor, system, load at this moment, threads and versions; JSON can hold them."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "threads": torch.get_num_threads(),
        "lapack": "MKL" if torch.backends.mkl.is_available() else "another library",  # type: ignore[no-untyped-call]
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "versions": versions(),
    }


def cpu_name() -> str:
    try:
        facts = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        facts = []  # not Linux
    names = [line.partition(":")[2].strip() for line in facts if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine_line(machine: dict[str, Any]) -> str:
    """One line of a report."""
    return f"machine: {machine['cpu']}, {machine['cores']} cores, {machine['system']}"
