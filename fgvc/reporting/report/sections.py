"""The sections of the report: each is one function from results to its parts and to notes on what is left out."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from fgvc.errors import NothingToShowError, RunError, UserError
from fgvc.io import read_csv, read_json_object
from fgvc.presentation.render import Block
from fgvc.presentation.style import method_order
from fgvc.reporting.registry import make_tables
from fgvc.reporting.report.charts import Curve, Panel, curves_figure, intervals_figure, matrix_figure
from fgvc.reporting.report.pictures import AttributionPictures, Gallery, read_attribution, read_picture
from fgvc.reporting.report.results import Results
from fgvc.reporting.run_tables import NOT_MEASURED
from fgvc.runs import Run
from fgvc.runs.config import flatten
from fgvc.runs.folder import RunFolder
from fgvc.studies.confusion.measure import confusion_matrix, confusion_order, top_confusions
from fgvc.studies.gradients.show import ERROR_FLOOR, gradients_block
from fgvc.studies.spectra.show import MEASURES
from fgvc.studies.spectra.views import VIEWS, Options

MATRIX_CLASSES = 250
"""Most classes of a confusion matrix that is drawn; the tables are of all."""
_COURSE = {"test_top1": "test top-1 in %", "test_loss": "test loss", "train_loss": "training loss"}
"""Columns of metrics.csv that are drawn, and their names."""


@dataclass(frozen=True)
class Chart:
    """A figure of plotly.

    Attributes:
        title: Heading.
        text: What is seen, for those who do not see it too.
        figure: The figure.
        height: Height on the page, a length of CSS.
    """

    title: str
    text: str
    figure: go.Figure
    height: str


@dataclass(frozen=True)
class Group:
    """Parts under a line that folds them up.

    Attributes:
        summary: The line.
        parts: Folded parts.
        open: Whether the parts are seen at first.
    """

    summary: str
    parts: Sequence["Part"]
    open: bool = False


Part = str | Block | Chart | Gallery | Group
"""Of a section: a paragraph, a table, a chart, pictures, or a group of these."""
PartsAndNotes = tuple[list[Part], list[str]]


@dataclass(frozen=True)
class Section:
    """A section of the page.

    Attributes:
        name: Anchor.
        title: Heading.
        command: Command that makes the content.
        parts: Content, empty where there is nothing to show.
        notes: Lines on what is left out.
        missing: Reason why there is nothing to show.
    """

    name: str
    title: str
    command: str
    parts: list[Part] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    missing: str = ""


def make_sections(results: Results) -> list[Section]:
    """Every section; one that cannot be made says why and what would make it."""
    sections = []
    for name, (title, command, make) in SECTIONS.items():
        try:
            parts, notes = make(results)
        except NothingToShowError as error:
            sections.append(Section(name, title, command, missing=str(error)))
            continue
        except UserError as error:
            note = f"the section {title} shows nothing: {error}"
            sections.append(Section(name, title, command, notes=[note], missing=str(error)))
            continue
        missing = "" if parts else "what lies here is left out, as the notes say"
        sections.append(Section(name, title, command, parts, list(dict.fromkeys(notes)), missing))
    return sections


def _tables(name: str) -> Callable[[Results], PartsAndNotes]:
    def make(results: Results) -> PartsAndNotes:
        tables, notes = make_tables([name], results.inputs)
        return [block for table in tables.values() for block in table.blocks], notes

    return make


def _run_name(run: Run | None, file: Path) -> str:
    """A run in one line; of a file that lies in none, its folder."""
    if run is None:
        return str(file.parent)
    status = "" if run.finished else f", {run.status}"
    return f"{run.label}, {run.dataset}, {run.backbone}, seed {run.seed}{status}"


def _training(results: Results) -> PartsAndNotes:
    """Curves of all runs, those that did not finish too."""
    curves: dict[str, list[Curve]] = {measure: [] for measure in _COURSE}
    rows, last, notes = [], [], []
    for run in results.runs:
        try:
            metrics = run.metrics().reindex(columns=["epoch", *_COURSE]).apply(pd.to_numeric, errors="coerce")
        except RunError as error:
            notes.append(f"no curve of {run.label}, seed {run.seed}: {error}")
            continue
        if metrics.empty:
            continue
        for measure, of_measure in curves.items():
            of_measure.append(
                Curve(run.label, _run_name(run, run.path), list(metrics["epoch"]), list(metrics[measure]))
            )
        end = metrics.iloc[-1]
        last.append(end["test_top1"])
        numbers = [
            NOT_MEASURED if pd.isna(end[measure]) else f"{end[measure]:.{2 if measure == 'test_top1' else 4}f}"
            for measure in _COURSE
        ]
        rows.append([run.label, str(run.seed), f"{end['epoch']:g}", *numbers])
    if not rows:
        kept = any((run.path / "metrics.csv").exists() for run in results.runs)
        raise (RunError if kept else NothingToShowError)("\n".join(["no run has a row in metrics.csv", *notes]))
    text = (
        f"Test top-1, test loss and training loss of {len(rows)} runs after each epoch, a line a run; after the last "
        f"epoch of each, the test top-1 lies between {min(last):.2f} and {max(last):.2f} %."
    )
    figure = curves_figure("epoch", [Panel(name, curves[measure]) for measure, name in _COURSE.items()])
    header = ["Method", "Seed", "Last epoch", "Test top-1 in %", "Test loss", "Training loss"]
    numbers_of_runs = Group("Numbers of each run after its last epoch", [Block("After the last epoch", header, rows)])
    return [Chart("Course of training", text, figure, "48rem"), numbers_of_runs], notes


def _views(
    name: str, file: str, results: Results, draw: Callable[[pd.DataFrame], go.Figure], text: str, height: str
) -> PartsAndNotes:
    """A chart and its table for every setting that a view of spectra shows, and notes on the others."""
    parts: list[Part] = []
    groups, notes = results.with_file(file)
    for setting, group in groups.items():
        try:
            view = VIEWS[name]([run for runs in group.values() for run in runs], Options())
            figure = draw(view.table)
        except RunError as error:
            notes.append(f"{setting.title}: {error}")
            continue
        parts.append(Chart(setting.title, text, figure, height))
        parts.append(replace(view.block, title=f"{view.block.title}: {setting.title}"))
        notes += view.notes
    if not parts:
        raise (RunError if groups else NothingToShowError)("\n".join(notes))
    return parts, notes


def _banded(table: pd.DataFrame, x: str, lower: str, middle: str, upper: str) -> list[Curve]:
    """A curve a method, with its band."""
    return [
        Curve(str(label), str(label), list(part[x]), list(part[middle]), (list(part[lower]), list(part[upper])))
        for label, part in table.sort_values(x).groupby("label", sort=False)
    ]


def _spectra(results: Results) -> PartsAndNotes:
    """Sorted eigenvalues before and after normalisation, a chart a setting."""

    def draw(table: pd.DataFrame) -> go.Figure:
        panels = []
        for stage, title in (("before", "λ of the covariance"), ("after", "λ, normalised")):
            part = table[(table["stage"] == stage) & (table["index"] <= table["rank"])]
            if len(part):
                panels.append(Panel(title, _banded(part, "index", "lower", "median", "upper"), log=True))
        if not panels:
            raise RunError("all covariances are zero: the feature maps have one location, or are constant")
        return curves_figure("index of the eigenvalue (1: largest)", panels)

    text = (
        "Eigenvalues λ in descending order up to the numerical rank of the covariance, on a log scale: median over "
        "test images of all seeds as a line, quartiles as a band."
    )
    return _views("methods", "spectrum.npz", results, draw, text, "40rem")


def _conditions(results: Results) -> PartsAndNotes:
    """Conditioning by epoch, a chart a setting, and as published."""

    def draw(table: pd.DataFrame) -> go.Figure:
        panels = []
        for measure, name in MEASURES.items():
            curves = _banded(table, "epoch", f"{measure}_lowest", measure, f"{measure}_highest")
            panels.append(Panel(name.replace("\n", "<br>"), curves, log="condition" in measure))
        return curves_figure("epoch (0: before training)", panels)

    text = (
        "Measures of the covariance by epoch on the same test images: median over seeds as a line, lowest and "
        "highest seed as a band."
    )
    parts, notes = _views("conditions", "spectrum_history.npz", results, draw, text, "48rem")
    tables, more = _tables("condition_number")(results)
    return parts + tables, notes + more


def _audit(results: Results) -> PartsAndNotes:
    """What `fgvc audit_gradients` wrote: errors of the published gradients."""
    parts: list[Part] = []
    audits, notes = results.read_each("gradients.csv", "audit_gradients", _read_audit)
    text = (
        "Relative error of the features' gradient against the exact one: median over images as a dot, quartiles as a "
        f"bar. Those below {ERROR_FLOOR:.0e}, which are exact up to rounding, are in the table only."
    )
    for file, run, (summary, block) in audits:
        title = str(file.parent) if run is None else f"On features of {_run_name(run, file)}"
        shown = summary[summary["relative_error"] > ERROR_FLOOR]
        if len(shown):
            numbers = [list(shown[f"relative_error{end}"]) for end in ("", "_lower", "_upper")]
            figure = intervals_figure("relative error of the gradient", list(shown["label"]), *numbers)
            parts.append(Chart(title, text, figure, f"{7 + 1.6 * len(shown):g}rem"))
        parts.append(replace(block, title=f"Gradients: {title}"))
        picture = file.with_name("loewner.png")
        if picture.is_file():
            shows = "Loewner matrices of the audited gradients side by side, and below each its relative error"
            caption = "Loewner matrices, |L|, and their relative errors"
            parts.append(Gallery("Loewner matrices", [read_picture(picture, 1600, shows, caption)], wide=True))
    return parts, notes


def _read_audit(file: Path) -> tuple[pd.DataFrame, Block]:
    columns = ("label", "relative_error", "relative_error_lower", "relative_error_upper")
    summary = read_csv(file, columns, names=("label",))
    try:
        return summary, gradients_block(summary)
    except (KeyError, TypeError) as error:
        raise ValueError(f"not an audit of this version, {error!r}") from error


def _confusions(results: Results) -> PartsAndNotes:
    """The most frequent confusions of each method, its seeds together, and the matrix."""
    parts: list[Part] = []
    groups, notes = results.with_file("predictions.csv")
    header = ["True class", "Predicted as", "Images", "% of the true class"]
    for setting, group in groups.items():
        for method in sorted(group, key=lambda method: method_order(method.label)):
            title = f"{method.label}: {setting.title}"
            try:
                predictions, classes = _predictions(group[method])
                table, matrix = top_confusions(predictions, classes), confusion_matrix(predictions, classes)
            except RunError as error:
                notes.append(f"no confusions of {title}: {error}")
                continue
            inner: list[Part] = [Block("Most frequent confusions", header, _pairs(table))]
            if len(classes) <= MATRIX_CLASSES:
                inner.append(_matrix(matrix))
            else:
                notes.append(f"{title}: a matrix of more than {MATRIX_CLASSES} classes is not drawn")
            parts.append(Group(title, inner, open=not parts))
    if not parts:
        raise (RunError if groups else NothingToShowError)("\n".join(notes))
    return parts, notes


def _predictions(runs: Sequence[Run]) -> tuple[pd.DataFrame, list[str]]:
    """Of all seeds, and the names of the classes. Raises RunError where a run has none or the classes differ."""
    classes = runs[0].classes
    if classes is None or any(run.classes != classes for run in runs):
        raise RunError(f"{runs[0].path}: the classes' names are not kept (earlier versions) or not those of all seeds")
    return pd.concat([run.predictions() for run in runs], ignore_index=True), [str(name) for name in classes]


def _pairs(table: pd.DataFrame) -> list[list[str]]:
    return [
        [row["true"], row["predicted"], str(row["count"]), f"{row['share']:.1f}"] for row in table.to_dict("records")
    ]


def _matrix(matrix: pd.DataFrame) -> Chart:
    order = confusion_order(matrix.to_numpy())
    counts = matrix.to_numpy()[order][:, order]
    right, images = int(counts.diagonal().sum()), int(counts.sum())
    text = (
        f"Confusion matrix of {len(order)} classes, rows the true ones, those confused with each other side by side: "
        f"{right} of {images} answers (each seed's counted) are right, on the diagonal."
    )
    figure = matrix_figure([str(matrix.index[i]) for i in order], counts)
    return Chart("Confusion matrix", text, figure, "min(44rem, 90vw)")


def _attribution(results: Results) -> PartsAndNotes:
    """Grids first, then the maps of each image."""
    records, notes = results.read_each("attribution.json", "attribute", read_attribution)
    pictures = AttributionPictures(notes=notes)
    parts: list[Part] = []
    for file, run, record in records:
        name = _run_name(run, file)
        parts += pictures.grids(file, record, name)
        maps = pictures.maps(file, record)
        if maps:
            parts.append(Group(f"Maps of {name}, image by image", maps))
    return [pictures.summary, *parts] if parts else [], notes


_CALIBRATION = {
    "split": "Fitted on",
    "images": "Images",
    "temperature": "Temperature",
    "before.calibration_error": "Calibration error in % before",
    "after.calibration_error": "after",
    "before.loss": "Loss before",
    "after.loss": "after",
}
"""Fields of calibration.json, and their columns."""
_CALIBRATION_NOTE = (
    "Logits divided by the temperature. Calibration error: expected difference of confidence and accuracy; after: "
    "cross-fitted, each image with a temperature that it took no part in."
)


def _calibration(results: Results) -> PartsAndNotes:
    """Temperatures and errors of calibration, as `fgvc calibrate` keeps them."""
    rows = []
    found, notes = results.read_each("calibration.json", "calibrate", _read_calibration)
    for file, run, checkpoints in found:
        name = [str(file.parent), "not stated"] if run is None else [run.label, str(run.seed)]
        for checkpoint, record in sorted(checkpoints.items()):
            values = flatten(record) if isinstance(record, dict) else {}
            rows.append([name[0], name[1], checkpoint, *(_cell(values.get(key)) for key in _CALIBRATION)])
    header = ["Method", "Seed", "Weights", *_CALIBRATION.values()]
    return [Block("Calibration", header, rows, [_CALIBRATION_NOTE])] if rows else [], notes


def _read_calibration(file: Path) -> dict[str, Any]:
    checkpoints = read_json_object(file).get("checkpoints")
    if not isinstance(checkpoints, dict) or not checkpoints:
        raise ValueError("it holds no 'checkpoints'")
    return checkpoints


def _cell(value: Any) -> str:
    if value is None:
        return "not stated"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _runs(results: Results) -> PartsAndNotes:
    """The runs that did not finish with the reason, and all of them."""
    parts: list[Part] = []
    unfinished = [run for run in results.runs if not run.finished]
    if unfinished:
        rows = [
            [run.label, run.status, run.reason or "not stated", str(run.seed), results.folder(run)]
            for run in unfinished
        ]
        parts.append(Block("Not finished", ["Method", "Status", "Reason", "Seed", "Folder"], rows))
    header = ["Method", "Status", "Seed", "Final top-1", "Best top-1", "Epochs", "Dataset", "Backbone"]
    header += ["Minutes", "Commit", "Folder"]
    rows = []
    for run in results.runs:
        accuracies = [NOT_MEASURED if a is None else f"{a.top1:.2f}" for a in (run.final, run.best)]
        backbone = f"{run.backbone}, {'frozen' if run.frozen else 'fine-tuned'}"
        total = (run.seconds or {}).get("total")
        minutes = NOT_MEASURED if total is None else f"{total / 60:.1f}"
        commit = "not stated" if run.commit is None else run.commit[:12] + ("-dirty" * run.commit.endswith("-dirty"))
        row = [run.label, run.status, str(run.seed), *accuracies, str(run.epochs), run.dataset, backbone]
        rows.append([*row, minutes, commit, results.folder(run)])
    return [*parts, Block("All runs", header, rows, [f"Folders: below {results.parent}."])], results.notes


def _configuration(results: Results) -> PartsAndNotes:
    """What all runs have in common once, then of each run what it has to itself."""
    notes: list[str] = []
    values = [_settings(run, notes) for run in results.runs]
    several = len(values) > 1
    common = {key: text for key, text in values[0].items() if all(other.get(key) == text for other in values)}
    parts: list[Part] = []
    if several:
        parts.append(
            f"{len(common)} settings are the same in all {len(values)} runs and stand here once; below them, run by "
            "run, those that differ."
        )
        parts.append(_folded(f"The same in all {len(values)} runs", common))
    for run, own in zip(results.runs, values, strict=True):
        summary = f"{run.label}, seed {run.seed}, {run.dataset}, {run.status}: {results.folder(run)}"
        differing = {key: text for key, text in own.items() if key not in common} if several else own
        parts.append(_folded(summary, differing, open=not several))
    return parts, notes


def _folded(summary: str, values: dict[str, str], open: bool = False) -> Group:
    rows = [[key, text] for key, text in values.items()]
    inner: list[Part] = [Block("Settings", ["Setting", "Value"], rows)] if rows else ["Nothing of its own."]
    return Group(f"{summary} ({len(values)})", inner, open)


def _settings(run: Run, notes: list[str]) -> dict[str, str]:
    """The configuration, its checksum, and the summary without its results."""
    config: dict[str, Any] = {}
    made_with: dict[str, Any] = {}
    try:
        config = flatten(run.settings())
    except RunError as error:
        notes.append(str(error))
    try:
        summary = RunFolder(run.path).read_summary()
        made_with = flatten({key: value for key, value in summary.items() if key not in ("final", "best", "classes")})
        file = run.path / "config.yaml"
        digest = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None
        made_with |= {"config_sha256": digest, "folder": str(run.path)}
    except RunError as error:  # it could be read a moment ago
        notes.append(str(error))
    named = {f"config: {key}": value for key, value in config.items()}
    named |= {f"made with: {key}": value for key, value in made_with.items()}
    return {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        for key, value in named.items()
    }


_TRAIN = "fgvc train experiment=NAME method=NAME"
SECTIONS: dict[str, tuple[str, str, Callable[[Results], PartsAndNotes]]] = {
    "accuracy": ("Accuracy", _TRAIN, _tables("accuracy")),
    "training": ("Training", _TRAIN, _training),
    "spectra": ("Spectra", f"{_TRAIN}    # a finished run keeps spectrum.npz", _spectra),
    "conditions": ("Condition numbers", f"{_TRAIN} trainer.probe_images=32", _conditions),
    "audit": ("Gradient audit", "fgvc audit_gradients RUN", _audit),
    "confusions": ("Confusions", _TRAIN, _confusions),
    "attribution": ("Attribution", "fgvc attribute RUN --images 8", _attribution),
    "calibration": ("Calibration", "fgvc calibrate RUN", _calibration),
    "hybrid": ("Hybrid protocol", f"{_TRAIN} hybrid.method=isqrt_cov", _tables("hybrid")),
    "cost": ("Cost", _TRAIN, _tables("cost")),
    "runs": ("Runs", _TRAIN, _runs),
    "configuration": ("Configuration and provenance", _TRAIN, _configuration),
}
"""Heading, command that makes the content, and function of each section, in the order of the page."""
