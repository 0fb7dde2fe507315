"""Tables as Markdown, LaTeX (booktabs), HTML and CSV, and where each of their numbers comes from."""

import html
import itertools
import math
import re
import textwrap
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from fgvc.errors import visible
from fgvc.io import sha256, to_csv

PLACES_NOTE = "The best three of a column: bold, italic, and underlined or marked (3rd); equal ones alike."
NOT_MEASURED = "—"
"""Cell of what was not measured or, in a column of published numbers, not published; a note says so."""


@dataclass(frozen=True)
class Block:
    """One table as it is read, all of it text: the first column names, the others mostly numbers.

    Attributes:
        title: Short heading.
        header, rows: Cells.
        notes: Lines under the table.
        caption: What was measured, on what, over how many seeds: full sentences, which stand without the title.
        name: Name of the table, for references in LaTeX: \\ref{tab:NAME}.
        places: Marks 1, 2 or 3 by (row, column): the best, second and third cells of their column.
    """

    title: str
    header: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)
    caption: str = ""
    name: str = "table"
    places: Mapping[tuple[int, int], int] = field(default_factory=dict)

    @property
    def all_notes(self) -> list[str]:
        """The notes, and what a dash means where there is one."""
        if not any(NOT_MEASURED in row for row in self.rows):
            return self.notes
        published = any(cell.startswith("Published") for cell in self.header)
        return [*self.notes, f"{NOT_MEASURED}: not measured{' or not published' if published else ''}."]


def places(values: Sequence[float], column: int, *, lowest: bool = False) -> dict[tuple[int, int], int]:
    """Marks of the three highest, or lowest, of a column's values; none where fewer than two are numbers.

    Values that read the same, with two decimals, share a place: saved accuracies are rounded, so that means over the
    same number of right images differ in digits that say nothing.
    """
    values = [round(-value if lowest else value, 2) for value in values]
    known = [value for value in values if not math.isnan(value)]
    if len(known) < 2:
        return {}
    rank = {value: 1 + sum(other > value for other in known) for value in known}
    return {(row, column): rank[value] for row, value in enumerate(values) if rank.get(value, 4) <= 3}


