"""The machine a benchmark ran on, as its result records it."""

import os
from typing import Any

import torch

from fgvc.provenance import machine_facts, versions


def benchmark_facts(device: str = "cpu") -> dict[str, Any]:
    """The machine, its load at this moment, the device and versions; JSON can hold them."""
    return machine_facts() | {
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "versions": versions(),
    }


def machine_line(machine: dict[str, Any]) -> str:
    """One line of a report."""
    return f"machine: {machine['cpu']}, {machine['cores']} cores, {machine['system']}"
