"""Scripts as a user starts them, a run small enough for a test, and a configuration."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fgvc.runs.config import (
    BackboneConfig,
    CacheConfig,
    DatasetConfig,
    MethodConfig,
    RunConfig,
    TrainerConfig,
    TransformConfig,
)

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    *("dataset=synthetic", "dataset.transform.size=64"),
    "+dataset.options={classes: 3, train_per_class: 4, test_per_class: 3, size: 64}",
    *("backbone.name=test_resnet", "backbone.weights=null", "method=seb", "method.reduction=8"),
    *("trainer.epochs=2", "trainer.batch_size=4", "trainer.workers=0"),
]


def a_config(**changes: Any) -> RunConfig:
    """A configuration in which whatever has no default is filled in; nothing can be trained with it."""
    parts = {
        "name": "t",
        "dataset": DatasetConfig(name="synthetic", root="r"),
        "backbone": BackboneConfig(name="resnet18"),
        "method": MethodConfig(name="seb"),
    }
    return RunConfig(**{**parts, **changes})


def trainable(place: Path, **changes: Any) -> RunConfig:
    """A configuration of a run that takes a second, in `place`/run; images and cached features are in `place` too."""
    options = {"classes": 3, "train_per_class": 4, "test_per_class": 3, "size": 64}
    data = DatasetConfig("synthetic", root=str(place / "data"), options=options, transform=TransformConfig(size=64))
    parts = {
        "run_dir": str(place / "run"),
        "dataset": data,
        "backbone": BackboneConfig(name="test_resnet"),
        "trainer": TrainerConfig(batch_size=4, workers=0),
        "cache": CacheConfig(dir=str(place / "cache")),
    }
    return a_config(**{**parts, **changes})


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


Train = Callable[..., Done]


def run(script: str, *arguments: object, cwd: Path) -> Done:
    """A script as a user starts it."""
    command = [sys.executable, str(ROOT / "scripts" / script), *map(str, arguments)]
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, encoding="utf-8", timeout=300, env=settings)
    return Done(done.returncode, done.stdout, done.stderr)


def train(cwd: Path, *overrides: str) -> Done:
    return run("train.py", *SMALL, *overrides, cwd=cwd)


def succeeded(done: Done) -> Done:
    """Exit status 0; otherwise the failure shows stderr."""
    assert done.returncode == 0, done.stderr
    return done


def refused(done: Done, *parts: str) -> None:
    """Exit status 2, one readable message that holds `parts`, no traceback."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "error: " in done.stderr
    for part in parts:
        assert part in done.stderr, done.stderr
