"""Spectra over the course of training."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from fgvc.csv_files import read_csv
from fgvc.errors import RunError
from fgvc.runs.settings import Group, sources
from fgvc.runs.spectra import (
    SpectrumHistory,
    condition_number,
    effective_rank,
    eigenvalue_curve,
    median_over_images,
    nonzero_condition_number,
    numerical_rank,
    participation_ratio,
)
from fgvc.runs.summary import Run

_FUNCTIONS = (condition_number, nonzero_condition_number, effective_rank, participation_ratio)
MEASURES = tuple(measure.__name__ for measure in _FUNCTIONS)
COLUMNS = ("label", "epoch", "n", *MEASURES, *(f"{m}_{end}" for m in MEASURES for end in ("lowest", "highest")))
EPOCH_COLUMNS = ("stage", "epoch", "index", "lower", "median", "upper", "rank")


def condition_history(group: Group) -> tuple[pd.DataFrame, list[str]]:
    """Measures of the covariance by epoch, and notes on runs that did not keep their spectra.

    Returns:
        One row a method and epoch, in that order: label, epoch, n (seeds), and of each of `MEASURES` the median over
        the seeds of the median over images, with the lowest and highest seed; and seeds, runs, commits.
    """
    rows, notes = [], []
    for method, runs in group.items():
        kept = []
        for run in runs:
            try:
                kept.append((run, _measures(run.history())))
            except RunError as error:
                notes.append(f"no history of {run.label}, seed {run.seed}: {error}")
        if kept:
            rows += _rows(method.label, [run for run, _ in kept], pd.concat([table for _, table in kept]))
    table: pd.DataFrame = pd.DataFrame(rows, columns=(*COLUMNS, "seeds", "runs", "commits"))
    return table, notes


def _measures(history: SpectrumHistory) -> pd.DataFrame:
    """Medians over images, one row an epoch."""
    measured = {m.__name__: [median_over_images(m(before)) for before in history.before] for m in _FUNCTIONS}
    table: pd.DataFrame = pd.DataFrame({"epoch": history.epochs, **measured})
    return table


def _rows(label: str, runs: Sequence[Run], table: pd.DataFrame) -> list[dict[str, object]]:
    rows = []
    for epoch, part in table.groupby("epoch"):
        row: dict[str, object] = {"label": label, "epoch": epoch, "n": len(part)}
        for measure in MEASURES:
            row |= {measure: part[measure].median(), f"{measure}_lowest": part[measure].min()}
            row[f"{measure}_highest"] = part[measure].max()
        rows.append(row | sources(runs))
    return rows


def curves_by_epoch(runs: Sequence[Run]) -> pd.DataFrame:
    """Eigenvalues by epoch, over the images and seeds of one method.

    Returns:
        One row a stage ("before", "after" normalisation), epoch and index (1: largest): lower, median and upper; and
        the rank of the covariance, median over all images and epochs.

    Raises:
        RunError: a run did not keep its spectra, the runs differ in their epochs or widths, or all is zero.
    """
    histories = [run.history() for run in runs]
    first = histories[0]
    if any(h.before.shape[2] != first.before.shape[2] or h.epochs != first.epochs for h in histories):
        raise RunError("the runs differ in the epochs or the number of eigenvalues they kept; give runs of one length")
    every_covariance = np.concatenate([history.before.reshape(-1, history.before.shape[2]) for history in histories])
    rank = int(median_over_images(numerical_rank(every_covariance)))
    if rank == 0:
        raise RunError(f"{runs[0].path}: the covariances of most images are zero: the features are constant")
    rows = []
    for stage in ("before", "after"):
        values = [getattr(history, stage) for history in histories]
        if any(value is None for value in values):
            continue
        for place, epoch in enumerate(first.epochs):
            curve = eigenvalue_curve(np.concatenate([value[place] for value in values]))
            for index, (lower, median, upper) in enumerate(zip(curve.lower, curve.median, curve.upper, strict=True)):
                rows.append((stage, epoch, index + 1, lower, median, upper, rank))
    table: pd.DataFrame = pd.DataFrame(rows, columns=EPOCH_COLUMNS)
    return table


def load_history(path: Path) -> pd.DataFrame:
    """A `condition_history` that was saved as CSV. Raises RunError where it is missing or damaged."""
    return read_csv(path, COLUMNS)


def load_curves_by_epoch(path: Path) -> pd.DataFrame:
    """`curves_by_epoch` of labelled methods, saved as CSV. Raises RunError where it is missing or damaged."""
    return read_csv(path, ("label", *EPOCH_COLUMNS))
