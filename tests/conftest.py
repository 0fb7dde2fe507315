"""Fixtures shared by the tests."""

import os
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("FGVC_SHARED", Path(__file__).resolve().parents[2] / "shared"))


@pytest.fixture(scope="session")
def golden_file() -> Path:
    """Inputs, outputs and gradients of the published layers."""
    path = SHARED / "golden" / "published_layers.npz"
    if not path.is_file():
        pytest.skip(f"golden values of the published layers are not here: {path}")
    return path


@pytest.fixture(scope="session")
def cub80_root() -> Path:
    """80 species of CUB-200-2011 in the official layout."""
    path = SHARED / "data" / "cub80" / "CUB_200_2011"
    if not path.is_dir():
        pytest.skip(f"the 80-class subset of CUB-200-2011 is not here: {path}")
    return path
