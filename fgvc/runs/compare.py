"""Comparison of two runs: their settings, environments and results, down to the bits of the weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pandas as pd
from safetensors.numpy import load_file

from fgvc.errors import RunError
from fgvc.foreign import open_foreign, read_npz
from fgvc.io import read_csv
from fgvc.runs.config import flatten
from fgvc.runs.folder import RunFolder
from fgvc.runs.statistics import pair_predictions
from fgvc.runs.summary import PREDICTION_COLUMNS, Accuracy, Run, read_run, same_images

T = TypeVar("T")

_ENVIRONMENT = (
    *("versions", "machine", "dataset_fingerprint", "weights_digest", "initial_weights_digest"),
    *("train_images", "test_images"),
)
_ARCHIVES = ("spectrum.npz", "spectrum_history.npz")
_WEIGHTS = ("last", "best")
_OF_THE_FOLDER = ("run_dir", "resume")  # these settings describe the folder, not the run


class Change(NamedTuple):
    """A value in two runs."""

    name: str
    first: Any
    second: Any


class Distance(NamedTuple):
    """Difference between two versions of some numbers.

    Attributes:
        name: Name of the column, array or set of weights.
        total, differing: Number of values (tensors, for weights), and number that differ in any bit.
        largest: Largest absolute difference; infinite if only one side is finite, a value is missing or texts differ.
        relative: For an array, `largest` divided by its largest finite value. For weights, the norm of the difference
            divided by their norm. Both divisors come from the first version. None for a column.
        where: First epoch that differs, or tensor that differs most; None if nothing differs.
    """

    name: str
    total: int
    differing: int
    largest: float
    relative: float | None = None
    where: str | None = None


class PredictionChanges(NamedTuple):
    """Numbers of test images: all, with another predicted class, now right, now wrong.

    `confidence` is the largest change of a confidence.
    """

    images: int
    changed: int
    became_right: int
    became_wrong: int
    confidence: float


@dataclass(frozen=True)
class RunComparison:
    """Two finished runs.

    Attributes:
        first, second: The two runs.
        environment: Differences in commit, versions, machine, images and the backbone's weights.
        settings: Differences in config.yaml.
        unrecorded: Environment entries, settings, metrics.csv columns and spectrum arrays that only one run records
            (the other run was made by an earlier version).
        metrics: Differences of every column of metrics.csv except times.
        predictions: Changes of the predictions after the last epoch; None if they cannot be compared.
        weights: Differences of the "last" and "best" weights that can be compared.
        spectra: Differences of every array of spectrum.npz and spectrum_history.npz.
        incomparable: Reasons why parts could not be compared.
    """

    first: Run
    second: Run
    environment: list[Change]
    settings: list[Change]
    unrecorded: list[str]
    metrics: list[Distance]
    predictions: PredictionChanges | None
    weights: list[Distance]
    spectra: list[Distance]
    incomparable: list[str]

    @property
    def accuracies(self) -> list[Change]:
        """Accuracies in per cent and numbers of the final and the best epoch, including equal ones."""
        pairs = {"final": (self.first.final, self.second.final), "best": (self.first.best, self.second.best)}
        changes = [
            Change(f"{which} {name}", getattr(one, name), getattr(other, name))
            for which, (one, other) in pairs.items()
            for name in Accuracy.__dataclass_fields__
        ]
        return [
            *changes,
            Change("final epoch", self.first.epochs, self.second.epochs),
            Change("best epoch", self.first.best_epoch, self.second.best_epoch),
        ]

    @property
    def identical(self) -> bool:
        """Whether weights, metrics, predictions and spectra are bit-identical."""
        numbers = [*self.metrics, *self.weights, *self.spectra]
        predictions = self.predictions is not None and not (self.predictions.changed or self.predictions.confidence)
        accuracies = all(one == other for _, one, other in self.accuracies)
        return accuracies and predictions and not self.incomparable and not any(n.differing for n in numbers)

    @property
    def verdict(self) -> str:
        """The result in one line."""
        if self.identical:
            return "bit-identical"
        moved = [change for change in self.accuracies if change.first != change.second and "epoch" not in change.name]
        others = [] if same_images(self.first, self.second) else ["other images"]
        found = others + [f"{name} {one} and {other} %" for name, one, other in moved[:1]]
        if self.predictions is not None and self.predictions.changed:
            found.append(f"{self.predictions.changed} of {self.predictions.images} predictions changed")
        weights = [distance for distance in self.weights if distance.differing]
        if weights:
            most = max(weights, key=lambda distance: distance.largest)
            found.append(f"weights differ by at most {most.largest:.2g}, {most.relative or 0:.1g} of their norm")
        elif any(distance.differing for distance in (*self.metrics, *self.spectra)):
            found.append("metrics or spectra differ")
        if self.incomparable:
            found.append(f"not compared: {'; '.join(self.incomparable)}")
        return ("differs: " if moved or others else "equal accuracy, ") + ", ".join(
            found or ["confidences or epochs differ"]
        )


def compare_runs(first: Path, second: Path) -> RunComparison:
    """Compare two finished runs; nothing is trained, evaluated or written.

    Raises RunError: a folder is not a run, its summary is damaged, or the run is not finished.
    """
    runs = (read_run(first), read_run(second))
    for run in runs:
        if not run.finished:
            raise RunError(f"{run.path}: status {run.status}; only finished runs can be compared, finish it first")
    incomparable: list[str] = []

    def attempt(compare: Callable[[Run, Run], T]) -> T | None:
        try:
            return compare(*runs)
        except RunError as error:
            incomparable.append(str(error))
            return None

    environment, unrecorded = _changes(_environment(runs[0]), _environment(runs[1]))
    settings, new = attempt(lambda a, b: _changes(_settings(a), _settings(b))) or ([], [])
    metrics, columns = attempt(_metrics) or ([], [])
    weights = [attempt(partial(_weights, which)) for which in _WEIGHTS]
    spectra = [attempt(partial(_arrays, name)) or ([], []) for name in _ARCHIVES]
    return RunComparison(
        *runs,
        environment=environment,
        settings=settings,
        unrecorded=[*unrecorded, *new, *columns, *(name for _, names in spectra for name in names)],
        metrics=metrics,
        predictions=attempt(_predictions),
        weights=[distance for distance in weights if distance is not None],
        spectra=[distance for distances, _ in spectra for distance in distances],
        incomparable=incomparable,
    )


def _environment(run: Run) -> dict[str, Any]:
    summary = RunFolder(run.path).read_summary()
    kept = {key: summary[key] for key in _ENVIRONMENT if key in summary}
    return ({} if run.commit is None else {"commit": run.commit}) | kept


def _settings(run: Run) -> dict[str, Any]:
    return {key: value for key, value in run.settings().items() if key not in _OF_THE_FOLDER}


def _changes(first: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[list[Change], list[str]]:
    """Return the changed values of two nested mappings, and the keys that only one of them has."""
    both = [key for key in first if key in second]
    flat = [flatten({key: side[key] for key in both}) for side in (first, second)]
    names = {**flat[0], **flat[1]}
    changes = [Change(n, flat[0][n], flat[1][n]) for n in names if n in flat[0] and n in flat[1]]
    alone = [name for name in names if not (name in flat[0] and name in flat[1])]
    return [c for c in changes if c.first != c.second], [*(k for k in {**first, **second} if k not in both), *alone]


def _metrics(first: Run, second: Run) -> tuple[list[Distance], list[str]]:
    """Compare the columns of metrics.csv except times; also return the names of columns that only one run has."""
    if not _in_both("metrics.csv", first, second):
        return [], []  # no epoch was trained
    a, b = (read_csv(run.path / "metrics.csv", ("epoch",), as_text=True).set_index("epoch") for run in (first, second))
    if not (a.index.is_unique and b.index.is_unique):
        raise RunError("metrics.csv: an epoch occurs twice; restore the file")
    columns = [column for column in dict.fromkeys([*a, *b]) if "second" not in column]
    both = [column for column in columns if column in a and column in b]
    distances = [column_distance(a[column], b[column]) for column in both]
    return distances, [f"metrics.csv: {column}" for column in columns if column not in both]


def _predictions(first: Run, second: Run) -> PredictionChanges:
    try:
        before, after = (
            read_csv(run.path / "predictions.csv", PREDICTION_COLUMNS, numbers=("confidence",))
            for run in (first, second)
        )
        pairs = pair_predictions(before, after, more=["confidence"])
    except RunError as error:
        raise RunError(f"predictions: {error}") from error
    changed = pairs["predicted_first"] != pairs["predicted_second"]
    was_right, is_right = pairs["right_first"], pairs["right_second"]
    return PredictionChanges(
        images=len(pairs),
        changed=int(changed.sum()),
        became_right=int((is_right & ~was_right).sum()),
        became_wrong=int((was_right & ~is_right).sum()),
        confidence=float(np.abs(pairs["confidence_first"] - pairs["confidence_second"]).max()),
    )


def _weights(which: str, first: Run, second: Run) -> Distance:
    tensors = []
    for run in (first, second):
        file = RunFolder(run.path).weights_file(which)
        try:
            with open_foreign(file):
                tensors.append(load_file(file))
        except Exception as error:  # safetensors and the file system raise many types
            raise RunError(f"{file} cannot be read ({error})") from error
    return weights_distance(which, *tensors)


def _arrays(file: str, first: Run, second: Run) -> tuple[list[Distance], list[str]]:
    """Compare the arrays of an archive; also return the names of arrays that only one run has."""
    if not _in_both(file, first, second):
        return [], []  # trainer.probe_images=0, or runs of an earlier version
    try:
        a, b = (read_npz(run.path / file) for run in (first, second))
    except (OSError, ValueError) as error:
        raise RunError(f"{file}: cannot be read ({error})") from error
    distances = [array_distance(f"{Path(file).stem}: {name}", a[name], b[name]) for name in a if name in b]
    return distances, [f"{file}: {name}" for name in {**a, **b} if not (name in a and name in b)]


def _in_both(file: str, first: Run, second: Run) -> bool:
    """Return whether both runs have the file. Raises RunError if only one has it."""
    exists = [(run.path / file).is_file() for run in (first, second)]
    if any(exists) and not all(exists):
        raise RunError(f"{(second if exists[0] else first).path / file}: no such file")
    return all(exists)


def array_distance(name: str, first: np.ndarray, second: np.ndarray) -> Distance:
    """Return the distance of two arrays. Raises RunError if they are not numbers or differ in shape or type."""
    if (first.shape, first.dtype) != (second.shape, second.dtype) or first.dtype.kind not in "biuf":
        raise RunError(f"{name} is {first.dtype} {first.shape} and {second.dtype} {second.shape}")
    differing, largest = _differing(first, second), _largest(first, second)
    scale = float(np.abs(first[np.isfinite(first)]).max(initial=0))
    return Distance(name, first.size, int(differing.sum()), largest, largest / scale if scale else None)


def weights_distance(name: str, first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]) -> Distance:
    """Return the distance of two sets of tensors. Raises RunError if they differ in names, shapes or types.

    Integer tensors (step counters of batch normalisation) count in `differing`, but in `largest` only if no float
    tensor differs.
    """
    kinds = [{key: (array.shape, array.dtype) for key, array in tensors.items()} for tensors in (first, second)]
    if kinds[0] != kinds[1]:
        odd = sorted(key for key in {**first, **second} if kinds[0].get(key) != kinds[1].get(key))
        raise RunError(f"the {name} weights have other tensors ({len(odd)}, the first {odd[0]})")
    most: tuple[bool, float, str | None] = (False, 0.0, None)
    differing = 0
    square, square_of_difference = 0.0, 0.0
    for key, before in first.items():
        a, b = before.astype(np.float64), second[key].astype(np.float64)
        measured = before.dtype.kind == "f"
        if measured:
            square += float((a**2).sum())
            square_of_difference += float(((b - a) ** 2).sum())
        if _differing(before, second[key]).any():
            differing += 1
            found = (measured, _largest(a, b), key)
            most = max(most, found, key=lambda entry: entry[:2])
    relative = (square_of_difference / square) ** 0.5 if square else None
    return Distance(name, len(first), differing, most[1], relative, most[2])


def column_distance(first: pd.Series, second: pd.Series) -> Distance:
    """Return the distance of two text columns by epoch, as numbers if all cells are; an empty cell is NaN."""
    name, epochs = str(first.name), first.index.union(second.index, sort=False)
    a, b = (column.reindex(epochs, fill_value="missing") for column in (first, second))
    try:
        values = [column.replace("", "nan").astype(float).to_numpy() for column in (a, b)]
        differing, largest = _differing(*values), _largest(*values)
    except ValueError:
        differing = (a != b).to_numpy()
        largest = float("inf") if differing.any() else 0.0
    where = str(epochs[differing][0]) if differing.any() else None
    return Distance(name, len(epochs), int(differing.sum()), largest, where=where)


def _differing(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return, flattened, which values differ in any bit; both arrays have the same shape and type."""
    a, b = (np.ascontiguousarray(array).reshape(-1, 1).view(np.uint8) for array in (first, second))
    differing: np.ndarray = (a != b).any(axis=1)
    return differing


def _largest(first: np.ndarray, second: np.ndarray) -> float:
    """Return the largest absolute difference; equal values and two NaNs count as 0."""
    a, b = first.astype(np.float64), second.astype(np.float64)
    apart = ~((a == b) | (np.isnan(a) & np.isnan(b)))
    with np.errstate(invalid="ignore"):
        distances = np.abs(a[apart] - b[apart])
    return float(np.nan_to_num(distances, nan=np.inf, posinf=np.inf).max(initial=0))
