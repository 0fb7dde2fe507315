"""Figures of the course of training, a thin line a run, and of the errors of an audit's gradients."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fgvc.analysis.training_curves import MEASURES
from fgvc.reporting.style import PAGE_WIDTH, figure_style, method_order, method_style, new_figure

MEASURE_NAMES = dict(zip(MEASURES, ("test top-1 in %", "test loss", "training loss"), strict=True))


def plot_training(axes: Axes, curves: pd.DataFrame, measure: str) -> None:
    """Draw one of `MEASURE_NAMES` by epoch, a line a run in the style of its method.

    Args:
        axes: to draw on.
        curves: of `fgvc.analysis.training_curves`.
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
        shown: rows of `fgvc.analysis.gradients.summarise_gradients` with an error.
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
