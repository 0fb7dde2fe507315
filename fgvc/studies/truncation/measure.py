"""How much a part of the spectrum matters: accuracy by band, kept at test time only or in training as well.

Three small tables hold a study, and its figures need no more: `grid` (one row a run, of `read_grid`), `tested` (one row
a run and band) and `classes` (one row a band and class, seeds pooled).
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from fgvc.csv_files import read_csv, to_csv
from fgvc.errors import DatasetError, RunError, WeightsError
from fgvc.runs.summary import Run
from fgvc.studies.truncation.bands import evaluate_bands
from fgvc.studies.truncation.grid import COLUMNS as GRID_COLUMNS
from fgvc.studies.truncation.grid import kept_band, read_grid

BAND = ["start", "stop"]
TESTED_COLUMNS = ("label", "seed", *BAND, "rank", "images", "right", "top1")
CLASS_COLUMNS = ("label", *BAND, "class", "images", "recall", "all", "change")


class Study(NamedTuple):
    """The tables of a study; `tested` and `classes` have no rows where no run was cut at test time."""

    grid: pd.DataFrame
    tested: pd.DataFrame
    classes: pd.DataFrame


def read_study(
    runs: Sequence[Run], *, cut: bool = True, root: str | None = None, cache: str | None = None
) -> tuple[Study, list[str]]:
    """The tables of finished runs of one setting, and notes on runs that cannot be cut at test time.

    Args:
        runs: as in `read_grid`.
        cut: evaluate the runs that see all eigenvalues on parts of them.
        root, cache: as in `evaluate_bands`.

    Raises:
        RunError: as `read_grid`.
    """
    grid, notes = read_grid(runs)
    whole = [run for run in runs if cut and kept_band(run) == (0, None)]
    table, left_out = cut_at_test_time(whole, root=root, cache=cache)
    notes += left_out
    if table is None:
        if cut:
            notes.append("no run of a covariance head that sees all eigenvalues: nothing was cut at test time")
        return Study(grid, _empty(TESTED_COLUMNS), _empty(CLASS_COLUMNS)), notes
    return Study(grid, by_run(table), by_class(table)), notes


def cut_at_test_time(
    runs: Iterable[Run], *, root: str | None = None, cache: str | None = None
) -> tuple[pd.DataFrame | None, list[str]]:
    """Evaluate runs with every one of `standard_bands`.

    Args:
        runs: whose heads see all of their eigenvalues.
        root, cache: as in `evaluate_bands`.

    Returns:
        One row a run, band and class: label, seed and the columns of `evaluate_bands`; None where no run could be cut.
        And a note on each that could not.
    """
    tables, notes = [], []
    for run in runs:
        try:
            tables.append(evaluate_bands(run.path, root=root, cache=cache).assign(label=run.label, seed=run.seed))
        except (RunError, DatasetError, WeightsError) as error:
            notes.append(f"not cut at test time: {error}")
    return pd.concat(tables, ignore_index=True) if tables else None, notes


def by_run(cut: pd.DataFrame) -> pd.DataFrame:
    """Rows of `cut_at_test_time` summed over the classes: `TESTED_COLUMNS`, top1 in per cent."""
    keys = ["label", "seed", *BAND, "rank"]
    table: pd.DataFrame = cut.groupby(keys, dropna=False, sort=False)[["images", "right"]].sum().reset_index()
    table["top1"] = 100 * table["right"] / table["images"]
    tested: pd.DataFrame = table.reindex(columns=TESTED_COLUMNS)
    return tested


def by_class(cut: pd.DataFrame) -> pd.DataFrame:
    """Rows of `cut_at_test_time` with the seeds pooled: `CLASS_COLUMNS`, recalls in per cent."""
    keys = ["label", *BAND, "class"]
    table: pd.DataFrame = cut.groupby(keys, dropna=False, sort=False)[["images", "right"]].sum().reset_index()
    table["recall"] = 100 * table["right"] / table["images"]
    whole = table[(table["start"] == 0) & table["stop"].isna()].set_index(["label", "class"])["recall"]
    table["all"] = whole.loc[pd.MultiIndex.from_frame(table[["label", "class"]])].to_numpy()
    table["change"] = table["recall"] - table["all"]
    classes: pd.DataFrame = table.reindex(columns=CLASS_COLUMNS)
    return classes


def band_table(study: Study, reference: str) -> pd.DataFrame:
    """Top-1 by band over the seeds.

    Args:
        study: its runs that keep a band, by the exact or the published gradient, and those of the reference.
        reference: the label that stands for all eigenvalues, in training and cut at test time; another head that sees
            them all is another method, and is left out.

    Returns:
        One row a curve and band: curve ("test", cut at test time only; "exact" and "published", trained so), kind
        ("all", "largest", "smallest" for all but the largest, "window"), start, stop, rank, n, mean, std, lowest and
        highest, in per cent. The reference stands under "exact" and "published" alike: it has nothing to leak.
    """
    grid, tested = study.grid, study.tested[study.tested["label"] == reference]
    cut = (grid["start"] > 0) | grid["stop"].notna()
    whole = grid[(grid["label"] == reference) & ~cut]
    gradients = {"exact": "exact", "published": "topn_published"}
    trained = {curve: grid[cut & (grid["gradient"] == gradient)] for curve, gradient in gradients.items()}
    parts = {"test": tested, "exact": pd.concat([whole, trained["exact"]])}
    if len(trained["published"]):
        parts["published"] = pd.concat([whole, trained["published"]])
    rank = int(grid["rank"].median()) if grid["rank"].notna().any() else int(grid[BAND].max().max())
    rows = []
    for curve, part in parts.items():
        for (start, stop), runs in part.groupby(BAND, dropna=False):
            values = runs["top1"].to_numpy(dtype=float)
            row = {"curve": curve, "kind": _kind(start, stop), "start": start, "stop": stop, "rank": rank}
            row |= {"n": len(values), "mean": values.mean(), "std": values.std(ddof=1) if len(values) > 1 else np.nan}
            rows.append(row | {"lowest": values.min(), "highest": values.max()})
    table: pd.DataFrame = pd.DataFrame(rows).astype({"stop": "Int64"})
    return table


def chance(study: Study) -> float:
    """Accuracy of guessing in per cent; NaN where the runs do not tell their number of classes."""
    return 100 / float(study.grid["num_classes"].max())


def is_cut(study: Study) -> bool:
    """Whether any run was cut at test time or trained on a part of the spectrum."""
    return len(study.tested) > 0 or bool(((study.grid["start"] > 0) | study.grid["stop"].notna()).any())


def _kind(start: int, stop: int) -> str:
    if pd.isna(stop):
        return "smallest" if start else "all"
    return "window" if start else "largest"


def save_study(study: Study, folder: Path) -> dict[Path, str]:
    """The text of each file of a study: grid.csv, and bands.csv and band_classes.csv where runs were cut."""
    texts = {folder / "grid.csv": to_csv(study.grid, None)}
    if len(study.tested):
        texts[folder / "bands.csv"] = to_csv(study.tested, "%.4f")
        texts[folder / "band_classes.csv"] = to_csv(study.classes, "%.4f")
    return texts


def load_study(folder: Path) -> Study:
    """Read the files that `save_study` names; without bands.csv there is no part at test time.

    Raises:
        RunError: a file is damaged, or grid.csv missing.
    """
    grid = _read(folder / "grid.csv", GRID_COLUMNS)
    if not (folder / "bands.csv").is_file():
        return Study(grid, _empty(TESTED_COLUMNS), _empty(CLASS_COLUMNS))
    return Study(grid, _read(folder / "bands.csv", TESTED_COLUMNS), _read(folder / "band_classes.csv", CLASS_COLUMNS))


def _read(path: Path, columns: tuple[str, ...]) -> pd.DataFrame:
    table: pd.DataFrame = read_csv(path, columns, names=("label", "class")).astype({"stop": "Int64"})
    return table


def _empty(columns: tuple[str, ...]) -> pd.DataFrame:
    table: pd.DataFrame = pd.DataFrame(columns=columns)
    return table
