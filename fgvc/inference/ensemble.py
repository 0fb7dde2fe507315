"""Several runs as one: the mean of their probabilities (an ensemble), or of their weights (a soup).

Shapes: N images, K classes.
"""

import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from fgvc.data import ImageDataset, TransformSpec, ViewTransform, resized_spec
from fgvc.errors import RunError
from fgvc.inference.calibrate import collect_logits, probabilities, read_calibration
from fgvc.inference.evaluate import module_and_loader
from fgvc.inference.restore import read_classes, read_weights, restore_run
from fgvc.io import kind_of, replaced_folder, require_own, to_csv, to_json, write_output
from fgvc.models.files import write_weights
from fgvc.presentation.render import markdown_table
from fgvc.provenance import source_state, versions
from fgvc.runs.folder import RunFolder
from fgvc.runs.statistics import paired_bootstrap
from fgvc.runs.summary import Run, read_finished, read_run, result_settings, same_images
from fgvc.training.environment import create_accelerator
from fgvc.training.evaluation import Evaluation, accuracies, true_rank

_log = logging.getLogger(__name__)

Members = list[dict[str, Any]]


@dataclass(frozen=True)
class EnsembleEvaluation:
    """An ensemble's result on the test split, next to those of its runs.

    Attributes:
        evaluation: Result of the mean probabilities.
        predictions: Table with one row per image, see `Evaluation.predictions`.
        members: For each run: run (its folder), top1, top5, mean_class, temperature, held_out (top-1 on the images that
            it held out of its training, None if there are none or it has no record of it).
        reference: Index of the run that `difference` compares with, see `evaluate_ensemble`.
        difference: Ensemble minus reference, see `fgvc.runs.statistics.paired_bootstrap`.
    """

    evaluation: Evaluation
    predictions: pd.DataFrame
    members: Members
    reference: int
    difference: dict[str, Any]

    @property
    def text(self) -> str:
        """A table of the runs and the ensemble, and the difference to the reference."""
        header = ["", "Test top-1 in %", "Held-out top-1 in %", "Temperature"]
        number = ("top1", "held_out", "temperature")
        rows = [
            [row["run"], *("none" if row[name] is None else f"{row[name]:.2f}" for name in number)]
            for row in self.members
        ]
        rows.append([f"ensemble of {len(rows)}", f"{self.evaluation.accuracy.top1:.2f}", "", ""])
        reference, by = self.members[self.reference], "the first run"
        if all(row["held_out"] is not None for row in self.members):
            by = "the run of the highest accuracy on held-out images"
        found = self.difference
        return (
            f"{markdown_table(header, rows)}\n\nensemble minus {reference['run']} ({by}): {found['difference']:+.2f} "
            f"points (95 % interval {found['low']:+.2f} to {found['high']:+.2f}, {found['images']:,} test images)"
        )


