"""The accuracy table: measured numbers over seeds and published ones, as one tidy frame and as blocks to read."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fgvc.errors import RunError
from fgvc.io import read_csv
from fgvc.presentation.render import NOT_MEASURED, PLACES_NOTE, Block, places, titled, with_spread
from fgvc.presentation.style import METHOD_STYLES, method_order
from fgvc.runs import Accuracy, Method, Run, Setting, group_runs
from fgvc.runs.settings import distinctions, in_order, seeds_in_words, sources

SETTING_COLUMNS = tuple(field.name for field in fields(Setting))
_METRICS = ("top1", "top5", "mean_class")
_NUMBERS = tuple(f"{metric}_{statistic}" for metric in _METRICS for statistic in ("mean", "std"))
TABLE_COLUMNS = (
    "block",  # number of the setting, from 1
    *SETTING_COLUMNS,
    "label",
    "method",
    "gradient",
    "origin",  # measured, published
    "epoch",  # final, best, unstated (published only)
    "state",  # ok, not measured, not published, did not converge (published only)
    "n",
    *_NUMBERS,
    "published_backbone",
    "source",
    "seeds",
    "runs",
    "commits",
)


PUBLISHED_COLUMNS = ("label", "dataset", "epoch", "backbone", "value", "source")
_CLASSES = {"cub": 200, "cars": 196, "aircraft": 100, "dogs": 120, "imagenet": 1000}
"""Classes of the benchmarks that the numbers were published for."""
_ICCV21 = ("method", "dataset", "final_top1", "best_top1", "converged", "source")
_RIVALS = ("method", "backbone", "source")  # and one column a dataset
_IMAGENET = ("backbone", "method", "protocol", "top1_error", "top5_error", "source")


def load_published(folder: Path) -> pd.DataFrame:
    """Read `fgvc_iccv21.csv`, `rivals.csv` and `imagenet_iccv21.csv` of a folder of published numbers.

    Returns:
        One row a published cell, all of it text: `label` of the method, `dataset`, `epoch` ("final", "best", which
        there means best on the test set, or "unstated"), `backbone` ("" where the source does not name it), `value`
        (top-1 in per cent as printed, 100 minus the printed error for ImageNet, or "did not converge") and `source`.

    Raises:
        RunError: a file is missing or damaged.
    """
    rows: list[tuple[Any, ...]] = []
    for row in read_csv(folder / "fgvc_iccv21.csv", _ICCV21, as_text=True).to_dict("records"):
        for epoch in ("final", "best"):
            value = "did not converge" if row["converged"] == "no" else row[f"{epoch}_top1"]
            rows.append((row["method"], row["dataset"], epoch, "", value, row["source"]))
    rivals = read_csv(folder / "rivals.csv", _RIVALS, as_text=True)
    datasets = [column for column in rivals.columns if column not in _RIVALS]
    for row in rivals.to_dict("records"):
        backbone = "" if row["backbone"] == "unstated" else row["backbone"]
        rows += [(row["method"], dataset, "unstated", backbone, row[dataset], row["source"]) for dataset in datasets]
    rows += _imagenet(folder)
    published: pd.DataFrame = pd.DataFrame([row for row in rows if row[4]], columns=PUBLISHED_COLUMNS)
    return published


def _imagenet(folder: Path) -> list[tuple[Any, ...]]:
    rows = []
    for row in read_csv(folder / "imagenet_iccv21.csv", _IMAGENET, as_text=True).to_dict("records"):
        label = f"{row['method']} (hybrid)" if row["protocol"] == "hybrid" else row["method"]
        try:
            value = str(100 - Decimal(row["top1_error"]))
        except InvalidOperation:
            value = row["top1_error"]  # refused where it is used, by the name of its method
        rows.append((label, "imagenet", "unstated", row["backbone"], value, row["source"]))
    return rows


def accuracy_table(runs: Iterable[Run], published: pd.DataFrame | None = None) -> pd.DataFrame:
    """Tabulate finished runs: mean and sample standard deviation (n - 1) over the seeds of each method and setting.

    A block is one setting, its methods in the order of `METHOD_STYLES`. For each of them it has the rows measured
    final, measured best, published final, published best and any number published without saying which epoch; `state`
    tells numbers from "not measured" and "not published". `best` is the epoch selected on the split `selected_on` for
    measured numbers and on the test set for published ones. Published numbers match by dataset, number of classes and
    label alone: their backbone and protocol are their own.

    Args:
        runs: finished runs (`fgvc.runs.split_finished`).
        published: of `load_published`, None for no published numbers.

    Returns:
        A frame with `TABLE_COLUMNS`, accuracies in per cent. The standard deviation of a single run is NaN.

    Raises:
        RunError: two runs of one setting and method have the same seed, or a published value is not a number.
    """
    published = pd.DataFrame(columns=PUBLISHED_COLUMNS) if published is None else published
    groups = in_order(group_runs(runs))
    measured = {method.label for group in groups.values() for method in group}
    published = published[published["label"].isin(measured | set(METHOD_STYLES))]
    rows: list[dict[str, Any]] = []
    for number, (setting, group) in enumerate(groups.items(), start=1):
        head = {"block": number, **asdict(setting)}
        of_dataset = published[published["dataset"] == setting.dataset]
        if setting.num_classes not in (None, _CLASSES.get(setting.dataset)):
            of_dataset = of_dataset[:0]  # a part of the benchmark is another, easier task
        methods = {method.label: method for method in group}
        for label in sorted({*methods, *of_dataset["label"]}, key=method_order):
            method = methods.get(label, Method("", None, label))
            cells = _measured(group.get(method, [])) + _published(of_dataset[of_dataset["label"] == label])
            rows += [{**head, "label": label, "method": method.name, "gradient": method.gradient, **c} for c in cells]
    return _typed(pd.DataFrame(rows, columns=TABLE_COLUMNS))


def load_accuracy(path: Path) -> pd.DataFrame:
    """An `accuracy_table` from the CSV that `to_csv` made of it (accuracies to four decimals).

    Raises RunError: the file is missing or damaged.
    """
    try:
        return _typed(read_csv(path, TABLE_COLUMNS)[list(TABLE_COLUMNS)])
    except (ValueError, TypeError) as error:
        raise RunError(f"{path}: not an accuracy table ({error}); make it again: fgvc make_tables") from error


def _typed(table: pd.DataFrame) -> pd.DataFrame:
    counts = ["reduction", "num_classes", "train_images", "test_images", "n"]
    typed: pd.DataFrame = table.astype({**dict.fromkeys(counts, "Int64"), **dict.fromkeys(_NUMBERS, "float64")})
    return typed


def _measured(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The cells measured final and measured best of one method."""
    cells = []
    for epoch in ("final", "best"):
        cell: dict[str, Any] = {"origin": "measured", "epoch": epoch, "n": len(runs)}
        if runs:
            accuracies = [run.final if epoch == "final" else run.best for run in runs]
            cell |= {"state": "ok", **_statistics([accuracy for accuracy in accuracies if accuracy is not None])}
            cell |= sources(runs)
        else:
            cell["state"] = "not measured"
        cells.append(cell)
    return cells


