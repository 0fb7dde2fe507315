"""How much a part of the spectrum matters: accuracy by band, where the cut is made at test time or in training too.

The runs have one setting (`fgvc.runs.settings`) and differ in method, gradient, options and seed. A study is three
small tables, and its figures need no more: `grid` (a row for each run, see `read_grid`), `tested` (a row for each run
and band), `classes` (a row for each band and class, seeds pooled).
"""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import stats

from fgvc.errors import DatasetError, RunError, WeightsError
from fgvc.io import read_tables, write_tables
from fgvc.pooling import published_gradient
from fgvc.runs.settings import one_setting
from fgvc.runs.spectra import median_rank
from fgvc.runs.summary import Run
from fgvc.spectral import EIGENVALUE_FLOOR
from fgvc.spectral.maps import seb_scale
from fgvc.studies.truncation.bands import evaluate_bands

BAND = ["start", "stop"]
GRID_COLUMNS = (
    *("label", "method", "gradient", "options", *BAND, "seed"),
    *("top1", "mean_class", "num_classes", "rank", "factor", "factor_std", "commit"),
)
TESTED_COLUMNS = ("label", "seed", *BAND, "rank", "images", "right", "top1")
CLASS_COLUMNS = ("label", *BAND, "class", "images", "recall", "all", "change")


def read_grid(runs: Sequence[Run]) -> tuple[pd.DataFrame, list[str]]:
    """A row for each run with `GRID_COLUMNS`, in the order of labels and seeds, and notes on unreadable spectra.

    `gradient` is the rule's name, "" where there is none. `options` is JSON. start and stop are the band of eigenvalues
    that the head keeps (0 and missing: all of them). Accuracies are in per cent after the last epoch. `rank` is the
    median numerical rank of the covariances. factor and factor_std, for SEB only, are the mean and standard deviation
    over test images of the scalar 1 + t that multiplies the square root. `commit` is the code that trained the run.
    Rank and factor are missing where spectrum.npz cannot be read.

    Args:
        runs: finished runs of one setting.

    Raises:
        RunError: runs of several settings, two of one label and seed, or a config.yaml that is missing or damaged.
    """
    _, group = one_setting(runs)
    rows, notes = [], []
    for method, repetitions in group.items():
        for run in repetitions:
            row = _row(method.label, run)
            try:
                before = run.spectrum().before
            except RunError as error:
                notes.append(f"without rank and factor: {error}")
            else:
                row["rank"] = median_rank(before)
                if run.method == "seb":
                    factor = 1 + seb_scale(torch.from_numpy(before).clamp(min=EIGENVALUE_FLOOR))
                    row |= {"factor": float(factor.mean()), "factor_std": float(factor.std())}
            rows.append(row)
    table: pd.DataFrame = pd.DataFrame(rows, columns=GRID_COLUMNS).astype({"stop": "Int64", "rank": "Int64"})
    return table, notes


def _row(label: str, run: Run) -> dict[str, object]:
    start, stop = kept_band(run)
    assert run.final is not None
    return {
        "label": label,
        "method": run.method,
        "gradient": run.gradient or published_gradient(run.method) or "",
        "options": json.dumps(_options(run), sort_keys=True),
        "start": start,
        "stop": stop,
        "seed": run.seed,
        "top1": run.final.top1,
        "mean_class": run.final.mean_class,
        "num_classes": run.num_classes,
        "commit": run.commit,
    }


def kept_band(run: Run) -> tuple[int, int | None]:
    """(start, stop) of the eigenvalues that a run's head sees; (0, None) for all. Raises RunError as `read_grid`."""
    keep = _options(run).get("keep")
    if keep is None and run.method == "svd_topn":
        channels = run.reduction or math.isqrt(2 * (run.out_features or 0))  # a descriptor has C (C + 1) / 2 numbers
        return 0, channels - 50  # as published
    pair = [0, keep] if type(keep) is int else [0, None] if keep is None else keep
    whole = isinstance(pair, list) and len(pair) == 2 and all(type(end) is int or end is None for end in pair)
    if not whole or pair[0] is None:
        raise RunError(
            f"{run.path / 'config.yaml'}: method.options.keep is {keep!r}, not N or [start, stop]; restore it"
        )
    return pair[0], pair[1]


def _options(run: Run) -> dict[str, Any]:
    settings = run.settings().get("method")
    options = (settings.get("options") or {}) if isinstance(settings, dict) else None
    if not isinstance(options, dict):
        raise RunError(f"{run.path / 'config.yaml'}: no mapping under 'method' or its options; restore the file")
    return options


