"""Two methods compared on the same images: exact tests, intervals, and a table over the runs of a setting."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from fgvc.errors import RunError
from fgvc.runs.settings import Group, sources
from fgvc.runs.summary import Run


@dataclass(frozen=True)
class McNemar:
    """How two classifiers agree on the same images, and the probability of a difference as large by chance.

    Attributes:
        both: images that both get right.
        only_first: that only the first gets right.
        only_second: that only the second gets right.
        neither: that both get wrong.
        p_value: two-sided, exact: of the images on which they differ, each is the first's with probability 1/2.
    """

    both: int
    only_first: int
    only_second: int
    neither: int
    p_value: float

    @property
    def images(self) -> int:
        return self.both + self.only_first + self.only_second + self.neither


def mcnemar(first: pd.DataFrame, second: pd.DataFrame) -> McNemar:
    """Exact McNemar test of two frames of predictions, paired by path. [McNemar, Psychometrika 1947]

    It speaks of these two sets of weights on such images, not of other seeds of the same methods.

    Raises:
        RunError: no rows, a path twice, or the frames differ in their images or targets.
    """
    pairs = pair_predictions(first, second)
    a, b = pairs["right_first"], pairs["right_second"]
    only_first, only_second = int((a & ~b).sum()), int((b & ~a).sum())
    differing = only_first + only_second
    p_value = float(binomtest(only_first, differing).pvalue) if differing else 1.0
    return McNemar(int((a & b).sum()), only_first, only_second, int((~a & ~b).sum()), p_value)


def combine_p_values(p_values: Sequence[float]) -> float:
    """One p-value of several that may depend on each other in any way: n / k times the k-th smallest, k = ceil(n / 2).

    Small only where half of them are. [Rüger, Metrika 1978]

    Raises:
        ValueError: no p-values.
    """
    if not p_values:
        raise ValueError("expected at least one p-value")
    n = len(p_values)
    k = (n + 1) // 2
    return min(1.0, n / k * sorted(p_values)[k - 1])


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number, in the same order. [Holm, Scand. J. Statist. 1979]"""
    order = np.argsort(p_values)
    scaled = np.asarray(p_values, dtype=float)[order] * np.arange(len(order), 0, -1)
    corrected = np.empty(len(order))
    corrected[order] = np.minimum(1, np.maximum.accumulate(scaled))
    return [float(value) for value in corrected]


@dataclass(frozen=True)
class Difference:
    """Accuracy of one method minus that of another, points of per cent.

    Attributes:
        mean: over images and pairs of runs.
        low, high: ends of the 95 % interval.
        images, pairs: how many images, and how many pairs of runs.
    """

    mean: float
    low: float
    high: float
    images: int
    pairs: int


def paired_bootstrap(
    first: Sequence[pd.DataFrame], second: Sequence[pd.DataFrame], *, resamples: int = 10_000, seed: int = 0
) -> Difference:
    """Percentile bootstrap over test images of the difference in accuracy, the pairs of runs averaged on each image.

    It speaks of these runs on other such images. [Efron and Tibshirani, An Introduction to the Bootstrap, 1993, ch. 13]

    Args:
        first, second: predictions of the runs of two methods; the i-th of each are compared, the same seed say.
        resamples: of the images.
        seed: of the resampling.

    Raises:
        RunError: as `mcnemar`, for any pair, or other images in one pair than in another.
        ValueError: no pairs, or not as many runs of each.
    """
    if not first or len(first) != len(second):
        raise ValueError(f"expected as many runs of each method, at least one, got {len(first)} and {len(second)}")
    tables = [pair_predictions(a, b).sort_values("path") for a, b in zip(first, second, strict=True)]
    if any(table["path"].tolist() != tables[0]["path"].tolist() for table in tables):
        raise RunError("the runs were evaluated on different images; give runs of one test split")
    differences = [table["right_first"].to_numpy(int) - table["right_second"].to_numpy(int) for table in tables]
    values = np.sum(differences, axis=0)  # (images,), whole numbers: an end of the interval that is 0 stays 0
    n, rng = len(values), np.random.default_rng(seed)
    # few values occur, so that resampling their counts is resampling the images
    found, counts = np.unique(values, return_counts=True)
    sums = rng.multinomial(n, counts / n, size=resamples) @ found
    low, high = np.quantile(sums, [0.025, 0.975])
    scale = 100 / (n * len(first))
    return Difference(float(values.sum() * scale), float(low * scale), float(high * scale), n, len(first))


def pair_predictions(first: pd.DataFrame, second: pd.DataFrame, more: Sequence[str] = ()) -> pd.DataFrame:
    """One row an image: path, and target, predicted, right and columns of `more`, each of both (_first, _second).

    Raises:
        RunError: as `mcnemar`.
    """
    columns = ["path", "target", "predicted", *more]
    for frame in (first, second):
        absent = [column for column in columns if column not in frame]
        if absent or frame.empty or frame["path"].duplicated().any():
            problem = f"no column {', '.join(absent)}" if absent else "no rows" if frame.empty else "a path twice"
            raise RunError(f"predictions have {problem}; give those of a run")
    pairs: pd.DataFrame = first[columns].merge(second[columns], on="path", suffixes=("_first", "_second"))
    if not len(first) == len(second) == len(pairs):
        raise RunError(
            f"predictions of {len(first)} and {len(second)} images have {len(pairs)} in common; "
            "give two evaluations of the same test split"
        )
    if (pairs["target_first"] != pairs["target_second"]).any():
        path = pairs.loc[pairs["target_first"] != pairs["target_second"], "path"].iloc[0]
        raise RunError(f"the predictions differ in the target of {path}; give two evaluations of the same test split")
    for name in ("first", "second"):
        pairs[f"right_{name}"] = pairs[f"predicted_{name}"] == pairs[f"target_{name}"]
    return pairs


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
