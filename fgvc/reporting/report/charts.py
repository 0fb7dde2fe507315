"""Plotly figures of the report: curves in panels below each other, errors with quartiles, confusion matrices."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
import plotly.graph_objects as go
from matplotlib.colors import to_hex
from plotly.subplots import make_subplots

from fgvc.presentation.style import by_method, class_name, method_style, short_name

MAX_POINTS = 40_000
"""Most points of one panel; beyond it a curve keeps evenly spaced points, its first and last among them."""
_MANY = 24  # curves of a panel beyond which lines are thin
_NAMED = 40  # classes up to which the axes of a matrix have names
_SYMBOLS = {"o": "circle", "p": "pentagon", "h": "hexagon", "s": "square", "v": "triangle-down", "<": "triangle-left"}
_SYMBOLS |= {">": "triangle-right", "P": "cross", "X": "x", "D": "diamond", "^": "triangle-up", "d": "diamond-tall"}
_SYMBOLS |= {"H": "hexagon2", "*": "star"}
"""matplotlib's markers to plotly's."""
_LOG = {"type": "log", "exponentformat": "power", "nticks": 5}
_LAYOUT = {
    "template": "plotly_white",
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
    "font": {"family": "system-ui, sans-serif", "size": 12, "color": "#1b1f24"},
    "margin": {"l": 50, "r": 10, "t": 30, "b": 40},
    "legend": {"orientation": "h", "y": 1, "yref": "container", "yanchor": "top", "x": 0, "itemwidth": 40},
    "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": "#57606a", "activecolor": "#0b5cad"},
    "hovermode": "closest",
    "hoverlabel": {"namelength": -1},
    "uirevision": "kept",
}


class Curve(NamedTuple):
    """One curve: label of its method, which gives colour, dash and marker; text at its points; their numbers."""

    label: str
    name: str
    table: pd.DataFrame


@dataclass(frozen=True)
class Panel:
    """Curves on one pair of axes.

    Attributes:
        title: Title of the vertical axis.
        curves: Curves, drawn in this order.
        y: Column of their tables; what is not finite is a gap.
        band: Columns of the lower and the upper end of a band around each curve.
        log: Whether the vertical axis is logarithmic.
    """

    title: str
    curves: Sequence[Curve]
    y: str
    band: tuple[str, str] | None = None
    log: bool = False


def method_curves(table: pd.DataFrame) -> list[Curve]:
    """A curve for each label of a table."""
    return [Curve(label, label, part) for label, part in by_method(table)]


def plain(text: str) -> str:
    """A name as plotly shows it: on one line, without tags and formulas, isolated from texts of another direction."""
    line = " ".join(text.encode("utf-8", "replace").decode("utf-8").split())
    escaped = "".join(f"&#{ord(letter)};" if letter in "&<>$" else letter for letter in short_name(line, 80))
    return f"\u2068{escaped}\u2069"


def curves_figure(x: str, x_title: str, panels: Sequence[Panel]) -> go.Figure:
    """Panels below each other with one horizontal axis, the column `x`, and one legend."""
    figure = make_subplots(rows=len(panels), shared_xaxes=True, vertical_spacing=0.05)
    for row, panel in enumerate(panels, start=1):
        traces = [trace for curve in panel.curves for trace in _traces(curve, x, x_title, panel)]
        figure.add_traces(traces, rows=row, cols=1)
        figure.update_yaxes(title_text=panel.title, row=row, **(_LOG if panel.log else {}))
    figure.update_xaxes(title_text=x_title, row=len(panels))
    return figure.update_layout(_LAYOUT)


def _traces(curve: Curve, x: str, x_title: str, panel: Panel) -> Iterator[go.Scatter]:
    """The band of a curve, and the curve."""
    style, many = method_style(curve.label), len(panel.curves) > _MANY
    most = min(len(curve.table), max(MAX_POINTS // len(panel.curves), 2))
    table = curve.table.iloc[np.linspace(0, len(curve.table) - 1, most).round().astype(int)]
    common = {"name": plain(curve.label), "legendgroup": curve.label, "meta": plain(curve.name)}
    if panel.band:
        low, high = panel.band
        shown = table[np.isfinite(table[low]) & np.isfinite(table[high]) & ((table[low] > 0) | (not panel.log))]
        back = shown[::-1]
        looks = {"fill": "toself", "fillcolor": style.color, "opacity": 0.2, "mode": "lines", "line": {"width": 0}}
        looks |= {"hoverinfo": "skip", "showlegend": False}
        yield go.Scatter(x=[*shown[x], *back[x]], y=[*shown[high], *back[low]], **looks, **common)
    dash = ",".join(f"{1.5 * part:g}px" for part in style.dash[1]) or "solid"
    marker: dict[str, Any] = {
        "symbol": _SYMBOLS[style.marker],
        "color": "white",
        "line": {"color": style.color, "width": 1.4},
    }
    counts = {"size": 5, "maxdisplayed": 3} if many else {"size": 7, "maxdisplayed": 9}
    line = {"color": style.color, "width": 1 if many else 1.8, "dash": dash}
    looks = {"mode": "lines+markers", "marker": marker | counts, "line": line, "opacity": 0.75 if many else 1}
    hover = f"%{{meta}}<br>{x_title}: %{{x}}<br>{panel.title.replace('<br>', ' ')}: %{{y:.5~g}}<extra></extra>"
    yield go.Scatter(x=[*table[x]], y=[*table[panel.y]], hovertemplate=hover, **looks, **common)


def intervals_figure(title: str, table: pd.DataFrame, column: str) -> go.Figure:
    """A number with an interval for each label, columns NAME, NAME_lower and NAME_upper, on a log axis."""
    middle, lower, upper = (table[f"{column}{end}"] for end in ("", "_lower", "_upper"))
    bars = {"array": [*(upper - middle)], "arrayminus": [*(middle - lower)], "symmetric": False}
    bars |= {"color": "#8b949e", "thickness": 2, "width": 5}
    looks = {"mode": "markers", "marker": {"color": "#1b1f24", "size": 9}, "hovertemplate": "%{y}<br>%{x:.3~g}"}
    dots = go.Scatter(x=[*middle], y=_distinct(table["label"]), error_x=bars, name="", **looks)
    figure = go.Figure(dots, layout=_LAYOUT).update_xaxes(title_text=title, tickangle=0, **_LOG)
    return figure.update_yaxes(type="category", autorange="reversed", automargin=True)


def matrix_figure(names: Sequence[str], counts: np.ndarray) -> go.Figure:
    """A confusion matrix in per cent of each row: wrong answers in colour, right ones on the diagonal in grey.

    Colours of wrong answers follow the square root of the share, so that a single mistake can be seen.

    Args:
        names: (K,) names of the classes.
        counts: (K, K) counts, rows the true class.
    """
    shares = (100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)).round(1)
    right = np.eye(len(counts), dtype=bool)
    labels = _distinct(class_name(name, 28) for name in names)
    steps = np.linspace(0, 1, 9)
    colours = [(step**2, to_hex(mpl.colormaps["YlOrRd"](0.15 + 0.85 * step))) for step in steps]
    figure = go.Figure(layout=_LAYOUT)
    for title, shown, scale, top, place in (
        ("% taken for another", ~right & (counts > 0), colours, None, 0.76),
        ("% right", right, [(0, "#e6e6e6"), (1, "#4d4d4d")], 100, 0.24),
    ):
        figure.add_heatmap(
            x=labels,
            y=labels,
            z=np.where(shown, shares, np.nan).tolist(),
            customdata=counts.tolist(),
            zmin=0,
            zmax=top or max(1, shares[shown].max(initial=0)),
            colorscale=scale,
            colorbar={"title": {"text": title, "side": "right"}, "len": 0.48, "y": place, "thickness": 12},
            hoverongaps=False,
            hovertemplate="true: %{y}<br>predicted: %{x}<br>%{customdata} images, %{z} % of the class<extra></extra>",
        )
    axis = {"type": "category", "showgrid": False, "constrain": "domain", "automargin": True, "tickfont": {"size": 10}}
    axis |= {"showline": True, "mirror": True, "linecolor": "#8b949e"}
    axis |= {"showticklabels": len(labels) <= _NAMED, "dtick": 1}
    figure.update_xaxes(title_text="predicted class", tickangle=-90, **axis)
    return figure.update_yaxes(title_text="true class", autorange="reversed", scaleanchor="x", **axis)


def _distinct(names: Iterable[str]) -> list[str]:
    """The names as plotly shows them, those that are equal with their place."""
    labels = [plain(name) for name in names]
    counted = Counter(labels)
    return [label if counted[label] == 1 else f"{label} ({place})" for place, label in enumerate(labels, start=1)]
