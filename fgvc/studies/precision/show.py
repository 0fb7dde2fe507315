"""Tables and figure of float32 against float64 spectra."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fgvc.presentation.render import markdown_table
from fgvc.presentation.style import COLUMN_WIDTH, by_method, figure_style, method_style, new_figure

_MARKERS = ("o", "^", "s", "D", "v", "P")
_COLUMNS = {"channels": "d = {}", "arithmetic": "{}"}


def errors_markdown(errors: pd.DataFrame, by: str) -> str:
    """Errors of each method, of descriptor and gradient: median, 95th percentile and maximum over the images.

    Methods with the same numbers everywhere share a row.

    Args:
        errors: of a `fgvc.studies.precision.measure.PrecisionStudy`, of one arithmetic or one width.
        by: what the columns tell apart: "channels" or "arithmetic".
    """
    values = list(dict.fromkeys(errors[by]))
    names = [_COLUMNS[by].format(value) for value in values]
    header = ["Method", *(f"{name}: {what}" for name in names for what in ("descriptor", "gradient")), "failures"]
    rows: dict[tuple[str, ...], list[str]] = {}
    for label, part in by_method(errors):
        of_label = part.set_index(by)
        cells = [_three(of_label.loc[value], what) for value in values for what in ("descriptor", "gradient")]
        rows.setdefault(tuple(cells), []).append(label)
    return markdown_table(header, [[", ".join(k), *c, _failures(errors, k)] for c, k in rows.items()])


def _three(row: "pd.Series[float]", what: str) -> str:
    return " / ".join(f"{row[f'{what}_{statistic}']:.0e}" for statistic in ("median", "q95", "max"))


def _failures(part: pd.DataFrame, labels: list[str]) -> str:
    """Images without a number, of all images and labels."""
    rows = part[part["label"].isin(labels)]
    return f"{int(rows[['no convergence', 'not finite']].to_numpy().sum())} of {int(rows['images'].sum())}"


def eigenvalues_markdown(eigenvalues: pd.DataFrame) -> str:
    """Relative error of float32 eigenvalues by their size: median and maximum, and how many were taken for null."""
    widths = sorted(eigenvalues["channels"].unique())
    rows = []
    for decade in sorted(eigenvalues["decade"].unique(), reverse=True):
        cells = []
        for d in widths:
            found = eigenvalues[(eigenvalues["channels"] == d) & (eigenvalues["decade"] == decade)]
            cells += [_decade(row) for row in found.to_dict("records")] or ["–"]
        rows.append([f"1e{decade} to 1e{decade + 1}", *cells])
    return markdown_table(["Size, of the largest", *(f"d = {d}" for d in widths)], rows)


def _decade(row: dict[object, object]) -> str:
    null = f", {row['null']} null" if row["null"] else ""
    return f"{row['error_median']:.0e} / {row['error_max']:.0e} ({row['eigenvalues']}{null})"


def pairs_markdown(pairs: pd.DataFrame) -> str:
    """Accuracy of trainings in float64 and float32, seed by seed the same but for that."""
    rows = []
    for label, part in by_method(pairs):
        means = [f"{part[dtype].mean():.2f}" for dtype in ("float64", "float32")]
        largest = f"{part['difference'].abs().max():.2f}"
        changed = f"{part['changed'].sum()} of {part['images'].sum()}"
        rows.append([label, str(len(part)), *means, largest, changed, f"{part['confidence'].max():.0e}"])
    header = ["Method", "seeds", "float64, %", "float32, %", "largest difference of a seed, points"]
    return markdown_table([*header, "other predictions", "largest change of a confidence"], rows)


def plot_errors(axes: Axes, images: pd.DataFrame) -> None:
    """Error of the gradient by condition number, a point an image: a colour a method, a marker a width.

    `images` is that of a `PrecisionStudy`.
    """
    for label, of_label in by_method(images):
        colour = method_style(label).color
        for marker, (_, part) in zip(_MARKERS, of_label.groupby("channels"), strict=False):
            axes.scatter(part["condition"], part["gradient"], s=7, marker=marker, color=colour, alpha=0.7, linewidths=0)
    axes.set(xscale="log", xlabel="condition number of the non-zero eigenvalues")
    axes.set(yscale="log", ylabel="relative error of the gradient")
    axes.grid(visible=True)
    axes.set_axisbelow(True)


def errors_figure(images: pd.DataFrame, setting: str) -> Figure:
    """A figure of one column: what float32 spectra do to the gradient of the features of `setting`."""
    with figure_style():
        figure = new_figure(COLUMN_WIDTH, 3.1)
        axes = figure.subplots()
        plot_errors(axes, images)
        axes.set_title(f"float32 against float64 spectra\n{setting}", fontsize=7)
        colours = [
            Line2D([], [], ls="", marker="o", ms=4, color=method_style(label).color, label=label)
            for label, _ in by_method(images)
        ]
        widths = [
            Line2D([], [], ls="", marker=marker, ms=4, color="#555555", mfc="none", label=f"d = {d}, M = {locations}")
            for marker, (d, locations) in zip(
                _MARKERS, sorted(set(zip(images["channels"], images["locations"], strict=True))), strict=False
            )
        ]
        blank = [Line2D([], [], ls="", label=" ")] * abs(len(colours) - len(widths))
        columns = [*colours, *(blank if len(colours) < len(widths) else []), *widths]
        figure.legend(
            handles=columns, loc="outside lower center", ncols=2, frameon=False, fontsize=6.5, handletextpad=0.1
        )
    return figure
