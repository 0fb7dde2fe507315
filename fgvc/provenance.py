"""What a result was made with: versions and commit."""

import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fgvc import __version__

_PACKAGES = ("torch", "torchvision", "timm", "accelerate", "numpy", "pillow")
_DIRTY = "-dirty"


def versions() -> dict[str, str]:
    """Python and the packages that decide what a run computes."""
    return {"python": platform.python_version(), "fgvc": __version__, **{name: version(name) for name in _PACKAGES}}


def source_state() -> dict[str, Any]:
    """`commit` of the checkout fgvc is imported from, and whether tracked files are `dirty`, different from it.

    Both are None outside a checkout.
    """
    described = _describe_checkout()
    if described is None:
        return {"commit": None, "dirty": None}
    return {"commit": described.removesuffix(_DIRTY), "dirty": described.endswith(_DIRTY)}


def commit_label(record: Mapping[str, Any]) -> str | None:
    """The commit of a record that has the keys of `source_state`, with "-dirty" where files differed from it.

    Records of earlier versions say so in the commit itself.
    """
    commit = record.get("commit")
    return f"{commit}{_DIRTY}" if isinstance(commit, str) and record.get("dirty") is True else commit


def _describe_checkout() -> str | None:
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():  # installed: git would find whatever repository lies around it
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
