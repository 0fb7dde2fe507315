"""A grid of runs that differ in what their heads do to the eigenvalues: one row a run, and effects against a reference.

The runs are of one setting (`fgvc.runs.settings`) and differ in method, gradient, options and seed.
"""

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import stats

from fgvc.errors import RunError
from fgvc.pooling import published_gradient
from fgvc.runs.settings import one_setting
from fgvc.runs.spectra import median_rank
from fgvc.runs.summary import Run
from fgvc.spectral import EIGENVALUE_FLOOR
from fgvc.spectral.maps import seb_scale

COLUMNS = (
    "label",
    "method",
    "gradient",
    "options",
    "start",
    "stop",
    "seed",
    "top1",
    "mean_class",
    "num_classes",
    "rank",
    "factor",
    "factor_std",
    "commit",
)


def read_grid(runs: Sequence[Run]) -> tuple[pd.DataFrame, list[str]]:
    """One row a run with `COLUMNS`, in the order of their labels and seeds, and notes on spectra that cannot be read.

    `gradient` is the rule's name, "" where there is none; `options` JSON; start and stop the band of eigenvalues that
    the head keeps (0 and missing: all of them); accuracies in per cent after the last epoch; `rank` the median
    numerical rank of the covariances; factor and factor_std, of SEB only, mean and standard deviation over test images
    of the scalar 1 + t that multiplies their square root; `commit` what trained it. Rank and factor are missing where
    spectrum.npz cannot be read.

    Args:
        runs: finished, of one setting.

    Raises:
        RunError: runs of several settings, two of one label and seed, or a config.yaml that is missing or damaged.
    """
    _, group = one_setting(runs)
    rows, notes = [], []
    for method, repetitions in group.items():
        for run in repetitions:
            row = _row(method.label, run)
            try:
                row |= _of_spectrum(run)
            except RunError as error:
                notes.append(f"without rank and factor: {error}")
            rows.append(row)
    table: pd.DataFrame = pd.DataFrame(rows, columns=COLUMNS).astype({"stop": "Int64", "rank": "Int64"})
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


def _of_spectrum(run: Run) -> dict[str, float]:
    before = run.spectrum().before
    found: dict[str, float] = {"rank": median_rank(before)}
    if run.method == "seb":
        factor = 1 + seb_scale(torch.from_numpy(before).clamp(min=EIGENVALUE_FLOOR))
        found |= {"factor": float(factor.mean()), "factor_std": float(factor.std())}
    return found


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


def effects(grid: pd.DataFrame, reference: str, level: float = 0.95) -> pd.DataFrame:
    """Top-1 of each label, and its difference to that of `reference` over the seeds that both have.

    The interval is Student's t of the differences seed by seed: it speaks of other seeds on the same test images.

    Args:
        grid: of `read_grid`.
        reference: a label.
        level: of the interval.

    Returns:
        One row a label in the order of the grid: label, n (seeds), mean, std (sample), difference, low, high (points of
        per cent; low and high NaN with one common seed), pairs (common seeds).

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
        low, high = t_interval(differences, level)
        mean = differences.mean() if len(differences) else np.nan
        row = {"label": label, "n": len(values), "mean": values.mean(), "std": values.std(ddof=1)}
        rows.append(row | {"difference": mean, "low": low, "high": high, "pairs": len(differences)})
    table: pd.DataFrame = pd.DataFrame(rows)
    return table


def t_interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Student's t interval of the mean of (n,) values; NaN for fewer than two."""
    n = len(values)
    if n < 2:
        return np.nan, np.nan
    half = float(stats.t.ppf((1 + level) / 2, n - 1)) * float(values.std(ddof=1)) / np.sqrt(n)
    return float(values.mean() - half), float(values.mean() + half)
