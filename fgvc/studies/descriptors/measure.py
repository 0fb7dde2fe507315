"""The descriptors of trained heads: which classes are alike, nearest neighbours, a map; and the tables of a study.

Distances between descriptors of covariance heads are Frobenius distances of the normalised matrices. So an off-diagonal
number of the upper triangle, which stands for two entries, has the weight sqrt(2). For the square root this is the
power-Euclidean metric of the covariances with exponent 1/2 [Dryden, Koloydenko, Zhou, Annals of Applied Statistics
2009].

Shapes: N test images, D numbers in a descriptor, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.stats import rankdata
from sklearn.manifold import TSNE
from sklearn.neighbors import NearestNeighbors

from fgvc.errors import DatasetError, RunError, WeightsError
from fgvc.inference.restore import restore_run
from fgvc.pooling import CovariancePooling
from fgvc.runs.settings import one_setting
from fgvc.runs.summary import Run, read_finished
from fgvc.studies.confusion.measure import confusion_matrix

METRICS = ("euclidean", "cosine")
NEIGHBOURS = (1, 5)
_PAIRS = 40
COLUMNS: dict[str, tuple[str, ...]] = {
    "pairs": (
        *("first", "second", "distance", "first_as_second", "second_as_first", "images", "confused", "accuracy"),
        "label",
    ),
    "correlations": ("label", "value", "low", "high"),
    "neighbours": ("label", "seed", "metric", "k", "same", "top1", "images"),
    "queries": ("label", "query", "query_class", "rank", "neighbour", "neighbour_class"),
    "embedding": ("label", "x", "y", "class", "predicted_class"),
}
"""Columns of each table."""


@dataclass(frozen=True)
class Descriptors:
    """The test images of a run as its classifier sees them.

    Attributes:
        label, seed: Label and seed of the run.
        classes: Names of the K classes.
        paths: Paths of the N images, relative to the dataset.
        targets, predicted: Class indices, (N,).
        vectors: Descriptors (N, D) float32, weighted as the module says.
    """

    label: str
    seed: int
    classes: list[str]
    paths: list[str]
    targets: np.ndarray
    predicted: np.ndarray
    vectors: np.ndarray


def read_descriptors(path: Path, *, root: str | None = None, cache: str | None = None) -> Descriptors:
    """The descriptors of the test split of a finished run, with its last weights.

    Raises:
        RunError: not a finished run, or as `restore_run`.
        DatasetError, WeightsError: as in training.
    """
    run = read_finished(path)
    restored = restore_run(path, root=root, cache=cache)
    head = restored.head
    vectors, targets, predicted = [], [], []
    with torch.inference_mode():
        for reduced, classes in restored.pooling_inputs():
            vector = head.pooling(reduced)
            predicted.append(head.classify(vector).argmax(dim=1).cpu())
            vectors.append(vector.float().cpu())
            targets.append(classes)
    matrix = torch.cat(vectors).numpy()
    if isinstance(head.pooling, CovariancePooling):
        row, column = np.triu_indices(head.pooling.channels)
        matrix = matrix * np.where(row == column, 1, np.sqrt(2)).astype(np.float32)
    images = restored.images
    return Descriptors(
        label=run.label,
        seed=run.seed,
        classes=images.classes,
        paths=images.relative_paths(),
        targets=torch.cat(targets).numpy(),
        predicted=torch.cat(predicted).numpy(),
        vectors=matrix,
    )


def class_pairs(descriptors: Descriptors) -> pd.DataFrame:
    """Every pair of classes that have images, the most similar first.

    Returns:
        first, second (names), distance (of the mean descriptors), first_as_second, second_as_first (numbers of wrong
        answers), images (of both), confused (per cent of them taken for the other), accuracy (per cent of them right).
    """
    found = np.unique(descriptors.targets)
    means = {i: descriptors.vectors[descriptors.targets == i].mean(axis=0) for i in found}
    predictions = pd.DataFrame({"target": descriptors.targets, "predicted": descriptors.predicted})
    confusion = confusion_matrix(predictions, descriptors.classes).to_numpy()
    counts, right = confusion.sum(axis=1), confusion.diagonal()
    i, j = (found[index] for index in np.triu_indices(len(found), 1))
    table: pd.DataFrame = pd.DataFrame(
        {
            "first": [descriptors.classes[a] for a in i],
            "second": [descriptors.classes[b] for b in j],
            "distance": [float(np.linalg.norm(means[a] - means[b])) for a, b in zip(i, j, strict=True)],
            "first_as_second": confusion[i, j],
            "second_as_first": confusion[j, i],
            "images": counts[i] + counts[j],
        }
    )
    table["confused"] = 100 * (table["first_as_second"] + table["second_as_first"]) / table["images"]
    table["accuracy"] = 100 * (right[i] + right[j]) / table["images"]
    return table.sort_values(["distance", "first", "second"], ignore_index=True)


def similarity_and_confusion(pairs: pd.DataFrame, *, resamples: int = 1000, seed: int = 0) -> dict[str, float]:
    """Spearman's correlation of the closeness of two classes (minus their distance) with how often they are confused.

    The 95 % interval from low to high around the value is a percentile bootstrap over classes, because pairs share
    classes and are not independent. A pair counts as often as the product of how often its two classes are drawn; a
    class makes no pair with itself.

    Args:
        pairs: table of `class_pairs`.
        resamples: number of draws of the classes.
        seed: seed of the resampling.
    """
    names = sorted({*pairs["first"], *pairs["second"]})
    number = {name: i for i, name in enumerate(names)}
    first, second = (pairs[side].map(number).to_numpy() for side in ("first", "second"))
    closeness, confused = -pairs["distance"].to_numpy(), pairs["confused"].to_numpy()
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
    values = np.array([_spearman(closeness, confused, counts[first] * counts[second]) for counts in drawn])
    known = values[np.isfinite(values)]
    low, high = np.quantile(known, [0.025, 0.975]) if len(known) else (np.nan, np.nan)
    value = _spearman(closeness, confused, np.ones(len(pairs), dtype=int))
    return {"value": value, "low": float(low), "high": float(high)}


def _spearman(a: np.ndarray, b: np.ndarray, counts: np.ndarray) -> float:
    """Spearman's correlation of (n,) values, each repeated `counts` times; NaN where one side does not vary."""
    ranks = np.stack([rankdata(np.repeat(values, counts)) for values in (a, b)])
    return float(np.corrcoef(ranks)[0, 1]) if ranks.size and (np.ptp(ranks, axis=1) > 0).all() else np.nan


