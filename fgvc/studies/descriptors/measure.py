"""The descriptor study of the runs of one setting, as the tables that are kept of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from fgvc.csv_files import read_csv, to_csv
from fgvc.errors import DatasetError, RunError, WeightsError
from fgvc.runs.settings import one_setting
from fgvc.runs.summary import Run
from fgvc.studies.descriptors.descriptors import (
    Descriptors,
    class_pairs,
    embed,
    neighbour_table,
    queries,
    read_descriptors,
    similarity_and_confusion,
)

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
    """The tables of a study; the functions of `fgvc.studies.descriptors.descriptors` say what their columns are.

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
