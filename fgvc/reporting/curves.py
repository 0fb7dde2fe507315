"""The course of training of many runs: one table, and figures with a thin line a run."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fgvc.errors import RunError
from fgvc.presentation.style import PAGE_WIDTH, figure_style, method_order, method_style, new_figure
from fgvc.runs.summary import Run

MEASURES = ("test_top1", "test_loss", "train_loss")
"""Columns of metrics.csv that a curve is drawn of; top-1 in per cent."""
COLUMNS = ("run", "label", "epoch", *MEASURES)


def training_curves(runs: Sequence[Run]) -> tuple[pd.DataFrame, list[str]]:
    """The course of runs, finished or not, and notes on those without one.

    Returns:
        One row a run and epoch, `COLUMNS`; `run` is its place in `runs`. A measure that a run did not keep is NaN.
    """
    tables, notes = [], []
    for place, run in enumerate(runs):
        try:
            metrics = run.metrics()
        except RunError as error:
            notes.append(f"no curve of {run.label}, seed {run.seed}: {error}")
            continue
        numbers = {name: pd.to_numeric(metrics[name], errors="coerce") for name in metrics if name in COLUMNS}
        if len(metrics):
            tables.append(pd.DataFrame({**numbers, "run": place, "label": run.label}).reindex(columns=COLUMNS))
    table: pd.DataFrame = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=COLUMNS)
    return table, notes


MEASURE_NAMES = dict(zip(MEASURES, ("test top-1 in %", "test loss", "training loss"), strict=True))


def plot_training(axes: Axes, curves: pd.DataFrame, measure: str) -> None:
    """Draw one of `MEASURE_NAMES` by epoch, a line a run in the style of its method.

    Args:
        axes: to draw on.
        curves: of `fgvc.reporting.curves`.
        measure: a column of it.
    """
    for label in sorted(dict.fromkeys(curves["label"]), key=method_order):
        style = method_style(label)
        for number, (_, run) in enumerate(curves[curves["label"] == label].groupby("run")):
            axes.plot(
                run["epoch"],
                run[measure],
                color=style.color,
                linestyle=style.dash,
                linewidth=0.9,
                marker=style.marker,
                markersize=3,
                markerfacecolor="white",
                markevery=max(len(run) // 6, 1),
                label=None if number else label,
            )
    axes.grid(True, axis="y")
    axes.set_xlabel("epoch")
    axes.set_ylabel(MEASURE_NAMES[measure])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def training_figure(curves: pd.DataFrame) -> Figure:
    """A figure across both columns, a panel a measure."""
    with figure_style():
        figure = new_figure(PAGE_WIDTH, 2.6)
        panels = figure.subplots(1, len(MEASURE_NAMES))
        for axes, measure in zip(panels, MEASURE_NAMES, strict=True):
            plot_training(axes, curves, measure)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", frameon=False, ncols=5, handlelength=3.2)
    return figure


def errors_figure(shown: pd.DataFrame) -> Figure:
    """Relative error of each gradient: median over images as a dot, quartiles as a bar.

    Args:
        shown: rows of `fgvc.studies.gradients.measure.summarise_gradients` with an error.
    """
    place = np.arange(len(shown))[::-1]
    with figure_style():
        figure = new_figure(PAGE_WIDTH, 0.7 + 0.22 * len(shown))
        axes = figure.subplots()
        axes.hlines(place, shown["relative_error_lower"], shown["relative_error_upper"], color="#888888")
        axes.plot(shown["relative_error"], place, linestyle="none", marker="o", markersize=4, color="black")
        axes.set_xscale("log")
        axes.set_yticks(place, [str(label) for label in shown["label"]], parse_math=False)
        axes.grid(True, axis="x")
        axes.set_xlabel("relative error of the gradient (median and quartiles over images)")
        axes.set_ylim(-0.6, len(shown) - 0.4)
        axes.tick_params(axis="y", length=0)
    return figure
