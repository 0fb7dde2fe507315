"""Fixtures shared by the tests."""

import gc
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import SMALL, Done, Train, run_script
from forked_runs import read_mat_in_a_fork
from PIL import Image

from fgvc.pooling import registry
from fgvc.spectral import GRADIENTS

SHARED = Path(os.environ.get("FGVC_SHARED", Path(__file__).resolve().parents[2] / "shared"))


@pytest.fixture(autouse=True)
def plain_log() -> None:
    """The levels of a fresh process: a command that ran in this one leaves its own."""
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("fgvc").setLevel(logging.NOTSET)


@pytest.fixture(autouse=True)
def quick_mat(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """MATLAB files are read in a fork but in the tests of the reader and of its limit of memory."""
    if hasattr(os, "fork") and request.path.name not in ("test_mat.py", "test_hostile_input.py"):
        monkeypatch.setattr("fgvc.data.mat._run_child", read_mat_in_a_fork)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with long tests come first, so that no process works alone at the end."""
    long = ("training", "studies", "inference")
    items.sort(key=lambda item: item.path.parent.name not in long)


@pytest.fixture(autouse=True, scope="module")
def light_garbage() -> None:
    """No collection of garbage walks through the libraries again (half a second each), nor copies them in a fork."""
    gc.collect()
    gc.freeze()


def _golden(name: str) -> Path:
    path = SHARED / "golden" / name
    if not path.is_file():
        pytest.skip(f"golden values of the published layers are not here: {path}")
    return path


@pytest.fixture(scope="session")
def golden_file() -> Path:
    """Inputs, outputs and gradients of the published layers."""
    return _golden("published_layers.npz")


@pytest.fixture(scope="session")
def golden_since_2022() -> Path:
    """The same of layers that were published later."""
    return _golden("since_2022.npz")


@pytest.fixture(scope="session")
def cub80_root() -> Path:
    """80 species of CUB-200-2011 in the official layout."""
    path = SHARED / "data" / "cub80" / "CUB_200_2011"
    if not path.is_dir():
        pytest.skip(f"the 80-class subset of CUB-200-2011 is not here: {path}")
    return path


@pytest.fixture
def scratch_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Methods and gradient rules that a test registers are gone after it."""
    monkeypatch.setattr(registry, "_METHODS", registry._Methods(registry._METHODS))
    rules = dict(GRADIENTS)
    yield
    GRADIENTS.clear()
    GRADIENTS.update(rules)


@pytest.fixture
def unprivileged() -> Iterator[Path]:
    """A folder, and a user whose permissions count: the superuser may read everything."""
    if not hasattr(os, "geteuid"):
        pytest.skip("no permissions as of Unix here")
    before = os.geteuid()
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    try:
        if before == 0:
            Image.init()  # what is imported on demand may not be readable to the other user
            os.chown(folder, 65534, 65534)
            os.seteuid(65534)
        yield folder
    finally:
        if before == 0:
            os.seteuid(before)
        for path in folder.rglob("*"):
            path.chmod(0o700)
        shutil.rmtree(folder)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Train:
    """`run` in this process, sparing the seconds of the imports: for the many ways to be refused."""

    def call(script: str, *arguments: object, cwd: Path) -> Done:
        monkeypatch.chdir(cwd)
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        monkeypatch.setattr(sys, "argv", sys.argv)
        caplog.set_level("INFO")
        status = run_script(script, arguments)
        out, err = capfd.readouterr()
        return Done(status, out, err + caplog.text)

    return call


@pytest.fixture
def train_here(here: Train) -> Train:
    return lambda cwd, *overrides: here("train.py", *SMALL, *overrides, cwd=cwd)
