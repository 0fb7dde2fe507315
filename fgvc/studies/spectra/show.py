"""Figure of the sorted eigenvalues before and after normalisation, and the small table beside it."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fgvc.presentation.render import Block, block_markdown
from fgvc.presentation.style import PAGE_WIDTH, figure_style, method_order, method_style, new_figure
from fgvc.studies.spectra.measure import MethodSpectrum, summarise

Stage = Literal["before", "after"]
_TITLES: dict[Stage, str] = {"before": "Covariance", "after": "After normalisation"}


def plot_eigenvalues(axes: Axes, curves: pd.DataFrame, stage: Stage) -> None:
    """Draw the i-th largest eigenvalue against i on a log scale: median over images as a line, quartiles as a band.

    Both axes end where numbers end to mean something: beyond the numerical rank of the covariance there is rounding
    noise (1e-17 of the largest eigenvalue; its square root after normalisation), so a rank-deficient curve falls out
    of the panel there. Methods without a normalised matrix are absent from "after".

    Args:
        axes: to draw on.
        curves: of `fgvc.studies.spectra.measure.curve_table`, in the order of drawing.
        stage: which of its stages.
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
        axes.fill_between(index, lower, upper, color=style.color, alpha=0.2, linewidth=0)
        step = max(right // 6, 1)
        axes.plot(
            index,
            median,
            color=style.color,
            linestyle=style.dash,
            zorder=2 if style.solid else 3,  # through the gaps of a dashed curve a solid one below it shows
            label=label,
            marker=style.marker,
            markersize=4,
            markerfacecolor="white",
            markeredgewidth=0.9,
            # staggered, so that curves that lie on each other still show all their markers
            markevery=(position * step // max(len(labels), 1), step),
        )
    axes.set_yscale("log")
    axes.set_ylim(bottom, top)
    axes.set_xlim(0, right * 1.06 + 1)
    axes.grid(True, axis="y")
    axes.set_title(_TITLES[stage])
    axes.set_xlabel("index of the eigenvalue (1: largest)")
    axes.set_ylabel("eigenvalue")


def _limits(curves: pd.DataFrame) -> tuple[float, float]:
    """Ends of the eigenvalue axis: what the quartiles reach within the numerical rank, with some room."""
    within = curves.loc[(curves["index"] <= curves["rank"]) & (curves["lower"] > 0), "lower"]
    bottom = float(within.min()) / 3 if len(within) else 0.1
    largest = curves.loc[curves["index"] == 1, "upper"]
    top = float(largest.max()) * 2 if len(largest) else 1.0
    return bottom, max(top, bottom * 10)  # zero matrices have no extent of their own


def spectra_figure(curves: pd.DataFrame, title: str) -> Figure:
    """A figure across both columns: the covariance on the left, the normalised matrix on the right, one legend.

    Args:
        curves: of `fgvc.studies.spectra.measure.curve_table`.
        title: of the figure.
    """
    labels = sorted(dict.fromkeys(curves["label"]), key=method_order)
    curves = pd.concat([curves[curves["label"] == label] for label in labels])
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
        figure.supxlabel(
            "Line: median over test images (all seeds); band: quartiles. Axes end at the numerical rank of the "
            "covariance: λ > d ε λ₁, ε = 2.2e-16.",
            fontsize=6.5,
            color="#555555",
        )
    return figure


def spectra_block(spectra: Sequence[MethodSpectrum], smallest: int = 8) -> Block:
    """The numbers beside the figure as a table, in the order of `spectra`: medians over images.

    `smallest` non-zero eigenvalues count as the small ones, whose share of the trace is given.
    """
    header = ["Method", "seeds", "images", "channels", "rank", "condition number", "of the non-zero"]
    header += ["effective rank before", "after", "participation ratio before", "after"]
    header += [f"share of the {smallest} smallest before", "after"]
    rows = []
    for s in (summarise(x, smallest) for x in spectra):
        counts = [str(count) for count in (s.seeds, s.images, s.channels, s.rank)]
        conditions = [f"{s.condition_number:.2e}", f"{s.nonzero_condition_number:.2e}"]
        dimensions = (s.effective_rank_before, s.effective_rank_after, s.participation_before, s.participation_after)
        shares = [
            f"{100 * x:.2g} %" if x is not None else "–" for x in (s.smallest_share_before, s.smallest_share_after)
        ]
        rows.append([s.label, *counts, *conditions, *("–" if d is None else f"{d:.1f}" for d in dimensions), *shares])
    return Block("Spectra", header, rows)


def spectra_markdown(spectra: Sequence[MethodSpectrum], smallest: int = 8) -> str:
    """`spectra_block` as Markdown."""
    return block_markdown(spectra_block(spectra, smallest))
