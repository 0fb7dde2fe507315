"""Which classes a classifier takes for which: tables made from predictions.

`predictions` has a row for each image and columns `target` and `predicted`, indices into `classes`. Shares are in per
cent. Every function of predictions raises RunError where they have no rows, lack these columns, or hold an index
outside the classes.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from fgvc.errors import RunError


def confusion_matrix(predictions: pd.DataFrame, classes: Sequence[str]) -> pd.DataFrame:
    """Counts (K, K): rows are true classes, columns predicted ones, in the order of `classes`."""
    target, predicted = _indices(predictions, len(classes))
    k = len(classes)
    counts = np.bincount(target * k + predicted, minlength=k * k).reshape(k, k)
    return pd.DataFrame(counts, index=pd.Index(classes, name="true"), columns=pd.Index(classes))


def confusion_counts(predictions: pd.DataFrame, classes: Sequence[str]) -> pd.DataFrame:
    """A row with true, predicted (names) and count for each pair of them that there is, right answers included."""
    target, predicted = _indices(predictions, len(classes))
    pairs, counts = np.unique(target * len(classes) + predicted, return_counts=True)
    names = np.array(classes, dtype=object)
    true, answer = np.divmod(pairs, len(classes))
    return pd.DataFrame({"true": names[true], "predicted": names[answer], "count": counts})


def per_class(predictions: pd.DataFrame, classes: Sequence[str]) -> pd.DataFrame:
    """A row for each class, in the order of `classes`.

    Columns: class, images, correct; recall (the accuracy on the class) with its 95 % interval recall_lower,
    recall_upper [Wilson, 1927]; precision; f1; confused_with and confused_count, the most frequent wrong answer (the
    first of equally frequent ones). A share of nothing is NaN (precision of a class that is never predicted), and
    so are all shares of a class without images: an average over the classes leaves it out.
    """
    target, answer = _indices(predictions, len(classes))
    images, answers, correct = (
        np.bincount(rows, minlength=len(classes)) for rows in (target, answer, target[target == answer])
    )
    answers = np.where(images > 0, answers, 0)
    # without the matrix, since 10,000 classes have 100 million pairs
    confusions = top_confusions(predictions, classes, len(predictions)).drop_duplicates("target")
    worst = confusions.set_index("target").reindex(range(len(classes)))
    intervals = np.array([_wilson(*pair) for pair in zip(correct.tolist(), images.tolist(), strict=True)])
    return pd.DataFrame(
        {
            "class": list(classes),
            "images": images,
            "correct": correct,
            "recall": _per_cent(correct, images),
            "recall_lower": intervals[:, 0],
            "recall_upper": intervals[:, 1],
            "precision": _per_cent(correct, answers),
            "f1": _per_cent(2 * correct, images + answers),
            "confused_with": [name if isinstance(name, str) else None for name in worst["predicted"]],
            "confused_count": worst["count"].fillna(0).astype(int).to_numpy(),
        }
    )


def top_confusions(predictions: pd.DataFrame, classes: Sequence[str], count: int = 10) -> pd.DataFrame:
    """The `count` most frequent pairs of a true class and a wrong answer, a row for each pair.

    Columns: true, predicted (names); target, answer (their indices); count; images, of the true class; share of them.
    With equal counts the larger share comes first.
    """
    target, answer = _indices(predictions, len(classes))
    images = np.bincount(target, minlength=len(classes))
    pairs, counts = np.unique(np.stack([target, answer])[:, target != answer], axis=1, return_counts=True)
    true, predicted = pairs
    shares = _per_cent(counts, images[true])
    order = np.lexsort((predicted, true, -shares, -counts))[:count]
    return pd.DataFrame(
        {
            "true": [classes[i] for i in true[order]],
            "predicted": [classes[i] for i in predicted[order]],
            "target": true[order],
            "answer": predicted[order],
            "count": counts[order],
            "images": images[true[order]],
            "share": shares[order],
        }
    )


def confusion_order(matrix: np.ndarray) -> np.ndarray:
    """An order of the classes in which those confused with each other are neighbours.

    Average linkage on 1 - (share of i taken for j + share of j taken for i) / 2, its leaves ordered optimally
    [Bar-Joseph, Gifford, Jaakkola, Bioinformatics 2001]. Classes without a confusion come last, in the matrix's order.

    Args:
        matrix: (K, K) counts.

    Returns:
        (K,) permutation of the indices.
    """
    from scipy.cluster.hierarchy import leaves_list, linkage, optimal_leaf_ordering  # here, since it is slow to import
    from scipy.spatial.distance import squareform

    wrong = matrix * ~np.eye(len(matrix), dtype=bool)
    shares = wrong / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    similarity = (shares + shares.T) / 2
    confused = np.flatnonzero(similarity.any(axis=1))
    alone = np.flatnonzero(~similarity.any(axis=1))
    if len(confused) > 2:
        distance = 1 - similarity[np.ix_(confused, confused)]
        np.fill_diagonal(distance, 0)
        condensed = squareform(distance, checks=False)
        tree = optimal_leaf_ordering(linkage(condensed, "average"), condensed)
        confused = confused[leaves_list(tree)]
    return np.concatenate([confused, alone])


def _indices(predictions: pd.DataFrame, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Columns target and predicted, checked to index `count` classes."""
    missing = [column for column in ("target", "predicted") if column not in predictions]
    if missing:
        raise RunError(f"predictions have no column {', '.join(missing)}; give those of a run")
    if predictions.empty:
        raise RunError("predictions have no rows; evaluate the run again")
    columns = []
    for name in ("target", "predicted"):
        values = predictions[name].to_numpy()
        if values.dtype.kind not in "iu" or values.min() < 0 or values.max() >= count:
            bad = [value for value in values.tolist() if not (isinstance(value, int) and 0 <= value < count)]
            found = repr(bad[0]) if bad else f"{values.dtype} numbers"
            raise RunError(
                f"predictions: {name} holds {found}, not an index of the {count} classes 0 to {count - 1}; "
                "give predictions and classes of the same run"
            )
        columns.append(values.astype(np.int64))
    return columns[0], columns[1]


def _per_cent(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    nothing = np.full(len(whole), np.nan)
    share: np.ndarray = np.divide(100 * part, whole, out=nothing, where=whole > 0)
    return share


def _wilson(correct: int, images: int) -> tuple[float, float]:
    """95 % interval of a share, in per cent; NaN where there are no images."""
    if images == 0:
        return float("nan"), float("nan")
    from scipy.stats import binomtest  # here, since it is slow to import

    interval = binomtest(correct, images).proportion_ci(0.95, method="wilson")
    return 100 * float(interval.low), 100 * float(interval.high)
