"""Differences in accuracy between the methods of a setting, on the predictions that their runs saved."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from fgvc.analysis.paired import combine_p_values, holm, mcnemar, paired_bootstrap
from fgvc.analysis.runs import Run
from fgvc.analysis.settings import Group, sources
from fgvc.errors import RunError

COLUMNS = (
    *("label", "against", "state", "pairs", "images", "difference", "low", "high"),
    *("mcnemar_median", "mcnemar_lowest", "mcnemar_highest", "mcnemar_combined", "holm", "seeds", "runs", "commits"),
)


class _Pair(NamedTuple):
    """Two runs of one seed, what they predicted, and the p-value of McNemar's test on it."""

    runs: tuple[Run, Run]
    predictions: tuple[pd.DataFrame, pd.DataFrame]
    p_value: float


def compare(first: Sequence[Run], second: Sequence[Run]) -> tuple[dict[str, Any], list[str]]:
    """How much better the runs of one method are than those of another, seed by seed, after the last epoch.

    A seed of which predictions are missing or damaged, or of other images, is left out.

    Returns:
        state "ok", pairs, images, difference in points with the ends of its 95 % bootstrap interval over images, and
        median, lowest and highest p-value of the exact McNemar tests, one a seed, and all of them as one
        (`combine_p_values`); or the state "no common seed", or "not comparable" where none of them is left.
        And notes on what was left out.
    """
    pairs, notes = _pairs(first, second)
    if not pairs:
        return {"state": "not comparable" if notes else "no common seed", "pairs": 0}, notes
    try:
        found = paired_bootstrap(*zip(*(pair.predictions for pair in pairs), strict=True))
    except RunError as error:
        return {"state": "not comparable", "pairs": 0}, [*notes, f"{_names(pairs[0].runs)}: {error}"]
    p_values = [pair.p_value for pair in pairs]
    involved = [run for pair in pairs for run in pair.runs]
    return {
        "state": "ok",
        "pairs": found.pairs,
        "images": found.images,
        "difference": found.mean,
        "low": found.low,
        "high": found.high,
        "mcnemar_median": float(np.median(p_values)),
        "mcnemar_lowest": min(p_values),
        "mcnemar_highest": max(p_values),
        "mcnemar_combined": combine_p_values(p_values),
        **sources(involved),
    }, notes


def _pairs(first: Sequence[Run], second: Sequence[Run]) -> tuple[list[_Pair], list[str]]:
    """The seeds that both have and whose predictions can be compared, and notes on the others."""
    by_seed = {run.seed: run for run in second}
    pairs, notes = [], []
    for run in first:
        if run.seed not in by_seed:
            continue
        runs = (run, by_seed[run.seed])
        try:
            predictions = (runs[0].predictions(), runs[1].predictions())
        except RunError as error:
            notes.append(f"left out of the differences: {error}")
            continue
        try:
            pairs.append(_Pair(runs, predictions, mcnemar(*predictions).p_value))
        except RunError as error:
            notes.append(f"left out of the differences: {_names(runs)}: {error}")
    return pairs, notes


def _names(runs: Sequence[Run]) -> str:
    return " and ".join(str(run.path) for run in runs)


def differences_to_best(group: Group) -> tuple[pd.DataFrame, list[str]]:
    """Each method of a setting against the one of the highest mean top-1, and notes on what could not be compared.

    Of several equal to two decimals the first is the best one.

    Returns:
        One row a method but the best, with `COLUMNS`; no rows for fewer than two methods. `holm` is
        `mcnemar_combined` corrected for the number of methods that were compared.
    """
    means = {method: _mean_top1(runs) for method, runs in group.items()}
    best = max(means, key=lambda method: means[method])
    rows, notes = [], []
    for method, runs in group.items():
        if method != best:
            cells, more = compare(runs, group[best])
            rows.append({"label": method.label, "against": best.label, **cells})
            notes += more
    table: pd.DataFrame = pd.DataFrame(rows, columns=COLUMNS)
    compared = table["state"] == "ok"
    table.loc[compared, "holm"] = holm(table.loc[compared, "mcnemar_combined"].tolist())
    return table, notes


def _mean_top1(runs: Sequence[Run]) -> float:
    return round(float(np.mean([run.final.top1 for run in runs if run.final is not None])), 2)
