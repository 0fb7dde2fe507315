"""How two runs differ: what they were made with, and what came out, down to the bits of the weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from fgvc.analysis.confusion import PREDICTION_COLUMNS
from fgvc.analysis.csv_file import read_csv
from fgvc.analysis.distances import Distance, array_distance, column_distance, weights_distance
from fgvc.analysis.paired import pair_predictions
from fgvc.analysis.runs import Accuracy, Run, read_run
from fgvc.errors import RunError
from fgvc.nested import flatten
from fgvc.reading import read_npz
from fgvc.training.run_folder import RunFolder

T = TypeVar("T")

_ENVIRONMENT = ("versions", "machine", "dataset_fingerprint", "weights_digest", "train_images", "test_images")
_ARCHIVES = ("spectrum.npz", "spectrum_history.npz")
_WEIGHTS = ("last", "best")
_OWN = ("run_dir", "resume")  # settings that are of the folder, not of the run


class Change(NamedTuple):
    """Something of two runs."""

    name: str
    first: Any
    second: Any


class PredictionChanges(NamedTuple):
    """Images of the test split: how many, how many got another class, became right or wrong.

    `confidence` is by how much the confidence in an answer moved at most.
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
        first, second: the runs.
        environment: what differs in commit, versions, machine, images and the backbone's weights.
        settings: what differs in config.yaml.
        unrecorded: what only one of the runs records (the other was made by an earlier version): of these two, and
            columns of metrics.csv and arrays of spectra.
        metrics: every column of metrics.csv but times.
        predictions: after the last epoch; None where they cannot be compared.
        weights: "last" and "best", where they can be compared.
        spectra: every array of spectrum.npz and spectrum_history.npz.
        incomparable: what could not be compared, and why.
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
        """Accuracies of the final and the best epoch in per cent, and which epochs these are; the same or not."""
        pairs = {"final": (self.first.final, self.second.final), "best": (self.first.best, self.second.best)}
        return [
            Change(f"{which} {name}", getattr(one, name), getattr(other, name))
            for which, (one, other) in pairs.items()
            for name in Accuracy.__dataclass_fields__
        ]

    @property
    def identical(self) -> bool:
        """Whether weights, metrics, predictions and spectra are the same to the last bit."""
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
        found = [f"{name} {one} and {other} %" for name, one, other in moved[:1]]
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
        return ("differs: " if moved else "equal accuracy, ") + ", ".join(found or ["confidences or epochs differ"])


def compare_runs(first: Path, second: Path) -> RunComparison:
    """Compare two finished runs; nothing is trained, evaluated or written.

    Raises:
        RunError: a folder is no run, its summary is damaged, or it is not finished.
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
    return {key: value for key, value in run.config().items() if key not in _OWN}


def _changes(first: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[list[Change], list[str]]:
    """What differs in two nested mappings, and the keys that only one of them has."""
    both = [key for key in first if key in second]
    flat = [flatten({key: side[key] for key in both}) for side in (first, second)]
    names = {**flat[0], **flat[1]}
    changes = [Change(n, flat[0][n], flat[1][n]) for n in names if n in flat[0] and n in flat[1]]
    alone = [name for name in names if not (name in flat[0] and name in flat[1])]
    return [c for c in changes if c.first != c.second], [*(k for k in {**first, **second} if k not in both), *alone]


def _metrics(first: Run, second: Run) -> tuple[list[Distance], list[str]]:
    """The columns of metrics.csv but times, and the names of those that only one has."""
    if not _in_both("metrics.csv", first, second):
        return [], []  # no epoch was trained
    a, b = (read_csv(run.path / "metrics.csv", ("epoch",), as_text=True).set_index("epoch") for run in (first, second))
    if not (a.index.is_unique and b.index.is_unique):
        raise RunError("metrics.csv: an epoch twice; restore the file")
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
    return weights_distance(which, *(RunFolder(run.path).read_weights(which) for run in (first, second)))


def _arrays(file: str, first: Run, second: Run) -> tuple[list[Distance], list[str]]:
    """The arrays of an archive, and the names of those that only one has."""
    if not _in_both(file, first, second):
        return [], []  # trainer.probe_images=0, or runs of a version without it
    try:
        a, b = (read_npz(run.path / file) for run in (first, second))
    except (OSError, ValueError) as error:
        raise RunError(f"{file}: cannot be read ({error})") from error
    distances = [array_distance(f"{Path(file).stem}: {name}", a[name], b[name]) for name in a if name in b]
    return distances, [f"{file}: {name}" for name in {**a, **b} if not (name in a and name in b)]


def _in_both(file: str, first: Run, second: Run) -> bool:
    """Whether both have the file, or none; RunError where one of them alone has it."""
    there = [(run.path / file).is_file() for run in (first, second)]
    if any(there) and not all(there):
        raise RunError(f"{(second if there[0] else first).path / file}: no such file")
    return all(there)
