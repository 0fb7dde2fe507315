"""Published accuracies, to stand beside measured ones."""

from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import pandas as pd

from fgvc.io import read_csv

COLUMNS = ("label", "dataset", "epoch", "backbone", "value", "source")
CLASSES = {"cub": 200, "cars": 196, "aircraft": 100, "dogs": 120, "imagenet": 1000}
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
    published: pd.DataFrame = pd.DataFrame([row for row in rows if row[4]], columns=COLUMNS)
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
