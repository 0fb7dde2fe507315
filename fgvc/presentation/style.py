"""One look for every figure: a method has the same colour, dash and marker wherever it is drawn."""

import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure, SubFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from fgvc.errors import one_line
from fgvc.io import output_path

COLUMN_WIDTH = 3.3
"""Width of a figure of one column, inches."""
PAGE_WIDTH = 6.9
"""Width of a figure across both columns, inches."""

Dash = tuple[int, tuple[float, ...]]
_SOLID: Dash = (0, ())
_DASHED: Dash = (0, (4, 1.5))
_DOTTED: Dash = (0, (1, 1.2))
_DASH_DOT: Dash = (0, (5, 1.2, 1, 1.2))


@dataclass(frozen=True)
class MethodStyle:
    """How the curve of a method looks; dash and marker part curves that lie on each other or lost their colour."""

    color: str
    dash: Dash
    marker: str

    @property
    def solid(self) -> bool:
        return self.dash == _SOLID


METHOD_STYLES: dict[str, MethodStyle] = {
    "GAP": MethodStyle("#7F7F7F", _DOTTED, "o"),
    "B-CNN": MethodStyle("#999933", _DASHED, "p"),
    "CBP": MethodStyle("#99670F", _DASH_DOT, "h"),
    "iSQRT-COV": MethodStyle("#0072B2", _SOLID, "o"),
    "MPN-COV": MethodStyle("#000000", _DASHED, "s"),
    "SVD-Padé": MethodStyle("#AA4499", _SOLID, "v"),
    "SVD-Taylor": MethodStyle("#882255", _DASH_DOT, "<"),
    "SVD-PI": MethodStyle("#CC79A7", _DOTTED, ">"),
    "SVD-Newton": MethodStyle("#332288", _DASHED, "P"),
    "SVD-Trunc": MethodStyle("#0099BF", _DASH_DOT, "X"),
    "SVD-TopN": MethodStyle("#117733", _DOTTED, "D"),
    "SEB": MethodStyle("#D55E00", _DASH_DOT, "^"),
    "SEB-spectral (ours)": MethodStyle("#661100", _DASHED, "d"),
    "Log-COV": MethodStyle("#00A642", _SOLID, "H"),
    "MPA-Lya": MethodStyle("#4477AA", _SOLID, "s"),
    "MTP-Lya": MethodStyle("#2A7A7A", _DASHED, "X"),
    "Pow-TMLR": MethodStyle("#5B4FCF", _SOLID, "D"),
    "ScalePow": MethodStyle("#DD2277", _DASHED, "^"),
    "Inv-COV": MethodStyle("#6B6B00", _DASH_DOT, "v"),
    "Cho-TMLR": MethodStyle("#B02020", _DOTTED, "s"),
    "iSICE": MethodStyle("#1F4E4E", _DASH_DOT, "o"),
    "DropCov": MethodStyle("#8C564B", _DOTTED, "p"),
    "HBP": MethodStyle("#7A5195", _DASHED, "h"),
    "MGCrP": MethodStyle("#3D7A00", _DOTTED, "h"),
}
"""Known methods in the order of every table and legend.

Colours are those of Okabe-Ito and Paul Tol, for all colour vision; those of CBP, SVD-Trunc and Log-COV are darker, so
that each has a contrast of at least 3 to white.
"""


