"""Confusions as files to read: a figure that suits three classes and hundreds, tables, and a summary."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from fgvc.io import to_csv, write_output
from fgvc.presentation.render import markdown_table
from fgvc.presentation.style import COLUMN_WIDTH, PAGE_WIDTH, caption, class_name, figure_style, new_figure, save_figure
from fgvc.studies.confusion.measure import (
    confusion_counts,
    confusion_matrix,
    confusion_order,
    per_class,
    top_confusions,
)

_COUNTED, _NAMED = 12, 40  # up to so many classes cells hold counts, and axes the names of classes
_LISTED = 10
_DRAWN = 1000  # up to so many classes there is a matrix
_GREY = "#555555"
_SMALL = 6.5
# light orange to dark red: a sequential map of ColorBrewer for all colour vision, without its near-white end
_WRONG = ListedColormap(mpl.colormaps["YlOrRd"](np.linspace(0.25, 1, 256)), name="wrong")
_RIGHT = ListedColormap(mpl.colormaps["Greys"](np.linspace(0.1, 0.7, 256)), name="right")


def plot_confusion(axes: Axes, matrix: pd.DataFrame, order: Sequence[int]) -> tuple[AxesImage, AxesImage]:
    """Draw the shares of each true class in per cent: wrong answers in colour, right ones on the diagonal in grey.

    The colours of wrong answers follow the square root of the share, so that a single mistake is visible next to a
    class that is half wrong; none is white. While there is room, cells hold counts, rows have names, and columns have
    the numbers of the rows.

    Args:
        axes: axes to draw on.
        matrix: (K, K) counts with class names; rows are true classes.
        order: (K,) permutation of the classes.

    Returns:
        The images of wrong and of right answers, for colour bars.
    """
    counts = matrix.to_numpy()[np.ix_(order, order)]
    k = len(counts)
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    diagonal = np.eye(k, dtype=bool)
    wrong = np.ma.masked_where(diagonal | (counts == 0), shares)
    highest = float(shares[~diagonal].max(initial=0)) or 1.0
    images = (
        axes.imshow(wrong, cmap=_WRONG, norm=PowerNorm(0.5, 0, highest), interpolation="nearest"),
        axes.imshow(
            np.ma.masked_where(~diagonal, shares), cmap=_RIGHT, norm=Normalize(0, 100), interpolation="nearest"
        ),
    )
    if k <= _COUNTED:
        _write_counts(axes, counts, shares, images)
    if k <= _NAMED:
        names = [f"{class_name(str(matrix.index[i]), 28)}  {place}" for place, i in enumerate(order, start=1)]
        size = 7 if k <= _COUNTED // 2 else 6 if k <= _COUNTED else 5
        axes.set_yticks(range(k), names, fontsize=size, parse_math=False)
        rotation = 0 if k <= _COUNTED else 90
        axes.set_xticks(range(k), [str(place) for place in range(1, k + 1)], fontsize=size, rotation=rotation)
    else:
        axes.set(xticks=[], yticks=[])
    axes.tick_params(length=0, pad=2)
    axes.spines[:].set_visible(True)
    axes.set(xlabel="predicted class", ylabel="true class")
    return images


def confusion_figure(matrix: pd.DataFrame, confusions: pd.DataFrame, title: str) -> Figure:
    """The matrix in the order of `confusion_order`; with 13 classes or more also the most frequent confusions.

    Where the axes have no room for names, the numbers of the list stand next to their cells. `matrix` is a
    `confusion_matrix`, `confusions` the `top_confusions`, of which ten are listed.
    """
    order = confusion_order(matrix.to_numpy())
    with figure_style():
        if len(matrix) <= _COUNTED:
            figure = new_figure(COLUMN_WIDTH, 2.9)
            plot_confusion(figure.subplots(), matrix, order.tolist())
        else:
            figure = _wide_figure(matrix, order, confusions)
        width = 55 if len(matrix) <= _COUNTED else 110
        lines = [textwrap.fill(line, width) for line in title.splitlines()]
        figure.suptitle("\n".join(lines), fontsize=8, parse_math=False)
        colour = "Colour: share of the true class. " if len(matrix) <= _COUNTED else ""
        text = f"{colour}{len(matrix)} classes, those confused with each other side by side."
        caption(figure, textwrap.fill(text, width + 10))
    return figure


def _wide_figure(matrix: pd.DataFrame, order: np.ndarray, confusions: pd.DataFrame) -> Figure:
    figure = new_figure(PAGE_WIDTH, 5)
    grid = figure.add_gridspec(3, 2, width_ratios=[1, 0.42], height_ratios=[1, 0.025, 0.025])
    axes = figure.add_subplot(grid[:, 0])
    images = plot_confusion(axes, matrix, order.tolist())
    _list_confusions(figure.add_subplot(grid[0, 1]), confusions.head(_LISTED))
    if len(matrix) > _NAMED:
        _number_cells(axes, order, confusions.head(_LISTED))
    labels = ("% of the true class taken for another", "% of the true class right (diagonal)")
    for row, (image, label) in enumerate(zip(images, labels, strict=True), start=1):
        bar = figure.add_subplot(grid[row, 1])
        figure.colorbar(image, cax=bar, orientation="horizontal").set_label(label, fontsize=_SMALL, loc="left")
        bar.tick_params(labelsize=6, length=2, pad=1.5)
    return figure


def _write_counts(axes: Axes, counts: np.ndarray, shares: np.ndarray, images: tuple[AxesImage, AxesImage]) -> None:
    size = min(7.0, 70 / len(counts))
    for (i, j), count in np.ndenumerate(counts):
        if count or i == j:
            image = images[int(i == j)]
            red, green, blue, _ = image.to_rgba(shares[i, j])
            dark = 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.5
            axes.text(j, i, str(count), ha="center", va="center", fontsize=size, color="white" if dark else "black")


def _list_confusions(axes: Axes, confusions: pd.DataFrame) -> None:
    axes.set_axis_off()
    head = "most frequent confusions" if len(confusions) else "no image is taken for another class"
    lines = [f"{head}\n"]
    for number, (_, row) in enumerate(confusions.iterrows(), start=1):
        # a figure space is as wide as a digit
        lines.append(f"{number:\u2007>2}  {class_name(row['true'], 28)}")
        lines.append(f"      → {class_name(row['predicted'], 28)}: {row['count']} ({row['share']:.0f} %)")
    text = "\n".join(lines)
    axes.text(0, 1, text, va="top", fontsize=_SMALL, linespacing=1.35, transform=axes.transAxes, parse_math=False)


def _number_cells(axes: Axes, order: np.ndarray, confusions: pd.DataFrame) -> None:
    """Write the rank of each confusion next to its cell, away from the diagonal and from the numbers of neighbours."""
    place = np.argsort(order)
    near = 0.06 * len(order)
    placed: list[tuple[int, int, int]] = []
    for number, (_, row) in enumerate(confusions.iterrows(), start=1):
        i, j = int(place[row["target"]]), int(place[row["answer"]])
        side = 1 if j > i else -1
        step = 1 + max((s for a, b, s in placed if (b > a) == (j > i) and abs(a + b - i - j) < near), default=0)
        placed.append((i, j, step))
        axes.annotate(
            str(number),
            (j, i),
            xytext=(side * (5 + 7 * step), side * (5 + 7 * step)),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=_SMALL,
            bbox={"boxstyle": "square,pad=0.05", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
            arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": _GREY, "shrinkA": 0, "shrinkB": 1},
        )


def write_class_report(
    predictions: pd.DataFrame, classes: Sequence[str], title: str, folder: Path, name: str
) -> tuple[str, list[Path]]:
    """Write per_class-NAME.csv, confusion-NAME.csv, confusion-NAME.png and .pdf, and confusions-NAME.md to a folder.

    With more than 1,000 classes there is no figure, and confusion-NAME.csv holds `confusion_counts`. `predictions` has
    a row for each image and columns target and predicted, indices into `classes`; `title` may have two lines; `name` is
    NAME.

    Returns:
        A Markdown summary of the classes, and the files.

    Raises:
        RunError: predictions without rows, or of other classes.
    """
    table = per_class(predictions, classes)
    matrix = confusion_matrix(predictions, classes) if len(classes) <= _DRAWN else None
    counts = to_csv(confusion_counts(predictions, classes), None) if matrix is None else to_csv(matrix, index=True)
    confusions = top_confusions(predictions, classes)
    text = f"{_worst_classes(table)}\n\n{confusions_markdown(confusions)}"
    empty = int((table["images"] == 0).sum())
    if empty:
        text += f"\n\n{empty} of {len(table)} classes have no test image; the tables and the mean leave them out."
    texts = {
        f"per_class-{name}.csv": to_csv(table, "%.4f"),
        f"confusion-{name}.csv": counts,
        f"confusions-{name}.md": f"# {' '.join(title.splitlines())}\n\n{text}\n",
    }
    for file, content in texts.items():
        write_output(folder / file, content)
    files = [folder / file for file in texts]
    if matrix is not None:
        files += save_figure(confusion_figure(matrix, confusions, title), folder / f"confusion-{name}")
    return text, files


def confusions_markdown(confusions: pd.DataFrame) -> str:
    """The table of `fgvc.studies.confusion.measure.top_confusions` as Markdown."""
    if confusions.empty:
        return "No image is taken for another class."
    rows = [
        [f"{class_name(row['true'])} → {class_name(row['predicted'])}", str(row["count"]), f"{row['share']:.1f}"]
        for _, row in confusions.iterrows()
    ]
    return markdown_table(["Most frequent confusions: true → predicted", "images", "% of the true class"], rows)


def _worst_classes(table: pd.DataFrame) -> str:
    """The five classes of lowest recall as a Markdown table."""
    header = ["Lowest recall: class", "right", "recall % [95 % interval]", "precision %", "taken for"]
    rows = []
    for _, row in table[table["images"] > 0].nsmallest(5, "recall").iterrows():
        recall = f"{row['recall']:.1f} [{row['recall_lower']:.1f}, {row['recall_upper']:.1f}]"
        precision = "–" if pd.isna(row["precision"]) else f"{row['precision']:.1f}"
        taken = f"{class_name(row['confused_with'])} ({row['confused_count']})" if row["confused_count"] else "–"
        rows.append([class_name(row["class"]), f"{row['correct']} of {row['images']}", recall, precision, taken])
    return markdown_table(header, rows)
