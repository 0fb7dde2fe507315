"""The sections of the report: each is one function that yields its parts and notes what it leaves out."""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from fgvc.errors import NothingToShowError, RunError, UserError
from fgvc.foreign import read_json_object
from fgvc.io import read_csv, sha256
from fgvc.presentation.render import NOT_MEASURED, Block, titled
from fgvc.presentation.style import class_name, method_order
from fgvc.reporting.registry import TABLES
from fgvc.reporting.report.answer import pooled_predictions, with_common_seeds
from fgvc.reporting.report.charts import Curve, Panel, curves_figure, intervals_figure, matrix_figure, method_curves
from fgvc.reporting.report.pictures import Attributions, Gallery, read_attribution, read_picture
from fgvc.reporting.report.results import Results
from fgvc.runs import Run
from fgvc.runs.config import flatten
from fgvc.runs.folder import RunFolder
from fgvc.runs.statistics import means_and_best
from fgvc.studies.confusion.measure import confusion_matrix, confusion_order, top_confusions
from fgvc.studies.gradients.show import ERROR_FLOOR, gradients_block
from fgvc.studies.spectra.show import MEASURES
from fgvc.studies.spectra.views import VIEWS, Options

_log = logging.getLogger(__name__)

MATRIX_CLASSES = 250
"""Most classes of a confusion matrix that is drawn; the tables are of all."""


@dataclass(frozen=True)
class Chart:
    """A figure of plotly under a heading; its text says what is seen, its height is a length of CSS.

    `wide` keeps it off a telephone, where a table in its place is read.
    """

    title: str
    text: str
    figure: go.Figure
    height: str
    wide: bool = False


@dataclass(frozen=True)
class Group:
    """Parts under a line, `summary`, that folds them up, unless they are open at first."""

    summary: str
    parts: Sequence["Part"]
    open: bool = False


Part = str | Block | Chart | Gallery | Group
"""Of a section: a paragraph, a table, a chart, pictures, or a group of these."""


@dataclass(frozen=True)
class Section:
    """A section: anchor, heading, the command that makes its content, the reason if there is none to show."""

    name: str
    title: str
    command: str
    parts: list[Part]
    notes: list[str]
    missing: str


def make_sections(results: Results) -> list[Section]:
    """Every section; one that cannot be made says why and what would make it."""
    sections = []
    for name, (title, command, make) in SECTIONS.items():
        notes: list[str] = []
        try:
            parts = [
                # a table under a heading that is its title says it once
                replace(part, title="") if isinstance(part, Block) and part.title == title else part
                for part in make(results, notes)
            ]
            missing = "" if parts else "what lies here is left out, as the notes say"
        except NothingToShowError as error:
            parts, notes, missing = [], [], str(error)
        except Exception as error:  # of files that someone may have sent; the other sections are shown
            _log.debug("the section %s", title, exc_info=True)
            missing = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            parts, notes = [], [f"the section {title} shows nothing: {missing}"]
        sections.append(Section(name, title, command, parts, list(dict.fromkeys(notes)), missing))
    return sections


def _block(title: str, columns: str, records: Iterable[Mapping[Any, Any]], *notes: str) -> Block:
    """A table of nested records, a row each; `columns` are HEAD=FIELD or, for numbers, HEAD=FIELD:FORMAT."""

    def cell(record: Mapping[str, Any], field: str) -> str:
        name, _, form = field.partition(":")
        value = record.get(name)
        if value is None or value != value:
            return NOT_MEASURED if form else "not stated"
        return format(value, form) if form else str(value)

    header, fields = zip(*(column.split("=") for column in columns.split(", ")), strict=True)
    rows = [[cell(record, field) for field in fields] for record in map(flatten, records)]
    return Block(title, list(header), rows, list(notes))


def _table(name: str, results: Results, notes: list[str]) -> list[Block]:
    """A table by name. The page says once what a caption says, and shows no published numbers of other settings."""
    table = TABLES[name](results.inputs)
    notes.extend(table.notes)
    return [replace(block, caption="") for block in table.blocks if block.name != "condition_number_published"]


_COURSE = {"test_top1": "test top-1 in %", "test_loss": "test loss", "train_loss": "training loss"}
"""Columns of metrics.csv that are drawn, and their names."""


