"""Figures of spectra over training, by class and across settings. All are drawn from small tidy tables."""

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fgvc.presentation.style import COLUMN_WIDTH, PAGE_WIDTH, figure_style, method_order, method_style, new_figure

MEASURES = {
    "nonzero_condition_number": "condition number\nof the non-zero λ",
    "effective_rank": "effective rank",
    "participation_ratio": "participation\nratio",
}
_STAGES = {"before": "covariance", "after": "normalised"}


def plot_measure(axes: Axes, history: pd.DataFrame, measure: str) -> None:
    """Draw one of `MEASURES` by epoch, a curve a method: median over seeds, band from the lowest to the highest seed.

    Args:
        axes: to draw on.
        history: of `fgvc.studies.spectra.history.condition_history`.
        measure: a column of it.
    """
    for label in sorted(dict.fromkeys(history["label"]), key=method_order):
        part, style = history[history["label"] == label].sort_values("epoch"), method_style(label)
        axes.fill_between(
            part["epoch"],
            part[f"{measure}_lowest"],
            part[f"{measure}_highest"],
            color=style.color,
            alpha=0.2,
            linewidth=0,
        )
        axes.plot(
            part["epoch"],
            part[measure],
            color=style.color,
            linestyle=style.dash,
            marker=style.marker,
            markersize=3.5,
            markerfacecolor="white",
            markevery=max(len(part) // 6, 1),
            label=label,
        )
    if measure.endswith("condition_number"):
        axes.set_yscale("log")
    axes.grid(True, axis="y")
    axes.set_ylabel(MEASURES[measure])


def history_figure(history: pd.DataFrame, title: str) -> Figure:
    """A figure of one column: the measures of the covariance below each other, against the epoch."""
    with figure_style():
        figure = new_figure(COLUMN_WIDTH, 4.6)
        panels = figure.subplots(len(MEASURES), 1, sharex=True)
        for axes, measure in zip(panels, MEASURES, strict=True):
            plot_measure(axes, history, measure)
        panels[-1].set_xlabel("epoch (0: before training)")
        panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", frameon=False, ncols=2, handlelength=3)
        figure.supxlabel(title, fontsize=6.5, color="#555555", wrap=True)
    return figure


def plot_epochs(axes: Axes, curves: pd.DataFrame, rank: int) -> None:
    """Draw the median eigenvalues of one method and stage, a curve an epoch, dark to light.

    Args:
        axes: to draw on.
        curves: rows of one stage of `fgvc.studies.spectra.history.curves_by_epoch`.
        rank: of the covariance; the axes end there.
    """
    epochs = sorted(set(curves["epoch"]))
    colours = mpl.colormaps["viridis"](np.linspace(0, 0.88, len(epochs)))
    for epoch, colour in zip(epochs, colours, strict=True):
        part = curves[(curves["epoch"] == epoch) & (curves["index"] <= rank)].sort_values("index")
        axes.plot(part["index"], part["median"].clip(lower=1e-300), color=colour, linewidth=1, label=str(epoch))
    axes.set_yscale("log")
    axes.grid(True, axis="y")


def some_epochs(curves: pd.DataFrame, count: int = 6) -> pd.DataFrame:
    """The rows of up to `count` epochs, up to the covariance's rank: the first, the last, more of the early ones.

    Spectra change most in the first epochs, so the steps between the chosen ones grow: of 16 epochs the second, third,
    fifth and ninth stand between the first and the last.
    """
    epochs = sorted(set(curves["epoch"]))
    last = len(epochs) - 1
    chosen = {epochs[0], *(epochs[min(i, last)] for i in np.geomspace(1, max(last, 1), count - 1).round().astype(int))}
    found: pd.DataFrame = curves[curves["epoch"].isin(chosen) & (curves["index"] <= curves["rank"])]
    return found


def epochs_figure(curves: pd.DataFrame, title: str) -> Figure:
    """Small multiples: a row a method, covariance on the left, normalised on the right, a curve an epoch.

    Args:
        curves: of `fgvc.studies.spectra.history.curves_by_epoch` with label and rank, of `some_epochs`.
        title: of the figure.
    """
    labels = sorted(dict.fromkeys(curves["label"]), key=method_order)
    with figure_style():
        figure = new_figure(COLUMN_WIDTH, 0.9 + 1.25 * len(labels))
        panels = figure.subplots(len(labels), 2, squeeze=False, sharex=True, sharey="col")
        for row, label in zip(panels, labels, strict=True):
            part = curves[curves["label"] == label]
            row[0].set_ylabel("eigenvalue")
            for axes, stage in zip(row, ("before", "after"), strict=True):
                of_stage = part[part["stage"] == stage]
                if of_stage.empty:
                    axes.set_axis_off()
                    continue
                plot_epochs(axes, of_stage, int(part["rank"].iloc[0]))
                axes.set_title(f"{label}, {_STAGES[stage]}", fontsize=7)
        for axes in panels[-1]:
            axes.set_xlabel("index of λ")
        handles, names = panels[0, 0].get_legend_handles_labels()
        figure.legend(
            handles, names, loc="outside upper center", frameon=False, ncols=len(names), title="epoch", handlelength=1.2
        )
        figure.supxlabel(title, fontsize=6.5, color="#555555", wrap=True)
    return figure


def plot_classes(axes: Axes, classes: pd.DataFrame, named: int = 3) -> None:
    """Draw the effective rank of each class's images, classes in order: median as a dot, quartiles as a bar.

    Args:
        axes: to draw on.
        classes: of `fgvc.studies.spectra.classes.spectra_by_class`, of one method.
        named: how many classes of either end are named.
    """
    ordered = classes.sort_values("effective_rank").reset_index(drop=True)
    style, place = method_style(ordered["label"].iloc[0]), np.arange(len(ordered))
    axes.vlines(place, ordered["effective_rank_lower"], ordered["effective_rank_upper"], color="#BBBBBB", linewidth=0.8)
    axes.plot(place, ordered["effective_rank"], linestyle="none", marker=".", markersize=4, color=style.color)
    ends = {"lowest": ordered["class"].head(named), "highest": ordered["class"].tail(named)[::-1]}
    for (name, found), (x, y) in zip(ends.items(), ((0.03, 0.97), (0.97, 0.03)), strict=True):
        text = "\n".join([f"{name}:", *found])
        sides = ("left", "top") if name == "lowest" else ("right", "bottom")
        axes.text(x, y, text, fontsize=6, ha=sides[0], va=sides[1], transform=axes.transAxes)
    axes.set_xlabel("class, by effective rank")
    axes.set_ylabel("effective rank")
    axes.grid(True, axis="y")


def classes_figure(classes: pd.DataFrame, title: str) -> Figure:
    """A figure of one column, a panel a method."""
    labels = sorted(dict.fromkeys(classes["label"]), key=method_order)
    with figure_style():
        figure = new_figure(COLUMN_WIDTH, 0.4 + 2.1 * len(labels))
        panels = figure.subplots(len(labels), 1, squeeze=False)[:, 0]
        for axes, label in zip(panels, labels, strict=True):
            plot_classes(axes, classes[classes["label"] == label])
            axes.set_title(label)
        figure.supxlabel(title, fontsize=6.5, color="#555555", wrap=True)
    return figure


def plot_shares(axes: Axes, curves: pd.DataFrame, labels: Sequence[str]) -> None:
    """Draw eigenvalues as shares of the trace, a curve a label, up to each one's rank, for spectra of other scales.

    Args:
        axes: to draw on.
        curves: of `fgvc.studies.spectra.measure.curve_table` on shares.
        labels: in the order of the legend.
    """
    colours = mpl.colormaps["viridis"](np.linspace(0, 0.85, len(labels)))
    for label, colour in zip(labels, colours, strict=True):
        part = curves[(curves["label"] == label) & (curves["index"] <= curves["rank"])].sort_values("index")
        axes.fill_between(part["index"], part["lower"], part["upper"], color=colour, alpha=0.2, linewidth=0)
        axes.plot(part["index"], part["median"], color=colour, label=label)
    axes.set_yscale("log")
    axes.grid(True, axis="y")
    axes.set_xlabel("index of the eigenvalue (1: largest)")
    axes.set_ylabel("share of the trace")


def shares_figure(curves: pd.DataFrame, title: str) -> Figure:
    """A figure across both columns of the spectra of several settings or layers, each as shares of its trace."""
    with figure_style():
        figure = new_figure(PAGE_WIDTH, 2.9)
        axes = figure.subplots()
        plot_shares(axes, curves, list(dict.fromkeys(curves["label"])))
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", frameon=False)
        figure.suptitle(title, fontsize=8)
    return figure