_LATEX = {
    "\\": r"\textbackslash{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "[": "{[}",  # at the start of a row it would be read as the optional argument of \\
    "]": "{]}",
    "|": r"\textbar{}",  # in text, the old font encoding has other letters in the place of these three
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "±": r"$\pm$",
    "—": "---",
    "–": "--",
    "…": r"\ldots{}",
    "→": r"$\to$",
    "−": r"$-$",
    "≤": r"$\le$",
    "≥": r"$\ge$",
    "ε": r"$\varepsilon$",
    "λ": r"$\lambda$",
    "∞": r"$\infty$",
    "√": r"$\surd$",
    **dict.fromkeys("\n\t\r\xa0", " "),
}
_ACCENTS = "\u0300\u0301\u0302\u0303\u0304\u0306\u0307\u0308\u030a\u030b\u030c\u0327"
_LATEX_LETTERS = "¡¿§¶©£°·µ×÷ßæÆøØœŒłŁı"
_PLACES = {
    "markdown": ("**{}**", "*{}*", "{} (3rd)"),
    "latex": (r"\textbf{{{}}}", r"\textit{{{}}}", r"\underline{{{}}}"),
    "html": ("<strong>{}</strong>", "<em>{}</em>", "<u>{}</u>"),
}
"""How the best three cells of a column are marked."""

NO_NUMBER = (NOT_MEASURED, "not published", "not stated", "did not converge", "–", "")
"""Cells that say why there is no number."""
_NEGATIVE = re.compile(r"(?<![\w.$])-(?=\.?\d)")
_HEAD = 12
"""Letters beyond which the head of a column is broken into lines in LaTeX."""
_NUMBER = re.compile(r"[\[(]?[+\-]?([\d,]+(\.\d+)?(e[+\-]?\d+)?|inf)(?![\w.])")
_LONG = 48
"""Letters beyond which a cell of HTML may be broken into lines."""


def to_markdown(title: str, blocks: Iterable[Block]) -> str:
    """A heading, and under it each block as a Markdown table between its caption and its notes."""
    parts = [f"# {_words(title)}"]
    for block in blocks:
        table = markdown_table(block.header, _marked(block, "markdown", block.rows))
        notes = "\n".join(f"- {_words(note)}" for note in block.all_notes)
        heading = "" if block.title == title else f"## {_words(block.title)}"
        parts += [part for part in (heading, _words(block.caption), table, notes) if part]
    return "\n\n".join(parts) + "\n"


def block_markdown(block: Block) -> str:
    """One block's table alone, for a page that has its own words."""
    return markdown_table(block.header, _marked(block, "markdown", block.rows))


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table with aligned columns, the first to the left, the others to the right."""
    cells = [[_words(cell).replace("|", "\\|") for cell in row] for row in (header, *rows)]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(header))]
    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]

    def line(row: Sequence[str]) -> str:
        rest = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        return f"| {' | '.join([row[0].ljust(widths[0]), *rest])} |"

    return "\n".join([line(cells[0]), line(rule), *map(line, cells[1:])])


def titled(title: str, of: str) -> str:
    """A title, and what tells its table from others of that title."""
    return f"{title}: {of}" if of else title


def mean_and_spread(values: "pd.Series[float]", places: int = 2) -> str:
    """Mean ± sample standard deviation, which one value alone has not."""
    return with_spread(values.mean(), values.std(ddof=1), places)


def with_spread(mean: float, spread: float, places: int = 2) -> str:
    """A mean, and after ± the standard deviation unless that is NaN."""
    return f"{mean:.{places}f}" + ("" if math.isnan(spread) else f" ± {spread:.{places}f}")


def to_latex(blocks: Iterable[Block]) -> str:
    """Each block as a LaTeX table for \\input; needs the package booktabs.

    Its label is tab:NAME; of several tables of one name the second is tab:NAME-2.
    """
    names: Counter[str] = Counter()
    tables = []
    for block in blocks:
        names[block.name] += 1
        number = names[block.name]
        tables.append(_latex_block(block, block.name if number == 1 else f"{block.name}-{number}"))
    return "% needs \\usepackage{booktabs}\n" + "\n".join(tables)


def to_html(title: str, blocks: Iterable[Block]) -> str:
    """A page of its own: no script, nothing from the network, light or dark as the reader's system."""
    return _TEMPLATES.get_template("page.html").render(title=title, blocks=map(html_block, blocks))


def _marked(block: Block, kind: str, rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """The rows, in which each cell is already in its final form, with the best three of a column marked."""
    marks = _PLACES[kind]
    return [
        [marks[place - 1].format(cell) if (place := block.places.get((i, j))) else cell for j, cell in enumerate(row)]
        for i, row in enumerate(rows)
    ]


_FONTS = (("small", 4.9, 6), ("footnotesize", 4.4, 4), ("scriptsize", 3.9, 3))
"""Font, width of a letter and room on each side of a column, in points; the first in which a table fits is taken."""
_PAGE = 340
"""Width of the text of article, in points."""
_WRAPPED = (34, 17)
"""Letters beyond which cells are broken into lines; the second where a table does not fit otherwise."""


def _latex_block(block: Block, name: str) -> str:
    kinds = _kinds(block)
    heads = [
        textwrap.wrap(head, _HEAD, break_long_words=False, break_on_hyphens=False) or [""] for head in block.header
    ]
    columns = list(zip(*block.rows, strict=True)) if block.rows else [()] * len(heads)
    widths = [max(map(len, [*head, *column])) for head, column in zip(heads, columns, strict=True)]
    font, gap, rooms = _layout(widths)
    sides = ["l" if j == 0 or kind == "words" else "r" for j, kind in enumerate(kinds)]
    escaped = [[_cell(*cell) for cell in zip(row, rooms, sides, strict=True)] for row in block.rows]
    return _TEMPLATES.get_template("block.tex").render(
        block=block,
        name=name,
        environment="table*" if len(block.header) > 5 else "table",  # the starred one spans both columns
        font=font,
        gap=gap,
        sides=sides,
        heads=map(_latex_head, heads, sides),
        rows=_marked(block, "latex", escaped),
    )


def _layout(widths: Sequence[int]) -> tuple[str, int, list[float]]:
    """Font, points beside a column, and of each column the points to which its cells are broken, 0 where they are not.

    Args:
        widths: Letters of the widest cell of each column.
    """
    for limit, font in itertools.product(_WRAPPED, _FONTS):
        name, letter, gap = font
        long = [width > limit for width in widths]
        short = sum(width for width in widths if width <= limit)
        spare = _PAGE - 2 * gap * len(widths) - letter * short
        room = min(limit * letter, spare / max(1, sum(long)))
        if room >= 12 * letter or (not any(long) and spare >= 0):
            break
    return name, gap, [max(room, 12 * letter) if is_long else 0 for is_long in long]


def _cell(text: str, room: float, side: str) -> str:
    """A cell, broken into lines of `room` points unless that is 0."""
    escaped = r"$\infty$" if text == "inf" else _NEGATIVE.sub("$-$", _escape(text))
    ragged = r"\raggedright" if side == "l" else r"\raggedleft"
    return rf"\parbox[t]{{{room:.0f}pt}}{{{ragged} {escaped}\strut}}" if room else escaped


def _latex_head(lines: Sequence[str], side: str) -> str:
    """The head of a column, of several lines where it is long."""
    if len(lines) == 1:
        return _escape(lines[0])
    return rf"\begin{{tabular}}[b]{{@{{}}{side}@{{}}}}" + r" \\ ".join(map(_escape, lines)) + r"\end{tabular}"


def html_block(block: Block) -> str:
    """One block as a table in a section that can be scrolled, and its notes; every text is escaped."""
    kinds = _kinds(block)
    escaped = [list(map(_html, row)) for row in block.rows]
    rows = [
        (
            _class("long" if len(row[0]) > _LONG else ""),
            first,
            list(zip(map(_html_class, rest, kinds[1:]), rest, strict=True)),
        )
        for row, (first, *rest) in zip(block.rows, _marked(block, "html", escaped), strict=True)
    ]
    return _TEMPLATES.get_template("block.html").render(
        block=block,
        caption=". ".join(_html(part) for part in (block.title, block.caption) if part),
        header=list(zip(map(_class, kinds), block.header, strict=True)),
        rows=rows,
    )


def _kinds(block: Block) -> list[str]:
    """Of each column "words" where none of its cells begins as a number does, "" otherwise."""
    columns = zip(*block.rows, strict=True) if block.rows else ([] for _ in block.header)
    return ["" if any(map(_NUMBER.match, cells)) or set(cells) == {NOT_MEASURED} else "words" for cells in columns]


def _html_class(cell: str, kind: str) -> str:
    return _class(kind, "none" if cell in NO_NUMBER else "", "long" if len(cell) > _LONG else "")


def _class(*names: str) -> str:
    used = " ".join(filter(None, names))
    return f' class="{used}"' if used else ""


def _escape(text: str) -> str:
    return "".join(_LATEX.get(character) or _latex_letter(character) for character in text)


def _latex_letter(character: str) -> str:
    """A character as it is where LaTeX's old font encoding has it, else its code point."""
    if " " <= character <= "~" or character in _LATEX_LETTERS:
        return character
    parts = unicodedata.normalize("NFD", character)
    if character <= "\u017f" and parts[0].isascii() and parts[0].isalpha() and set(parts[1:]) <= set(_ACCENTS):
        return character
    return f"{{[}}U+{ord(character):04X}{{]}}"


_MARKUP = {"<": "&lt;", "&": "&amp;", "\\": r"\\", "[": r"\["}
_IS_MARKUP = re.compile(r"<(?=[A-Za-z/!?])|&(?=#?\w+;)|\\(?=[!-/:-@\[-`{-~]|$)|(?<=!)\[|\[(?=.*\][(\[])")


def _words(text: str) -> str:
    """Text on one line in which a name from data is no tag, entity, image or link, and escapes nothing after it."""
    return _IS_MARKUP.sub(lambda found: _MARKUP[found[0]], visible(" ".join(text.split())))


def _html(text: str) -> str:
    return html.escape(visible(text))


_TEMPLATES = Environment(
    loader=PackageLoader("fgvc.presentation", "assets"),
    undefined=StrictUndefined,
    trim_blocks=True,
    keep_trailing_newline=True,
    # braces are LaTeX's
    variable_start_string="[[",
    variable_end_string="]]",
    block_start_string="[%",
    block_end_string="%]",
)
_TEMPLATES.filters |= {"html": _html, "latex": _escape}


@dataclass(frozen=True)
class Table:
    """A table by name.

    Attributes:
        title: Title of the whole.
        blocks: Blocks to read.
        frames: Tidy frames by the name of their CSV file, one row a cell or a row of cells; those made from runs have
            the columns seeds, runs (the paths, in CSV "; " between them) and commits.
        notes: Lines on what was left out, or is doubtful.
    """

    title: str
    blocks: list[Block]
    frames: Mapping[str, pd.DataFrame]
    notes: list[str] = field(default_factory=list)

    def texts(self, name: str) -> dict[str, str]:
        """Content by file name: NAME.md, NAME.tex, NAME.html, and a CSV for each frame.

        The notes stand under the first block.
        """
        blocks = [replace(block, notes=[*block.notes, *self.notes]) for block in self.blocks[:1]] + self.blocks[1:]
        texts = {
            f"{name}.md": to_markdown(self.title, blocks),
            f"{name}.tex": to_latex(blocks),
            f"{name}.html": to_html(self.title, blocks),
        }
        return texts | {f"{frame}.csv": to_csv(table) for frame, table in self.frames.items()}

    def provenance(self) -> list[dict[str, Any]]:
        """Every row of the frames with the runs behind it: path, sha256 of config.yaml (None without one)."""
        cells = []
        for name, frame in self.frames.items():
            for row in frame.to_dict("records"):
                runs = row.pop("runs", None)
                values = {str(key): _plain(value) for key, value in row.items() if not _missing(value)}
                paths = [] if _missing(runs) else runs
                cells.append({"table": name, **values, "runs": [_run(Path(path)) for path in paths]})
        return cells


def _run(path: Path) -> dict[str, str | None]:
    config = path / "config.yaml"
    digest = sha256(config) if config.is_file() else None
    return {"path": str(path), "config_sha256": digest}


def _missing(value: object) -> bool:
    return value is None or value is pd.NA or (isinstance(value, float) and value != value)


def _plain(value: Any) -> Any:
    number = value.item() if hasattr(value, "item") else value
    return str(number) if isinstance(number, float) and math.isinf(number) else number  # JSON knows no infinity
