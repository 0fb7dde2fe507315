"""The descriptors of trained heads: which classes are alike, nearest neighbours, a map; and the tables of a study.

Distances between descriptors of covariance heads are Frobenius distances of the normalised matrices: an off-diagonal
number of the upper triangle stands for two entries and has the weight sqrt(2). For the square root this is the power-
Euclidean metric of the covariances with exponent 1/2 [Dryden, Koloydenko, Zhou, Annals of Applied Statistics 2009].

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
from torch.utils.data import DataLoader

from fgvc.csv_files import read_csv, to_csv
from fgvc.errors import DatasetError, RunError, WeightsError
from fgvc.inference.restore import restore_run
from fgvc.pooling import CovariancePooling
from fgvc.runs.settings import one_setting
from fgvc.runs.summary import Run, read_run
from fgvc.studies.confusion.measure import confusion_matrix

METRICS = ("euclidean", "cosine")
NEIGHBOURS = (1, 5)


@dataclass(frozen=True)
class Descriptors:
    """The test images of a run as its classifier sees them.

    Attributes:
        label, seed: of the run.
        classes: K names.
        paths: N, relative to the dataset.
        targets, predicted: (N,) class indices.
        vectors: (N, D) float32, weighed as above.
    """

    label: str
    seed: int
    classes: list[str]
    paths: list[str]
    targets: np.ndarray
    predicted: np.ndarray
    vectors: np.ndarray


def read_descriptors(path: Path, *, root: str | None = None, cache: str | None = None) -> Descriptors:
    """Describe the test split of a finished run with its last weights.

    Raises:
        RunError: not a finished run, or as `restore_run`.
        DatasetError, WeightsError: as in training.
    """
    run = read_run(path)
    if not run.finished:
        raise RunError(f"{path}: status {run.status}, not finished; finish the run first")
    restored = restore_run(path, root=root, cache=cache)
    restored.trained.eval()
    head = restored.head
    vectors, targets, predicted = [], [], []
    with torch.inference_mode():
        for inputs, classes in DataLoader(restored.inputs(), batch_size=restored.config.trainer.eval_batch_size):
            vector = head.pooling(restored.pooling_input(inputs))
            predicted.append(head.classifier(vector).argmax(dim=1).cpu())
            vectors.append(vector.float().cpu())
            targets.append(classes)
    matrix = torch.cat(vectors).numpy()
    if isinstance(head.pooling, CovariancePooling):
        matrix = matrix * _weights(head.pooling.channels)
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


def _weights(channels: int) -> np.ndarray:
    """1 on the diagonal and sqrt(2) off it, (D,) in the order of the upper triangle."""
    row, column = np.triu_indices(channels)
    weights: np.ndarray = np.where(row == column, 1, np.sqrt(2)).astype(np.float32)
    return weights


def class_pairs(found: Descriptors) -> pd.DataFrame:
    """Every pair of classes, the most similar first.

    Returns:
        first, second (names), distance (of the mean descriptors), first_as_second, second_as_first (images so
        confused), images (of both), confused (share of them taken for the other, per cent), accuracy (share of them
        taken for what they are, per cent).
    """
    k = len(found.classes)
    means = np.stack([found.vectors[found.targets == i].mean(axis=0) for i in range(k)])
    predictions = pd.DataFrame({"target": found.targets, "predicted": found.predicted})
    confusion = confusion_matrix(predictions, found.classes).to_numpy()
    counts, right = confusion.sum(axis=1), confusion.diagonal()
    i, j = np.triu_indices(k, 1)
    table: pd.DataFrame = pd.DataFrame(
        {
            "first": [found.classes[a] for a in i],
            "second": [found.classes[b] for b in j],
            "distance": np.linalg.norm(means[i] - means[j], axis=1),
            "first_as_second": confusion[i, j],
            "second_as_first": confusion[j, i],
            "images": counts[i] + counts[j],
        }
    )
    table["confused"] = 100 * (table["first_as_second"] + table["second_as_first"]) / table["images"]
    table["accuracy"] = 100 * (right[i] + right[j]) / table["images"]
    ordered: pd.DataFrame = table.sort_values(["distance", "first", "second"], ignore_index=True)
    return ordered


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's correlation with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def similarity_and_confusion(pairs: pd.DataFrame, *, resamples: int = 1000, seed: int = 0) -> RankCorrelation:
    """Rank correlation of the closeness of two classes (minus their distance) with how often they are confused.

    The interval is a percentile bootstrap over classes: pairs share classes and are not independent. A pair is taken as
    often as the product of the numbers of its classes; pairs of a class with itself do not occur.

    Args:
        pairs: of `class_pairs`.
        resamples: of the classes.
        seed: of the resampling.
    """
    names = sorted({*pairs["first"], *pairs["second"]})
    number = {name: i for i, name in enumerate(names)}
    first, second = (pairs[side].map(number).to_numpy() for side in ("first", "second"))
    closeness, confused = -pairs["distance"].to_numpy(), pairs["confused"].to_numpy()
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
    values = []
    for counts in drawn:
        value = _spearman(closeness, confused, counts[first] * counts[second])
        if np.isfinite(value):
            values.append(value)
    low, high = np.quantile(values, [0.025, 0.975]) if values else (np.nan, np.nan)
    return RankCorrelation(_spearman(closeness, confused, np.ones(len(pairs), dtype=int)), float(low), float(high))


def _spearman(a: np.ndarray, b: np.ndarray, counts: np.ndarray) -> float:
    """Spearman's correlation of (n,) values taken `counts` times each; NaN where one of them does not vary."""
    taken = np.repeat(np.arange(len(a)), counts)
    if len(taken) < 2:
        return np.nan
    ranks = np.stack([rankdata(values[taken]) for values in (a, b)])
    if (ranks.std(axis=1) == 0).any():
        return np.nan
    return float(np.corrcoef(ranks)[0, 1])


