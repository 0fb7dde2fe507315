"""What a run does about NaN, infinity, growing losses, lack of memory and files that a worker cannot read."""

import ctypes
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import zlib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import forked_runs
import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from command_line import ROOT, Train, fresh_process, refused, succeeded, train
from forked_runs import train_in_processes, train_until
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import get_worker_info

import fgvc.data.dataset
from fgvc.data.image_file import UnreadableImageError
from fgvc.models import PoolingHead
from fgvc.spectral import EigendecompositionError
from fgvc.training.loop import Trainer

CLONE_NEWNS, MS_REC, MS_PRIVATE = 0x20000, 0x4000, 0x40000  # of Linux

pytestmark = pytest.mark.usefixtures("uncalibrated")

RUNS = ("straight", "run")
# the loss grows, and the watch is quick to see it
WILD = ["trainer.clip_norm=null", "method=gap", "trainer.batch_size=1", "trainer.epochs=1", "optimizer.lr=1"]
WILD += ["trainer.divergence_window=4", "trainer.divergence_factor=1.2"]
FROZEN = ["backbone.frozen=true", "cache.dir=cache", "trainer.batch_size=3", "trainer.clip_norm=null"]


@pytest.fixture(scope="module")
def poisoned_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cwd = tmp_path_factory.mktemp("poisoned")
    succeeded(train(cwd, *FROZEN, "run_dir=healthy", "trainer.epochs=0"))
    for path in (cwd / "cache").glob("features-*.npy"):
        maps = np.lib.format.open_memmap(path, mode="r+")
        if maps.shape[:2] == (2, 12):
            maps[:, 2, 0, 0, 0] = np.nan
            maps.flush()
            card = json.loads(path.with_suffix(".json").read_text())
            card["crc32"] = f"{zlib.crc32(path.read_bytes()):08x}"  # else it would be computed again
            path.with_suffix(".json").write_text(json.dumps(card))
    return cwd


@pytest.fixture
def poisoned(poisoned_once: Path, tmp_path: Path) -> Path:
    """Working folder whose feature cache holds one NaN, in the map of the third training image."""
    return shutil.copytree(poisoned_once, tmp_path, dirs_exist_ok=True)


def repeat(cwd: Path, saved: Path) -> torch.Tensor:
    """The loss of a saved step, by the lines that docs/running.md gives."""
    page = (ROOT / "docs" / "running.md").read_text()
    (lines,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.S) if "def repeat" in block)
    names: dict[str, Any] = {}
    exec(lines, names)
    before = Path.cwd()
    os.chdir(cwd)  # where the run was started: its paths are relative
    try:
        loss: torch.Tensor = names["repeat"](saved.parents[1], saved)
    finally:
        os.chdir(before)
    return loss


def third_image(cwd: Path) -> str:
    return sorted((cwd / "datasets").rglob("train_*.jpg"))[2].name


@pytest.mark.parametrize("method", ["gap", "seb"])
def test_a_nan_names_the_image_and_saves_the_step(poisoned: Path, train_here: Train, method: str) -> None:
    done = train_here(poisoned, *FROZEN, "run_dir=run", f"method={method}")
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "in epoch 1, step" in done.stderr and "inputs that are not finite: " in done.stderr
    (saved,) = (poisoned / "run" / "failed_steps").iterdir()
    assert f"the step is saved in run/failed_steps/{saved.name}" in done.stderr
    summary = json.loads((poisoned / "run" / "summary.json").read_text())
    assert summary["status"] == "failed" and "inputs that are not finite" in summary["reason"]
    if method == "gap":
        assert repeat(poisoned, saved).isnan()
    else:
        with pytest.raises(EigendecompositionError):
            repeat(poisoned, saved)
    (named,) = {line.split(".jpg")[0].split("/")[-1] for line in done.stderr.splitlines() if "inputs that" in line}
    assert f"{named}.jpg" == third_image(poisoned)


def test_a_step_that_cannot_be_saved_is_no_further_failure(poisoned: Path, train_here: Train) -> None:
    (poisoned / "run").mkdir()
    (poisoned / "run" / "failed_steps").symlink_to("nowhere")  # in the way of the folder
    done = train_here(poisoned, *FROZEN, "run_dir=run", "method=gap")
    assert done.returncode == 1 and "could not be saved" in done.stderr, done.stderr
    assert "inputs that are not finite: " in done.stderr and "the step is saved" not in done.stderr


