"""Charts as the page's script reads them: plain values, no more digits and points than can be seen."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from fgvc.reporting.report.content import Chart, Curve, Curves, Intervals, Matrix

MAX_POINTS = 40_000
"""Of one chart; beyond it every n-th point of a curve is left out, never its last."""
_FEWEST = 20  # points that a curve keeps however many there are
_DIGITS = 5
_LONGEST = 80  # letters of a name in a plot


def chart_data(chart: Chart) -> dict[str, Any]:
    """One chart as values of JSON."""
    if isinstance(chart, Curves):
        return _curves(chart)
    if isinstance(chart, Intervals):
        return _intervals(chart)
    return _matrix(chart)


def short(text: str) -> str:
    """A name on one line, cut where it is longer than a plot has room for."""
    flat = one_line(text)
    return flat if len(flat) <= _LONGEST else f"{flat[: _LONGEST - 1]}…"


def one_line(text: str) -> str:
    """A name without line feeds, and with signs in place of what is no character: half of a surrogate pair."""
    return " ".join(text.encode("utf-8", "replace").decode("utf-8").split())


def _curves(chart: Curves) -> dict[str, Any]:
    most = max(MAX_POINTS // max(len(chart.curves), 1), _FEWEST)
    return {
        "kind": "curves",
        "title": chart.title,
        "x": chart.x_title,
        "y": chart.y_title,
        "log": chart.log,
        "curves": [_curve(curve, most, chart.log) for curve in chart.curves],
    }


def _curve(curve: Curve, most: int, log: bool) -> dict[str, Any]:
    kept = thinned(len(curve.x), most)
    values: dict[str, Any] = {"label": curve.label, "name": short(curve.name), "runs": curve.runs}
    values["x"] = _numbers((curve.x[i] for i in kept), False)
    values["y"] = _numbers((curve.y[i] for i in kept), log)
    if curve.lower is not None and curve.upper is not None:
        values["lower"] = _numbers((curve.lower[i] for i in kept), log)
        values["upper"] = _numbers((curve.upper[i] for i in kept), log)
    return values


def thinned(count: int, most: int) -> Sequence[int]:
    """Indices of evenly spaced points, at most `most` + 1 of `count`, first and last among them."""
    step = math.ceil(count / most) if count else 1
    kept = list(range(0, count, step))
    return kept if not kept or kept[-1] == count - 1 else [*kept, count - 1]


def _intervals(chart: Intervals) -> dict[str, Any]:
    return {
        "kind": "intervals",
        "title": chart.title,
        "x": chart.x_title,
        "names": [short(name) for name in chart.names],
        **{name: _numbers(getattr(chart, name), True) for name in ("middle", "lower", "upper")},
    }


def _matrix(chart: Matrix) -> dict[str, Any]:
    return {
        "kind": "matrix",
        "title": chart.title,
        "names": [short(name) for name in chart.names],
        "cells": [list(cell) for cell in chart.cells],
        "totals": list(chart.totals),
    }


def _numbers(values: Iterable[float], log: bool) -> list[float | int | None]:
    """With five digits; None for what a plot cannot show: not finite, or not positive on a log axis."""
    return [_number(float(value)) if math.isfinite(value) and (value > 0 or not log) else None for value in values]


def _number(value: float) -> float | int:
    rounded = float(f"{value:.{_DIGITS}g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded
