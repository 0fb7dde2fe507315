"""Comparison of two methods on the same images: exact tests, intervals, and a table over the runs of a setting.

Also the accuracy of one method at coarser labels, and by the number of training images of the classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fgvc.errors import RunError
from fgvc.runs.settings import Group, Method, sources
from fgvc.runs.summary import Run


@dataclass(frozen=True)
class McNemar:
    """Agreement of two classifiers on the same images, and the probability of a difference this large by chance.

    Attributes:
        both: Number of images that both get right.
        only_first: Number of images that only the first gets right.
        only_second: Number of images that only the second gets right.
        neither: Number of images that both get wrong.
        p_value: Exact two-sided p-value. Null hypothesis: if only one classifier is right, each is with probability
            1/2.
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
    """Run the exact McNemar test on two frames of predictions, paired by path. [McNemar, Psychometrika 1947]

    The result holds for these two sets of weights on similar images, not for other seeds of the same methods.

    Raises RunError: no rows, a path twice, or the frames differ in their images or targets.
    """
    from scipy.stats import binomtest  # here, since it is slow to import

    pairs = pair_predictions(first, second)
    a, b = pairs["right_first"], pairs["right_second"]
    only_first, only_second = int((a & ~b).sum()), int((b & ~a).sum())
    differing = only_first + only_second
    p_value = float(binomtest(only_first, differing).pvalue) if differing else 1.0
    return McNemar(int((a & b).sum()), only_first, only_second, int((~a & ~b).sum()), p_value)


def combine_p_values(p_values: Sequence[float]) -> float:
    """Combine p-values with any dependence into one: n / k times the k-th smallest, k = floor(n / 2) + 1.

    The result is small only if more than half of them are, and never below their median. [Rüger, Metrika 1978]
    """
    n = len(p_values)
    k = n // 2 + 1
    return min(1.0, n / k * sorted(p_values)[k - 1])


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for their number; the order is kept. [Holm, Scand. J. Statist. 1979]"""
    order = np.argsort(p_values)
    scaled = np.asarray(p_values, dtype=float)[order] * np.arange(len(order), 0, -1)
    corrected = np.empty(len(order))
    corrected[order] = np.minimum(1, np.maximum.accumulate(scaled))
    return [float(value) for value in corrected]


def paired_bootstrap(
    first: Sequence[pd.DataFrame], second: Sequence[pd.DataFrame], *, resamples: int = 10_000
) -> dict[str, Any]:
    """Bootstrap the accuracy difference over test images (percentile interval), averaged over the pairs of runs.

    The result holds for these runs on similar images. [Efron and Tibshirani, An Introduction to the Bootstrap, 1993,
    ch. 13]

    Args:
        first, second: predictions of the runs of two methods; the i-th of each are paired, e.g. by seed.
        resamples: number of resamples of the images.

    Returns:
        pairs and images, their numbers; difference, of the accuracy of the first and the second in percentage points,
        the mean over images and pairs of runs; low and high, the ends of its 95 % interval.

    Raises:
        RunError: as in `mcnemar` for any pair, or the pairs differ in their images.
    """
    tables = [pair_predictions(a, b).sort_values("path") for a, b in zip(first, second, strict=True)]
    if any(table["path"].tolist() != tables[0]["path"].tolist() for table in tables):
        raise RunError("the runs were evaluated on different images; give runs of one test split")
    differences = [table["right_first"].to_numpy(int) - table["right_second"].to_numpy(int) for table in tables]
    values = np.sum(differences, axis=0)  # (images,), integers: an interval end of 0 stays exactly 0
    n, rng = len(values), np.random.default_rng(0)
    # resampling the counts of the few values is the same as resampling the images, and faster
    found, counts = np.unique(values, return_counts=True)
    sums = rng.multinomial(n, counts / n, size=resamples) @ found
    low, high = np.quantile(sums, [0.025, 0.975])
    scale = 100 / (n * len(first))
    interval = {"difference": float(values.sum() * scale), "low": float(low * scale), "high": float(high * scale)}
    return {"pairs": len(first), "images": n, **interval}


def two_level_interval(values: NDArray[np.float64], *, level: float) -> tuple[float, float]:
    """Percentile interval of the mean of (seeds, images) values, from a bootstrap over both.

    Each resample draws seeds, and images for all of them alike, with replacement. The result holds for other seeds and
    similar images; from few seeds it is rough, and too narrow rather than too wide. [Davison and Hinkley, Bootstrap
    Methods and their Application, 1997, 3.8]
    """
    rng, resamples = np.random.default_rng(0), 2_000
    seeds, images = values.shape
    seed_weights = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples) / seeds
    image_weights = rng.multinomial(images, np.full(images, 1 / images), size=resamples) / images
    means = np.einsum("rs,sn,rn->r", seed_weights, values, image_weights, optimize=True)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def pair_predictions(first: pd.DataFrame, second: pd.DataFrame, more: Sequence[str] = ()) -> pd.DataFrame:
    """Return one row per image: path, and target, predicted, right and `more` of each side (_first, _second).

    Raises RunError as in `mcnemar`.
    """
    columns = ["path", "target", "predicted", *more]
    for frame in (first, second):
        absent = [column for column in columns if column not in frame]
        if absent or frame.empty or frame["path"].duplicated().any():
            problem = f"no column {', '.join(absent)}" if absent else "no rows" if frame.empty else "a path twice"
            raise RunError(f"predictions have {problem}; give the predictions of a run")
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


COARSE_COLUMNS = ("level", "groups", "images", "accuracy", "mistakes", "inside")


def coarse_accuracy(predictions: pd.DataFrame, coarse: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """Accuracy at coarser labels, and how many mistakes stay inside the right one; a row for each level.

    Columns: level; groups, the number of its labels; images, those whose class has a label; accuracy, the share of the
    images whose predicted class has the label of the true class, in per cent; mistakes, the number of the images whose
    class is predicted wrong; inside, the share of these whose predicted class has the right label, in per cent, NaN
    without mistakes. A level that no image has a label of has no row.

    Args:
        predictions: a row for each image, with columns target and predicted: class indices.
        coarse: by level, the label of each class index; "" where it is unknown.

    Raises:
        RunError: a level has fewer labels than there are classes in the predictions.
    """
    rows = []
    target, predicted = (predictions[name].to_numpy() for name in ("target", "predicted"))
    for level, names in coarse.items():
        labels = np.asarray(names, dtype=object)
        classes = 1 + max(target.max(initial=-1), predicted.max(initial=-1))
        if len(labels) < classes or min(target.min(initial=0), predicted.min(initial=0)) < 0:
            raise RunError(
                f"{len(labels)} coarser labels of the level {level!r} for {classes} classes; give predictions and "
                "labels of the same run"
            )
        known = labels[target] != ""
        if not known.any():
            continue
        right = (labels[target] == labels[predicted])[known]
        wrong = (target != predicted)[known]
        inside = float(100 * right[wrong].mean()) if wrong.any() else float("nan")
        groups = len({name for name in names if name})
        rows.append((level, groups, int(known.sum()), float(100 * right.mean()), int(wrong.sum()), inside))
    return pd.DataFrame(rows, columns=COARSE_COLUMNS)


def shot_accuracy(
    target: NDArray[np.integer], predicted: NDArray[np.integer], class_sizes: Sequence[int]
) -> dict[str, dict[str, float]]:
    """Return the top-1 of the classes with many (above 100), medium (20 to 100) and few (below 20) training images.

    Liu et al., "Large-scale long-tailed recognition in an open world", CVPR 2019. As in their code each class counts
    the same, however many test images it has; classes without any are left out.

    Args:
        target, predicted: (N,) class indices of the test images.
        class_sizes: number of training images of each class index.

    Returns:
        For "many", "medium" and "few", where there are such classes: their number, "classes", and "top1", the mean of
        their accuracies in per cent.

    Raises:
        RunError: a class has no entry in `class_sizes`.
    """
    if len(class_sizes) <= target.max(initial=-1):
        raise RunError(
            f"{len(class_sizes)} numbers of training images (class_sizes in summary.json) for {1 + target.max()} "
            "classes; give predictions and sizes of the same run"
        )
    by_class = pd.Series(100.0 * (target == predicted)).groupby(target).mean()
    shots = pd.cut(np.asarray(class_sizes)[by_class.index], [-1, 19, 100, np.inf], labels=["few", "medium", "many"])
    groups = {name: by_class[shots == name] for name in ("many", "medium", "few")}
    return {
        name: {"classes": len(found), "top1": round(float(found.mean()), 4)}
        for name, found in groups.items()
        if len(found)
    }


def tree_distance(
    target: NDArray[np.integer], predicted: NDArray[np.integer], coarse: Mapping[str, Sequence[str]]
) -> NDArray[np.float64]:
    """Distance of two classes in the tree of their coarser labels, for arrays of class indices (broadcast).

    0 for the same class, else 1 + the number of levels at which the labels differ: in a tree, the height of the lowest
    node above both [Bertinetto et al., "Making better mistakes", CVPR 2020]. NaN where a class has no label at a level.
    """
    distance: NDArray[np.float64] = (target != predicted).astype(float)
    for names in coarse.values():
        _, codes = np.unique(np.asarray(names, dtype=str), return_inverse=True)
        known = np.asarray(names, dtype=object) != ""
        distance = distance + np.where(known[target] & known[predicted], codes[target] != codes[predicted], np.nan)
    return distance


COLUMNS = (
    *("label", "against", "state", "pairs", "images", "difference", "low", "high"),
    *("mcnemar_median", "mcnemar_lowest", "mcnemar_highest", "mcnemar_combined", "holm", "seeds", "runs", "commits"),
)


class _Pair(NamedTuple):
    """Two runs of one seed, their predictions, and the p-value of McNemar's test."""

    runs: tuple[Run, Run]
    predictions: tuple[pd.DataFrame, pd.DataFrame]
    p_value: float


