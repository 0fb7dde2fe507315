"""Spectra of finished runs: by method, by class, by layer, and over training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fgvc.errors import RunError
from fgvc.io import read_csv
from fgvc.runs.settings import Group, one_setting, sources
from fgvc.runs.spectra import (
    Spectrum,
    condition_number,
    effective_rank,
    eigenvalue_curve,
    median_over_images,
    median_rank,
    nonzero_condition_number,
    numerical_rank,
    participation_ratio,
    smallest_share,
)
from fgvc.runs.summary import Run


@dataclass(frozen=True)
class MethodSpectrum:
    """Eigenvalues of one method over the test images of all its runs.

    Attributes:
        label: Name of the method in tables and figures.
        seeds: Seeds of the pooled runs.
        before: Eigenvalues of the covariance, (n, d) float64, descending; n counts each image once a run.
        after: Eigenvalues of the normalised matrix, likewise; None for a method without one.
    """

    label: str
    seeds: tuple[int, ...]
    before: np.ndarray
    after: np.ndarray | None

    @property
    def rank(self) -> int:
        """Numerical rank of the covariance, median over images (the lower one of two)."""
        return median_rank(self.before)


def pool_spectra(runs: Sequence[Run]) -> list[MethodSpectrum]:
    """One spectrum a method, from the finished runs of one setting.

    Raises RunError: the runs belong to several settings (another dataset, backbone, ...), a method has two runs of one
    seed, or a spectrum.npz is missing or damaged.
    """
    _, group = one_setting(runs)
    return [pool(method.label, own, [run.spectrum() for run in own]) for method, own in group.items()]


def summarise(spectrum: MethodSpectrum, smallest: int = 8) -> dict[str, Any]:
    """Medians over images of the measures in `fgvc.runs.spectra`, by name.

    Names: seeds, images, channels, rank, condition_number and nonzero_condition_number (of the covariance); and of the
    covariance NAME_before and of the normalised matrix NAME_after, None for a method without one: effective_rank,
    participation, and smallest_share, the share of the trace in the `smallest` smallest non-zero eigenvalues.
    """
    before = spectrum.before
    summary: dict[str, Any] = {
        "seeds": len(spectrum.seeds),
        "images": before.shape[0],
        "channels": before.shape[1],
        "rank": spectrum.rank,
        "condition_number": _median(condition_number(before)),
        "nonzero_condition_number": _median(nonzero_condition_number(before)),
    }
    share = partial(smallest_share, k=smallest, rank=numerical_rank(before))
    measures: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "effective_rank": effective_rank,
        "participation": participation_ratio,
        "smallest_share": share,
    }
    for stage, values in (("before", before), ("after", spectrum.after)):
        for name, measure in measures.items():
            summary[f"{name}_{stage}"] = None if values is None else _median(measure(values))
    return summary


def _median(values: np.ndarray) -> float:
    """Median over images; those of a zero matrix (NaN) are left out."""
    known = values[~np.isnan(values)]
    return float(np.median(known)) if len(known) else float("nan")


CURVE_COLUMNS = ("label", "seeds", "images", "channels", "rank", "stage", "index", "lower", "median", "upper")


def curve_table(spectra: Sequence[MethodSpectrum]) -> pd.DataFrame:
    """What a figure of spectra shows: median and quartiles over images of each eigenvalue, `CURVE_COLUMNS`.

    One row a label, stage ("before", "after" normalisation; a method without the latter has none) and index (1:
    largest); `rank` is that of the covariance.
    """
    rows = []
    for spectrum in spectra:
        images, channels = spectrum.before.shape
        head = (spectrum.label, len(spectrum.seeds), images, channels, spectrum.rank)
        for stage, values in (("before", spectrum.before), ("after", spectrum.after)):
            if values is not None:
                quartiles = eigenvalue_curve(values).T
                rows += [(*head, stage, index, *numbers) for index, numbers in enumerate(quartiles, start=1)]
    return pd.DataFrame(rows, columns=CURVE_COLUMNS)


def pool(label: str, runs: Sequence[Run], spectra: Sequence[Spectrum]) -> MethodSpectrum:
    """The spectra of all runs of a method together. Raises RunError where they differ in width."""
    shapes = {(spectrum.before.shape[1], spectrum.after is None) for spectrum in spectra}
    if len(shapes) > 1:
        folders = ", ".join(str(run.path) for run in runs)
        raise RunError(f"the spectra of {label} differ in width or in having an 'after': {folders}; repeat them")
    afters = [spectrum.after for spectrum in spectra if spectrum.after is not None]
    return MethodSpectrum(
        label=label,
        seeds=tuple(run.seed for run in runs),
        before=np.concatenate([spectrum.before for spectrum in spectra]),
        after=np.concatenate(afters) if afters else None,
    )


CLASS_COLUMNS = (
    *("label", "class", "images", "effective_rank", "effective_rank_lower", "effective_rank_upper"),
    "nonzero_condition_number",
)


def spectra_by_class(label: str, runs: Sequence[Run], spectra: Sequence[Spectrum]) -> pd.DataFrame:
    """Measures of the covariance by class, the images of all runs of one method pooled.

    There is one spectrum a run; the class names are those of the runs.

    Returns:
        One row a class that has images: `CLASS_COLUMNS`, medians over its images, and quartiles of the effective rank.

    Raises:
        RunError: the images' classes or the classes' names are not known (runs of earlier versions), or do not fit.
    """
    names = runs[0].classes
    if names is None or any(spectrum.targets is None for spectrum in spectra):
        raise RunError(f"{runs[0].path}: its spectrum.npz names no classes; give --images N to look at images again")
    before = np.concatenate([spectrum.before for spectrum in spectra])
    targets = np.concatenate([spectrum.targets for spectrum in spectra if spectrum.targets is not None])
    unknown = targets[(targets < 0) | (targets >= len(names))]
    if len(unknown):
        raise RunError(f"{runs[0].path}: an image of class {unknown[0]} in spectrum.npz, of {len(names)} class(es)")
    ranks, conditions = effective_rank(before), nonzero_condition_number(before)
    rows = []
    for index in sorted(set(targets.tolist())):
        own = targets == index
        lower, median, upper = np.quantile(ranks[own], [0.25, 0.5, 0.75], method="inverted_cdf")
        condition = np.quantile(conditions[own], 0.5, method="inverted_cdf")
        rows.append((label, names[index], int(own.sum()), median, lower, upper, condition))
    return pd.DataFrame(rows, columns=CLASS_COLUMNS)


def as_shares(spectrum: MethodSpectrum) -> MethodSpectrum:
    """The covariance's eigenvalues divided by their sum, image by image, for spectra of other scales."""
    trace = np.maximum(spectrum.before.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)
    return replace(spectrum, before=spectrum.before / trace, after=None)


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
                history = run.history()
            except RunError as error:
                notes.append(f"no history of {run.label}, seed {run.seed}: {error}")
                continue
            measured = {m.__name__: [median_over_images(m(before)) for before in history.before] for m in _FUNCTIONS}
            kept.append((run, pd.DataFrame({"epoch": history.epochs, **measured})))
        if kept:
            rows += _rows(method.label, [run for run, _ in kept], pd.concat([table for _, table in kept]))
    table: pd.DataFrame = pd.DataFrame(rows, columns=(*COLUMNS, "seeds", "runs", "commits"))
    return table, notes


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
            quartiles = eigenvalue_curve(np.concatenate([value[place] for value in values])).T
            rows += [(stage, epoch, index, *numbers, rank) for index, numbers in enumerate(quartiles, start=1)]
    return pd.DataFrame(rows, columns=EPOCH_COLUMNS)


_KEPT = {"conditions": COLUMNS, "epochs": ("label", *EPOCH_COLUMNS), "classes": CLASS_COLUMNS}


def load_view(name: str, path: Path) -> pd.DataFrame:
    """The table that a view of this name (see `fgvc.studies.spectra.views`) wrote. Raises RunError if it is damaged."""
    return read_csv(path, _KEPT.get(name, CURVE_COLUMNS), names=("label", "class"))
