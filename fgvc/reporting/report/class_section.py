"""The section of confusions: which classes each method takes for which."""

from collections.abc import Sequence

import pandas as pd

from fgvc.errors import RunError
from fgvc.presentation.render import Block
from fgvc.presentation.style import method_order
from fgvc.reporting.report.chart_data import one_line
from fgvc.reporting.report.collect import Collected
from fgvc.reporting.report.content import GroupPart, Made, Matrix, Part, PlotPart, Runs, TablePart
from fgvc.runs import Run
from fgvc.studies.confusion.measure import confusion_matrix, confusion_order, top_confusions
from fgvc.studies.confusion.show import confusion_figure

MATRICES, MATRIX_CLASSES = 12, 250
"""So many confusion matrices are drawn, of at most so many classes; the tables are of all."""


def confusions(collected: Collected) -> Made:
    """The most frequent confusions of each method, its seeds together, and the matrix."""
    parts: list[Part] = []
    notes: list[str] = []
    drawn = 0
    for setting, whole in collected.groups.items():
        group, more = collected.kept(whole, "predictions.csv")
        notes += [f"{setting.title}: {note}" for note in more]
        for method in sorted(group, key=lambda method: method_order(method.label)):
            title = f"{method.label}: {setting.title}"
            try:
                predictions, classes = _predictions(group[method])
                table, matrix = top_confusions(predictions, classes), confusion_matrix(predictions, classes)
            except RunError as error:
                notes.append(f"no confusions of {title}: {error}")
                continue
            runs = collected.of(group[method])
            inner: list[Part] = [_pairs(table, runs)]
            if drawn < MATRICES and len(classes) <= MATRIX_CLASSES:
                inner.append(_matrix(matrix, table, title, runs))
                drawn += 1
            else:
                notes.append(
                    f"{title}: matrix not drawn; a page has {MATRICES}, of up to {MATRIX_CLASSES} classes each"
                )
            parts.append(GroupPart(title, inner, runs, open=not parts))
    if not parts:
        raise RunError("\n".join(notes))
    return parts, notes


def _pairs(table: pd.DataFrame, runs: Runs) -> TablePart:
    rows = [
        [row["true"], row["predicted"], str(row["count"]), f"{row['share']:.1f}"] for row in table.to_dict("records")
    ]
    header = ["True class", "Predicted as", "Images", "% of the true class"]
    return TablePart(Block("Most frequent confusions", header, rows), [runs] * len(rows))


def _predictions(runs: Sequence[Run]) -> tuple[pd.DataFrame, list[str]]:
    """Of all seeds, and the names of the classes. Raises RunError where a run has none or the classes differ."""
    classes = runs[0].classes
    if classes is None or any(run.classes != classes for run in runs):
        raise RunError(f"{runs[0].path}: the classes' names are not kept (earlier versions) or not those of all seeds")
    tables = [run.predictions() for run in runs]
    return pd.concat(tables, ignore_index=True), [one_line(str(name)) for name in classes]


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
    return PlotPart("Confusion matrix", text, confusion_figure(matrix, table, title), [chart], runs)
