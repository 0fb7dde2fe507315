"""The styles of methods on a page that may be light or dark: colours that can be seen on both, dashes, markers."""

import colorsys

import numpy as np
from matplotlib.colors import to_hex, to_rgb
from matplotlib.markers import MarkerStyle

from fgvc.presentation.style import MethodStyle

LIGHT, DARK = "#ffffff", "#16191d"
"""Backgrounds of plots; style.css has the same."""
_CONTRAST = 3.0  # of lines against the background, as WCAG 2 asks of graphics
_WIDTH = 1.5  # of lines, in units of which dashes are measured
_SYMBOLS = {
    "o": "circle",
    "p": "pentagon",
    "h": "hexagon",
    "s": "square",
    "v": "triangle-down",
    "<": "triangle-left",
    ">": "triangle-right",
    "P": "cross",
    "X": "x",
    "D": "diamond",
    "^": "triangle-up",
    "d": "diamond-tall",
    "H": "hexagon2",
    "*": "star",
}
"""matplotlib's markers to plotly's."""


def plot_style(style: MethodStyle) -> dict[str, str]:
    """Colours on light and dark, dash in pixels, symbol of plotly."""
    return {
        "light": on_light(style.color),
        "dark": on_dark(style.color),
        "dash": ",".join(f"{_WIDTH * part:g}px" for part in style.dash[1]) or "solid",
        "symbol": _SYMBOLS[style.marker],
    }


def on_light(colour: str) -> str:
    """The colour, darker where it would not be seen on white."""
    hue, lightness, saturation = colorsys.rgb_to_hls(*to_rgb(colour))
    return _readable(hue, lightness, saturation, LIGHT, -0.01)


def on_dark(colour: str) -> str:
    """The colour with its lightness turned round, black to white, so that what differed in it still does."""
    hue, lightness, saturation = colorsys.rgb_to_hls(*to_rgb(colour))
    return _readable(hue, 1 - 0.8 * lightness, saturation, DARK, 0.01)


def _readable(hue: float, lightness: float, saturation: float, background: str, step: float) -> str:
    while contrast(colour := to_hex(colorsys.hls_to_rgb(hue, lightness, saturation)), background) < _CONTRAST:
        lightness += step
    return colour


def contrast(first: str, second: str) -> float:
    """Contrast ratio of two colours, between 1 and 21 [WCAG 2.2]."""
    light, dark = sorted((_luminance(first), _luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in to_rgb(colour))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def swatch(style: MethodStyle) -> str:
    """A bit of the method's line with its marker, as SVG for a legend."""
    shape = MarkerStyle(style.marker)
    outline = np.asarray(shape.get_path().transformed(shape.get_transform()).to_polygons()[0])
    points = " ".join(f"{15 + 7 * x:.1f},{7 - 7 * y:.1f}" for x, y in outline)
    dash = " ".join(f"{_WIDTH * part:g}" for part in style.dash[1]) or "none"
    return (
        f'<svg class="swatch" viewBox="0 0 30 14" width="30" height="14" aria-hidden="true" '
        f'style="--light:{on_light(style.color)};--dark:{on_dark(style.color)}">'
        f'<path d="M0 7H30" stroke-dasharray="{dash}"/><polygon points="{points}"/></svg>'
    )
