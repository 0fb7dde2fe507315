"""Saved runs: a typed summary, and readers of the other files."""

import functools
import math
import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import pandas as pd

from fgvc.errors import RunError
from fgvc.io import read_csv
from fgvc.provenance import commit_label
from fgvc.runs.config import default_settings, flatten
from fgvc.runs.folder import RunFolder, role
from fgvc.runs.spectra import Spectrum, SpectrumHistory

_REPEAT = "restore the file or repeat the run"
_LARGEST = 1 << 63  # of a whole number; larger ones do not fit into a column of a table
_COUNTS = (
    *("epochs", "image_size", "reduction", "num_classes", "out_features"),
    *("best_epoch", "train_images", "test_images", "test_classes", "validation_images"),
)
_LARGEST_COUNT = 1 << 32

_DIGESTS_OF_IMAGES = [f"{split}_{what}" for split in ("train", "validation", "test") for what in ("list", "content")]

PREDICTION_COLUMNS = ("path", "target", "predicted", "confidence")
"""Columns of predictions in every version; newer files also have target_class, predicted_class and rank."""


@dataclass(frozen=True)
class Accuracy:
    """Accuracies on one split, in per cent.

    Attributes:
        top1: Share of images whose class has the largest logit.
        top5: Share of images whose class is among the five largest logits; None if not measured.
        mean_class: Mean of the top-1 of each class over the classes that have images.
    """

    top1: float
    top5: float | None
    mean_class: float


