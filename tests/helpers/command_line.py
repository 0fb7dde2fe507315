"""Scripts as a user starts them, a run small enough for a test, and a configuration."""

import functools
import logging
import os
import runpy
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from PIL import Image

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
    """A script in a process of its own, forked from this one: it spares the seconds of the imports."""
    import_for(script)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if not child:
            status = 70
            try:
                fresh_process(cwd, out.fileno(), err.fileno())
                status = run_script(script, arguments)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = [(file.seek(0), file.read().decode())[1] for file in (out, err)]
    return Done(status, *texts)


def fresh_process(cwd: Path, out: int, err: int) -> None:
    """Give a forked process what a new one has: streams (descriptors), folder, signals, log, warnings."""
    torch.set_num_threads(1)  # the parent's pool of threads does not exist here
    AcceleratorState._reset_state(reset_partial_state=True)
    GlobalHydra.instance().clear()
    os.chdir(cwd)
    os.dup2(out, 1)
    os.dup2(err, 2)
    logging.getLogger().handlers.clear()  # those of pytest, which keep the log to themselves
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("fgvc").setLevel(logging.NOTSET)
    warnings.resetwarnings()
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1, encoding="utf-8") for stream in (1, 2))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ.pop("HYDRA_FULL_ERROR", None)


def run_script(script: str, arguments: Iterable[object]) -> int:
    """A script in this process; returns its exit status.

    Hydra composes a configuration twice, first only to see whether it sets hydra.mode; here once.
    """
    sys.argv = [script, *map(str, arguments)]
    get_mode = Hydra.get_mode
    try:
        Hydra.get_mode = lambda *_, **__: None
        runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
    except SystemExit as error:
        return int(error.code or 0)
    finally:
        Hydra.get_mode = get_mode
    return 0


@functools.cache
def import_for(script: str) -> None:
    """Import what a script does, before processes are forked: else each of them would, in seconds."""
    runpy.run_path(str(ROOT / "scripts" / script), run_name="imported")
    Plugins.instance()  # of Hydra, which looks for them on disk
    Image.init()


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
