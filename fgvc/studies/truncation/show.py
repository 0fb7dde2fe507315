"""Figures of accuracy against the part of the spectrum that a head sees, and of effects on accuracy."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fgvc.presentation.render import markdown_table, with_spread
from fgvc.presentation.style import (
    COLUMN_WIDTH,
    class_name,
    figure_style,
    legend_outside,
    method_order,
    method_style,
    new_figure,
    save_figure,
)
from fgvc.studies.truncation.measure import Study, band_table, chance, effects, is_cut

Kind = Literal["largest", "smallest", "window"]
_LABELS: dict[Kind, str] = {
    "largest": "largest eigenvalues kept (the rest set to ε)",
    "smallest": "largest eigenvalues dropped (set to ε)",
    "window": "index of the eigenvalues kept (1: largest)",
}
CURVES = {"test": "MPN-COV (exact)", "exact": "SVD-TopN (exact)", "published": "SVD-TopN"}
"""The method whose style each curve has: cut at test time only, or trained so with the exact or published gradient."""
_NAMES = {
    "test": "trained on all, cut at test time",
    "exact": "trained so, exact gradient",
    "published": "trained so, published gradient",
}


def plot_bands(axes: Axes, table: pd.DataFrame, kind: Kind, guessing: float) -> None:
    """Draw test top-1 by the band that is kept, a curve for each way of training: mean over seeds, range as a bar.

    `table` is a `band_table`; a dotted line stands at `guessing`, the accuracy of guessing in per cent.
    """
    rank = int(table["rank"].max())
    table = _windows(table) if kind == "window" else table[table["kind"].isin([kind, "all"])]
    for curve, points in table.groupby("curve", sort=False):
        style = method_style(CURVES[str(curve)])
        x = _positions(points, kind, rank)
        order = np.argsort(x)
        mean, low, high = (points[name].to_numpy(dtype=float)[order] for name in ("mean", "lowest", "highest"))
        axes.errorbar(
            x[order],
            mean,
            yerr=np.abs([mean - low, high - mean]),
            xerr=(points["stop"] - points["start"]).to_numpy(dtype=float)[order] / 2 if kind == "window" else None,
            color=style.color,
            linestyle=style.dash if kind != "window" else "none",
            marker=style.marker,
            markersize=3.5,
            markerfacecolor="white",
            elinewidth=0.8,
            label=_NAMES[str(curve)],
        )
    axes.axhline(guessing, color="#888888", linestyle=(0, (1, 1.2)), linewidth=0.8)
    axes.set(xlim=(-1.5, rank + 1.5), ylim=(-3, 100))
    axes.grid(True, axis="y")
    axes.set(xlabel=_LABELS[kind], ylabel="top-1 in %")


def _windows(table: pd.DataFrame) -> pd.DataFrame:
    """Windows, and the first one of their width, whose kind is "largest"."""
    inside = table["kind"] == "window"
    widths = set((table["stop"] - table["start"])[inside])
    return table[inside | ((table["kind"] == "largest") & table["stop"].isin(widths))]


def _positions(points: pd.DataFrame, kind: Kind, rank: int) -> np.ndarray:
    start = points["start"].to_numpy(dtype=float)
    stop = points["stop"].fillna(rank).clip(upper=rank).to_numpy(dtype=float)
    positions: dict[Kind, np.ndarray] = {"largest": stop, "smallest": start, "window": (start + 1 + stop) / 2}
    return positions[kind]


def bands_figure(table: pd.DataFrame, guessing: float) -> Figure:
    """A figure of one column: the k largest, all but the k largest, and windows, below each other."""
    with figure_style():
        figure = new_figure(COLUMN_WIDTH, 5.2)
        panels = figure.subplots(3, 1)
        kinds: tuple[Kind, ...] = ("largest", "smallest", "window")
        for axes, kind in zip(panels, kinds, strict=True):
            plot_bands(axes, table, kind, guessing)
        legend_outside(figure, "upper center")
    return figure


def plot_effects(axes: Axes, compared: pd.DataFrame, grid: pd.DataFrame, reference: str) -> None:
    """Draw each label's difference to the reference in points of top-1: the seeds as dots, mean and interval as a bar.

    `compared` is the table of `effects`, `grid` that of the runs that it was made from.
    """
    shown = compared[compared["label"] != reference]
    shown = shown.loc[sorted(shown.index, key=lambda i: method_order(str(shown.loc[i, "label"])), reverse=True)]
    base = grid[grid["label"] == reference].set_index("seed")["top1"]
    for place, row in enumerate(shown.to_dict("records")):
        style, difference = method_style(row["label"]), row["difference"]
        seeds = (grid[grid["label"] == row["label"]].set_index("seed")["top1"] - base).dropna()
        axes.plot(seeds, np.full(len(seeds), place), linestyle="none", marker=".", markersize=3, color="#999999")
        axes.errorbar(
            [difference],
            [place],
            xerr=None if np.isnan(row["low"]) else [[difference - row["low"]], [row["high"] - difference]],
            color=style.color,
            marker=style.marker,
            markersize=4,
            markerfacecolor="white",
            capsize=2,
        )
        # the name is above its row: on the left long names would leave no room for the axes
        axes.text(0.01, place + 0.28, row["label"], fontsize=6, va="bottom", transform=axes.get_yaxis_transform())
    axes.axvline(0, color="black", linewidth=0.6)
    axes.set(yticks=[], ylim=(-0.6, len(shown) - 0.1))
    axes.spines["left"].set_visible(False)
    axes.grid(True, axis="x")
    axes.set_xlabel(f"top-1 minus that of {reference}, points")


def effects_figure(compared: pd.DataFrame, grid: pd.DataFrame, reference: str) -> Figure:
    """A figure of one column, a line for each label."""
    with figure_style():
        figure = new_figure(COLUMN_WIDTH, 0.6 + 0.27 * (len(compared) - 1))
        plot_effects(figure.subplots(), compared, grid, reference)
    return figure


def effects_markdown(compared: pd.DataFrame, reference: str) -> str:
    """Top-1 of each label and its difference to the reference, with the 95 % interval over seeds."""
    rows = []
    for row in sorted(compared.to_dict("records"), key=lambda row: method_order(row["label"])):
        difference = "reference"
        if row["label"] != reference:
            interval = "" if np.isnan(row["low"]) else f" [{row['low']:+.2f}, {row['high']:+.2f}]"
            difference = f"{row['difference']:+.2f}{interval}" if row["pairs"] else "no common seed"
        rows.append([row["label"], str(row["n"]), with_spread(row["mean"], row["std"]), difference])
    return markdown_table(["Method", "n", "Final", "Difference [95 %]"], rows)


def bands_markdown(table: pd.DataFrame) -> str:
    """Top-1 by band, a column for each way of training."""
    cells: dict[str, dict[str, str]] = {}
    for row in table.sort_values(["kind", "start", "stop"]).to_dict("records"):
        cells.setdefault(_band_name(row["start"], row["stop"]), {})[row["curve"]] = with_spread(row["mean"], row["std"])
    curves = [curve for curve in CURVES if curve in set(table["curve"])]
    rows = [[name, *(found.get(curve, "not measured") for curve in curves)] for name, found in cells.items()]
    return markdown_table(["Eigenvalues kept", *(_NAMES[curve] for curve in curves)], rows)


def _band_name(start: int, stop: Any) -> str:
    if pd.isna(stop):
        return f"all but the {start} largest" if start else "all"
    return f"{start + 1} to {stop}" if start else f"{stop} largest" if stop > 1 else "the largest"


def class_changes_markdown(classes: pd.DataFrame, reference: str) -> str:
    """The five classes of the reference that lose most where only the 1, 4 or 16 largest are kept, seeds pooled."""
    classes = classes[classes["label"] == reference]
    rows = []
    for stop in (1, 4, 16):
        part = classes[(classes["start"] == 0) & (classes["stop"] == stop)]
        for row in part.sort_values(["change", "class"]).head(5).to_dict("records"):
            rows.append([_band_name(0, stop), class_name(row["class"]), f"{row['all']:.1f}", f"{row['recall']:.1f}"])
    return markdown_table(["Eigenvalues kept", "Class", "Recall with all", "with these"], rows)


def study_markdown(study: Study, reference: str) -> str:
    """The tables of a study, one after the other: effects, and where eigenvalues were cut, bands and classes."""
    parts = [effects_markdown(effects(study.grid, reference), reference)]
    if is_cut(study):
        parts.append(bands_markdown(band_table(study, reference)))
    if (study.classes["label"] == reference).any():
        parts.append(class_changes_markdown(study.classes, reference))
    return "\n\n".join(parts)


def write_study_figures(study: Study, reference: str, folder: Path) -> list[Path]:
    """Write effects.png and .pdf, and bands.png and .pdf where eigenvalues were cut; returns their paths."""
    compared = effects(study.grid, reference)
    written = []
    if len(compared) > 1:
        written += save_figure(effects_figure(compared, study.grid, reference), folder / "effects")
    if is_cut(study):
        written += save_figure(bands_figure(band_table(study, reference), chance(study)), folder / "bands")
    return written