def compare(first: Sequence[Run], second: Sequence[Run]) -> tuple[dict[str, Any], list[str]]:
    """Compare the runs of two methods seed by seed, after the last epoch.

    A seed is left out if its predictions are missing, damaged or of other images.

    Returns:
        Cells of a row, and notes on what was left out. The cells: state "ok", pairs, images, difference in percentage
        points, ends of its 95 % bootstrap interval over images, and the median, lowest, highest and combined
        (`combine_p_values`) p-value of the exact McNemar tests, one per seed. Without pairs, the state is "no common
        seed", or "not comparable" if every seed was left out.
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
        **found,
        "mcnemar_median": float(np.median(p_values)),
        "mcnemar_lowest": min(p_values),
        "mcnemar_highest": max(p_values),
        "mcnemar_combined": combine_p_values(p_values),
        **sources(involved),
    }, notes


def _pairs(first: Sequence[Run], second: Sequence[Run]) -> tuple[list[_Pair], list[str]]:
    """Return the pairs of runs with a common seed and comparable predictions, and notes on the others."""
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
    """Compare each method of a setting with the best one: the highest mean top-1, the first if equal to two decimals.

    Returns:
        Table with `COLUMNS` and one row for each method except the best, and notes on what could not be compared.
        `holm` is `mcnemar_combined` corrected for the number of compared methods.
    """
    _, best = means_and_best(group)
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


def means_and_best(group: Group) -> tuple[dict[Method, float], Method]:
    """Mean final top-1 of each method, to the two decimals that tables show, and the best, the first of equal ones."""
    top1 = {method: [run.final.top1 for run in runs if run.final is not None] for method, runs in group.items()}
    means = {method: round(float(np.mean(values)), 2) for method, values in top1.items()}
    return means, max(means, key=lambda method: means[method])
