"""What a section of the report holds, before it is HTML: tables, plots, pictures and text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from fgvc.presentation.render import Block

Runs = tuple[int, ...]
"""Places in `Collected.runs` of the runs behind something: it is shown while one of them passes the page's filter.
None stands for what no run is behind and every filter leaves."""


@dataclass(frozen=True)
class TablePart:
    """A table of which each row belongs to runs.

    Attributes:
        block: as it is read.
        runs: of each row; () for a row that no run is behind, say one of published numbers.
    """

    block: Block
    runs: Sequence[Runs | None]


@dataclass(frozen=True)
class Curve:
    """One curve of a chart.

    Attributes:
        label: of its method, whose colour, dash and marker it has.
        name: what its points are called.
        x, y: (n,) numbers; what is not finite is a gap.
        lower, upper: (n,) ends of a band around it, or None.
        runs: behind it.
    """

    label: str
    name: str
    x: Sequence[float]
    y: Sequence[float]
    lower: Sequence[float] | None = None
    upper: Sequence[float] | None = None
    runs: Runs | None = None


@dataclass(frozen=True)
class Curves:
    """A chart of curves."""

    title: str
    x_title: str
    y_title: str
    curves: Sequence[Curve]
    log: bool = False
    y_range: tuple[float, float] | None = None


@dataclass(frozen=True)
class Intervals:
    """A chart of one number with an interval for each of some names, on a log axis."""

    title: str
    x_title: str
    names: Sequence[str]
    middle: Sequence[float]
    lower: Sequence[float]
    upper: Sequence[float]


@dataclass(frozen=True)
class Matrix:
    """A chart of a confusion matrix, its classes in the order of drawing.

    Attributes:
        cells: (row, column, count) of what is not zero.
        totals: images of each row.
    """

    title: str
    names: Sequence[str]
    cells: Sequence[tuple[int, int, int]]
    totals: Sequence[int]


Chart = Curves | Intervals | Matrix


@dataclass(frozen=True)
class PlotPart:
    """Charts that can be zoomed, and the same as a picture for a reader without scripts.

    Attributes:
        title: heading.
        text: what is seen, for those who do not see it too.
        figure: the picture.
        charts: side by side where there is room.
        runs: behind all of it.
    """

    title: str
    text: str
    figure: Figure
    charts: Sequence[Chart]
    runs: Runs | None = None


@dataclass(frozen=True)
class Picture:
    """An image in the page: its bytes, what it shows, and the line under it."""

    kind: str  # of the data: image/webp
    data: bytes
    size: tuple[int, int]
    text: str
    caption: str = ""


@dataclass(frozen=True)
class GalleryPart:
    """Pictures of one thing beside each other."""

    title: str
    pictures: Sequence[Picture]
    runs: Runs | None = None
    wide: bool = False


@dataclass(frozen=True)
class DetailsPart:
    """Names and values under a line that folds them up; the page's search looks through them.

    Attributes:
        summary: the line.
        values: name to value.
        runs: behind it.
        open: not folded up at first.
    """

    summary: str
    values: Mapping[str, str]
    runs: Runs | None = None
    open: bool = False


@dataclass(frozen=True)
class GroupPart:
    """Other parts under a line that folds them up.

    Attributes:
        summary: the line.
        parts: under it, in order.
        runs: behind all of them.
        open: not folded up at first.
    """

    summary: str
    parts: Sequence["Part"]
    runs: Runs | None = None
    open: bool = False


@dataclass(frozen=True)
class TextPart:
    """Paragraphs."""

    lines: Sequence[str]


Part = TablePart | PlotPart | GalleryPart | DetailsPart | GroupPart | TextPart
Made = tuple[list[Part], list[str]]
"""Parts of a section, and notes on what is left out of them."""


@dataclass(frozen=True)
class Section:
    """A section of the page.

    Attributes:
        name: its anchor.
        title: its heading.
        parts: in order; none where there is nothing to show.
        notes: what was left out.
        missing: why there is nothing to show.
        command: what would make it.
    """

    name: str
    title: str
    parts: Sequence[Part] = ()
    notes: Sequence[str] = ()
    missing: str = ""
    command: str = ""