def evaluate_ensemble(
    paths: Sequence[Path],
    *,
    checkpoint: str = "last",
    views: str = "single",
    resize_size: int | None = None,
    root: str | None = None,
    cache: str | None = None,
    output: Path | None = None,
) -> EnsembleEvaluation:
    """Average the probabilities of several runs on their common test images.

    A run's probabilities are calibrated if its temperature was fitted on held-out images. A temperature that was fitted
    on test images is not used, since the ensemble's number is one on test images, too.

    The difference is to the best single run. The test images do not choose it: it is the run of the highest accuracy on
    its held-out images, after the epoch of its weights; if a run has none, it is the first run.

    Args:
        paths: folders of at least two runs; their methods, backbones and image sizes may differ.
        checkpoint, views, resize_size, root, cache: as in `fgvc.inference.evaluate_run`.
        output: folder of evaluation-ensemble-NAME.json and predictions-ensemble-NAME.csv, NAME as of one run; None
            writes nothing.

    Raises:
        RunError: a run is given twice, the runs have other classes or other test images; or as `evaluate_run`.
        FileExistsError: the files of `output` are of other runs.
        ConfigError, DatasetError, WeightsError: as `evaluate_run`.
    """
    parts = [checkpoint, *([] if views == "single" else [views])]
    name = "-".join([*parts, *([] if resize_size is None else [f"resize{resize_size}"])])
    kinds = ("evaluation-ensemble-{}.json", "predictions-ensemble-{}.csv")
    files = [] if output is None else [output / kind.format(name) for kind in kinds]
    _require_different(paths)
    kind = kind_of("ensemble", sorted(path.resolve() for path in paths))
    for file in files:  # before the work
        require_own(file, kind)
    first: ImageDataset | None = None
    total, frames, members = torch.zeros(()), [], Members()
    for path in paths:
        accelerator = create_accelerator(RunFolder(path).read_config(), path, training=False)
        restored = restore_run(path, accelerator.device, checkpoint=checkpoint, root=root, cache=cache)
        own, images = restored.images.transform, restored.images
        assert isinstance(own, TransformSpec)
        first = first or images
        _require_same_images(first, images, paths[0], path)
        transform = ViewTransform(resized_spec(own, resize_size), views)
        module, loader = module_and_loader(restored, transform, own, accelerator)
        logits, targets = collect_logits(module, loader, accelerator, "test")  # (N, K), (N,)
        if not logits.isfinite().all():
            raise RunError(f"{path}: the {checkpoint} weights give logits that are not finite; train the run again")
        calibration = read_calibration(path, checkpoint)
        on_test = calibration is not None and calibration.split == "test" and calibration.temperature is not None
        temperature = None if calibration is None or on_test else calibration.temperature
        if on_test:
            _log.warning("%s: its temperature was fitted on test images and is not used", path)
        total = total + probabilities(logits, temperature or 1.0)
        evaluation = _evaluation(logits, targets)
        frames.append(evaluation.predictions(images.relative_paths(), images.classes))
        held_out = _held_out_accuracy(read_run(path), checkpoint)
        members.append(
            {"run": str(path), **asdict(evaluation.accuracy), "temperature": temperature, "held_out": held_out}
        )
    assert first is not None
    evaluation = _evaluation((total / len(paths)).clamp_min(torch.finfo(torch.float64).tiny).log(), targets)
    predictions = evaluation.predictions(first.relative_paths(), first.classes)
    held_outs = [row["held_out"] for row in members]
    reference = 0 if None in held_outs else held_outs.index(max(held_outs))
    difference = paired_bootstrap([predictions], [frames[reference]])
    if files:
        record = {"runs": members, "reference": members[reference]["run"], "difference": difference}
        record |= {"checkpoint": checkpoint, "views": views, "resize_size": resize_size}
        record |= {"images": len(targets), **asdict(evaluation.accuracy), "loss": round(evaluation.loss, 6)}
        write_output(files[0], to_json(record | {"versions": versions(), **source_state()}), kind)
        write_output(files[1], to_csv(predictions, None), kind)
    return EnsembleEvaluation(evaluation, predictions, members, reference, difference)


def _require_different(paths: Sequence[Path]) -> None:
    """Raise RunError if a folder is given twice."""
    found = [os.path.realpath(path) for path in paths]
    if twice := [str(path) for path, place in zip(paths, found, strict=True) if found.count(place) > 1]:
        raise RunError(f"{twice[-1]} is given twice; give each run once")


def _require_same_images(first: ImageDataset, images: ImageDataset, first_path: Path, path: Path) -> None:
    if images.classes != first.classes:
        raise RunError(
            f"{path} has {len(images.classes)} classes and {first_path} {len(first.classes)}, or they have other names "
            "or another order; give runs of one dataset"
        )
    if (images.relative_paths(), images.targets) != (first.relative_paths(), first.targets):
        raise RunError(
            f"{path} has {len(images.targets)} test images and {first_path} {len(first.targets)}, and they are not the "
            "same; give runs of one test split"
        )
    if images.content != first.content:
        raise RunError(f"the test images of {path} and {first_path} differ in their content; give one folder: --root")


def _evaluation(logits: Tensor, targets: Tensor) -> Evaluation:
    """The result of logits (N, K), or log probabilities, for targets (N,)."""
    rank, loss = true_rank(logits, targets), float(F.cross_entropy(logits.double(), targets))
    confidence, predicted = logits.softmax(dim=1).max(dim=1)
    return Evaluation(accuracies(targets, rank), loss, targets, predicted, confidence, rank)