def _training(results: Results, notes: list[str]) -> Iterator[Part]:
    """Curves of all runs, those that did not finish too."""
    curves, ends = [], []
    for run in results.runs:
        try:
            metrics = run.metrics().reindex(columns=["epoch", *_COURSE]).apply(pd.to_numeric, errors="coerce")
        except RunError as error:
            notes.append(f"no curve of {run.label}, seed {run.seed}: {error}")
            continue
        if not metrics.empty:
            curves.append(Curve(run.label, results.name(run), metrics))
            ends.append({"label": run.label, "seed": run.seed, **metrics.iloc[-1]})
    if not curves:
        kept = any((run.path / "metrics.csv").exists() for run in results.runs)
        raise (RunError if kept else NothingToShowError)("\n".join(["no run has a row in metrics.csv", *notes]))
    last = [end["test_top1"] for end in ends]
    text = (
        f"Test top-1, test loss and training loss of {len(curves)} runs after each epoch, a line a run; after the last "
        f"epoch of each, the test top-1 lies between {min(last):.2f} and {max(last):.2f} %."
    )
    panels = [Panel(name, curves, measure) for measure, name in _COURSE.items()]
    yield Chart("Course of training", text, curves_figure("epoch", "epoch", panels), "48rem")
    columns = "Method=label, Seed=seed, Last epoch=epoch:g, Test top-1 in %=test_top1:.2f, Test loss=test_loss:.3f"
    table = _block("After the last epoch", f"{columns}, Training loss=train_loss:.3f", ends)
    yield Group("Numbers of each run after its last epoch", [table])


def _view(
    name: str, file: str, draw: Callable[[str, pd.DataFrame], Chart], results: Results, notes: list[str]
) -> Iterator[Part]:
    """A chart and its table for every setting that a view of spectra shows."""
    for setting, group in results.with_file(file, notes).items():
        try:
            view = VIEWS[name]([run for runs in group.values() for run in runs], Options())
            yield draw(results.of(setting), view.table)
        except RunError as error:
            notes.append(titled(str(error), results.of(setting)))
            continue
        notes.extend(view.notes)
        yield replace(view.block, title=titled(view.block.title, results.of(setting)))


def _spectra(of: str, table: pd.DataFrame) -> Chart:
    within, panels = table[table["index"] <= table["rank"]], []
    for stage, name in (("before", "λ of the covariance"), ("after", "λ, normalised")):
        part = within[within["stage"] == stage]
        if len(part):
            panels.append(Panel(name, method_curves(part), "median", ("lower", "upper"), log=True))
    if not panels:
        raise RunError("all covariances are zero: the feature maps have one location, or are constant")
    text = (
        "Eigenvalues λ in descending order up to the numerical rank of the covariance, on a log scale: median over "
        "test images of all seeds as a line, quartiles as a band."
    )
    return Chart(
        titled("Eigenvalues", of), text, curves_figure("index", "index of the eigenvalue (1: largest)", panels), "40rem"
    )


def _conditions(of: str, table: pd.DataFrame) -> Chart:
    panels = []
    for measure, name in MEASURES.items():
        ends = (f"{measure}_lowest", f"{measure}_highest")
        panels.append(
            Panel(name.replace("\n", "<br>"), method_curves(table), measure, ends, log="condition" in measure)
        )
    text = (
        "Measures of the covariance by epoch on the same test images: median over seeds as a line, lowest and "
        "highest seed as a band."
    )
    return Chart(titled("By epoch", of), text, curves_figure("epoch", "epoch (0: before training)", panels), "48rem")


def _conditioning(results: Results, notes: list[str]) -> Iterator[Part]:
    """Conditioning by epoch, a chart a setting."""
    yield from _view("conditions", "spectrum_history.npz", _conditions, results, notes)
    yield from _table("condition_number", results, notes)


def _audit(results: Results, notes: list[str]) -> Iterator[Part]:
    """What `fgvc audit_gradients` wrote: errors of the published gradients."""
    text = (
        "Relative error of the features' gradient against the exact one: median over images as a dot, quartiles as a "
        f"bar. Those below {ERROR_FLOOR:.0e}, which are exact up to rounding, are in the table only."
    )
    for file, run, (summary, block) in results.read_each("gradients.csv", "audit_gradients", _read_audit, notes):
        title = f"On features of {results.name(run)}" if run else str(file.parent)
        shown = summary[summary["relative_error"] > ERROR_FLOOR]
        if len(shown):
            figure = intervals_figure("relative error of the gradient", shown, "relative_error")
            yield Chart(title, text, figure, f"{7 + 1.6 * len(shown):g}rem")
        yield replace(block, title=f"Gradients: {title}")
        picture = file.with_name("loewner.png")
        if picture.is_symlink():
            notes.append(f"{picture}: a link, which is not followed")
        elif picture.is_file():
            shows = "Loewner matrices of the audited gradients side by side, and below each its relative error"
            caption = "Loewner matrices, |L|, and their relative errors"
            yield Gallery("Loewner matrices", [read_picture(picture, 1600, shows, caption)], wide=True)


