"""The accuracy table as it is read: one block of plain text cells a setting, for the renderers to lay out."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from fgvc.reporting.style import method_order
from fgvc.reporting.tables import SETTING_COLUMNS
from fgvc.runs import Setting

PLACES_NOTE = (
    "The three highest measured means of a column: bold, italic, and underlined or marked (3rd); equal ones alike."
)
_PUBLISHED_HEADERS = {
    "final": "Published final",
    "best": "Published best (on test)",
    "unstated": "Published, epoch unstated",
}


@dataclass(frozen=True)
class Block:
    """One table as it is read, all of it text: the first column names, the others mostly numbers.

    Attributes:
        title: heading or caption.
        header, rows: cells.
        notes: stand under the table.
        quantity: what the numbers are, for a caption.
        places: (row, column) -> 1, 2 or 3, cells marked as the best, second and third of their column.
    """

    title: str
    header: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)
    quantity: str = ""
    places: Mapping[tuple[int, int], int] = field(default_factory=dict)


def places(values: Sequence[float], column: int) -> dict[tuple[int, int], int]:
    """Marks of the three highest of a column's values; none where fewer than two are numbers.

    Values that read the same, with two decimals, share a place: saved accuracies are rounded, so that means over the
    same number of right images differ in digits that say nothing.
    """
    values = [round(value, 2) for value in values]
    known = sorted({value for value in values if not math.isnan(value)}, reverse=True)
    if sum(not math.isnan(value) for value in values) < 2:
        return {}
    rank = {value: 1 + sum(other > value for other in values) for value in known}
    return {(row, column): rank[value] for row, value in enumerate(values) if rank.get(value, 4) <= 3}


def table_blocks(table: pd.DataFrame) -> list[Block]:
    """A block for each setting of an `accuracy_table`, after an overview of the measured where there are several."""
    settings = [_setting_block(part) for _, part in table.groupby("block")]
    return settings if len(settings) == 1 else [_overview(table), *settings]


def _overview(table: pd.DataFrame) -> Block:
    parts = [part for _, part in table.groupby("block")]
    settings = [_setting(part) for part in parts]
    header = ["Method"]
    for number, setting in enumerate(settings, start=1):
        header += [f"{number}: {setting.dataset}, final", f"{number}: best (selected on {setting.selected_on})"]
    measured = table.loc[(table["origin"] == "measured") & (table["state"] == "ok"), "label"]
    rows = [
        [label, *(_measured(part[part["label"] == label], epoch) for part in parts for epoch in ("final", "best"))]
        for label in sorted(set(measured), key=method_order)
    ]
    notes = [f"{number}: {setting.title}" for number, setting in enumerate(settings, start=1)]
    return Block("Overview, measured", header, rows, notes, quantity="Top-1 accuracy in %")


def _setting_block(part: pd.DataFrame) -> Block:
    setting = _setting(part)
    published = part.loc[(part["origin"] == "published") & (part["state"] != "not published"), "epoch"]
    epochs = [epoch for epoch in _PUBLISHED_HEADERS if epoch != "unstated" or epoch in set(published)]
    if published.empty:
        epochs = []
    sources: dict[str, int] = {}
    rows = []
    for label in dict.fromkeys(part["label"]):
        cells = part[part["label"] == label]
        n = str(cells["n"].max())
        measured = [_measured(cells, epoch) for epoch in ("final", "best")]
        rows.append([label, n, *measured, *(_published(cells, epoch, sources) for epoch in epochs)])
    marks: dict[tuple[int, int], int] = {}
    for column, epoch in ((2, "final"), (3, "best")):
        measured = part[(part["origin"] == "measured") & (part["epoch"] == epoch)].set_index("label")["top1_mean"]
        marks |= places([float(measured.get(row[0], math.nan)) for row in rows], column)
    header = ["Method", "n", "Final", f"Best (selected on {setting.selected_on})"]
    notes = [
        f"Mean ± sample standard deviation of the test top-1 in % over n seeds; {_counts(setting)}. "
        f"Final: after the last epoch. Best: at the epoch with the highest top-1 on the {setting.selected_on} split.",
        *(f"[{number}] published: {source}" for source, number in sources.items()),
    ]
    if marks:
        notes.append(PLACES_NOTE)
    if published.empty:
        classes = "" if setting.num_classes is None else f" with {setting.num_classes} classes"
        notes.append(f"Not published: no number for the dataset {setting.dataset}{classes}.")
    return Block(
        title=f"{part['block'].iloc[0]}. {setting.title}",
        header=[*header, *(_PUBLISHED_HEADERS[epoch] for epoch in epochs)],
        rows=rows,
        notes=notes,
        quantity="Top-1 accuracy in %",
        places=marks,
    )


def _setting(part: pd.DataFrame) -> Setting:
    first = part.iloc[0]
    values: dict[str, Any] = {name: None if pd.isna(first[name]) else first[name] for name in SETTING_COLUMNS}
    return Setting(**values)


def _measured(cells: pd.DataFrame, epoch: str) -> str:
    cells = cells[(cells["origin"] == "measured") & (cells["epoch"] == epoch) & (cells["state"] == "ok")]
    if cells.empty:
        return "not measured"
    cell = cells.iloc[0]
    spread = "" if pd.isna(cell["top1_std"]) else f" ± {cell['top1_std']:.2f}"
    return f"{cell['top1_mean']:.2f}{spread}"


def _published(cells: pd.DataFrame, epoch: str, sources: dict[str, int]) -> str:
    """The published cells of one method, each with the number of its source, which is entered in `sources`."""
    texts = []
    cells = cells[(cells["origin"] == "published") & (cells["epoch"] == epoch) & (cells["state"] != "not published")]
    for cell in cells.to_dict("records"):
        backbone = f" ({cell['published_backbone']})" if cell["published_backbone"] else ""
        number = sources.setdefault(f"{cell['source']}{backbone}", len(sources) + 1)
        value = f"{cell['top1_mean']:.2f}" if cell["state"] == "ok" else cell["state"]
        texts.append(f"{value} [{number}]")
    return "; ".join(texts) or "not published"


def _counts(setting: Setting) -> str:
    counts = (setting.num_classes, setting.train_images, setting.test_images)
    classes, train, test = ("?" if count is None else count for count in counts)
    return f"{classes} classes, {train} training and {test} test images"
