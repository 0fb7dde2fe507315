"""Figure of the Loewner matrices of several gradients side by side, and the table of their errors."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle

from fgvc.presentation.render import Block, block_markdown
from fgvc.presentation.style import PAGE_WIDTH, caption, figure_style, new_figure

if TYPE_CHECKING:  # it imports torch, which tables do without
    from fgvc.studies.gradients.loewner import LoewnerMatrix, LoewnerPicture

ERROR_FLOOR = 1e-9
"""Relative errors below this are rounding and left white."""

_COLUMNS = 6
_LINE = "#777777"
_VALUES = mpl.colormaps["viridis"].with_extremes(bad="#C4C4C4")
_ERRORS = mpl.colormaps["magma_r"].with_extremes(bad="white", under="white", over="#00B4D8")
_BANDS = {
    "diagonal": "one eigenvalue",
    "both_large": "two large",
    "mixed": "large, small",
    "both_small": "two small",
    "null": "with a null one",
}
_CAPTION = (
    "Axes: index of the eigenvalue (1: largest); thin lines: rank. L*: exact derivative of the same map.\nError: white "
    f"below {ERROR_FLOOR:.0e}; blue above 1, or where L* = 0; hatched: two null ones, which never reach the features."
)
_NOTES = """\
Gradient of the features, medians [quartiles] over images. Largest L: absolute value, of any image, with its two
eigenvalues; null ones, l <= d eps l_max, never reach the features in pairs. Error at: share of the squared error in %,
mean over images, at the slope of one eigenvalue, or between two of the larger half of the non-zero ones, one of each
half, two of the smaller half, a non-zero and a null one. –: the error is rounding, or there is no Loewner matrix."""


def gradients_block(summary: pd.DataFrame) -> Block:
    """The audit as a table with notes."""
    header = ["Gradient", "norm / exact", "relative error", "cosine", "largest L (at eigenvalues)", "reaching features"]
    header += [f"error at: {name}" for name in _BANDS.values()]
    return Block("Gradients", header, [_cells(row) for _, row in summary.iterrows()], [_NOTES])


def gradients_markdown(summary: pd.DataFrame) -> str:
    """`gradients_block` as Markdown."""
    block = gradients_block(summary)
    return "\n\n".join([block_markdown(block), *block.notes])


def _cells(row: pd.Series[Any]) -> list[str]:
    kept = "" if row["kept"] == row["channels"] else f", {row['kept']} of {row['channels']} kept"
    error = f"{row['relative_error']:.1e} [{row['relative_error_lower']:.1e}, {row['relative_error_upper']:.1e}]"
    shares = ["–" if math.isnan(row[band]) else f"{100 * row[band]:.1f}" for band in _BANDS]
    error = error if row["relative_error_upper"] > 0 else "0"
    largest = [_largest(row, "largest"), _largest(row, "reaching")]
    return [row["label"] + kept, f"{row['norm_ratio']:.4g}", error, f"{row['cosine']:.4f}", *largest, *shares]


def _largest(row: pd.Series[Any], name: str) -> str:
    """|L| and the two eigenvalues it belongs to."""
    if math.isnan(row[name]):
        return "–"
    pair = (row[f"{name}_high"], row[f"{name}_low"])
    return f"{row[name]:.1e} ({', '.join(f'{value:.1e}' if value else 'null' for value in pair)})"


def loewner_figure(picture: LoewnerPicture, source: str) -> Figure:
    """|L_ij| of each gradient, and below it its relative error |L - L*| / |L*|, on colour scales common to all panels.

    Eigenvalues descend along both axes, which end a little beyond the rank. Under an exact gradient, which has no
    error, stands the spectrum instead (the first) or nothing.
    """
    title = (
        f"Image {picture.image}: rank {picture.rank} of {len(picture.eigenvalues)}, condition number "
        f"{picture.condition:.1e}, the median of {source}"
    )
    picture = _window(picture)
    blocks = math.ceil(len(picture.matrices) / _COLUMNS)
    values, errors = _value_scale(picture.matrices), LogNorm(ERROR_FLOOR, 1)
    with figure_style():
        figure = new_figure(PAGE_WIDTH, 1.1 + 2.7 * blocks)
        figure.set_layout_engine(ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.05))
        grid = figure.add_gridspec(2 * blocks + 1, _COLUMNS, height_ratios=[*[1] * (2 * blocks), 0.07])
        spectrum_due = True
        for index, matrix in enumerate(picture.matrices):
            row, column = 2 * (index // _COLUMNS), index % _COLUMNS
            upper, lower = (figure.add_subplot(grid[row + step, column]) for step in (0, 1))
            plot_matrix(upper, matrix.matrix, picture.rank, values, _VALUES)
            upper.set_title(matrix.label, fontsize=7.5)
            if np.array_equal(matrix.matrix, matrix.exact):
                _plot_spectrum(lower, picture) if spectrum_due else lower.set_axis_off()
                spectrum_due = False
            else:
                plot_matrix(lower, relative_error(matrix), picture.rank, errors, _ERRORS)
                _cover_null_pairs(lower, picture)
        _colour_bars(figure, grid, values, errors)
        figure.suptitle(textwrap.fill(title, 100), fontsize=8)
        caption(figure, _CAPTION)
    return figure


def _window(picture: LoewnerPicture) -> LoewnerPicture:
    """The picture without most null eigenvalues where they are many: they look alike and would take up the panels."""
    end = picture.rank + max(picture.rank // 3, 1)

    def cut(matrix: LoewnerMatrix) -> LoewnerMatrix:
        return replace(matrix, matrix=matrix.matrix[:end, :end], exact=matrix.exact[:end, :end])

    return replace(picture, eigenvalues=picture.eigenvalues[:end], matrices=list(map(cut, picture.matrices)))


def relative_error(matrix: LoewnerMatrix) -> np.ndarray:
    """|L - L*| / |L*|, (d, d); infinite where L* = 0 and L is not."""
    difference, exact = np.abs(matrix.matrix - matrix.exact), np.abs(matrix.exact)
    beyond = np.where(difference > 0, np.inf, 0)
    error: np.ndarray = np.divide(difference, exact, out=beyond, where=exact > 0)
    return error


def plot_matrix(axes: Axes, matrix: np.ndarray, rank: int, scale: LogNorm, colours: Colormap) -> None:
    """Draw absolute values (d, d) on a log scale; zero has the colour map's "bad" colour. Lines mark the rank."""
    d = len(matrix)
    # matplotlib takes infinity for a missing value; it belongs above the scale
    shown = np.ma.masked_equal(np.minimum(np.abs(matrix), 10 * float(scale.vmax or 1)), 0)
    # the index of an eigenvalue counts from 1
    axes.imshow(shown, norm=scale, cmap=colours, interpolation="nearest", extent=(0.5, d + 0.5, d + 0.5, 0.5))
    if rank < d:
        axes.axvline(rank + 0.5, color=_LINE, linewidth=0.5)
        axes.axhline(rank + 0.5, color=_LINE, linewidth=0.5)
    ticks = [1, rank, d] if 1 < rank < 0.9 * d else [1, d]
    axes.set(xticks=ticks, yticks=ticks)
    axes.tick_params(labelsize=6, length=2, pad=1.5)
    axes.spines[:].set_visible(True)