def test_steps_are_left_out_within_a_limit(poisoned: Path, train_here: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fgvc.training.guard.SAVED_STEPS", 1)
    skip = ["trainer.on_non_finite=skip", "trainer.ema_decay=0.5"]
    done = train_here(poisoned, *FROZEN, *skip, "run_dir=run")
    assert done.returncode == 0 and "skipped step" in done.stderr, done.stderr
    assert pd.read_csv(poisoned / "run" / "metrics.csv")["skipped_steps"].tolist() == [1, 1]
    assert len(list((poisoned / "run" / "failed_steps").iterdir())) == 1  # of two
    for which in ("best", "last"):
        weights = load_file(poisoned / "run" / "checkpoints" / f"{which}.safetensors")
        assert all(tensor.isfinite().all() for tensor in weights.values())  # statistics of the normalisation included

    again = train_here(poisoned, *FROZEN, *skip, "run_dir=limited", "trainer.max_skips=1")
    assert again.returncode == 1 and "more than trainer.max_skips=1 steps failed" in again.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are forked")
def test_a_nan_in_one_of_two_processes_stops_both_and_is_named_by_its_own(poisoned: Path) -> None:
    gap = [*FROZEN, "method=gap"]  # batch normalisation over both would spread it at once
    assert train_in_processes(poisoned, [*gap, "run_dir=run"], 2) == [1, 1]
    said = (poisoned / "log").read_text()
    assert said.count("Traceback") == 0 and "a number in another process is not finite in epoch 1" in said, said
    assert (
        f"inputs that are not finite: images/class_00/{third_image(poisoned)}" in said or third_image(poisoned) in said
    )
    assert len(list((poisoned / "run" / "failed_steps").iterdir())) == 1
    # the eigendecomposition of one process fails: its NaN reaches the other with the gradient
    skip = [*FROZEN, "method=seb", "method.reduction=null", "run_dir=skipped", "trainer.on_non_finite=skip"]
    assert train_in_processes(poisoned, skip, 2) == [0, 0], (poisoned / "log").read_text()
    assert pd.read_csv(poisoned / "skipped" / "metrics.csv")["skipped_steps"].tolist() == [1, 1]


def test_a_loss_that_grows_and_stays_grown_is_a_divergence(tmp_path: Path, train_here: Train) -> None:
    ignored = train_here(tmp_path, *WILD, "run_dir=ignored", "trainer.on_divergence=ignore")
    assert ignored.returncode == 0 and "diverges" not in ignored.stderr
    warned = train_here(tmp_path, *WILD, "run_dir=warned", "trainer.on_divergence=warn")
    assert warned.returncode == 0 and "the training loss diverges" in warned.stderr
    refused(train_here(tmp_path, "trainer.divergence_factor=1"), "trainer.divergence_factor", "1")
    refused(train_here(tmp_path, "trainer.divergence_window=0"), "trainer.divergence_window", "0")
    refused(train_here(tmp_path, "trainer.on_divergence=panic"), "panic", "warn")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are forked")
def test_a_divergence_is_seen_at_the_same_step_by_a_run_that_was_stopped_on_the_way(tmp_path: Path) -> None:
    assert train_until(tmp_path, [*WILD, "run_dir=straight"]) == 1
    (told,) = (line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("error: "))
    step = int(told.split(", step ")[1].split(",")[0])
    stopped = [*WILD, "run_dir=stopped"]
    assert train_until(tmp_path, stopped, ("step", step - 2), number=signal.SIGTERM) == 143
    assert train_until(tmp_path, stopped) == 1
    assert told.split(";")[0] in (tmp_path / "log").read_text()


def test_out_of_memory_says_what_to_set(tmp_path: Path, train_here: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(*_: object) -> torch.Tensor:
        return torch.empty(2**50)

    monkeypatch.setattr(PoolingHead, "forward", forward)
    done = train_here(tmp_path, "run_dir=run")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "trainer.accumulation=2" in done.stderr and "trainer.batch_size=4" in done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "failed" and "trainer.accumulation=2" in summary["reason"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are forked")
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_file_no_worker_can_read_is_one_message(tmp_path: Path, split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(path: Path, *arguments: object, **options: object) -> Image.Image:
        if get_worker_info() is not None and path.name == f"{split}_0002.jpg":
            raise UnreadableImageError("broken data stream")
        return decode(path, *arguments, **options)

    decode: Callable[..., Image.Image] = fgvc.data.dataset.decode_rgb
    monkeypatch.setattr(fgvc.data.dataset, "decode_rgb", failing)
    status = train_until(tmp_path, ["run_dir=run", "trainer.workers=1"])
    said = (tmp_path / "log").read_text()
    assert status == 2 and "Traceback" not in said and "worker process" not in said, said
    message = said.split("error: ")[1]
    assert f"{split}_0002.jpg: broken data stream. Replace it" in message, said
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "failed"


def test_skips_of_the_loss_scaler_count(tmp_path: Path, train_here: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp16 on the CPU, where accelerate does without: with torch's scaler, at a scale that overflows.

    Of the head alone: convolutions in fp16 are a hundred times slower there.
    """

    def create(*_: object, **__: object) -> Accelerator:
        AcceleratorState._reset_state()
        accelerator = Accelerator(mixed_precision="fp16")
        accelerator.native_amp = True
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**21)
        return accelerator

    def stop(self: Trainer) -> None:
        save(self)
        raise KeyboardInterrupt

    monkeypatch.setattr("fgvc.training.run.create_accelerator", create)
    command = ["trainer.precision=fp16", "trainer.epochs=3", *FROZEN]
    assert train_here(tmp_path, *command, "run_dir=straight").returncode == 0
    save = Trainer._save
    with monkeypatch.context() as stopped:
        stopped.setattr(Trainer, "_save", stop)
        assert train_here(tmp_path, *command, "run_dir=run").returncode == 130
    succeeded(train_here(tmp_path, *command, "run_dir=run"))
    skips = {name: pd.read_csv(tmp_path / name / "metrics.csv")["loss_scale_skips"].tolist() for name in RUNS}
    assert skips["straight"][0] > 0 and skips["straight"][-1] == 0
    assert skips["run"] == skips["straight"]  # the scale it had come down to was kept
    weights = [load_file(tmp_path / name / "checkpoints" / "last.safetensors") for name in RUNS]
    assert all(weights[0][name].isfinite().all() and weights[0][name].equal(weights[1][name]) for name in weights[0])


class NanGradient(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: object, values: torch.Tensor) -> torch.Tensor:
        return values.clone()

    @staticmethod
    def backward(_ctx: object, grad: torch.Tensor) -> torch.Tensor:
        return grad * torch.nan


def test_a_gradient_of_an_earlier_part_is_named(
    tmp_path: Path, train_here: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The micro-batch that is repeated, the last, is finite by itself."""

    def forward(self: PoolingHead, features: torch.Tensor) -> torch.Tensor:
        logits = plain(self, features)
        if not self.training:
            return logits
        calls.append(len(features))
        return NanGradient.apply(logits) if len(calls) == 3 else logits  # the first part of the second step

    plain, calls = PoolingHead.forward, list[int]()
    monkeypatch.setattr(PoolingHead, "forward", forward)
    settings = ["method=gap", "trainer.accumulation=2", "run_dir=run"]
    done = train_here(tmp_path, *settings)
    assert done.returncode == 1 and "the norm of the gradient is nan in epoch 1, step 2" in done.stderr, done.stderr
    assert "gradients that are not finite: backbone." in done.stderr and "their norm is not" not in done.stderr
    (saved,) = (tmp_path / "run" / "failed_steps").iterdir()
    assert repeat(tmp_path, saved).isfinite()


def in_a_small_dev_shm() -> bool:
    """Give this process a /dev/shm of 1 MB, as in a container, in a mount namespace of its own; False if refused."""
    libc = ctypes.CDLL(None)
    alone = libc.unshare(CLONE_NEWNS) == 0
    private = alone and libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None) == 0
    return private and libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, b"size=1m") == 0


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a file system")
def test_a_full_dev_shm_is_named_with_its_size_and_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as probe:
        if not probe.submit(in_a_small_dev_shm).result():
            pytest.skip("mounting a file system is not permitted here")

    def in_it(*arguments: Any) -> None:
        fresh_process(*arguments)
        assert in_a_small_dev_shm()

    monkeypatch.setattr(forked_runs, "fresh_process", in_it)
    large = ["dataset.transform.size=128", "method=gap", "trainer.batch_size=12", "trainer.eval_batch_size=9"]
    for frozen in ("false", "true"):  # then the maps are what is computed
        run = [f"backbone.frozen={frozen}", f"run_dir=run-{frozen}"]
        status = train_until(tmp_path, [*large, "trainer.workers=1", *run])
        said = (tmp_path / "log").read_text()
        assert status == 1 and "Traceback" not in said, said
        for part in ("/dev/shm, which has 1 MiB, is full", "trainer.workers=0", "enlarge /dev/shm"):
            assert part in said, said
    summary = json.loads((tmp_path / "run-false" / "summary.json").read_text())
    assert summary["status"] == "failed" and "/dev/shm" in summary["reason"]