def neighbour_table(found: Descriptors) -> pd.DataFrame:
    """How often the nearest test images are of the same class, each image left out of its own neighbours.

    Returns:
        One row a metric and k of `NEIGHBOURS`: label, seed, metric, k, same (mean share of the k neighbours that are of
        the image's class, per cent), top1 (accuracy of the majority among them, the nearer class where two are level,
        per cent), images.
    """
    rows = []
    for metric in METRICS:
        nearest = _neighbours(found, metric, max(NEIGHBOURS))
        for k in NEIGHBOURS:
            classes = found.targets[nearest[:, :k]]  # (N, k)
            same = (classes == found.targets[:, None]).mean()
            right = (_majority(classes) == found.targets).mean()
            rows.append((found.label, found.seed, metric, k, 100 * same, 100 * right, len(found.targets)))
    table: pd.DataFrame = pd.DataFrame(rows, columns=["label", "seed", "metric", "k", "same", "top1", "images"])
    return table


def _neighbours(found: Descriptors, metric: str, k: int) -> np.ndarray:
    """Indices (N, k) of the nearest other images, the nearest first."""
    search = NearestNeighbors(n_neighbors=min(k, len(found.targets) - 1), metric=metric, algorithm="brute")
    indices: np.ndarray = search.fit(found.vectors).kneighbors(return_distance=False)  # without the point itself
    return indices


def _majority(classes: np.ndarray) -> np.ndarray:
    """The most frequent of each row (N, k), of equally frequent ones that which comes first."""
    counts = (classes[:, :, None] == classes[:, None, :]).sum(axis=2)
    winners: np.ndarray = np.take_along_axis(classes, counts.argmax(axis=1)[:, None], axis=1)[:, 0]
    return winners


def queries(found: Descriptors, images: int = 2, k: int = 5) -> pd.DataFrame:
    """The k nearest images of those `images` whose neighbours are most often of another class, Euclidean.

    Returns:
        One row a query and neighbour: label, query, query_class, rank, neighbour, neighbour_class.
    """
    nearest = _neighbours(found, "euclidean", k)
    strangers = (found.targets[nearest] != found.targets[:, None]).sum(axis=1)
    chosen = np.argsort(-strangers, kind="stable")[:images]
    rows = [
        (
            found.label,
            found.paths[i],
            found.classes[found.targets[i]],
            rank,
            found.paths[j],
            found.classes[found.targets[j]],
        )
        for i in chosen
        for rank, j in enumerate(nearest[i], start=1)
    ]
    columns = ["label", "query", "query_class", "rank", "neighbour", "neighbour_class"]
    table: pd.DataFrame = pd.DataFrame(rows, columns=columns)
    return table


