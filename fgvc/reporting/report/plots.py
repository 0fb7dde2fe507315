"""The sections of plots: what the analysis computed, as charts and as the figures of the house."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from fgvc.analysis import Run, Setting, confusion_matrix, confusion_order, read_csv, top_confusions
from fgvc.analysis.settings import Group
from fgvc.analysis.training_curves import training_curves
from fgvc.errors import RunError
from fgvc.reporting.blocks import Block
from fgvc.reporting.confusion_plot import confusion_figure
from fgvc.reporting.curves_plot import MEASURE_NAMES, errors_figure, training_figure
from fgvc.reporting.history_plot import MEASURES
from fgvc.reporting.loewner_plot import gradients_block
from fgvc.reporting.report.collect import Collected
from fgvc.reporting.report.content import Curve, Curves, GalleryPart, Intervals, Matrix, Part, PlotPart, TablePart
from fgvc.reporting.report.pictures import read_picture
from fgvc.reporting.spectra_views import VIEWS, Options, View
from fgvc.reporting.style import method_order

Made = tuple[list[Part], list[str]]
MATRICES, MATRIX_CLASSES = 12, 250
"""So many confusion matrices are drawn, of at most so many classes; the tables are of all."""
_AUDIT_COLUMNS = ("label", "kept", "channels", "relative_error", "relative_error_lower", "relative_error_upper")


def training(collected: Collected) -> Made:
    """Curves of all runs, those that did not finish too."""
    table, notes = training_curves(collected.runs)
    if table.empty:
        raise RunError("\n".join(["no run has a row in metrics.csv", *notes]))
    charts = []
    for measure, name in MEASURE_NAMES.items():
        curves = [
            Curve(label, _run_name(collected.runs[place]), list(part["epoch"]), list(part[measure]), runs=(place,))
            for (place, label), part in table.groupby(["run", "label"], sort=False)
        ]
        charts.append(Curves(name, "epoch", name, curves))
    last = table.groupby("run").tail(1)
    text = (
        f"{MEASURE_NAMES['test_top1']}, test loss and training loss of {last.shape[0]} runs after each epoch, a line a "
        f"run; after the last epoch of each, the test top-1 lies between {last['test_top1'].min():.2f} and "
        f"{last['test_top1'].max():.2f} %."
    )
    rows = [_last_row(collected.runs[row["run"]], row) for row in last.to_dict("records")]
    header = ["Method", "Seed", "Last epoch", "Test top-1 in %", "Test loss", "Training loss"]
    block = Block("After the last epoch", header, rows)
    places = [(int(place),) for place in last["run"]]
    return [PlotPart("Course of training", text, training_figure(table), charts), TablePart(block, places)], notes


def _last_row(run: Run, row: dict[object, float]) -> list[str]:
    numbers = [
        "not measured" if pd.isna(row[m]) else f"{row[m]:.{2 if m == 'test_top1' else 4}f}" for m in MEASURE_NAMES
    ]
    return [run.label, str(run.seed), str(row["epoch"]), *numbers]


def _run_name(run: Run) -> str:
    status = "" if run.finished else f", {run.status}"
    return f"{run.label}, {run.dataset}, {run.backbone}, seed {run.seed}{status}"


def _views(name: str, collected: Collected, part: Callable[[Setting, Group, View], PlotPart]) -> Made:
    """A plot and its table for every setting that a view shows, and notes on the others."""
    parts: list[Part] = []
    notes: list[str] = []
    for setting, group in collected.groups.items():
        try:
            view = VIEWS[name]([run for runs in group.values() for run in runs], Options())
        except RunError as error:
            notes.append(f"{setting.title}: {error}")
            continue
        block = replace(view.block, title=f"{view.block.title}: {setting.title}")
        parts += [
            part(setting, group, view),
            TablePart(block, [collected.behind(block.title, r[0]) for r in block.rows]),
        ]
        notes += view.notes
    if not parts:
        raise RunError("\n".join(notes))
    return parts, notes


def spectra(collected: Collected) -> Made:
    """Sorted eigenvalues before and after normalisation, a plot a setting."""

    def part(setting: Setting, group: Group, view: View) -> PlotPart:
        charts = []
        for stage, title in (("before", "Covariance"), ("after", "After normalisation")):
            table = view.table[(view.table["stage"] == stage) & (view.table["index"] <= view.table["rank"])]
            curves = _banded(collected, group, table, "index", ("lower", "median", "upper"))
            if curves:
                charts.append(Curves(title, "index of the eigenvalue (1: largest)", "eigenvalue", curves, log=True))
        text = (
            "Eigenvalues in descending order up to the numerical rank of the covariance, on a log scale: median over "
            "test images of all seeds as a line, quartiles as a band."
        )
        return PlotPart(setting.title, text, view.figure, charts, _all(collected, group))

    return _views("methods", collected, part)


def conditions(collected: Collected) -> Made:
    """Conditioning by epoch, a plot a setting."""

    def part(setting: Setting, group: Group, view: View) -> PlotPart:
        charts = []
        for measure, name in MEASURES.items():
            columns = (f"{measure}_lowest", measure, f"{measure}_highest")
            curves = _banded(collected, group, view.table, "epoch", columns)
            title = " ".join(name.split())
            charts.append(Curves(title, "epoch (0: before training)", title, curves, log="condition" in measure))
        text = (
            "Measures of the covariance by epoch on the same test images: median over seeds as a line, lowest and "
            "highest seed as a band."
        )
        return PlotPart(setting.title, text, view.figure, charts, _all(collected, group))

    return _views("conditions", collected, part)


def _banded(
    collected: Collected, group: Group, table: pd.DataFrame, x: str, columns: tuple[str, str, str]
) -> list[Curve]:
    """A curve a method, with its band between the first and the last of the columns."""
    runs = {method.label: collected.of(of) for method, of in group.items()}
    curves = []
    for label in sorted(dict.fromkeys(table["label"]), key=method_order):
        part = table[table["label"] == label].sort_values(x)
        lower, middle, upper = (list(part[column]) for column in columns)
        curves.append(Curve(label, label, list(part[x]), middle, lower, upper, runs[label]))
    return curves


def _all(collected: Collected, group: Group) -> tuple[int, ...]:
    return tuple(place for runs in group.values() for place in collected.of(runs))


def audit(collected: Collected) -> Made:
    """What scripts/audit_gradients.py wrote: errors of the published gradients."""
    parts: list[Part] = []
    notes: list[str] = []
    for file in collected.files("gradients.csv"):
        try:
            found, more = _audit(collected, file)
        except RunError as error:
            notes.append(str(error))
            continue
        parts += found
        notes += more
    if not parts:
        raise RunError("\n".join(["no audit (gradients.csv) lies in these folders", *notes]))
    return parts, notes


def _audit(collected: Collected, file: Path) -> Made:
    summary = read_csv(file, _AUDIT_COLUMNS, names=("label",))
    try:
        block = gradients_block(summary)
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"{file}: not an audit of this version ({error!r}); run scripts/audit_gradients.py again"
        ) from error
    run = collected.owner(file)
    runs = None if run is None else collected.of([run])
    title = str(file.parent) if run is None else f"On features of {_run_name(run)}"
    shown = summary[summary["relative_error"] > 0]
    columns = (list(shown[f"relative_error{end}"]) for end in ("", "_lower", "_upper"))
    chart = Intervals("Relative error", "relative error of the gradient", list(shown["label"]), *columns)
    text = (
        "Relative error of the features' gradient against the exact one: median over images as a dot, quartiles as a "
        "bar. Gradients without an error, which are exact, are in the table only."
    )
    parts: list[Part] = [PlotPart(title, text, errors_figure(summary), [chart], runs)]
    parts.append(TablePart(replace(block, title=f"Gradients: {title}"), [runs] * len(block.rows)))
    picture = file.with_name("loewner.png")
    if picture.is_file():
        text = "Loewner matrices of the audited gradients side by side, and below each its relative error"
        shown_picture = read_picture(picture, 1600, text, "Loewner matrices, |L|, and their relative errors")
        parts.append(GalleryPart("Loewner matrices", [shown_picture], runs, wide=True))
    return parts, []


def confusions(collected: Collected) -> Made:
    """The most frequent confusions of each method, its seeds together, and the matrix."""
    parts: list[Part] = []
    notes: list[str] = []
    drawn = 0
    for setting, group in collected.groups.items():
        for method in sorted(group, key=lambda method: method_order(method.label)):
            try:
                predictions, classes = _predictions(group[method])
                table = top_confusions(predictions, classes)
                matrix = confusion_matrix(predictions, classes)
            except RunError as error:
                notes.append(f"no confusions of {method.label}: {error}")
                continue
            runs, title = collected.of(group[method]), f"{method.label}: {setting.title}"
            if drawn < MATRICES and len(classes) <= MATRIX_CLASSES:
                parts.append(_matrix(matrix, table, title, runs))
                drawn += 1
            else:
                notes.append(f"{title}: the matrix is not drawn, {MATRICES} are, of up to {MATRIX_CLASSES} classes")
            rows = [
                [row["true"], row["predicted"], str(row["count"]), f"{row['share']:.1f}"] for row in _records(table)
            ]
            header = ["True class", "Predicted as", "Images", "% of the true class"]
            parts.append(TablePart(Block(f"Most frequent confusions of {title}", header, rows), [runs] * len(rows)))
    if not parts:
        raise RunError("\n".join(notes))
    return parts, notes


def _records(table: pd.DataFrame) -> list[dict[str, object]]:
    return [{str(key): value for key, value in row.items()} for row in table.to_dict("records")]


def _predictions(runs: Sequence[Run]) -> tuple[pd.DataFrame, list[str]]:
    """Of all seeds, and the names of the classes. Raises RunError where a run has none or the classes differ."""
    classes = runs[0].classes
    if classes is None or any(run.classes != classes for run in runs):
        raise RunError(f"{runs[0].path}: the classes' names are not kept (earlier versions) or not those of all seeds")
    tables = [run.predictions() for run in runs]
    return pd.concat(tables, ignore_index=True), [" ".join(str(name).split()) for name in classes]


def _matrix(matrix: pd.DataFrame, table: pd.DataFrame, title: str, runs: tuple[int, ...]) -> PlotPart:
    order = confusion_order(matrix.to_numpy()).tolist()
    counts = matrix.to_numpy()[order][:, order]
    cells = [(int(i), int(j), int(counts[i, j])) for i, j in zip(*counts.nonzero(), strict=True)]
    chart = Matrix(title, [str(matrix.index[i]) for i in order], cells, counts.sum(axis=1).tolist())
    right, images = int(counts.diagonal().sum()), int(counts.sum())
    text = (
        f"Confusion matrix of {len(order)} classes, rows the true ones, those confused with each other side by side: "
        f"{right} of {images} answers (each seed's counted) are right, on the diagonal."
    )
    return PlotPart(title, text, confusion_figure(matrix, table, title), [chart], runs)
