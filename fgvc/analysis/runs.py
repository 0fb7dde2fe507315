"""Run folders as they lie on the disk: their summary typed, everything else read on demand."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import yaml

from fgvc.analysis.confusion import read_predictions
from fgvc.analysis.csv_file import read_csv
from fgvc.errors import RunError
from fgvc.provenance import commit_label
from fgvc.reading import read_json_object, read_npz, read_plain_yaml

T = TypeVar("T")

_REPEAT = "restore the file or repeat the run"


@dataclass(frozen=True)
class Accuracy:
    """Accuracies on the test split after one epoch, in per cent; `top5` is None where there are too few classes."""

    top1: float
    top5: float | None
    mean_class: float
    epoch: int


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of n test images, each row descending.

    Attributes:
        before: (n, d) float64, of the covariance.
        after: (n, d) float64, of the normalised matrix; None for a method without one (GAP).
        targets: (n,) class indices of the images; None in runs of earlier versions.
    """

    before: np.ndarray
    after: np.ndarray | None
    targets: np.ndarray | None = None


@dataclass(frozen=True)
class History:
    """Eigenvalues of the same n test images after each of E epochs, descending; epoch 0 is before the first step.

    Attributes:
        epochs: (E,) int.
        before: (E, n, d) float64, of the covariance.
        after: (E, n, d) float64, of the normalised matrix; None for a method without one.
    """

    epochs: np.ndarray
    before: np.ndarray
    after: np.ndarray | None


@dataclass(frozen=True)
class Run:
    """One training run: its summary.json, typed. `final` and `best` are set where the run is finished."""

    path: Path
    method: str
    gradient: str | None
    label: str
    dataset: str
    backbone: str
    frozen: bool
    reduction: int | None
    recipe: str | None
    image_size: int
    seed: int
    epochs: int
    num_classes: int | None
    train_images: int | None
    test_images: int | None
    final: Accuracy | None
    best: Accuracy | None
    selected_on: str | None
    status: str
    reason: str | None
    commit: str | None
    classes: list[str] | None = None
    out_features: int | None = None
    seconds: Mapping[str, float] | None = None
    peak_memory_mb: float | None = None
    spectral_dtype: str = "float64"

    @property
    def finished(self) -> bool:
        """Whether the run came to its planned end, so that its numbers may be compared with others."""
        return self.status == "finished"

    def metrics(self) -> pd.DataFrame:
        """metrics.csv, one row an epoch. Raises RunError where it is missing or damaged."""
        return read_csv(self.path / "metrics.csv", ("epoch", "train_loss", "test_top1"))

    def predictions(self) -> pd.DataFrame:
        """predictions.csv, one row a test image, final epoch. Raises RunError where it is missing or damaged."""
        return read_predictions(self.path / "predictions.csv")

    def config(self) -> dict[str, Any]:
        """config.yaml, the resolved configuration. Raises RunError where it is missing or damaged."""
        path = self.path / "config.yaml"
        try:
            config = yaml.safe_load(read_plain_yaml(path))
        except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: the 31st of February, too
            raise RunError(f"{path}: cannot be read ({_line(error)}); {_REPEAT}") from error
        if not isinstance(config, dict):
            raise RunError(f"{path}: holds {type(config).__name__}, not a mapping of settings; {_REPEAT}")
        return config

    def spectrum(self) -> Spectrum:
        """spectrum.npz. Raises RunError where it is missing or damaged."""
        path = self.path / "spectrum.npz"
        arrays = _arrays(path, ("before",))
        before, after = _before_and_after(arrays, path, "(n, d)")
        targets = arrays.get("targets")
        if targets is not None and (targets.shape != before.shape[:1] or targets.dtype.kind != "i"):
            raise RunError(
                f"{path}: 'targets' is {targets.dtype} of shape {targets.shape}, not a class each; {_REPEAT}"
            )
        return Spectrum(before, after, targets)

    def history(self) -> History:
        """spectrum_history.npz. Raises RunError where it is missing (trainer.probe_images=0) or damaged."""
        path = self.path / "spectrum_history.npz"
        if not path.is_file():
            kept = "kept no spectra by epoch (trainer.probe_images=0, or an earlier version)"
            raise RunError(f"{path}: no such file; the run {kept}: repeat it")
        arrays = _arrays(path, ("before", "epochs"))
        before, after = _before_and_after(arrays, path, "(E, n, d)")
        epochs = arrays["epochs"]
        if epochs.shape != before.shape[:1] or epochs.dtype.kind != "i":
            raise RunError(f"{path}: 'epochs' is {epochs.dtype} of shape {epochs.shape}, not {len(before)}; {_REPEAT}")
        return History(epochs, before, after)


