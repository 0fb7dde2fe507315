"""Differences in accuracy between the methods of a setting, on the predictions that their runs saved."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from fgvc.analysis.paired import combine_p_values, holm, mcnemar, paired_bootstrap
from fgvc.analysis.runs import Run
from fgvc.analysis.settings import Group, Method
from fgvc.errors import RunError

COLUMNS = (
    *("label", "against", "state", "pairs", "images", "difference", "low", "high"),
    *("mcnemar_median", "mcnemar_lowest", "mcnemar_highest", "mcnemar_combined", "holm", "seeds", "runs", "commits"),
)


def compare(first: Sequence[Run], second: Sequence[Run]) -> dict[str, Any]:
    """How much better the runs of one method are than those of another, seed by seed, after the last epoch.

    Returns:
        state "ok", pairs, images, difference in points with the ends of its 95 % bootstrap interval over images, and
        median, lowest and highest p-value of the exact McNemar tests, one a seed, and all of them as one
        (`combine_p_values`); or the state "no common seed".

    Raises:
        RunError: predictions are missing or damaged, or of other images.
    """
    by_seed = {run.seed: run for run in second}
    pairs = [(run, by_seed[run.seed]) for run in first if run.seed in by_seed]
    if not pairs:
        return {"state": "no common seed", "pairs": 0}
    frames = [(a.predictions(), b.predictions()) for a, b in pairs]
    found = paired_bootstrap([a for a, _ in frames], [b for _, b in frames])
    p_values = [mcnemar(a, b).p_value for a, b in frames]
    involved = [run for pair in pairs for run in pair]
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
        "seeds": " ".join(str(run.seed) for run, _ in pairs),
        "runs": "; ".join(str(run.path) for run in involved),
        "commits": " ".join(sorted({run.commit for run in involved if run.commit})),
    }


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
            row, note = _row(method, runs, best, group)
            rows.append(row)
            notes += note
    table: pd.DataFrame = pd.DataFrame(rows, columns=COLUMNS)
    compared = table["state"] == "ok"
    table.loc[compared, "holm"] = holm(table.loc[compared, "mcnemar_combined"].tolist())
    return table, notes


def _row(method: Method, runs: Sequence[Run], best: Method, group: Mapping[Method, Sequence[Run]]) -> Any:
    head = {"label": method.label, "against": best.label}
    try:
        return head | compare(runs, group[best]), []
    except RunError as error:
        return head | {"state": "not comparable", "pairs": 0}, [f"{method.label} and {best.label}: {error}"]


def _mean_top1(runs: Sequence[Run]) -> float:
    return round(float(np.mean([run.final.top1 for run in runs if run.final is not None])), 2)