def _read_audit(file: Path) -> tuple[pd.DataFrame, Block]:
    numbers = ("relative_error", "relative_error_lower", "relative_error_upper")
    summary = read_csv(file, ("label", *numbers), names=("label",))
    return summary, gradients_block(summary)


def _confusions(results: Results, notes: list[str]) -> Iterator[Part]:
    """The most frequent confusions of each method, its seeds together, and the matrix."""
    columns = "True class=true, Predicted as=predicted, Images=count, % of class=share:.1f"
    for setting, group in results.with_file("predictions.csv", notes).items():
        _, best = means_and_best(with_common_seeds(group))
        for method in sorted(group, key=lambda method: method_order(method.label)):
            title = titled(method.label, results.of(setting))
            try:
                predictions, classes = pooled_predictions(group[method], notes)
                pairs = top_confusions(predictions, classes)
            except RunError as error:
                notes.append(f"no confusions of {title}: {error}")
                continue
            shown = pairs.assign(true=pairs["true"].map(class_name), predicted=pairs["predicted"].map(class_name))
            parts: list[Part] = [_block("Most frequent confusions", columns, shown.to_dict("records"))]
            if len(classes) <= MATRIX_CLASSES:
                parts.append(_matrix(confusion_matrix(predictions, classes)))
            else:
                notes.append(f"{title}: a matrix of more than {MATRIX_CLASSES} classes is not drawn")
            yield Group(title, parts, open=method == best)


def _matrix(matrix: pd.DataFrame) -> Chart:
    order = confusion_order(matrix.to_numpy())
    counts = matrix.to_numpy()[order][:, order]
    text = (
        f"Confusion matrix of {len(order)} classes, rows the true ones, those confused with each other side by side: "
        f"{counts.trace()} of {counts.sum()} answers (each seed's counted) are right, on the diagonal."
    )
    return Chart(
        "Confusion matrix", text, matrix_figure(list(matrix.index[order]), counts), "min(44rem, 90vw)", wide=True
    )


def _attribution(results: Results, notes: list[str]) -> list[Part]:
    """Grids first, then the maps of each image."""
    parts: list[Part] = []
    attributions = Attributions(notes)
    for file, run, record in results.read_each("attribution.json", "attribute", read_attribution, notes):
        name = results.name(run) if run else str(file.parent)
        parts += attributions.grids(file, record["grids"], name)
        if maps := attributions.maps(file, record["items"]):
            parts.append(Group(f"Maps of {name}, image by image", maps))
    return [attributions.summary, *parts] if parts else []


def _calibration(results: Results, notes: list[str]) -> Iterator[Part]:
    """Temperatures and errors of calibration, as `fgvc calibrate` keeps them."""
    records = []
    for file, run, found in results.read_each("calibration.json", "calibrate", _read_calibration, notes):
        source = {"label": run.label, "seed": run.seed} if run else {"label": file.parent}
        for record in found:
            weights = RunFolder(file.parent).weights_file(record["weights"])  # results may be kept without
            if weights.is_file() and record["digest"] not in (None, sha256(weights)):
                notes.append(f"left out of the calibrations: {file} is of other {record['weights']} weights")
                continue
            records.append(record | source)
    columns = "Method=label, Seed=seed, Weights=weights, Fitted on=split, Images=images, Temperature=temperature:.3f, "
    columns += "Calibration error in % before=before.calibration_error:.2f, after=after.calibration_error:.2f, "
    columns += "Loss before=before.loss:.3f, after=after.loss:.3f"
    note = (
        "Logits divided by the temperature. Calibration error: expected difference of confidence and accuracy; after: "
        "cross-fitted, each image with a temperature that it took no part in."
    )
    if records:
        yield _block("Calibration", columns, records, note)


def _read_calibration(file: Path) -> list[dict[str, Any]]:
    """The records by checkpoint. Raises ValueError, KeyError or TypeError where one holds no number for a number."""
    checkpoints = read_json_object(file)["checkpoints"]
    for record in checkpoints.values():
        for measured in (record["before"], record["after"]):
            numbers = (record["temperature"] or 0, measured["calibration_error"], measured["loss"])
            if bad := [number for number in numbers if isinstance(number, bool) or not isinstance(number, int | float)]:
                raise ValueError(f"{bad[0]!r} is no number")
    records = sorted(checkpoints.items())
    return [{**record, "weights": name, "digest": record.get("weights")} for name, record in records]