def _statistics(accuracies: Sequence[Accuracy]) -> dict[str, float]:
    numbers = {}
    for metric in _METRICS:
        values = [getattr(accuracy, metric) for accuracy in accuracies]
        if None in values:
            continue
        numbers[f"{metric}_mean"] = float(np.mean(values))
        numbers[f"{metric}_std"] = float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")
    return numbers


def _published(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """The cells published final, published best and every published unstated one of one method on one dataset."""
    cells: list[dict[str, Any]] = []
    for row in rows.to_dict("records"):
        cell = {"origin": "published", "epoch": row["epoch"], "source": row["source"]}
        cell["published_backbone"] = row["backbone"]
        if row["value"] == "did not converge":
            cell["state"] = row["value"]
        else:
            cell |= {"state": "ok", "top1_mean": _number(row["value"], f"{row['label']} on {row['dataset']}")}
        cells.append(cell)
    absent = [epoch for epoch in ("final", "best") if epoch not in set(rows["epoch"])]
    cells += [{"origin": "published", "epoch": epoch, "state": "not published"} for epoch in absent]
    return sorted(cells, key=lambda cell: ("final", "best", "unstated").index(cell["epoch"]))


def _number(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 <= value <= 100:  # so is NaN
        raise RunError(f"published number of {where} is {text!r}, not an accuracy in per cent; correct its csv file")
    return value


_PUBLISHED_HEADERS = {
    "final": "Published final",
    "best": "Published best (on test)",
    "unstated": "Published, epoch unstated",
}


def table_blocks(table: pd.DataFrame) -> list[Block]:
    """A block for each setting of an `accuracy_table`, after an overview of the measured where there are several."""
    parts = {_setting(part): part for _, part in table.groupby("block")}
    of = distinctions(parts)
    blocks = [_setting_block(setting, part, of[setting]) for setting, part in parts.items()]
    return blocks if len(blocks) == 1 else [_overview(parts, of), *blocks]


def _overview(parts: Mapping[Setting, pd.DataFrame], of: Mapping[Setting, str]) -> Block:
    header = ["Method"]
    for setting in parts:
        header += [f"{of[setting]}: final", f"{of[setting]}: best (selected on {setting.selected_on})"]
    table = pd.concat(parts.values())
    measured = table[(table["origin"] == "measured") & (table["state"] == "ok")]
    labels = sorted(set(measured["label"]), key=method_order)
    rows: list[list[str]] = [[label] for label in labels]
    marks: dict[tuple[int, int], int] = {}
    for part in parts.values():
        for epoch in ("final", "best"):
            marks |= _marks(part, labels, epoch, len(rows[0]))
            for row in rows:
                row.append(_measured_text(part[part["label"] == row[0]], epoch))
    caption = f"Top-1 accuracy in % in {len(parts)} settings. {_MEAN} {seeds_in_words(measured['n'])}."
    notes = [f"{of[setting]}: {setting.title}" for setting in parts] + ([PLACES_NOTE] if marks else [])
    return Block("Overview, top-1 in %", header, rows, notes, caption, "overview", marks)


_MEAN = "Mean ± sample standard deviation over"


def _marks(part: pd.DataFrame, labels: Sequence[str], epoch: str, column: int) -> dict[tuple[int, int], int]:
    top1 = part[(part["origin"] == "measured") & (part["epoch"] == epoch)].set_index("label")["top1_mean"]
    return places([float(top1.get(label, math.nan)) for label in labels], column)


def _setting_block(setting: Setting, part: pd.DataFrame, of: str) -> Block:
    published = part.loc[(part["origin"] == "published") & (part["state"] != "not published"), "epoch"]
    epochs = [epoch for epoch in _PUBLISHED_HEADERS if epoch != "unstated" or epoch in set(published)]
    if published.empty:
        epochs = []
    cited: dict[str, int] = {}
    rows = []
    for label in dict.fromkeys(part["label"]):
        cells = part[part["label"] == label]
        n = str(cells["n"].max())
        measured = [_measured_text(cells, epoch) for epoch in ("final", "best")]
        rows.append([label, n, *measured, *(_published_text(cells, epoch, cited) for epoch in epochs)])
    marks: dict[tuple[int, int], int] = {}
    for column, epoch in ((2, "final"), (3, "best")):
        marks |= _marks(part, [row[0] for row in rows], epoch, column)
    header = ["Method", "n", "Final", f"Best (selected on {setting.selected_on})"]
    notes = [
        f"Final: after the last epoch. Best: at the epoch with the highest top-1 on the {setting.selected_on} split. "
        "± is the sample standard deviation over n seeds.",
        *(f"[{number}] published: {source}" for source, number in cited.items()),
    ]
    if marks:
        notes.append(PLACES_NOTE)
    caption = f"Top-1 accuracy in % on {setting.words}. {_MEAN} {seeds_in_words(part['n'].dropna())}."
    header += [_PUBLISHED_HEADERS[epoch] for epoch in epochs]
    return Block(titled("Accuracy, top-1 in %", of), header, rows, notes, caption, "accuracy", marks)


def _setting(part: pd.DataFrame) -> Setting:
    first = part.iloc[0]
    values: dict[str, Any] = {name: None if pd.isna(first[name]) else first[name] for name in SETTING_COLUMNS}
    return Setting(**values)


def _measured_text(cells: pd.DataFrame, epoch: str) -> str:
    cells = cells[(cells["origin"] == "measured") & (cells["epoch"] == epoch) & (cells["state"] == "ok")]
    if cells.empty:
        return NOT_MEASURED
    return with_spread(*cells[["top1_mean", "top1_std"]].iloc[0])


def _published_text(cells: pd.DataFrame, epoch: str, numbers: dict[str, int]) -> str:
    """The published cells of one method, each with the number of its source, which is entered in `numbers`."""
    texts = []
    cells = cells[(cells["origin"] == "published") & (cells["epoch"] == epoch) & (cells["state"] != "not published")]
    for cell in cells.to_dict("records"):
        backbone = f" ({cell['published_backbone']})" if cell["published_backbone"] else ""
        number = numbers.setdefault(f"{cell['source']}{backbone}", len(numbers) + 1)
        value = f"{cell['top1_mean']:.2f}" if cell["state"] == "ok" else cell["state"]
        texts.append(f"{value} [{number}]")
    return "; ".join(texts) or NOT_MEASURED
