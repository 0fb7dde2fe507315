"""The picture at the top of README.md: images of the demo, what four heads make of them, and the spectra behind it."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fgvc.data.synthetic import class_name, draw_image, draw_layout
from fgvc.presentation.style import PAGE_WIDTH, figure_style, method_order, method_style, new_figure
from fgvc.reporting.accuracy import load_accuracy
from fgvc.studies.spectra.measure import load_curves
from fgvc.studies.spectra.show import plot_eigenvalues

_CLASSES = (0, 7, 3, 10)
_CHANCE = 100 / 12


def overview_figure(accuracy: Path, spectra: Path) -> Figure:
    """Four panels across the page.

    Args:
        accuracy: CSV of an accuracy table of the demo.
        spectra: CSV of its eigenvalues.
    """
    curves = load_curves(spectra)
    with figure_style():
        figure = new_figure(PAGE_WIDTH, 2.4)
        left, points, before, after = figure.subplots(1, 4, width_ratios=(1.5, 0.85, 1.2, 1.2))
        _draw_images(left)
        _plot_accuracies(points, accuracy)
        plot_eigenvalues(before, curves, "before")
        plot_eigenvalues(after, curves, "after")
        after.set_ylabel("")
        for axes in (before, after):
            axes.set_xlabel("index (1: largest)")
        after.set_ylim(bottom=after.get_ylim()[0] / 10)  # room for the names
        handles, labels = before.get_legend_handles_labels()
        after.legend(handles, labels, loc="lower left", frameon=False, handlelength=2.4, borderaxespad=0.1)
    return figure


def _draw_images(axes: Axes) -> None:
    """Four classes, two by two, each under its name."""
    axes.set_title("Images of four classes")
    axes.axis("off")
    rng = np.random.default_rng(0)
    for place, label in enumerate(_CLASSES):
        row, column = divmod(place, 2)
        image = draw_image(rng, draw_layout(rng, label, 1.0), 160)
        inset = axes.inset_axes((0.54 * column, 0.5 - 0.56 * row, 0.46, 0.4))
        inset.imshow(np.asarray(image))
        inset.axis("off")
        name = "{} {},\n{} {}".format(*class_name(label).split("_"))
        inset.set_title(name, fontsize=5.5, pad=2)


def _plot_accuracies(axes: Axes, path: Path) -> None:
    """Final top-1 of each head, mean and standard deviation over the seeds."""
    table = load_accuracy(path)
    rows = table[(table["origin"] == "measured") & (table["epoch"] == "final")]
    rows = rows.sort_values("label", key=lambda labels: labels.map(method_order), ascending=False)
    for place, row in enumerate(rows.itertuples()):
        style = method_style(row.label)
        axes.errorbar(
            row.top1_mean, place, xerr=row.top1_std, fmt=style.marker, color=style.color, markersize=4, capsize=2
        )
    axes.axvline(_CHANCE, color="#777777", linewidth=0.6, linestyle=":")
    axes.text(_CHANCE + 2, -0.45, "chance", color="#777777", fontsize=6)
    axes.set_yticks(range(len(rows)), list(rows["label"]))
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlim(0, 100)
    axes.grid(True, axis="x")
    axes.set_title("Test accuracy")
    axes.set_xlabel(f"top-1 in %, {int(rows['n'].iloc[0])} seeds")
