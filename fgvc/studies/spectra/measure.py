"""Spectra of the methods of one setting, the seeds of a method pooled."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from fgvc.csv_files import read_csv
from fgvc.errors import RunError
from fgvc.runs.settings import Method, one_setting
from fgvc.runs.spectra import (
    condition_number,
    effective_rank,
    eigenvalue_curve,
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
        label: the method's name in tables and figures.
        seeds: of the pooled runs.
        before: (n, d) float64, descending, of the covariance; n counts each image once a run.
        after: (n, d) float64, descending, of the normalised matrix, or None for a method without one.
    """

    label: str
    seeds: tuple[int, ...]
    before: np.ndarray
    after: np.ndarray | None

    @property
    def rank(self) -> int:
        """Numerical rank of the covariance, median over images (the lower one of two)."""
        return median_rank(self.before)


@dataclass(frozen=True)
class SpectrumSummary:
    """Medians over images of the measures in `fgvc.runs.spectra`.

    `*_after` is None for a method without a normalised matrix; the conditioning is that of the covariance.
    `smallest_share_*` is the share of the trace in the `smallest` smallest non-zero eigenvalues.
    """

    label: str
    seeds: int
    images: int
    channels: int
    rank: int
    condition_number: float
    nonzero_condition_number: float
    effective_rank_before: float
    effective_rank_after: float | None
    participation_before: float
    participation_after: float | None
    smallest: int
    smallest_share_before: float
    smallest_share_after: float | None


def pool_spectra(runs: Sequence[Run]) -> list[MethodSpectrum]:
    """One spectrum a method, from the finished runs of one setting.

    Raises:
        RunError: the runs belong to several settings (another dataset, backbone, ...), a method has two runs of one
            seed, or a spectrum.npz is missing or damaged.
    """
    _, group = one_setting(runs)
    return [_pool(method, repetitions) for method, repetitions in group.items()]


def summarise(spectrum: MethodSpectrum, smallest: int = 8) -> SpectrumSummary:
    """The numbers of a spectrum that stand in a table; `smallest` eigenvalues count as the small ones."""
    before, after = spectrum.before, spectrum.after
    nonzero = nonzero_condition_number(before)
    return SpectrumSummary(
        label=spectrum.label,
        seeds=len(spectrum.seeds),
        images=before.shape[0],
        channels=before.shape[1],
        rank=spectrum.rank,
        condition_number=float(np.median(condition_number(before))),
        nonzero_condition_number=float(np.median(nonzero[~np.isnan(nonzero)])) if spectrum.rank else float("nan"),
        effective_rank_before=float(np.median(effective_rank(before))),
        effective_rank_after=None if after is None else float(np.median(effective_rank(after))),
        participation_before=float(np.median(participation_ratio(before))),
        participation_after=None if after is None else float(np.median(participation_ratio(after))),
        smallest=smallest,
        smallest_share_before=_share(before, before, smallest),
        smallest_share_after=None if after is None else _share(after, before, smallest),
    )


def _share(eigenvalues: np.ndarray, covariance: np.ndarray, smallest: int) -> float:
    """Median over images that are not zero."""
    shares = smallest_share(eigenvalues, smallest, numerical_rank(covariance))
    return float(np.median(shares[~np.isnan(shares)])) if not np.isnan(shares).all() else float("nan")


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
                curve = eigenvalue_curve(values)
                quartiles = zip(curve.lower, curve.median, curve.upper, strict=True)
                rows += [(*head, stage, index, *numbers) for index, numbers in enumerate(quartiles, start=1)]
    table: pd.DataFrame = pd.DataFrame(rows, columns=CURVE_COLUMNS)
    return table


def load_curves(path: Path) -> pd.DataFrame:
    """A `curve_table` that was saved as CSV. Raises RunError where it is missing or damaged."""
    return read_csv(path, CURVE_COLUMNS)


def _pool(method: Method, runs: Sequence[Run]) -> MethodSpectrum:
    spectra = [run.spectrum() for run in runs]
    shapes = {(spectrum.before.shape[1], spectrum.after is None) for spectrum in spectra}
    if len(shapes) > 1:
        folders = ", ".join(str(run.path) for run in runs)
        raise RunError(f"the spectra of {method.label} differ in width or in having an 'after': {folders}; repeat them")
    afters = [spectrum.after for spectrum in spectra if spectrum.after is not None]
    return MethodSpectrum(
        label=method.label,
        seeds=tuple(run.seed for run in runs),
        before=np.concatenate([spectrum.before for spectrum in spectra]),
        after=np.concatenate(afters) if afters else None,
    )