def neighbour_table(descriptors: Descriptors) -> pd.DataFrame:
    """How often the nearest other test images are of the same class.

    Returns:
        A row for each metric and each k of `NEIGHBOURS`: label, seed, metric, k, same (mean per cent of the k
        neighbours that are of the image's class), top1 (per cent of images where the majority of them is right; the
        nearer of two equally frequent classes wins), images.
    """
    rows = []
    for metric in METRICS:
        nearest = _neighbours(descriptors, metric, max(NEIGHBOURS))
        for k in NEIGHBOURS:
            classes = descriptors.targets[nearest[:, :k]]  # (N, k)
            same = (classes == descriptors.targets[:, None]).mean()
            right = (_majority(classes) == descriptors.targets).mean()
            rows.append(
                (descriptors.label, descriptors.seed, metric, k, 100 * same, 100 * right, len(descriptors.targets))
            )
    return pd.DataFrame(rows, columns=COLUMNS["neighbours"])


def _neighbours(descriptors: Descriptors, metric: str, k: int) -> np.ndarray:
    """Indices (N, k) of the nearest other images, the nearest first."""
    search = NearestNeighbors(n_neighbors=min(k, len(descriptors.targets) - 1), metric=metric, algorithm="brute")
    indices: np.ndarray = search.fit(descriptors.vectors).kneighbors(return_distance=False)  # without the point itself
    return indices


def _majority(classes: np.ndarray) -> np.ndarray:
    """The most frequent class of each row (N, k); the first of equally frequent ones."""
    counts = (classes[:, :, None] == classes[:, None, :]).sum(axis=2)
    return np.take_along_axis(classes, counts.argmax(axis=1)[:, None], axis=1)[:, 0]


def queries(descriptors: Descriptors, images: int = 2, k: int = 5) -> pd.DataFrame:
    """The images whose k nearest neighbours (Euclidean) are most often of another class, with these neighbours.

    Returns:
        A row for each query and neighbour: label, query, query_class, rank, neighbour, neighbour_class.
    """
    nearest = _neighbours(descriptors, "euclidean", k)
    strangers = (descriptors.targets[nearest] != descriptors.targets[:, None]).sum(axis=1)
    chosen = np.argsort(-strangers, kind="stable")[:images]
    paths, names = descriptors.paths, [descriptors.classes[target] for target in descriptors.targets]
    rows = [
        (descriptors.label, paths[i], names[i], rank, paths[j], names[j])
        for i in chosen
        for rank, j in enumerate(nearest[i], start=1)
    ]
    return pd.DataFrame(rows, columns=COLUMNS["queries"])