@dataclass(frozen=True)
class Run:
    """One training run: its summary.json, typed.

    Most attributes have the same name in summary.json. `final` and `best` are accuracies of a finished run on the test
    split. `best_epoch` is the epoch of `best`; it was selected on the split `selected_on`. `test_classes` is the
    number of classes with test images, over which `mean_class` averages. `images` has digests that tell images apart:
    "train_list", "test_list" by names, classes and sizes, "train_content", "test_content" by bytes too; earlier
    versions lack some. `initial_weights_digest` is that of the file, `head_digest` that of the head before training.
    `rerun_of` is the folder of the run that `fgvc rerun` repeated. `coarse` has the coarser label of each class by the
    name of its level, e.g. "family"; "" where it is unknown. `class_sizes` is the number of training images of each
    class.
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
    reduced: bool | None = None
    test_classes: int | None = None
    validation_images: int | None = None
    rerun_of: str | None = None
    images: dict[str, str] = field(default_factory=dict)
    initial_weights_digest: str | None = None
    head_digest: str | None = None
    coarse: dict[str, list[str]] | None = None
    class_sizes: list[int] | None = None

    @property
    def finished(self) -> bool:
        """Whether the run reached its planned end, so its numbers may be compared."""
        return self.status == "finished"

    def metrics(self) -> pd.DataFrame:
        """Return metrics.csv, one row per epoch. Raises RunError if it is missing or damaged."""
        return read_csv(self.path / "metrics.csv", ("epoch", "train_loss", "test_top1"))

    def held_out_top1(self, epoch: int | None = None) -> float | None:
        """Return top-1 in per cent on the images held out of training, after an epoch (None: the last one).

        None if there are no such images. Raises RunError as `metrics`, and if it is no percentage.
        """
        metrics = self.metrics()
        rows = metrics.tail(1) if epoch is None else metrics[metrics["epoch"] == epoch]
        if "val_top1" not in rows or not len(rows):
            return None
        found = pd.to_numeric(rows["val_top1"], errors="coerce").iloc[0]
        if not 0 <= found <= 100:
            raise RunError(f"{self.path / 'metrics.csv'}: val_top1 is {rows['val_top1'].iloc[0]}; {_REPEAT}")
        return float(found)

    def predictions(self) -> pd.DataFrame:
        """Return predictions.csv, one row per test image, final epoch.

        Raises RunError: it is missing or damaged, or has not a row for each test image.
        """
        file = self.path / "predictions.csv"
        found = read_predictions(file)
        if self.test_images not in (None, len(found)):
            raise RunError(f"{file} has {len(found)} rows for {self.test_images} test images; {_REPEAT}")
        return found

    def settings(self) -> dict[str, Any]:
        """Return config.yaml, nested and untyped. Raises RunError if it is missing or damaged."""
        return self._settings

    @functools.cached_property
    def _settings(self) -> dict[str, Any]:
        return RunFolder(self.path).read_settings()

    def spectrum(self) -> Spectrum:
        """Return spectrum.npz. Raises RunError if it is missing or damaged."""
        return Spectrum.read(RunFolder(self.path).spectrum_file)

    def history(self) -> SpectrumHistory:
        """Return spectrum_history.npz. Raises RunError if it is missing (trainer.probe_images=0) or damaged."""
        return SpectrumHistory.read(RunFolder(self.path).spectrum_history_file)


def read_predictions(path: Path) -> pd.DataFrame:
    """Read a predictions file of this or an older version. Raises RunError if it is missing or damaged."""
    names = ("path", "target_class", "predicted_class")
    return read_csv(path, PREDICTION_COLUMNS, numbers=PREDICTION_COLUMNS[1:], names=names)


def read_run(path: Path) -> Run:
    """Read the summary of the run folder `path`; whoever has a `Run` need not check its values.

    Raises RunError: summary.json is missing or damaged, has a value of another type or that no run has, or lacks a
    field that its status requires; or config.yaml is damaged.
    """
    folder = RunFolder(path)
    file, summary = folder.summary_file, folder.read_summary()
    if folder.config_file.exists():
        folder.read_settings()
    final, best = _accuracy(summary, "final", file), _accuracy(summary, "best", file)
    if summary.get("status") == "finished" and (final is None or best is None):
        raise RunError(f"{file}: status is finished but 'final' or 'best' is missing; {_REPEAT}")
    selected = summary["best"] if best is not None else {}
    _optional(summary, "dirty", bool, file)
    images = _optional(summary, "dataset_fingerprint", dict, file) or {}
    fields: dict[str, Any] = {
        "path": path,
        "images": {name: _value(images, name, str, file) for name, digest in images.items() if digest is not None},
        "final": final,
        "best": best,
        "best_epoch": _optional(selected, "epoch", int, file),
        "selected_on": None if best is None else _value(selected, "selected_on", str, file),
    }
    for name, (read, kind) in _plain_fields().items():
        if name not in fields:
            fields[name] = read(summary, name, kind, file)
    for name in _COUNTS:
        if not 0 <= (fields[name] or 0) < _LARGEST_COUNT:
            raise RunError(f"{file}: field {name!r} is {fields[name]}, which no run has; {_REPEAT}")
    if len(set(fields["classes"] or ())) < len(fields["classes"] or ()):
        raise RunError(f"{file}: two classes have one name; {_REPEAT}")
    fields["spectral_dtype"] = fields["spectral_dtype"] or "float64"  # absent in runs of earlier versions
    return Run(**fields | {"commit": commit_label(summary)})


def read_finished(path: Path) -> Run:
    """Read the summary of a finished run. Raises RunError as `read_run`, and if it has no config.yaml or no end."""
    RunFolder(path).read_settings()  # says what to name where the folder is one of several runs
    run = read_run(path)
    if not run.finished:
        raise RunError(f"{path}: status {run.status}, not finished; finish the run first")
    return run


@functools.cache
def _plain_fields() -> dict[str, tuple[Callable[..., Any], Any]]:
    """Return reader (required or optional) and type of each attribute of `Run`, from its annotation."""
    fields = {}
    for name, hint in get_type_hints(Run).items():
        kinds = [kind for kind in get_args(hint) or (hint,) if kind is not NoneType]
        optional = NoneType in get_args(hint) or name == "spectral_dtype"
        fields[name] = (_optional if optional else _value, kinds[0] if optional else hint)
    return fields


def _value(values: Mapping[Any, Any], key: Any, kind: Any, file: Path) -> Any:
    """Return a value of a type, or of a `list[...]` or `dict[str, ...]` of it."""
    value: Any = values.get(key)
    if type(value) is dict and get_origin(kind) is dict:
        return {name: _value(value, name, get_args(kind)[1], file) for name in value}
    if type(value) is list and get_origin(kind) is list:
        members = dict(enumerate(value))
        return [_value(members, place, get_args(kind)[0], file) for place in members]
    small = type(value) is not int or abs(value) < _LARGEST
    if kind is float and type(value) is int and small:
        return float(value)
    if type(value) is kind and small:  # not isinstance: true is no integer here
        return value
    name, shown = getattr(kind, "__name__", kind), "missing" if key not in values else reprlib.repr(value)
    raise RunError(f"{file}: field {key!r} should be {name}, is {shown}; {_REPEAT}")


def _optional(values: Mapping[str, Any], key: str, kind: Any, file: Path) -> Any:
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


def split_finished(runs: Iterable[Run]) -> tuple[list[Run], list[str]]:
    """Return the finished runs, and for every other run a note with the reason why it is left out.

    A rerun is no second run: it is left out where the run that it repeats is there, known by its settings and images.
    Raises RunError: no run is finished.
    """
    runs, finished, notes = list(runs), [], []
    first = [run for run in runs if run.finished and run.rerun_of is None]
    for run in runs:
        if run.finished and run.rerun_of is not None and any(_repeats(run, other) for other in first):
            notes.append(f"left out {run.path}: a rerun of {run.rerun_of}, not a second run")
        elif run.finished:
            finished.append(run)
        else:
            notes.append(f"left out {run.path}: status {run.status}" + (f" ({run.reason})" if run.reason else ""))
    if not finished:
        raise RunError("no finished run among those given; finish or repeat them:\n  " + "\n  ".join(notes))
    return finished, notes


def _repeats(rerun: Run, run: Run) -> bool:
    """Whether `rerun` can be the repetition of `run`: their settings and images are the same."""
    alike = _identity(rerun) == _identity(run) and same_images(rerun, run)
    alike &= rerun.initial_weights_digest == run.initial_weights_digest
    return alike and result_settings(rerun) == result_settings(run)


def _identity(run: Run) -> tuple[object, ...]:
    """Return what the summaries of a run and its rerun have in common."""
    setting = (run.dataset, run.backbone, run.frozen, run.image_size, run.reduction, run.recipe, run.epochs)
    return (run.method, run.gradient, run.label, run.seed, *setting)


def same_images(first: Run, second: Run) -> bool:
    """Whether two runs had the same images in each split, as far as both say."""
    counts = [(run.train_images, run.test_images) for run in (first, second)]
    digests = [(first.images.get(name), second.images.get(name)) for name in _DIGESTS_OF_IMAGES]
    return all(one == other for one, other in (*zip(*counts, strict=True), *digests) if None not in (one, other))


def result_settings(run: Run) -> dict[str, Any] | None:
    """Return the settings that change a run's result, other than the seed; None if they cannot be read."""
    try:
        given = flatten(run.settings())
    except RunError:
        return None
    settings = _defaults() | given  # an older run does not know a newer setting: it did what its default does
    settings["dataset.adapter"] = settings["dataset.adapter"] or settings["dataset.name"]
    given_weights = (settings[key] for key in ("backbone.weights", "backbone.pretrained", "initial_weights"))
    if any(given_weights) and run.weights_digest is not None:
        settings["backbone.weights"] = run.weights_digest[:12]  # the file may lie elsewhere, or be another one there
    # the summary has the reduction; some methods have none, whatever its configuration says
    left_out = ("seed", "method.reduction")
    return {key: value for key, value in settings.items() if role(key).changes_result and key not in left_out}


@functools.cache
def _defaults() -> dict[str, Any]:
    return flatten(default_settings())


def find_finished(paths: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """Return the finished runs in some folders, and a note for each folder and run that is left out.

    Raises RunError: no run can be read, or none is finished.
    """
    runs, unread = readable_runs(paths)
    finished, unfinished = split_finished(runs)
    return finished, unread + unfinished


def readable_runs(paths: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """Return the runs in some folders at any depth, each once, ordered by folder and then by path.

    A folder is a run if it holds summary.json. A note names each folder or run that cannot be read. The trials of
    a search (`fgvc train search=NAME`) are left out with a note if there are other runs. Raises RunError if no run is
    left.
    """
    folders: dict[Path, Path] = {}  # as given, by where they are
    runs, problems = [], []
    for root in paths:
        try:
            found = _run_folders(root)
        except RunError as error:
            problems.append(str(error))
            continue
        searches = {folder.parent for folder in found if folder.match("search/trial*")} - {root}
        if others := [folder for folder in found if folder.parent not in searches]:
            problems += [f"the trials of the search in {search}; give this folder to see them" for search in searches]
        for folder in others or found:
            folders.setdefault(folder.resolve(), folder)
    for folder in folders.values():
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
