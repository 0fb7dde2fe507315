"""Fixtures of the tests of training."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def uncalibrated() -> Iterator[None]:
    """Runs end with their training; the calibration after it, a quarter of a small run, is tested elsewhere."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("fgvc.inference.calibrate.calibrate_finished", lambda *_: None)
        yield