def _runs(results: Results, notes: list[str]) -> Iterator[Part]:
    """The runs that did not finish with the reason, and all of them."""
    notes.extend(results.notes)
    records = []
    for run in results.runs:
        minutes = run.seconds["total"] / 60 if run.seconds and "total" in run.seconds else None
        commit = run.commit and run.commit[:12] + "-dirty" * run.commit.endswith("-dirty")
        backbone = f"{run.backbone}, {'frozen' if run.frozen else 'fine-tuned'}"
        records.append(asdict(run) | {"backbone": backbone, "minutes": minutes, "commit": commit})
    unfinished = [record for record in records if record["status"] != "finished"]
    if unfinished:
        columns = "Method=label, Status=status, Reason=reason, Seed=seed, Folder=path"
        yield _block("Not finished", columns, unfinished)
    facts = {"epochs": "Epochs", "dataset": "Dataset", "backbone": "Backbone", "commit": "Commit"}
    own = "".join(f"{head}={fact}, " for fact, head in facts.items() if len({r[fact] for r in records}) > 1)
    columns = "Method=label, Status=status, Seed=seed, Final top-1=final.top1:.2f, Best top-1=best.top1:.2f, "
    yield _block("All runs", f"{columns}{own}Minutes=minutes:.1f, Folder=path", records)


def _configuration(results: Results, notes: list[str]) -> Iterator[Part]:
    """What all runs have in common once, then of each run what it has to itself."""
    values = [_settings(run, notes) for run in results.runs]
    common = set.intersection(*(set(own.items()) for own in values)) if len(values) > 1 else set()
    if common:
        summary = f"The same in all {len(values)} runs; below, run by run, what differs"
        yield _folded(summary, [pair for pair in values[0].items() if pair in common])
    for run, own in zip(results.runs, values, strict=True):
        summary = f"{results.name(run)}: {run.path}"
        yield _folded(summary, [pair for pair in own.items() if pair not in common], open=len(values) == 1)


def _folded(summary: str, pairs: list[tuple[str, str]], open: bool = False) -> Group:
    part = Block("Settings", ["Setting", "Value"], list(map(list, pairs))) if pairs else "Nothing of its own."
    return Group(f"{summary} ({len(pairs)})", [part], open)


def _settings(run: Run, notes: list[str]) -> dict[str, str]:
    """The configuration, its checksum, and the summary without its results."""
    folder = RunFolder(run.path)
    found: dict[str, Any] = {"made with: folder": str(run.path)}
    for source, read in {"config: ": folder.read_settings, "made with: ": folder.read_summary}.items():
        try:
            values = read()
        except RunError as error:
            notes.append(str(error))
            continue
        kept = values.keys() - {"final", "best", "classes"}
        found |= flatten({key: value for key, value in values.items() if key in kept}, source)
    if folder.config_file.is_file():
        found["made with: config_sha256"] = sha256(folder.config_file)
    return {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        for key, value in found.items()
    }


_TRAIN = "fgvc train experiment=NAME method=NAME"
_SPECTRA = partial(_view, "methods", "spectrum.npz", _spectra)
SECTIONS: dict[str, tuple[str, str, Callable[[Results, list[str]], Iterable[Part]]]] = {
    "accuracy": ("Accuracy", _TRAIN, partial(_table, "accuracy")),
    "training": ("Training", _TRAIN, _training),
    "spectra": ("Spectra", f"{_TRAIN}    # a finished run keeps spectrum.npz", _SPECTRA),
    "conditions": ("Condition numbers", f"{_TRAIN} trainer.probe_images=32", _conditioning),
    "audit": ("Gradient audit", "fgvc audit_gradients RUN", _audit),
    "confusions": ("Confusions", _TRAIN, _confusions),
    "attribution": ("Attribution", "fgvc attribute RUN --images 8", _attribution),
    "calibration": ("Calibration", "fgvc calibrate RUN", _calibration),
    "hybrid": ("Hybrid protocol", f"{_TRAIN} hybrid.method=isqrt_cov", partial(_table, "hybrid")),
    "cost": ("Cost", _TRAIN, partial(_table, "cost")),
    "runs": ("Runs", _TRAIN, _runs),
    "configuration": ("Configuration and provenance", _TRAIN, _configuration),
}
"""Heading, command that makes the content, and function of each section, in the order of the page; the function takes
a list for its notes and raises UserError where there is nothing to show."""