def method_style(label: str) -> MethodStyle:
    """Style of a label. Options, "MPN-COV [alpha=0.25]", change nothing; another gradient, "SVD-TopN (exact)", makes a
    paler form of the method's; labels of unknown methods get one by their name.

    The choice depends on the label alone, never on what else is drawn.
    """
    label = label.split(" [")[0]
    if label in METHOD_STYLES:
        return METHOD_STYLES[label]
    base = _method(label)
    if base is not None:
        style = METHOD_STYLES[base]
        red, green, blue = (0.55 * part + 0.45 for part in to_rgb(style.color))
        return replace(style, color=to_hex((red, green, blue)), dash=_DASHED if style.solid else _SOLID)
    choice = zlib.crc32(label.encode())  # unlike hash(), the same in every process
    return MethodStyle(
        color=("#5588BB", "#888888", "#AA4466", "#4477AA", "#BB5566")[choice % 5],
        dash=(_SOLID, _DASHED, _DOTTED, _DASH_DOT)[choice // 7 % 4],
        marker="*",
    )


def _method(label: str) -> str | None:
    """The known method that a label is a variant of: "SEB" of "SEB (exact) [..]"."""
    return next((name for name in METHOD_STYLES if label == name or label.startswith((f"{name} (", f"{name} ["))), None)


def method_order(label: str) -> tuple[int, list[tuple[float, str]]]:
    """Sort key of labels: the known methods in their order, each followed by its variants, then the rest by name.

    Numbers in a label count by their value: "[keep=2]" comes before "[keep=14]".
    """
    known, name = list(METHOD_STYLES), _method(label)
    parts = re.findall(r"(\d+(?:\.\d+)?)|(\D+)", label)
    natural = [(float(number) if number else -1.0, text) for number, text in parts]
    return (len(known) if name is None else known.index(name), natural)


def by_method(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The labels of a table in the order of methods, each with its rows."""
    labels = sorted(dict.fromkeys(table["label"]), key=method_order)
    return [(label, table[table["label"] == label]) for label in labels]


def draw_curve(axes: Axes, x: Any, y: Any, label: str, **looks: Any) -> None:
    """Draw the curve of a method in its style; `looks` are options of `Axes.plot`."""
    style = method_style(label)
    own = {"color": style.color, "linestyle": style.dash, "marker": style.marker, "markerfacecolor": "white"}
    axes.plot(x, y, **{**own, "label": label, **looks})


def draw_band(axes: Axes, x: Any, lower: Any, upper: Any, color: Any, alpha: float = 0.2) -> None:
    """Fill the band around a curve."""
    axes.fill_between(x, lower, upper, color=color, alpha=alpha, linewidth=0)


def staggered(position: int, count: int, step: int) -> tuple[int, int]:
    """`markevery` of one of `count` curves: those that lie on each other still show all their markers."""
    return position * step // count, step


def legend_outside(figure: Figure | SubFigure, place: str, **looks: Any) -> None:
    """A legend of the first panel's curves next to all panels; `looks` are options of `Figure.legend`."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    options: dict[str, Any] = {"loc": f"outside {place}", "frameon": False, **looks}
    figure.legend(handles, labels, **options)


def caption(figure: Figure, text: str, *, wrap: bool = False) -> None:
    """Small grey words under a figure."""
    figure.supxlabel(text, fontsize=6.5, color="#555555", wrap=wrap)


def short_name(name: str, longest: int = 28) -> str:
    """A name in one line of at most `longest` letters, its end cut off where it has more."""
    name = one_line(name)
    return name if len(name) <= longest else f"{name[: longest - 1]}…"


_SORTING_NUMBER = re.compile(r"\A(?:\d+\.\s*|0\d*[_\- ]|n\d{8}[_-])(?=[^\W\d_])")
"""What sorts folders and says nothing: "001." of CUB, "00012_", the WordNet number "n02085620-" of Dogs."""


def class_name(name: str, longest: int | None = None) -> str:
    """A class as readers see it: "Black footed Albatross" for "001.Black_footed_Albatross"; files keep the raw name."""
    plain = " ".join(_SORTING_NUMBER.sub("", one_line(name), count=1).replace("_", " ").split()) or one_line(name)
    return plain if longest is None else short_name(plain, longest)


@contextmanager
def figure_style() -> Iterator[None]:
    """Make and save figures in here: print sizes, fonts embedded as TrueType, whatever the user's matplotlibrc says."""
    with mpl.rc_context():
        mpl.rcdefaults()
        with mpl.rc_context(
            {
                "font.size": 8,
                "axes.labelsize": 8,
                "axes.titlesize": 8,
                "xtick.labelsize": 7,
                "ytick.labelsize": 7,
                "legend.fontsize": 7,
                "axes.linewidth": 0.6,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "lines.linewidth": 1.2,
                "grid.linewidth": 0.4,
                "grid.color": "#DDDDDD",
                "pdf.fonttype": 42,
                "ps.fonttype": 42,
                "savefig.dpi": 300,
            }
        ):
            yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that many inches on the Agg canvas, unknown to pyplot; call inside `figure_style()`."""
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.1))  # inches between panels
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, stem: Path) -> list[Path]:
    """Write `stem`.png and `stem`.pdf, without a date, so that the same figure is the same file. Returns both paths."""
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "pdf")]
    with figure_style():
        for path, metadata in zip(paths, ({}, {"CreationDate": None}), strict=True):
            with output_path(path) as temporary:
                figure.savefig(temporary, metadata=metadata)
    return paths