def _held_out_accuracy(run: Run, checkpoint: str) -> float | None:
    """Top-1 in per cent on the images that a run held out, after the epoch of its weights; None without a record."""
    if run.status == "averaged":  # a soup has no epochs
        return None
    return run.held_out_top1(None if checkpoint == "last" else run.best_epoch)


def average_runs(paths: Sequence[Path], output: Path) -> None:
    """Write a run folder whose weights are the mean of the last weights of several runs.

    A uniform soup [Wortsman et al., Model soups, ICML 2022, arXiv 2203.05482]. The mean of weights is a model only if
    they lie in one basin, so the runs must start from the same backbone and head, of one file `initial_weights`. The
    running means and variances of batch normalisation are averaged like weights, and are not computed again. The
    folder has the settings of the first run, status "averaged" and no accuracy of its own.

    Args:
        paths: folders of at least two finished runs that differ in the seed alone.
        output: folder to write; it must not exist, or be empty.

    Raises:
        RunError: fewer than two runs, one that is given twice or not finished, or runs that differ in what they
            started from, their settings, classes or images; damaged weights.
        FileExistsError: `output` holds something.
    """
    if len(paths) < 2:
        raise RunError(f"a mean of weights needs at least two runs, got {len(paths)}")
    _require_different(paths)
    runs = [read_finished(path) for path in paths]
    first = runs[0]
    for run in runs:
        _require_same_start(first, run)
    folder = RunFolder(first.path)
    config, weights = folder.read_config(), read_weights(folder, "last")
    mean = {name: tensor.double() for name, tensor in weights.items()}
    for run in runs[1:]:
        other = read_weights(RunFolder(run.path), "last")
        if {name: tensor.shape for name, tensor in other.items()} != {name: t.shape for name, t in weights.items()}:
            raise RunError(f"{run.path} and {first.path} have weights of other names or shapes; restore the files")
        for name, tensor in other.items():
            mean[name] += tensor.double()
    for name, tensor in weights.items():  # a counter of batches stays that of the first run
        weights[name] = (mean[name] / len(runs)).to(tensor.dtype) if tensor.is_floating_point() else tensor
    config.run_dir = str(output)
    summary = folder.read_summary() | {"status": "averaged"} | dict.fromkeys(("final", "best", "seconds", "shots"))
    summary["reason"] = f"mean of the weights of {', '.join(str(run.path) for run in runs)}"
    summary["label"] = f"{first.label} (mean of {len(runs)} runs)"
    summary |= {"versions": versions(), **source_state()}
    with replaced_folder(output) as temporary:
        written = RunFolder(temporary)
        written.checkpoints.mkdir()
        write_weights(written.weights_file("last"), weights, epoch=first.epochs)
        if folder.split_file.is_file():
            shutil.copyfile(folder.split_file, written.split_file)
        written.begin(config, summary)


def _require_same_start(first: Run, run: Run) -> None:
    """Raise RunError unless two runs differ in the seed alone."""
    names = f"{run.path} and {first.path}"
    starts = [(one.head_digest, one.weights_digest) for one in (first, run)]
    if starts[0] != starts[1] or None in starts[0]:
        raise RunError(
            f"{names} did not start from the same backbone and head, so a mean of their weights is no model; train "
            "both with one initial_weights=FILE of as many classes, e.g. of fgvc export RUN --to safetensors"
        )
    if read_classes(RunFolder(run.path)) != read_classes(RunFolder(first.path)):
        raise RunError(f"{names} have other classes; give runs of one dataset")
    one, other = ((result_settings(run) or {}) | {"initial_weights": None} for run in (first, run))  # a file may move
    if differing := [f"{key} ({other.get(key)}, {value})" for key, value in one.items() if other.get(key) != value]:
        raise RunError(f"{names} differ in {', '.join(differing[:3])}; give runs that differ in the seed alone")
    if not same_images(first, run):
        raise RunError(
            f"{names} have other images: training images of one would be test or held-out images of the other; give "
            "runs of one split (trainer.val_fraction draws another one for each seed)"
        )
