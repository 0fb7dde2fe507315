"""Plotly figures of the report: curves in panels below each other, errors with quartiles, confusion matrices."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import plotly.graph_objects as go
from matplotlib.colors import to_hex, to_rgb
from plotly.subplots import make_subplots

from fgvc.presentation.style import method_order, method_style, short_name

MAX_POINTS = 40_000
"""Most points of one panel; beyond it a curve keeps evenly spaced points, its first and last among them."""
_MANY = 24  # curves of a panel beyond which lines are thin
_NAMED = 40  # classes up to which the axes of a matrix have names
_NAMES = "circle pentagon hexagon square triangle-down triangle-left triangle-right cross x diamond triangle-up "
_NAMES += "diamond-tall hexagon2 star"
_SYMBOLS = dict(zip("ophsv<>PXD^dH*", _NAMES.split(), strict=True))
"""matplotlib's markers to plotly's."""
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


@dataclass(frozen=True)
class Curve:
    """One curve of a panel.

    Attributes:
        label: Label of the method, which gives colour, dash and marker.
        name: Text at its points.
        x, y: (n,) numbers; what is not finite is a gap.
        band: (n,) lower and (n,) upper ends of a band around it.
    """

    label: str
    name: str
    x: Sequence[float]
    y: Sequence[float]
    band: tuple[Sequence[float], Sequence[float]] | None = None


@dataclass(frozen=True)
class Panel:
    """Curves on one pair of axes.

    Attributes:
        title: Title of the vertical axis.
        curves: Curves, drawn in this order.
        log: Whether the vertical axis is logarithmic.
    """

    title: str
    curves: Sequence[Curve]
    log: bool = False


def plain(text: str) -> str:
    """A name as plotly shows it: on one line, without tags and formulas, isolated from texts of another direction."""
    line = " ".join(text.encode("utf-8", "replace").decode("utf-8").split())
    escaped = "".join(f"&#{ord(letter)};" if letter in "&<>$" else letter for letter in short_name(line, 80))
    return f"\u2068{escaped}\u2069"


def curves_figure(x_title: str, panels: Sequence[Panel]) -> go.Figure:
    """Panels below each other with one horizontal axis and one legend."""
    figure = make_subplots(rows=len(panels), shared_xaxes=True, vertical_spacing=0.05)
    for row, panel in enumerate(panels, start=1):
        curves = sorted(panel.curves, key=lambda curve: method_order(curve.label))
        traces = [trace for curve in curves for trace in _traces(curve, x_title, panel)]
        figure.add_traces(traces, rows=[row] * len(traces), cols=[1] * len(traces))
        ends = [value for curve in curves for values in (curve.y, *(curve.band or ())) for value in values]
        figure.update_yaxes(title_text=panel.title, row=row, col=1, **(_log_axis(ends) if panel.log else {}))
    figure.update_xaxes(title_text=x_title, row=len(panels), col=1)
    return figure.update_layout(_LAYOUT)


def _traces(curve: Curve, x_title: str, panel: Panel) -> list[go.Scatter]:
    style, many = method_style(curve.label), len(panel.curves) > _MANY
    count = len(curve.x)
    most = max(MAX_POINTS // len(panel.curves), 2)
    kept = np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))
    x, y = (np.asarray(values, float)[kept] for values in (curve.x, curve.y))
    common = {"name": plain(curve.label), "legendgroup": curve.label, "meta": plain(curve.name)}
    traces = []
    if curve.band is not None:
        lower, upper = (np.asarray(end, float)[kept] for end in curve.band)
        shown = np.isfinite(lower) & np.isfinite(upper) & ((lower > 0) | (not panel.log))
        edge = [*x[shown].tolist(), *x[shown][::-1].tolist()], [*upper[shown].tolist(), *lower[shown][::-1].tolist()]
        red, green, blue = (round(255 * part) for part in to_rgb(style.color))
        fill = {"fill": "toself", "fillcolor": f"rgba({red},{green},{blue},0.2)", "line": {"width": 0}}
        traces.append(
            go.Scatter(x=edge[0], y=edge[1], mode="lines", hoverinfo="skip", showlegend=False, **fill, **common)
        )
    width = 1 if many else 1.8
    dash = ",".join(f"{1.5 * part:g}px" for part in style.dash[1]) or "solid"
    line = {"color": style.color, "width": width, "dash": dash}
    marker = {
        "symbol": _SYMBOLS[style.marker],
        "color": "white",
        "line": {"color": style.color, "width": 1.4},
        "size": 5 if many else 7,
        "maxdisplayed": 3 if many else 9,
    }
    hover = f"%{{meta}}<br>{x_title}: %{{x}}<br>{panel.title.replace('<br>', ' ')}: %{{y:.5~g}}<extra></extra>"
    looks = {"line": line, "marker": marker, "opacity": 0.75 if many else 1, "hovertemplate": hover}
    return [*traces, go.Scatter(x=x.tolist(), y=y.tolist(), mode="lines+markers", **looks, **common)]


def _log_axis(values: Sequence[float]) -> dict[str, Any]:
    """A logarithmic axis with powers of ten, at most some eight of them."""
    positive = [value for value in values if 0 < value < math.inf]
    decades = math.log10(max(positive) / min(positive)) if positive else 0
    ticks = math.ceil(decades / 8) if decades > 1.5 else "D2"  # D2: 2 and 5 between the powers
    return {"type": "log", "exponentformat": "power", "dtick": ticks}


def intervals_figure(
    title: str, names: Sequence[str], middle: Sequence[float], lower: Sequence[float], upper: Sequence[float]
) -> go.Figure:
    """A number with an interval for each name, on a log axis."""
    centre, low, high = (np.asarray(values, float) for values in (middle, lower, upper))
    gaps = {"array": (high - centre).tolist(), "arrayminus": (centre - low).tolist()}
    bars = {"type": "data", "symmetric": False, "color": "#8b949e", "thickness": 2, "width": 5, **gaps}
    labels = _distinct([plain(name) for name in names])
    hover = "%{y}<br>%{x:.3~g}<extra></extra>"
    dots = {"mode": "markers", "marker": {"color": "#1b1f24", "size": 9}, "hovertemplate": hover}
    figure = go.Figure(go.Scatter(x=centre.tolist(), y=labels, error_x=bars, **dots), layout=_LAYOUT)
    figure.update_xaxes(title_text=title, tickangle=0, **_log_axis([*low.tolist(), *high.tolist()]))
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
    labels = _distinct([plain(short_name(name, 28)) for name in names])
    steps = np.linspace(0, 1, 9)
    colours = [(step**2, to_hex(mpl.colormaps["YlOrRd"](0.15 + 0.85 * step))) for step in steps]
    no_names = {"xaxis.showticklabels": False, "yaxis.showticklabels": False}
    figure = go.Figure(layout={**_LAYOUT, "meta": no_names})  # the page's script applies meta on a small screen
    for title, shown, scale, top, place in (
        ("% taken for another", ~right & (counts > 0), colours, None, 0.76),
        ("% right", right, [(0, "#e6e6e6"), (1, "#4d4d4d")], 100, 0.24),
    ):
        bar = {"title": {"text": title, "side": "right"}, "len": 0.48, "y": place, "thickness": 12}
        figure.add_heatmap(
            x=labels,
            y=labels,
            z=np.where(shown, shares, np.nan).tolist(),
            customdata=counts.tolist(),
            zmin=0,
            zmax=top or max(1, shares[shown].max(initial=0)),
            colorscale=scale,
            colorbar=bar,
            hoverongaps=False,
            hovertemplate="true: %{y}<br>predicted: %{x}<br>%{customdata} images, %{z} % of the class<extra></extra>",
        )
    axis = {"type": "category", "showgrid": False, "constrain": "domain", "automargin": True, "tickfont": {"size": 10}}
    axis |= {"showline": True, "mirror": True, "linecolor": "#8b949e"}
    axis |= {"showticklabels": len(labels) <= _NAMED, "dtick": 1}
    figure.update_xaxes(title_text="predicted class", tickangle=-90, **axis)
    return figure.update_yaxes(title_text="true class", autorange="reversed", scaleanchor="x", **axis)


def _distinct(labels: Sequence[str]) -> list[str]:
    """The labels, those that are equal with their place."""
    counted = Counter(labels)
    return [label if counted[label] == 1 else f"{label} ({place})" for place, label in enumerate(labels, start=1)]
