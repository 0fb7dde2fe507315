"""A small test of an experiment: two steps on random images in the layout of its dataset, to check all its parts."""

import copy
import tempfile
from pathlib import Path

import pandas as pd

from fgvc.data import write_miniature
from fgvc.runs.config import RunConfig
from fgvc.runs.folder import RunFolder
from fgvc.training.run import train_run

_CLASSES = 4  # a batch is one image of each class: even, since mixup needs pairs


def dry_run(config: RunConfig) -> str:
    """Run `config` with its own backbone, method, optimiser, recipe and image size on a few random images.

    The run has two epochs of one step each with at most four images, and an evaluation after each. A hybrid run
    switches before the second step. The backbone has random weights instead of weights from a hub. Nothing stays on
    disk.

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
        f"{small.trainer.batch_size} random images of {summary['image_size']} px in the layout of "
        f"{config.dataset.name}; losses {', '.join(f'{loss:.3f}' for loss in losses)}; "
        f"{summary['seconds']['total']:.0f} s; nothing was saved"
    )


def _shrink(config: RunConfig, folder: Path) -> RunConfig:
    small = copy.deepcopy(config)
    small.run_dir, small.resume, small.cache.dir = str(folder / "run"), "never", str(folder / "cache")
    small.dataset.root = str(folder / "data")
    small.backbone.pretrained = False
    trainer = small.trainer
    trainer.epochs = min(max(trainer.epochs, 1), 2)
    trainer.batch_size = min(trainer.batch_size, _CLASSES)
    trainer.eval_batch_size = min(trainer.eval_batch_size, _CLASSES)
    trainer.workers, trainer.tracker, trainer.max_steps = 0, None, None
    if small.hybrid.method is not None:
        small.hybrid.switch_epoch = 1
    per_class = 1
    if trainer.val_fraction > 0:
        per_class, trainer.val_fraction = 2, 0.5
    adapter = small.dataset.adapter or small.dataset.name
    if adapter == "synthetic":  # generates its own images
        small.dataset.options |= {"classes": _CLASSES, "train_per_class": per_class, "test_per_class": 1}
        return small
    if adapter == "hf":  # the images on disk are a folder of class folders
        small.dataset.adapter = adapter = "folder"
        small.dataset.options = {}
    for key in ("train_split", "test_split"):  # these select official images, which random images do not have
        small.dataset.options.pop(key, None)
    write_miniature(adapter, folder / "data", classes=_CLASSES, train_per_class=per_class, test_per_class=1)
    return small