def embed(descriptors: Descriptors, *, seed: int = 0) -> pd.DataFrame:
    """A t-SNE map of the descriptors [van der Maaten and Hinton, JMLR 2008], started from their principal components.

    In such a map the distances between groups and the sizes of groups mean little. The perplexity is 30, lowered to a
    third of N - 1 where there are few images; `seed` is that of the optimisation.

    Returns:
        A row for each image: label, x, y, class, predicted_class.
    """
    perplexity = min(30.0, (len(descriptors.targets) - 1) / 3)
    components = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(descriptors.vectors)
    return pd.DataFrame(
        {
            "label": descriptors.label,
            "x": components[:, 0],
            "y": components[:, 1],
            "class": [descriptors.classes[i] for i in descriptors.targets],
            "predicted_class": [descriptors.classes[i] for i in descriptors.predicted],
        }
    )


class DescriptorStudy(NamedTuple):
    """The tables of a study; the functions of `fgvc.studies.descriptors.measure` say what their columns are.

    Attributes:
        pairs: The closest and the most confused pairs of each method, first seed.
        correlations: Correlation of closeness and confusion over all pairs, a row for each method, first seed.
        neighbours: Neighbours of every run.
        queries: Queries of the method that is drawn, first seed.
        embedding: Map of the same descriptors.
    """

    pairs: pd.DataFrame
    correlations: pd.DataFrame
    neighbours: pd.DataFrame
    queries: pd.DataFrame
    embedding: pd.DataFrame


def study_descriptors(
    runs: Sequence[Run], *, label: str | None = None, seed: int = 0, root: str | None = None, cache: str | None = None
) -> tuple[DescriptorStudy, list[str]]:
    """Study the descriptors of runs of one setting.

    Args:
        runs: finished runs.
        label: label of the method that is drawn; None takes the highest mean top-1.
        seed: seed of the map and the bootstrap.
        root, cache: as in `restore_run`.

    Returns:
        The tables, and a note for each run whose descriptors could not be made, or which has classes without images.

    Raises:
        RunError: runs of several settings, no run of `label`, or no descriptors of any run (of `label`).
    """
    _, group = one_setting(runs)
    by_label = {method.label: of_method for method, of_method in group.items()}
    if label is not None and label not in by_label:
        raise RunError(f"no run of {label!r} here; choose one of {', '.join(by_label)}")
    pairs, correlations, neighbours = {}, [], []
    notes: list[str] = []
    drawn: tuple[float, Descriptors] | None = None
    for name, of_method in by_label.items():
        for run in of_method:
            try:
                descriptors = read_descriptors(run.path, root=root, cache=cache)
            except (RunError, DatasetError, WeightsError) as error:
                notes.append(f"left out {run.path}: {error}")
                continue
            present = len(np.unique(descriptors.targets))
            if present < 2:
                notes.append(f"left out {run.path}: its test images are of one class, which makes no pair")
                continue
            if empty := len(descriptors.classes) - present:
                notes.append(f"{run.path}: {empty} of {len(descriptors.classes)} classes have no image and no pair")
            neighbours.append(neighbour_table(descriptors))
            if name in pairs:
                continue  # only the first seed of a method goes further
            every = class_pairs(descriptors)
            confused = every.sort_values(["confused", "distance"], ascending=[False, True]).head(_PAIRS)
            pairs[name] = pd.concat([every.head(_PAIRS), confused]).drop_duplicates().assign(label=name)
            correlations.append({"label": name, **similarity_and_confusion(every, seed=seed)})
            top1 = float(np.mean([run.final.top1 for run in of_method if run.final]))
            if label == name or (label is None and (drawn is None or top1 > drawn[0])):
                drawn = top1, descriptors
    if drawn is None:
        raise RunError(f"no run{f' of {label}' if label else ''} could be studied:\n  " + "\n  ".join(notes))
    return DescriptorStudy(
        pd.concat(pairs.values(), ignore_index=True),
        pd.DataFrame(correlations),
        pd.concat(neighbours, ignore_index=True),
        queries(drawn[1]),
        embed(drawn[1], seed=seed),
    ), notes
