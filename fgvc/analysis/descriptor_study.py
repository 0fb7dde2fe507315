"""The descriptor study of the runs of one setting, as the tables that are kept of it."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from fgvc.analysis.descriptors import (
    Descriptors,
    class_pairs,
    embed,
    neighbour_table,
    queries,
    read_descriptors,
    similarity_and_confusion,
)
from fgvc.analysis.runs import Run
from fgvc.analysis.settings import group_runs
from fgvc.errors import RunError

KEPT_PAIRS = 40


class DescriptorStudy(NamedTuple):
    """The tables of a study; the functions of `fgvc.analysis.descriptors` say what their columns are.

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
) -> DescriptorStudy:
    """Study the descriptors of runs of one setting.

    Args:
        runs: finished.
        label: of the method that is drawn; None takes that of the highest mean top-1.
        seed: of the map and the bootstrap.
        root, cache: folders of the dataset and of cached features, where they have moved since training.

    Raises:
        RunError: runs of several settings, or no run of `label`; or as `read_descriptors`.
        DatasetError, WeightsError: as in training.
    """
    groups = group_runs(runs)
    if len(groups) > 1:
        titles = "".join(f"\n  {setting.title}" for setting in groups)
        raise RunError(f"these runs belong to {len(groups)} settings, a study compares those of one:{titles}")
    (group,) = groups.values()
    by_label = {method.label: of_method for method, of_method in group.items()}
    drawn = label or max(by_label, key=lambda name: np.mean([run.final.top1 for run in by_label[name] if run.final]))
    if drawn not in by_label:
        raise RunError(f"no run of {drawn!r} here; choose one of {', '.join(by_label)}")
    pairs, correlations, neighbours = [], [], []
    shown: Descriptors | None = None
    for name, of_method in by_label.items():
        for run in of_method:
            found = read_descriptors(run.path, root=root, cache=cache)
            neighbours.append(neighbour_table(found))
            if run is of_method[0]:
                shown = found if name == drawn else shown
                all_pairs = class_pairs(found)
                correlations.append({"label": name, **vars(similarity_and_confusion(all_pairs, seed=seed))})
                pairs.append(_kept(all_pairs).assign(label=name))
    assert shown is not None
    return DescriptorStudy(
        pd.concat(pairs, ignore_index=True),
        pd.DataFrame(correlations),
        pd.concat(neighbours, ignore_index=True),
        queries(shown),
        embed(shown, seed=seed),
    )


def _kept(pairs: pd.DataFrame) -> pd.DataFrame:
    """The closest pairs, and those most often confused."""
    confused = pairs.sort_values(["confused", "distance"], ascending=[False, True]).head(KEPT_PAIRS)
    both: pd.DataFrame = pd.concat([pairs.head(KEPT_PAIRS), confused]).drop_duplicates()
    return both
