"""Dry run: two steps of an experiment on random images, to see that all its parts fit."""

import copy
import itertools
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from fgvc.runs.config import RunConfig
from fgvc.runs.folder import RunFolder
from fgvc.training.run import train_run

_CLASSES = 4  # a batch is one image of each class: even, since mixup needs pairs


def dry_run(config: RunConfig) -> str:
    """Train two steps with the backbone, method, optimiser, recipe and image size of `config`, on a few random images.

    The images are in class folders; the dataset's own adapter and its options are not used. There are two epochs of one
    step of at most four images, each with an evaluation. In a hybrid run the second step is after the switch. The
    backbone starts from random weights, not from those of a hub. Nothing is left on the disk.

    Returns:
        One line about the run and its losses.

    Raises:
        As `fgvc.training.train_run`.
    """
    with tempfile.TemporaryDirectory(prefix="fgvc-dry-run-") as name:
        small = _shrink(config, Path(name))
        folder = RunFolder(train_run(small))
        summary, losses = folder.read_summary(), pd.read_csv(folder.metrics_file)["train_loss"]
    return (
        f"dry run: {config.name}, {summary['label']} on {summary['backbone']}, {len(losses)} steps of at most "
        f"{small.trainer.batch_size} random images of {summary['image_size']} px; "
        f"losses {', '.join(f'{loss:.3f}' for loss in losses)}; "
        f"{summary['seconds']['total']:.0f} s; nothing is kept"
    )


def _shrink(config: RunConfig, folder: Path) -> RunConfig:
    small = copy.deepcopy(config)
    small.run_dir, small.resume, small.cache.dir = str(folder / "run"), "never", str(folder / "cache")
    small.dataset.adapter, small.dataset.root, small.dataset.options = "folder", str(folder / "data"), {}
    small.backbone.pretrained = False
    trainer = small.trainer
    trainer.epochs = min(max(trainer.epochs, 1), 2)
    trainer.batch_size = min(trainer.batch_size, _CLASSES)
    trainer.eval_batch_size = min(trainer.eval_batch_size, _CLASSES)
    trainer.accumulation = min(trainer.accumulation, max(trainer.batch_size // 2, 1))
    trainer.workers, trainer.tracker, trainer.min_steps, trainer.max_steps = 0, None, None, None
    if small.hybrid.method is not None:
        small.hybrid.switch_epoch = 1
    per_class = 1
    if trainer.val_fraction > 0:
        per_class, trainer.val_fraction = 2, 0.5
    _write_images(folder / "data", {"train": per_class, "test": 1})
    return small


def _write_images(root: Path, per_class: Mapping[str, int]) -> None:
    """Pictures of random pixels in class folders."""
    rng = np.random.default_rng(0)
    for split, target in itertools.product(per_class, range(_CLASSES)):
        place = root / split / str(target)
        place.mkdir(parents=True)
        for number in range(per_class[split]):
            Image.fromarray(rng.integers(0, 256, (80, 96, 3), dtype=np.uint8)).save(place / f"{number}.png")