def embed(found: Descriptors, *, seed: int = 0, perplexity: float = 30.0) -> pd.DataFrame:
    """A t-SNE map of the descriptors [van der Maaten and Hinton, JMLR 2008], started from their principal components.

    Distances between groups and their sizes mean little in such a map.

    Args:
        found: the descriptors.
        seed: of the optimisation.
        perplexity: lowered to (N - 1) / 3 where there are few images.

    Returns:
        One row an image: label, x, y, class, predicted_class.
    """
    few = (len(found.targets) - 1) / 3
    components = TSNE(perplexity=min(perplexity, few), init="pca", random_state=seed).fit_transform(found.vectors)
    table: pd.DataFrame = pd.DataFrame(
        {
            "label": found.label,
            "x": components[:, 0],
            "y": components[:, 1],
            "class": [found.classes[i] for i in found.targets],
            "predicted_class": [found.classes[i] for i in found.predicted],
        }
    )
    return table


KEPT_PAIRS = 40
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
"""Of the file that keeps each table."""
_NAMES = (
    *("label", "class", "predicted_class", "first", "second"),
    *("query", "query_class", "neighbour", "neighbour_class"),
)


class DescriptorStudy(NamedTuple):
    """The tables of a study; the functions of `fgvc.studies.descriptors.measure` say what their columns are.

    Attributes:
        pairs: the closest and the most confused pairs of each method, first seed.
        correlations: of closeness and confusion over all pairs, a row a method, first seed.
        neighbours: of every run.
        queries: of the method that is drawn, first seed.
        embedding: the same.
    """

    pairs: pd.DataFrame
    correlations: pd.DataFrame
    neighbours: pd.DataFrame
    queries: pd.DataFrame
    embedding: pd.DataFrame


def study_descriptors(
    runs: Sequence[Run],
    *,
    label: str | None = None,
    seed: int = 0,
    root: str | None = None,
    cache: str | None = None,
) -> tuple[DescriptorStudy, list[str]]:
    """Study the descriptors of runs of one setting.

    Args:
        runs: finished.
        label: of the method that is drawn; None takes that of the highest mean top-1.
        seed: of the map and the bootstrap.
        root, cache: folders of the dataset and of cached features, where they have moved since training.

    Returns:
        The tables, and a note for each run whose descriptors could not be had.

    Raises:
        RunError: runs of several settings, no run of `label`, or no run of it (without `label`: none at all) whose
            descriptors could be had.
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
                found = read_descriptors(run.path, root=root, cache=cache)
            except (RunError, DatasetError, WeightsError) as error:
                notes.append(f"left out {run.path}: {error}")
                continue
            neighbours.append(neighbour_table(found))
            if name in pairs:
                continue  # only the first seed of a method goes further
            every = class_pairs(found)
            pairs[name] = _kept(every).assign(label=name)
            correlations.append({"label": name, **vars(similarity_and_confusion(every, seed=seed))})
            top1 = _mean_top1(of_method)
            if label == name or (label is None and (drawn is None or top1 > drawn[0])):
                drawn = top1, found
    if drawn is None:
        raise RunError(f"no run{f' of {label}' if label else ''} could be studied:\n  " + "\n  ".join(notes))
    return DescriptorStudy(
        pd.concat(pairs.values(), ignore_index=True),
        pd.DataFrame(correlations),
        pd.concat(neighbours, ignore_index=True),
        queries(drawn[1]),
        embed(drawn[1], seed=seed),
    ), notes


def save_descriptor_study(study: DescriptorStudy, folder: Path) -> dict[Path, str]:
    """The text of each file of a study: one a table, called as it is."""
    tables = study._asdict().items()
    return {folder / f"{name}.csv": to_csv(table) for name, table in tables}


def load_descriptor_study(folder: Path) -> DescriptorStudy:
    """Read the files that `save_descriptor_study` names. Raises RunError where one is missing or damaged."""
    return DescriptorStudy(
        **{name: read_csv(folder / f"{name}.csv", columns, names=_NAMES) for name, columns in COLUMNS.items()}
    )


def _mean_top1(runs: Sequence[Run]) -> float:
    return float(np.mean([run.final.top1 for run in runs if run.final]))


def _kept(pairs: pd.DataFrame) -> pd.DataFrame:
    """The closest pairs, and those most often confused."""
    confused = pairs.sort_values(["confused", "distance"], ascending=[False, True]).head(KEPT_PAIRS)
    both: pd.DataFrame = pd.concat([pairs.head(KEPT_PAIRS), confused]).drop_duplicates()
    return both