def effects(grid: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Top-1 of each label, and its difference to that of `reference` over the seeds that both have.

    The 95 % interval is Student's t of the differences seed by seed: it holds for other seeds on the same test images.

    Returns:
        A row for each label in the order of the grid: label, n (seeds), mean, std (sample), difference, low, high
        (points of per cent; low and high NaN with one common seed), pairs (common seeds).

    Raises:
        RunError: no such label in the grid, or two rows of one label and seed.
    """
    twice = grid[grid.duplicated(["label", "seed"])]
    if len(twice):
        first = twice.iloc[0]
        raise RunError(f"two runs of {first['label']} with seed {first['seed']}; leave out one of them")
    if reference not in set(grid["label"]):
        known = ", ".join(dict.fromkeys(grid["label"]))
        raise RunError(f"no run of the reference {reference!r}; choose one of {known}")
    base = grid[grid["label"] == reference].set_index("seed")["top1"]
    rows = []
    for label, part in grid.groupby("label", sort=False):
        values = part.set_index("seed")["top1"]
        differences = (values - base).dropna().to_numpy(dtype=float)
        low, high = t_interval(differences)
        mean = differences.mean() if len(differences) else np.nan
        row = {"label": label, "n": len(values), "mean": values.mean(), "std": values.std(ddof=1)}
        rows.append(row | {"difference": mean, "low": low, "high": high, "pairs": len(differences)})
    return pd.DataFrame(rows)


def t_interval(values: np.ndarray) -> tuple[float, float]:
    """Student's t interval at 95 % of the mean of (n,) values; NaN for fewer than two."""
    n = len(values)
    if n < 2:
        return np.nan, np.nan
    half = float(stats.t.ppf(0.975, n - 1)) * float(values.std(ddof=1)) / np.sqrt(n)
    return float(values.mean() - half), float(values.mean() + half)


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
        cut: evaluate the runs that see all eigenvalues on bands of them.
        root, cache: as in `evaluate_bands`.

    Raises:
        RunError: as `read_grid`.
    """
    grid, notes = read_grid(runs)
    _, group = one_setting(runs)
    whole = [run for of_method in group.values() for run in of_method if cut and kept_band(run) == (0, None)]
    table, left_out = cut_at_test_time(whole, root=root, cache=cache)
    notes += left_out
    if table is None:
        if cut:
            notes.append("no run of a covariance head that sees all eigenvalues: nothing was cut at test time")
        return Study(grid, pd.DataFrame(columns=TESTED_COLUMNS), pd.DataFrame(columns=CLASS_COLUMNS)), notes
    return Study(grid, by_run(table), by_class(table)), notes


def cut_at_test_time(
    runs: Iterable[Run], *, root: str | None = None, cache: str | None = None
) -> tuple[pd.DataFrame | None, list[str]]:
    """Evaluate runs with every one of `standard_bands`.

    Their heads see all of their eigenvalues; `root` and `cache` as in `evaluate_bands`.

    Returns:
        A row for each run, band and class, with label, seed and the columns of `evaluate_bands`; None where no run
        could be cut. And a note on each run that could not.
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
    return table.reindex(columns=TESTED_COLUMNS)


def by_class(cut: pd.DataFrame) -> pd.DataFrame:
    """Rows of `cut_at_test_time` with the seeds pooled: `CLASS_COLUMNS`, recalls in per cent."""
    keys = ["label", *BAND, "class"]
    table: pd.DataFrame = cut.groupby(keys, dropna=False, sort=False)[["images", "right"]].sum().reset_index()
    table = table[table["images"] > 0].reset_index(drop=True)
    table["recall"] = 100 * table["right"] / table["images"]
    whole = table[(table["start"] == 0) & table["stop"].isna()].set_index(["label", "class"])["recall"]
    table["all"] = whole.loc[pd.MultiIndex.from_frame(table[["label", "class"]])].to_numpy()
    table["change"] = table["recall"] - table["all"]
    return table.reindex(columns=CLASS_COLUMNS)


def band_table(study: Study, reference: str) -> pd.DataFrame:
    """Top-1 by band over the seeds.

    Args:
        study: the study; the table has its runs that keep a band, with the exact or the published gradient, and those
            of the reference.
        reference: the label that sees all eigenvalues in training and is cut at test time; another head that sees them
            all is another method, and is left out.

    Returns:
        A row for each curve and band: curve ("test", cut at test time only; "exact" and "published", trained with the
        band), kind ("all", "largest", "smallest" for all but the largest, "window"), start, stop, rank, n, mean, std,
        lowest and highest, in per cent. "exact" and "published" both have the reference: it drops no eigenvalue.
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
    return pd.DataFrame(rows).astype({"stop": "Int64"})


def chance(study: Study) -> float:
    """Accuracy of guessing in per cent; NaN where the runs do not tell their number of classes."""
    return 100 / float(study.grid["num_classes"].max())


def is_cut(study: Study) -> bool:
    """Whether any run was cut at test time or trained on a part of the spectrum."""
    return len(study.tested) > 0 or bool(((study.grid["start"] > 0) | study.grid["stop"].notna()).any())


def _kind(start: Any, stop: Any) -> str:
    if pd.isna(stop):
        return "smallest" if start else "all"
    return "window" if start else "largest"


_FILES = {"grid": GRID_COLUMNS, "bands": TESTED_COLUMNS, "band_classes": CLASS_COLUMNS}


def save_study(study: Study, folder: Path) -> list[Path]:
    """Write grid.csv, and bands.csv and band_classes.csv where runs were cut; returns the paths."""
    tables = dict(zip(_FILES, study if len(study.tested) else study[:1], strict=False))
    return write_tables(folder, tables, "%.4f", grid=None)


def load_study(folder: Path) -> Study:
    """Read the files of `save_study`; without bands.csv no run was cut at test time.

    Raises RunError: a file is damaged, or grid.csv missing.
    """
    cut = (folder / "bands.csv").is_file()
    found = read_tables(folder, _FILES if cut else {"grid": GRID_COLUMNS}, ("label", "class"))
    tables = {name: pd.DataFrame(columns=columns) for name, columns in _FILES.items()}
    tables |= {name: table.astype({"stop": "Int64"}) for name, table in found.items()}
    return Study(*tables.values())