def _cover_null_pairs(axes: Axes, picture: LoewnerPicture) -> None:
    """Hatch the pairs of null eigenvalues: errors there never reach the features."""
    corner, side = picture.rank + 0.5, len(picture.eigenvalues) - picture.rank
    axes.add_patch(Rectangle((corner, corner), side, side, facecolor="white", edgecolor=_LINE, hatch="/////", lw=0))


def _plot_spectrum(axes: Axes, picture: LoewnerPicture) -> None:
    """The non-zero eigenvalues by index, in the place of an error."""
    d, rank = len(picture.eigenvalues), picture.rank
    axes.semilogy(np.arange(1, rank + 1), picture.eigenvalues[:rank], color="black", linewidth=1)
    axes.set(xlim=(0.5, d + 0.5), xticks=[1, rank, d] if 1 < rank < 0.9 * d else [1, d])
    axes.tick_params(labelsize=6, length=2, pad=1.5)
    axes.minorticks_off()
    axes.set_box_aspect(1)
    axes.set_title("eigenvalues", fontsize=7.5)


def _value_scale(matrices: Sequence[LoewnerMatrix]) -> LogNorm:
    values = np.concatenate([np.abs(matrix.matrix).ravel() for matrix in matrices])
    values = values[values > 0]
    low, high = (values.min(), values.max()) if len(values) else (1.0, 1.0)
    return LogNorm(low, max(high, 10 * low))


def _colour_bars(figure: Figure, grid: GridSpec, values: LogNorm, errors: LogNorm) -> None:
    bars = (
        (grid[-1, :2], ScalarMappable(values, _VALUES), "neither", "upper panels: |L| (grey: zero)"),
        (grid[-1, 3:], ScalarMappable(errors, _ERRORS), "max", "lower panels: |L − L*| / |L*|"),
    )
    for place, mappable, extend, label in bars:
        bar = figure.colorbar(mappable, cax=figure.add_subplot(place), orientation="horizontal", extend=extend)
        bar.set_label(label, fontsize=7)
        bar.ax.tick_params(labelsize=6)
        bar.ax.minorticks_off()
