"""Figures of spectra, drawn from small tidy tables."""

from collections.abc import Sequence
from typing import Literal

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fgvc.presentation.render import Block
from fgvc.presentation.style import (
    COLUMN_WIDTH,
    PAGE_WIDTH,
    by_method,
    caption,
    class_name,
    draw_band,
    draw_curve,
    figure_style,
    legend_outside,
    method_style,
    new_figure,
    staggered,
)
from fgvc.studies.spectra.measure import MethodSpectrum, summarise

Stage = Literal["before", "after"]
_TITLES: dict[Stage, str] = {"before": "Covariance", "after": "After normalisation"}


def plot_eigenvalues(axes: Axes, curves: pd.DataFrame, stage: Stage) -> None:
    """Draw the i-th largest eigenvalue against i on a log scale: median over images as a line, quartiles as a band.

    Both axes end where numbers end to mean something: beyond the numerical rank of the covariance there is rounding
    noise (1e-17 of the largest eigenvalue; its square root after normalisation), so a rank-deficient curve falls out of
    the panel there. Methods without a normalised matrix are absent from "after". `curves` is a `curve_table`, in the
    order of drawing.
    """
    curves = curves[curves["stage"] == stage]
    right = int(curves["rank"].max()) if len(curves) else 1
    bottom, top = _limits(curves)
    labels = list(dict.fromkeys(curves["label"]))
    for position, label in enumerate(labels):
        curve, style = curves[curves["label"] == label].sort_values("index"), method_style(label)
        index = curve["index"].to_numpy()
        # values under the panel must stay on the log axis to draw the fall towards them
        lower, median, upper = (np.maximum(curve[name], bottom / 100) for name in ("lower", "median", "upper"))
        draw_band(axes, index, lower, upper, style.color)
        # through the gaps of a dashed curve a solid one below it shows
        looks = {"zorder": 2 if style.solid else 3, "markersize": 4, "markeredgewidth": 0.9}
        every = staggered(position, len(labels), max(right // 6, 1))
        draw_curve(axes, index, median, label, markevery=every, **looks)
    axes.set(yscale="log", ylim=(bottom, top), xlim=(0, right * 1.06 + 1))
    axes.grid(True, axis="y")
    axes.set(title=_TITLES[stage], xlabel="index of the eigenvalue (1: largest)", ylabel="eigenvalue")


def _limits(curves: pd.DataFrame) -> tuple[float, float]:
    """Ends of the eigenvalue axis: what the quartiles reach within the numerical rank, with some room."""
    within = curves.loc[(curves["index"] <= curves["rank"]) & (curves["lower"] > 0), "lower"]
    bottom = float(within.min()) / 3 if len(within) else 0.1
    largest = curves.loc[curves["index"] == 1, "upper"]
    top = float(largest.max()) * 2 if len(largest) else 1.0
    return bottom, max(top, bottom * 10)  # zero matrices have no extent of their own


def spectra_figure(curves: pd.DataFrame, title: str) -> Figure:
    """A figure across both columns: the covariance on the left, the normalised matrix on the right, one legend."""
    curves = pd.concat([part for _, part in by_method(curves)])
    with figure_style():
        figure = new_figure(PAGE_WIDTH, 2.9)
        before, after = figure.subplots(1, 2)
        plot_eigenvalues(before, curves, "before")
        if (curves["stage"] == "after").any():
            plot_eigenvalues(after, curves, "after")
        else:
            after.set_axis_off()
            after.text(0.5, 0.5, "no method here normalises a covariance", ha="center", transform=after.transAxes)
        handles, names = before.get_legend_handles_labels()
        channels = curves.drop_duplicates("label").set_index("label")["channels"]
        if channels.nunique() > 1:
            names = [f"{label} (d = {channels[label]})" for label in names]
        figure.legend(handles, names, loc="outside right center", frameon=False, handlelength=3.2)
        figure.suptitle(title, fontsize=8)
        caption(
            figure,
            "Line: median over test images (all seeds); band: quartiles. Axes end at the numerical rank of the "
            "covariance: λ > d ε λ₁, ε = 2.2e-16.",
        )
    return figure


def spectra_block(spectra: Sequence[MethodSpectrum], smallest: int = 8) -> Block:
    """The numbers of the figure as a table, in the order of `spectra`: medians over images.

    `smallest` non-zero eigenvalues count as the small ones, whose share of the trace is given.
    """
    header = ["Method", "seeds", "images", "channels", "rank", "condition number", "of the non-zero"]
    header += ["effective rank before", "after", "participation ratio before", "after"]
    header += [f"share of the {smallest} smallest before", "after"]
    rows = []
    stages = ("before", "after")
    for spectrum in spectra:
        s = summarise(spectrum, smallest)
        counts = [str(s[name]) for name in ("seeds", "images", "channels", "rank")]
        conditions = [f"{s[name]:.2e}" for name in ("condition_number", "nonzero_condition_number")]
        dimensions = [s[f"{name}_{stage}"] for name in ("effective_rank", "participation") for stage in stages]
        shares = [s[f"smallest_share_{stage}"] for stage in stages]
        cells = ["–" if pd.isna(d) else f"{d:.1f}" for d in dimensions]
        cells += ["–" if pd.isna(share) else f"{100 * share:.2g} %" for share in shares]
        rows.append([spectrum.label, *counts, *conditions, *cells])
    return Block("Spectra", header, rows)


MEASURES = {
    "nonzero_condition_number": "condition number\nof the non-zero λ",
    "effective_rank": "effective rank",
    "participation_ratio": "participation\nratio",
}
_STAGES = {"before": "covariance", "after": "normalised"}


def plot_measure(axes: Axes, history: pd.DataFrame, measure: str) -> None:
    """Draw one of `MEASURES` by epoch, a curve a method: median over seeds, band from lowest to highest seed."""
    for label, rows in by_method(history):
        part = rows.sort_values("epoch")
        ends = part[f"{measure}_lowest"], part[f"{measure}_highest"]
        draw_band(axes, part["epoch"], *ends, method_style(label).color)
        draw_curve(axes, part["epoch"], part[measure], label, markersize=3.5, markevery=max(len(part) // 6, 1))
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
        legend_outside(figure, "upper center", ncols=2, handlelength=3)
        caption(figure, title, wrap=True)
    return figure


def plot_epochs(axes: Axes, curves: pd.DataFrame, rank: int) -> None:
    """Draw the median eigenvalues of one method and stage, a curve an epoch, dark to light.

    `curves` are rows of `curves_by_epoch` of one stage; the axes end at `rank`, that of the covariance.
    """
    epochs = sorted(set(curves["epoch"]))
    colours = mpl.colormaps["viridis"](np.linspace(0, 0.88, len(epochs)))
    for epoch, colour in zip(epochs, colours, strict=True):
        part = curves[(curves["epoch"] == epoch) & (curves["index"] <= rank)].sort_values("index")
        axes.plot(part["index"], part["median"].clip(lower=1e-300), color=colour, linewidth=1, label=str(epoch))
    axes.set_yscale("log")
    axes.grid(True, axis="y")


def some_epochs(curves: pd.DataFrame) -> pd.DataFrame:
    """The rows of up to six epochs, up to the covariance's rank: the first, the last, more of the early ones.

    Spectra change most in the first epochs, so the steps between the chosen ones grow: of 16 epochs the second, third,
    fifth and ninth stand between the first and the last.
    """
    epochs = sorted(set(curves["epoch"]))
    last = len(epochs) - 1
    chosen = {epochs[0], *(epochs[min(i, last)] for i in np.geomspace(1, max(last, 1), 5).round().astype(int))}
    return curves[curves["epoch"].isin(chosen) & (curves["index"] <= curves["rank"])]


def epochs_figure(curves: pd.DataFrame, title: str) -> Figure:
    """Small multiples: a row a method, covariance on the left, normalised on the right, a curve an epoch.

    `curves` are labelled rows of `curves_by_epoch`, of `some_epochs`.
    """
    methods = by_method(curves)
    with figure_style():
        figure = new_figure(COLUMN_WIDTH, 0.9 + 1.25 * len(methods))
        panels = figure.subplots(len(methods), 2, squeeze=False, sharex=True, sharey="col")
        for row, (label, part) in zip(panels, methods, strict=True):
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
        legend_outside(figure, "upper center", ncols=curves["epoch"].nunique(), title="epoch", handlelength=1.2)
        caption(figure, title, wrap=True)
    return figure


def plot_classes(axes: Axes, classes: pd.DataFrame) -> None:
    """Draw the effective rank of each class's images, classes in order: median as a dot, quartiles as a bar.

    `classes` are rows of `spectra_by_class` of one method.
    """
    ordered = classes.sort_values("effective_rank").reset_index(drop=True)
    style, place = method_style(ordered["label"].iloc[0]), np.arange(len(ordered))
    axes.vlines(place, ordered["effective_rank_lower"], ordered["effective_rank_upper"], color="#BBBBBB", linewidth=0.8)
    axes.plot(place, ordered["effective_rank"], linestyle="none", marker=".", markersize=4, color=style.color)
    ends = {"lowest": ordered["class"].head(3), "highest": ordered["class"].tail(3)[::-1]}
    for (name, found), (x, y) in zip(ends.items(), ((0.03, 0.97), (0.97, 0.03)), strict=True):
        text = "\n".join([f"{name}:", *map(class_name, found)])
        sides = ("left", "top") if name == "lowest" else ("right", "bottom")
        axes.text(x, y, text, fontsize=6, ha=sides[0], va=sides[1], transform=axes.transAxes)
    axes.set(xlabel="class, by effective rank", ylabel="effective rank")
    axes.grid(True, axis="y")


def classes_figure(classes: pd.DataFrame, title: str) -> Figure:
    """A figure of one column, a panel a method."""
    methods = by_method(classes)
    with figure_style():
        figure = new_figure(COLUMN_WIDTH, 0.4 + 2.1 * len(methods))
        panels = figure.subplots(len(methods), 1, squeeze=False)[:, 0]
        for axes, (label, part) in zip(panels, methods, strict=True):
            plot_classes(axes, part)
            axes.set_title(label)
        caption(figure, title, wrap=True)
    return figure


def plot_shares(axes: Axes, curves: pd.DataFrame, labels: Sequence[str]) -> None:
    """Draw eigenvalues as shares of the trace, a curve a label, up to each one's rank, for spectra of other scales.

    `curves` is a `curve_table` on shares; `labels` are in the order of the legend.
    """
    colours = mpl.colormaps["viridis"](np.linspace(0, 0.85, len(labels)))
    for label, colour in zip(labels, colours, strict=True):
        part = curves[(curves["label"] == label) & (curves["index"] <= curves["rank"])].sort_values("index")
        draw_band(axes, part["index"], part["lower"], part["upper"], colour)
        axes.plot(part["index"], part["median"], color=colour, label=label)
    axes.set_yscale("log")
    axes.grid(True, axis="y")
    axes.set(xlabel="index of the eigenvalue (1: largest)", ylabel="share of the trace")


def shares_figure(curves: pd.DataFrame, title: str) -> Figure:
    """A figure across both columns of the spectra of several settings or layers, each as shares of its trace."""
    with figure_style():
        figure = new_figure(PAGE_WIDTH, 2.9)
        axes = figure.subplots()
        plot_shares(axes, curves, list(dict.fromkeys(curves["label"])))
        legend_outside(figure, "right center")
        figure.suptitle(title, fontsize=8)
    return figure