def read_run(path: Path) -> Run:
    """Read the summary of the run folder `path`.

    Raises:
        RunError: summary.json is missing or damaged, or lacks a field that its status demands.
    """
    file = path / "summary.json"
    try:
        summary = read_json_object(file)
    except (OSError, ValueError) as error:
        raise RunError(f"{file}: cannot be read ({_line(error)}); {_REPEAT}") from error
    status = _value(summary, "status", str, file)
    final, best = _accuracy(summary, "final", file), _accuracy(summary, "best", file)
    if status == "finished" and (final is None or best is None):
        raise RunError(f"{file}: status is finished but 'final' or 'best' is missing; {_REPEAT}")
    return Run(
        path=path,
        method=_value(summary, "method", str, file),
        gradient=_optional(summary, "gradient", str, file),
        label=_value(summary, "label", str, file),
        dataset=_value(summary, "dataset", str, file),
        backbone=_value(summary, "backbone", str, file),
        frozen=_value(summary, "frozen", bool, file),
        reduction=_optional(summary, "reduction", int, file),
        recipe=_optional(summary, "recipe", str, file),
        image_size=_value(summary, "image_size", int, file),
        seed=_value(summary, "seed", int, file),
        epochs=_value(summary, "epochs", int, file),
        num_classes=_optional(summary, "num_classes", int, file),
        train_images=_optional(summary, "train_images", int, file),
        test_images=_optional(summary, "test_images", int, file),
        final=final,
        best=best,
        selected_on=None if best is None else _value(summary["best"], "selected_on", str, file),
        status=status,
        reason=_optional(summary, "reason", str, file),
        commit=_commit(summary, file),
        classes=_optional(summary, "classes", list, file),
        out_features=_optional(summary, "out_features", int, file),
        seconds=_optional(summary, "seconds", dict, file),
        peak_memory_mb=_optional(summary, "peak_memory_mb", float, file),
        spectral_dtype=_optional(summary, "spectral_dtype", str, file) or "float64",
    )


def _commit(summary: Mapping[str, Any], file: Path) -> str | None:
    _optional(summary, "commit", str, file)
    _optional(summary, "dirty", bool, file)
    return commit_label(summary)


def _value(values: Mapping[str, Any], key: str, kind: type[T], file: Path) -> T:
    value = values.get(key)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:  # not isinstance: true is no integer here
        found = "missing" if key not in values else repr(value)
        raise RunError(f"{file}: field {key!r} should be {kind.__name__}, is {found}; {_REPEAT}")
    return value


def _optional(values: Mapping[str, Any], key: str, kind: type[T], file: Path) -> T | None:
    return None if values.get(key) is None else _value(values, key, kind, file)


def _accuracy(summary: Mapping[str, Any], key: str, file: Path) -> Accuracy | None:
    values = _optional(summary, key, dict, file)
    if values is None:
        return None
    accuracy = Accuracy(
        top1=_value(values, "top1", float, file),
        top5=_optional(values, "top5", float, file),
        mean_class=_value(values, "mean_class", float, file),
        epoch=_value(values, "epoch", int, file),
    )
    for name in ("top1", "top5", "mean_class"):
        value = getattr(accuracy, name)
        if value is not None and not (math.isfinite(value) and 0 <= value <= 100):
            raise RunError(f"{file}: {key}.{name} is {value}, not an accuracy in per cent; {_REPEAT}")
    return accuracy


def _arrays(path: Path, needed: tuple[str, ...]) -> dict[str, np.ndarray]:
    try:
        arrays = read_npz(path)
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read ({_line(error)}); {_REPEAT}") from error
    for name in needed:
        if name not in arrays:
            raise RunError(f"{path}: no array {name!r}, found {sorted(arrays) or 'none'}; {_REPEAT}")
    return arrays


def _before_and_after(arrays: Mapping[str, np.ndarray], path: Path, shape: str) -> tuple[np.ndarray, np.ndarray | None]:
    before = _eigenvalues(arrays["before"], path, "before", shape)
    after = _eigenvalues(arrays["after"], path, "after", shape) if "after" in arrays else None
    if after is not None and after.shape != before.shape:
        raise RunError(f"{path}: 'after' has shape {after.shape}, 'before' {before.shape}; {_REPEAT}")
    return before, after


def _eigenvalues(array: np.ndarray, path: Path, name: str, shape: str) -> np.ndarray:
    if array.ndim != shape.count(",") + 1 or 0 in array.shape or array.dtype.kind != "f":
        raise RunError(f"{path}: {name!r} is {array.dtype} of shape {array.shape}, not floats {shape}; {_REPEAT}")
    if not np.isfinite(array).all():
        raise RunError(f"{path}: {name!r} holds NaN or infinity: the training diverged; repeat it with a lower rate")
    if (np.diff(array, axis=-1) > 0).any():
        raise RunError(f"{path}: {name!r} is not in descending order; {_REPEAT}")
    return array.astype(np.float64)


def _line(error: Exception) -> str:
    """The error's message on one line."""
    return " ".join(str(error).split()) or type(error).__name__
