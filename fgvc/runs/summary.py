"""Run folders as they lie on the disk: their summary typed, everything else read on demand."""

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import pandas as pd

from fgvc.csv_files import read_csv
from fgvc.errors import RunError
from fgvc.provenance import commit_label
from fgvc.runs.folder import RunFolder
from fgvc.runs.spectra import Spectrum, SpectrumHistory

T = TypeVar("T")

_REPEAT = "restore the file or repeat the run"


PREDICTION_COLUMNS = ("path", "target", "predicted", "confidence")
"""What every version's predictions have; newer ones also have target_class, predicted_class and rank."""


@dataclass(frozen=True)
class Accuracy:
    """Accuracies on one split, in per cent.

    Attributes:
        top1: share of the images whose class has the largest logit.
        top5: share of the images whose class is among the five largest; None where it was not measured.
        mean_class: mean over the classes of their own top-1.
    """

    top1: float
    top5: float | None
    mean_class: float


@dataclass(frozen=True)
class Run:
    """One training run: its summary.json, typed.

    Most attributes have the name they have there. `final` and `best` are accuracies on the test split, set where the
    run is finished; `best_epoch` is the epoch of `best`, and `selected_on` the split that it was selected on.
    """

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
    best_epoch: int | None
    selected_on: str | None
    status: str
    reason: str | None
    commit: str | None
    classes: list[str] | None = None
    out_features: int | None = None
    seconds: dict[str, float] | None = None
    peak_memory_mb: float | None = None
    spectral_dtype: str = "float64"
    weights_digest: str | None = None
    versions: dict[str, str] | None = None

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

    def settings(self) -> dict[str, Any]:
        """config.yaml as it is, nested. Raises RunError where it is missing or damaged."""
        return RunFolder(self.path).read_settings()

    def spectrum(self) -> Spectrum:
        """spectrum.npz. Raises RunError where it is missing or damaged."""
        return Spectrum.read(RunFolder(self.path).spectrum_file)

    def history(self) -> SpectrumHistory:
        """spectrum_history.npz. Raises RunError where it is missing (trainer.probe_images=0) or damaged."""
        return SpectrumHistory.read(RunFolder(self.path).spectrum_history_file)


def read_predictions(path: Path) -> pd.DataFrame:
    """A predictions file, of this version or an older one. Raises RunError where it is missing or damaged."""
    return read_csv(path, PREDICTION_COLUMNS, names=("path", "target_class", "predicted_class"))


def read_run(path: Path) -> Run:
    """Read the summary of the run folder `path`.

    Raises:
        RunError: summary.json is missing or damaged, or lacks a field that its status demands.
    """
    folder = RunFolder(path)
    file, summary = folder.summary_file, folder.read_summary()
    final, best = _accuracy(summary, "final", file), _accuracy(summary, "best", file)
    if summary.get("status") == "finished" and (final is None or best is None):
        raise RunError(f"{file}: status is finished but 'final' or 'best' is missing; {_REPEAT}")
    selected = summary["best"] if best is not None else {}
    _optional(summary, "dirty", bool, file)
    fields: dict[str, Any] = {
        "path": path,
        "final": final,
        "best": best,
        "best_epoch": _optional(selected, "epoch", int, file),
        "selected_on": None if best is None else _value(selected, "selected_on", str, file),
    }
    for name, (read, kind) in _plain_fields().items():
        if name not in fields:
            fields[name] = read(summary, name, kind, file)
    fields["spectral_dtype"] = fields["spectral_dtype"] or "float64"  # absent in runs of earlier versions
    return Run(**fields | {"commit": commit_label(summary)})


@functools.cache
def _plain_fields() -> dict[str, tuple[Callable[..., Any], type]]:
    """How each attribute of a `Run` is read, by its annotation: required or optional, and of which type."""
    fields = {}
    for name, hint in get_type_hints(Run).items():
        kinds = [kind for kind in get_args(hint) or (hint,) if kind is not NoneType]
        required = NoneType not in get_args(hint) and name != "spectral_dtype"
        fields[name] = (_value if required else _optional, get_origin(kinds[0]) or kinds[0])
    return fields


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
    )
    for name in ("top1", "top5", "mean_class"):
        value = getattr(accuracy, name)
        if value is not None and not (math.isfinite(value) and 0 <= value <= 100):
            raise RunError(f"{file}: {key}.{name} is {value}, not an accuracy in per cent; {_REPEAT}")
    return accuracy


def find_runs(paths: Iterable[Path]) -> list[Run]:
    """Runs in the given folders at any depth, each once, in the order of the folders and then of their paths.

    A folder is a run if it holds summary.json.

    Raises:
        RunError: a folder does not exist or holds no run, or a summary is damaged.
    """
    folders = (folder for root in paths for folder in _run_folders(root))
    return [read_run(folder) for folder in _each_once(folders)]


def split_finished(runs: Iterable[Run]) -> tuple[list[Run], list[str]]:
    """The finished runs, and for each other one a note that says why it is left out.

    Raises:
        RunError: no run is finished.
    """
    finished, notes = [], []
    for run in runs:
        if run.finished:
            finished.append(run)
        else:
            notes.append(f"left out {run.path}: status {run.status}" + (f" ({run.reason})" if run.reason else ""))
    if not finished:
        raise RunError("no finished run among those given; finish or repeat them:\n  " + "\n  ".join(notes))
    return finished, notes


def find_finished(paths: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """The finished runs in some folders, and a note for each folder and run that is left out.

    Raises:
        RunError: no run can be read, or none is finished.
    """
    runs, unread = readable_runs(paths)
    finished, unfinished = split_finished(runs)
    return finished, unread + unfinished


def readable_runs(paths: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """As `find_runs`, but what it would raise for a folder or a run is a note, and the others are read.

    Raises:
        RunError: no run is left.
    """
    folders: list[Path] = []
    runs, problems = [], []
    for root in paths:
        try:
            folders += _run_folders(root)
        except RunError as error:
            problems.append(str(error))
    for folder in _each_once(folders):
        try:
            runs.append(read_run(folder))
        except RunError as error:
            problems.append(str(error))
    if not runs:
        raise RunError("\n  ".join(problems))
    return runs, [f"left out {problem}" for problem in problems]


def _run_folders(root: Path) -> list[Path]:
    if not root.is_dir():
        raise RunError(f"{root}: no such folder; give a run folder or a folder of runs")
    summaries = sorted(root.rglob("summary.json"))
    if not summaries:
        raise RunError(f"{root}: no run in it: looked for summary.json at any depth; train first or give its parent")
    return [summary.parent for summary in summaries]


def _each_once(folders: Iterable[Path]) -> list[Path]:
    found: dict[Path, Path] = {}  # resolved -> as given
    for folder in folders:
        found.setdefault(folder.resolve(), folder)
    return list(found.values())
