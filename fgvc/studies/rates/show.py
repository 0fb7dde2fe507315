"""Figure and tables of the study of rates, from its table."""

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fgvc.presentation.render import markdown_table
from fgvc.presentation.style import (
    PAGE_WIDTH,
    draw_curve,
    figure_style,
    legend_outside,
    method_order,
    new_figure,
    save_figure,
)
from fgvc.studies.rates.measure import best_values, curves, equivalent_rate, shifts

OPTIMIZERS = {"sgd": "SGD", "adamw": "AdamW"}
_MOVED = {"sgd": "classifier rate × c²", "adamw": "classifier rate × c"}


def plot_rates(axes: Axes, part: pd.DataFrame, optimizer: str, *, moved: bool) -> None:
    """Draw mean top-1 against the rate of the classifier, a curve a label, the spread over seeds as bars.

    `part` are rows of `curves` of one dataset and optimiser. With `moved`, each curve stands at the rate at which the
    plain square root would train the same.
    """
    for label in sorted(set(part["label"]), key=method_order):
        own = part[part["label"] == label]
        x = equivalent_rate(own, optimizer) if moved else own["rate"]
        # the same method as the plain one, which would give both one look
        looks = {"color": "#0072B2", "linestyle": ":", "marker": "o"} if label.endswith("× c") else {}
        draw_curve(axes, x, own["mean"], label, markersize=3.5, **looks)
        axes.errorbar(x, own["mean"], yerr=own["std"], fmt="none", ecolor="#888888", elinewidth=0.6)
    axes.set_xscale("log")
    axes.grid(True)
    axes.set_xlabel(_MOVED[optimizer] if moved else "classifier rate")


def rates_figure(table: pd.DataFrame, optimizer: str) -> Figure:
    """A column a dataset: above accuracy against the rate as set, below against the rate times c^2 (AdamW: c)."""
    means = curves(table[table["optimizer"] == optimizer])
    datasets = list(dict.fromkeys(means["dataset"]))
    with figure_style():
        figure = new_figure(PAGE_WIDTH, 4.2)
        for row, moved in enumerate((False, True)):
            for column, dataset in enumerate(datasets):
                axes = figure.add_subplot(2, len(datasets), row * len(datasets) + column + 1)
                part = means[means["dataset"] == dataset]
                plot_rates(axes, part, optimizer, moved=moved)
                best = part["mean"].max()
                axes.set_ylim(best - 40, best + 2)  # what trains badly is below
                if row == 0:
                    axes.set_title(dataset)
                if column == 0:
                    axes.set_ylabel("test top-1 in %")
        legend_outside(figure, "upper center", ncols=4)
    return figure


def curves_markdown(table: pd.DataFrame) -> str:
    """Mean top-1 of each label, a column a rate."""
    means = curves(table)
    rates = sorted(set(means["rate"]))
    rows = []
    for keys, own in means.groupby(["dataset", "optimizer", "label"]):
        name = _named(dict(zip(("dataset", "optimizer", "label"), keys, strict=True)))
        found = dict(zip(own["rate"], own["mean"], strict=True))
        factor = f"{own['factor'].mean():.2f}"
        shown = [f"{found[rate]:.1f}" if rate in found else "" for rate in rates]
        rows.append([name, factor, *shown])
    return markdown_table(["Head", "c", *(f"{rate:g}" for rate in rates)], rows)


def shifts_markdown(table: pd.DataFrame, reference: str) -> str:
    """Distances of the curves before and after the move."""
    rows = [
        [
            *(_named(row), _number(row["before"]), _number(row["after"]), str(row["rates"])),
            *(f"{row['expected_move']:.2f}", _number(row["best_move"])),
        ]
        for row in shifts(table, reference).to_dict("records")
    ]
    head = ["Head", "Distance as set", "after the move", "rates", "Expected move", "Best move"]
    return markdown_table(head, rows)


def best_markdown(table: pd.DataFrame, reference: str, margin: float) -> str:
    """Each label at the rate chosen on held-out images, and its difference to the reference."""
    rows = []
    for row in best_values(table, reference, margin).to_dict("records"):
        difference, verdict = "reference", ""
        if row["label"] != reference:
            difference = f"{row['difference']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}]" if row["pairs"] else ""
            verdict = row["verdict"] + (f" (of {row['pairs']:.0f} seeds)" if 0 < row["pairs"] < row["n"] else "")
        shown = [f"{row['rate']:g}", str(row["n"]), f"{row['top1']:.2f}", difference, verdict]
        rows.append([_named(row), *shown])
    verdict_head = f"Verdict, margin {margin:g}"
    return markdown_table(["Head", "Rate", "n", "Top-1", "Difference [90 %]", verdict_head], rows)


def _named(row: Mapping[Hashable, Any]) -> str:
    return f"{row['label']}, {row['dataset']}, {OPTIMIZERS[row['optimizer']]}"


def _number(value: float) -> str:
    return "too few rates" if np.isnan(value) else f"{value:.2f}"


def write_rate_figures(table: pd.DataFrame, folder: Path) -> list[Path]:
    """Write a figure for each optimiser, rates_sgd.png and .pdf; returns their paths."""
    found = [name for name in OPTIMIZERS if name in set(table["optimizer"])]
    return [path for name in found for path in save_figure(rates_figure(table, name), folder / f"rates_{name}")]
