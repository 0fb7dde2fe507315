"""Figure and table of the smoothness of methods while they train, or at the weights of finished runs."""

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fgvc.io import write_output, write_tables
from fgvc.presentation.render import markdown_table
from fgvc.presentation.style import (
    PAGE_WIDTH,
    by_method,
    caption,
    draw_band,
    draw_curve,
    figure_style,
    legend_outside,
    method_style,
    new_figure,
    save_figure,
    staggered,
)
from fgvc.studies.smoothness.measure import (
    SUMMARISED,
    require_one_setting,
    summarise_smoothness,
    with_ranges,
)

_PANELS = {
    "loss_range": "Range of the loss",
    "gradient_change_max": "Change of the gradient",
    "beta": "Effective β-smoothness",
}
_WEIGHTS = {"all": "all trained weights", "features": "the weights in front of the classifier"}
_MEASURES = (
    "Range of the loss: largest less smallest L(x − s g); change of the gradient: largest ‖∇L(x − s g) − g‖; "
    "β: largest ‖∇L(x − s g) − g‖ / (s ‖g‖); over step sizes s, for the gradient g of a batch's loss L by {weights}. "
    "Lower is smoother."
)


def plot_smoothness(axes: Axes, table: pd.DataFrame, measure: str) -> None:
    """Draw a measure by training step on a log scale: median over seeds as a line, all seeds within the band.

    A cross at the upper edge: training diverged in that step. A triangle there: no finite loss at a step size. At the
    saved weights of runs the steps are batches, which have no order: points without lines. The table has
    `SMOOTHNESS_COLUMNS`, of one setting; the measure is one of `SUMMARISED`.
    """
    training = bool((table["point"] == "training").all())
    measured = with_ranges(table)
    methods = by_method(table)
    for position, (label, rows) in enumerate(methods):
        style = method_style(label)
        values = measured[measured["label"] == label].groupby("step")[measure]
        curve = values.agg(["min", "median", "max"]).replace(np.inf, np.nan)
        step = max(len(curve) // 3, 1)
        if training:
            draw_band(axes, curve.index, curve["min"], curve["max"], style.color, alpha=0.15)
        looks = {"linewidth": 1, "zorder": 2 if style.solid else 3, "markersize": 3.5, "markeredgewidth": 0.8}
        every = staggered(position, len(methods), step) if training else None
        dash = style.dash if training else ""
        draw_curve(axes, curve.index, curve["median"], label, linestyle=dash, markevery=every, **looks)
        _mark_ends(axes, rows, style.color)
    axes.set_yscale("log")
    axes.grid(True, axis="y")
    axes.set_xlabel("training step" if training else "batch")


def _mark_ends(axes: Axes, rows: pd.DataFrame, color: str) -> None:
    """Mark at the upper edge where a training ended early and where there was no number to draw."""
    for steps, marker in ((rows["step"][rows["diverged"]], "x"), (rows["step"][np.isinf(rows["beta"])], "^")):
        for step in steps:
            (mark,) = axes.plot(
                step, 1, marker, color=color, markersize=4, transform=axes.get_xaxis_transform(), clip_on=False
            )
            mark.set_in_layout(False)


def smoothness_figure(table: pd.DataFrame) -> Figure:
    """Range of the loss, change of the gradient and effective beta-smoothness side by side, one curve a method.

    Raises RunError where the table, with `SMOOTHNESS_COLUMNS`, mixes different settings.
    """
    require_one_setting(table)
    with figure_style():
        figure = new_figure(PAGE_WIDTH, 2.9)
        panels = figure.subplots(1, len(_PANELS))
        for axes, (measure, name) in zip(panels, _PANELS.items(), strict=True):
            plot_smoothness(axes, table, measure)
            axes.set_title(name)
        legend_outside(figure, "right center", handlelength=3)
        figure.suptitle(textwrap.fill(table["setting"].iloc[0], 100), fontsize=8)
        caption(figure, _caption(table))
    return figure


def _caption(table: pd.DataFrame) -> str:
    """What is drawn, in up to three lines."""
    point = table["point"].iloc[0]
    batches = f"Points: batches at the {point} weights, median over runs."
    lines = "Line: median over seeds; band: all seeds." if point == "training" else batches
    marks = [" ×: diverged." * bool(table["diverged"].any()), " ▲: not finite." * bool(np.isinf(table["beta"]).any())]
    measures = _MEASURES.format(weights=_WEIGHTS[table["weights"].iloc[0]])
    return textwrap.fill(f"{measures} {lines}{''.join(marks)}", 150)


def smoothness_markdown(table: pd.DataFrame) -> str:
    """The numbers of the figure as a Markdown table with notes.

    Raises:
        RunError: as `summarise_smoothness`.
    """
    summary = summarise_smoothness(table)
    header = ["Method", "seeds", "points", "‖g‖", "range of the loss", "change of g", "relative to ‖g‖", "β"]
    rows = [_cells(part.iloc[0]) for _, part in by_method(summary)]
    sizes = f"{table['step_size_min'].min():.2g} to {table['step_size_max'].max():.2g}"
    point = table["point"].iloc[0]  # the same in all rows
    where = "measured steps" if point == "training" else f"batches at the {point} weights"
    notes = (
        f"{table['setting'].iloc[0]}. Medians [quartiles] over {where} of all seeds {{range of the seeds' medians}}. "
        + _MEASURES.format(weights=_WEIGHTS[table["weights"].iloc[0]])
        + f" Step sizes as taken: {sizes}."
    )
    return f"{markdown_table(header, rows)}\n\n{textwrap.fill(notes, 120)}"


def _cells(row: "pd.Series[Any]") -> list[str]:
    seeds = f"{row['seeds']}" + (f" ({row['diverged']} diverged)" if row["diverged"] else "")
    counts = [row["label"], seeds, str(row["points"])]
    return [*counts, f"{row['gradient_norm']:.3g}", *(_spread(row, name) for name in SUMMARISED)]


def _spread(row: "pd.Series[Any]", name: str) -> str:
    """Median [quartiles] {range of the seeds' medians}."""
    quartiles = f"[{row[f'{name}_lower']:.3g}, {row[f'{name}_upper']:.3g}]"
    seeds = f" {{{row[f'{name}_seed_min']:.3g} – {row[f'{name}_seed_max']:.3g}}}" if row["seeds"] > 1 else ""
    return f"{row[name]:.3g} {quartiles}{seeds}"


def write_smoothness(table: pd.DataFrame, folder: Path) -> list[Path]:
    """Write `smoothness.csv`, `.md`, `.png` and `.pdf` to a folder; returns their paths.

    Raises RunError as `summarise_smoothness`; nothing is written then.
    """
    figure, text = smoothness_figure(table), smoothness_markdown(table)
    written = [*write_tables(folder, {"smoothness": table}), folder / "smoothness.md"]
    write_output(written[-1], text + "\n")
    return written + save_figure(figure, folder / "smoothness")
