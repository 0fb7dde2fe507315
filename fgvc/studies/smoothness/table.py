"""Saved measures of smoothness: one row a measured step, read back and summarised without the runs."""

from pathlib import Path

import numpy as np
import pandas as pd

from fgvc.csv_files import read_csv
from fgvc.errors import RunError

SMOOTHNESS_COLUMNS = (
    "setting",  # data, backbone and optimiser in a line
    "point",  # training; last or best: the saved weights of a run
    "weights",  # which ones were moved: all, features
    "method",
    "gradient",
    "label",
    "seed",
    "step",  # of the optimiser, from 1; at saved weights the number of the batch
    "diverged",  # whether training ended in this step, without measures
    "loss",
    "gradient_norm",
    "step_size_min",
    "step_size_max",
    "loss_min",
    "loss_max",
    "gradient_change_min",
    "gradient_change_max",
    "beta",
)

MEASURES = SMOOTHNESS_COLUMNS[SMOOTHNESS_COLUMNS.index("loss") :]

SUMMARISED = ("loss_range", "gradient_change_max", "relative_change", "beta")
"""What is drawn and summarised, see `with_ranges`."""

_SHARED = ("setting", "point", "weights")


def load_smoothness(path: Path) -> pd.DataFrame:
    """Read measures back from their CSV file.

    Returns:
        A frame with `SMOOTHNESS_COLUMNS`.

    Raises:
        RunError: the file is missing or damaged, holds no row, or something else than a number where one belongs.
    """
    table = read_csv(path, SMOOTHNESS_COLUMNS)
    if not len(table):
        raise RunError(f"{path}: no row in it; make it anew: fgvc study_smoothness")
    kinds = {"diverged": pd.api.types.is_bool_dtype} | dict.fromkeys(
        ("seed", "step", *MEASURES), pd.api.types.is_numeric_dtype
    )
    for column, fits in kinds.items():
        if not fits(table[column]):
            raise RunError(f"{path}: column {column} holds {table[column].iloc[0]!r} or the like; restore the file")
    typed: pd.DataFrame = table.assign(gradient=table["gradient"].astype(object).fillna(""))
    return typed


def require_one_setting(table: pd.DataFrame) -> None:
    """Raise RunError where measures of different settings are mixed: their smoothness does not compare."""
    for column in _SHARED:
        found = table[column].unique().tolist()
        if len(found) > 1:
            raise RunError(f"measures of different {column} do not compare: {'; '.join(found)}; give those of one")


def divergence_notes(table: pd.DataFrame) -> list[str]:
    """A line for each training that diverged."""
    ended = table[table["diverged"]]
    return [f"{row['label']}, seed {row['seed']}: diverged at step {row['step']}" for _, row in ended.iterrows()]


def with_ranges(table: pd.DataFrame) -> pd.DataFrame:
    """The measured rows with `SUMMARISED`: `loss_range` is the largest less the smallest loss, `relative_change` the
    largest change of the gradient over its norm."""
    measured = table[~table["diverged"]]
    finite = np.isfinite(measured["loss_max"])
    ranges: pd.DataFrame = measured.assign(
        loss_range=(measured["loss_max"] - measured["loss_min"].where(finite, 0)),  # infinite where a loss is
        relative_change=measured["gradient_change_max"] / measured["gradient_norm"],
    )
    return ranges


def summarise_smoothness(table: pd.DataFrame) -> pd.DataFrame:
    """One row a method: medians and quartiles over measured steps and seeds, and how far the seeds' medians lie apart.

    Medians and quartiles are order statistics, so that a few infinite values leave them finite.

    Args:
        table: with `SMOOTHNESS_COLUMNS`, of one setting.

    Returns:
        Columns method, gradient, label, seeds, points (measured steps of all seeds), diverged (seeds that did),
        gradient_norm (median), and `SUMMARISED`, each followed by *_lower and *_upper (quartiles), *_seed_min and
        *_seed_max (of the medians of the seeds).

    Raises:
        RunError: different settings are mixed, or every training diverged before it was measured.
    """
    require_one_setting(table)
    measured = with_ranges(table)
    if not len(measured):
        raise RunError(f"nothing was measured: {'; '.join(divergence_notes(table))}; lower optimizer.lr of the run")
    diverged = table[table["diverged"]].groupby("label")["seed"].nunique()
    rows = []
    for label, part in measured.groupby("label", sort=False):
        row: dict[str, object] = {name: part[name].iloc[0] for name in ("method", "gradient", "label")}
        row |= {"seeds": part["seed"].nunique(), "points": len(part), "diverged": int(diverged.get(label, 0))}
        row["gradient_norm"] = _quantile(part["gradient_norm"], 0.5)
        for name in SUMMARISED:
            seeds = [_quantile(values, 0.5) for _, values in part.groupby("seed")[name]]
            row |= {name: _quantile(part[name], 0.5)}
            row |= {f"{name}_lower": _quantile(part[name], 0.25), f"{name}_upper": _quantile(part[name], 0.75)}
            row |= {f"{name}_seed_min": min(seeds), f"{name}_seed_max": max(seeds)}
        rows.append(row)
    summary: pd.DataFrame = pd.DataFrame(rows)
    return summary


def beta_ratios(table: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Beta of each method over that of `reference` at the same seed and step, which start from the same weights.

    Returns:
        One row a method that both have steps of: label, points, ratio (median), lower, upper (quartiles).

    Raises:
        RunError: different settings are mixed, or there is no such label.
    """
    require_one_setting(table)
    measured = with_ranges(table)
    base = measured[measured["label"] == reference].set_index(["seed", "step"])["beta"]
    if base.empty:
        raise RunError(f"no measures of {reference!r}; choose one of {', '.join(dict.fromkeys(measured['label']))}")
    rows = []
    for label, part in measured.groupby("label", sort=False):
        ratios = (part.set_index(["seed", "step"])["beta"] / base).dropna()
        if len(ratios):
            lower, median, upper = (_quantile(ratios, share) for share in (0.25, 0.5, 0.75))
            rows.append((label, len(ratios), median, lower, upper))
    ratios_table: pd.DataFrame = pd.DataFrame(rows, columns=["label", "points", "ratio", "lower", "upper"])
    return ratios_table


def _quantile(values: "pd.Series[float]", share: float) -> float:
    return float(np.quantile(values, share, method="inverted_cdf"))
