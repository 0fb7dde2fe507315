"""Figure of the sorted eigenvalues before and after normalisation, and the small table beside it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fgvc.analysis import EigenvalueCurve, MethodSpectrum, eigenvalue_curve, summarise
from fgvc.reporting.render import markdown_table
from fgvc.reporting.style import PAGE_WIDTH, figure_style, method_order, method_style, new_figure, save_figure

Stage = Literal["before", "after"]
_TITLES: dict[Stage, str] = {"before": "Covariance", "after": "After normalisation"}


def plot_eigenvalues(axes: Axes, spectra: Sequence[MethodSpectrum], stage: Stage) -> None:
    """Draw the i-th largest eigenvalue against i on a log scale: median over images as a line, quartiles as a band.

    Both axes end where numbers end to mean something: beyond the numerical rank of the covariance there is rounding
    noise (1e-17 of the largest eigenvalue; its square root after normalisation), so a rank-deficient curve falls out
    of the panel there. Methods without a normalised matrix are absent from "after".
    """
    curves = [
        (spectrum, eigenvalue_curve(values)) for spectrum in spectra if (values := getattr(spectrum, stage)) is not None
    ]
    right = max((spectrum.rank for spectrum, _ in curves), default=1)
    bottom, top = _limits(curves)
    for position, (spectrum, curve) in enumerate(curves):
        style = method_style(spectrum.label)
        index = np.arange(1, len(curve.median) + 1)
        # values under the panel must stay on the log axis to draw the fall towards them
        lower, median, upper = (np.maximum(values, bottom / 100) for values in (curve.lower, curve.median, curve.upper))
        axes.fill_between(index, lower, upper, color=style.color, alpha=0.2, linewidth=0)
        step = max(right // 6, 1)
        axes.plot(
            index,
            median,
            color=style.color,
            linestyle=style.dash,
            zorder=2 if style.solid else 3,  # through the gaps of a dashed curve a solid one below it shows
            label=spectrum.label,
            marker=style.marker,
            markersize=4,
            markerfacecolor="white",
            markeredgewidth=0.9,
            # staggered, so that curves that lie on each other still show all their markers
            markevery=(position * step // max(len(curves), 1), step),
        )
    axes.set_yscale("log")
    axes.set_ylim(bottom, top)
    axes.set_xlim(0, right * 1.06 + 1)
    axes.grid(True, axis="y")
    axes.set_title(_TITLES[stage])
    axes.set_xlabel("index of the eigenvalue (1: largest)")
    axes.set_ylabel("eigenvalue")


def _limits(curves: Sequence[tuple[MethodSpectrum, EigenvalueCurve]]) -> tuple[float, float]:
    """Ends of the eigenvalue axis: what the quartiles reach within the numerical rank, with some room."""
    within = [curve.lower[: spectrum.rank] for spectrum, curve in curves]
    bottom = min((float(values[values > 0].min()) for values in within if (values > 0).any()), default=0.1) / 3
    top = max((float(curve.upper[0]) for _, curve in curves), default=1.0) * 2
    return bottom, max(top, bottom * 10)  # zero matrices have no extent of their own


def spectra_figure(spectra: Sequence[MethodSpectrum], title: str) -> Figure:
    """A figure across both columns: the covariance on the left, the normalised matrix on the right, one legend."""
    spectra = sorted(spectra, key=lambda spectrum: method_order(spectrum.label))
    with figure_style():
        figure = new_figure(PAGE_WIDTH, 2.9)
        before, after = figure.subplots(1, 2)
        plot_eigenvalues(before, spectra, "before")
        if any(spectrum.after is not None for spectrum in spectra):
            plot_eigenvalues(after, spectra, "after")
        else:
            after.set_axis_off()
            after.text(0.5, 0.5, "no method here normalises a covariance", ha="center", transform=after.transAxes)
        handles, labels = before.get_legend_handles_labels()
        channels = [spectrum.before.shape[1] for spectrum in spectra]
        if len(set(channels)) > 1:
            labels = [f"{label} (d = {count})" for label, count in zip(labels, channels, strict=True)]
        figure.legend(handles, labels, loc="outside right center", frameon=False, handlelength=3.2)
        figure.suptitle(title, fontsize=8)
        figure.supxlabel(
            "Line: median over test images (all seeds); band: quartiles. Axes end at the numerical rank of the "
            "covariance: λ > d ε λ₁, ε = 2.2e-16.",
            fontsize=6.5,
            color="#555555",
        )
    return figure


def spectra_markdown(spectra: Sequence[MethodSpectrum]) -> str:
    """The numbers beside the figure as a Markdown table: medians over images."""
    header = ["Method", "seeds", "images", "channels", "rank", "condition number", "of the non-zero"]
    header += ["effective rank before", "after", "participation ratio before", "after"]
    rows = []
    for s in map(summarise, sorted(spectra, key=lambda spectrum: method_order(spectrum.label))):
        counts = [str(count) for count in (s.seeds, s.images, s.channels, s.rank)]
        conditions = [f"{s.condition_number:.2e}", f"{s.nonzero_condition_number:.2e}"]
        dimensions = (s.effective_rank_before, s.effective_rank_after, s.participation_before, s.participation_after)
        rows.append([s.label, *counts, *conditions, *("–" if d is None else f"{d:.1f}" for d in dimensions)])
    return markdown_table(header, rows)


def write_spectra_figure(spectra: Sequence[MethodSpectrum], title: str, folder: Path) -> list[Path]:
    """Write `spectra.png` and `spectra.pdf` to a folder; returns their paths."""
    return save_figure(spectra_figure(spectra, title), folder / "spectra")
