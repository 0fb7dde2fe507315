"""Two classifiers on the same images."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from fgvc.errors import RunError


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
