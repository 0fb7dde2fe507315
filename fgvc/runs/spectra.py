"""Eigenvalues that a run saves for some of its test images, after training and by epoch, and measures of them.

Shapes: n images, d channels, E epochs. The measures take `eigenvalues` (n, d) float64 of positive semi-definite
matrices, each row descending, and return (n,) unless they say otherwise. Rank-deficient matrices are the rule here
(rank <= H*W - 1), and LAPACK returns rounding noise of either sign for their zero eigenvalues, about 1e-17 of the
largest. Every measure says how it treats that noise.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fgvc.errors import RunError
from fgvc.foreign import read_npz
from fgvc.io import write_npz

_ROUNDING = 1e-6  # of the largest eigenvalue
_LARGEST = 1e30  # of an eigenvalue; squares and sums of such numbers are finite


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of n test images, each row descending.

    Attributes:
        before: Eigenvalues (n, d) float64 of the covariance that the pooling reads.
        after: Eigenvalues (n, d) float64 of the normalised matrix; None for a pooling without one.
        targets: Class indices (n,) of the images; None in runs of earlier versions.
        indices: Indices (n,) of the images in the test split; None in runs of earlier versions.
    """

    before: np.ndarray
    after: np.ndarray | None
    targets: np.ndarray | None = None
    indices: np.ndarray | None = None

    def write(self, path: Path) -> None:
        """Write spectrum.npz: the attributes that are not None."""
        write_npz(path, {name: array for name, array in vars(self).items() if array is not None})

    @classmethod
    def read(cls, path: Path) -> "Spectrum":
        """Read spectrum.npz. Raises RunError if it is missing or damaged."""
        arrays = _read(path, ("before",))
        before, after = _before_and_after(arrays, path, "(n, d)")
        return cls(before, after, *_images(arrays, path, len(before)))


@dataclass
class SpectrumHistory:
    """The spectra of the same n test images after each of E epochs; epoch 0 is before the first step."""

    epochs: list[int] = field(default_factory=list)
    spectra: list[Spectrum] = field(default_factory=list)

    @property
    def before(self) -> np.ndarray:
        """Eigenvalues (E, n, d) float64 of the covariance."""
        return np.stack([spectrum.before for spectrum in self.spectra])

    @property
    def after(self) -> np.ndarray | None:
        """Eigenvalues (E, n, d) float64 of the normalised matrix; None for a pooling without one."""
        after = [spectrum.after for spectrum in self.spectra if spectrum.after is not None]
        return np.stack(after) if after else None

    def write(self, path: Path) -> None:
        """Write spectrum_history.npz: epochs (E,), before, after, targets (n,), indices (n,)."""
        last = self.spectra[-1]
        arrays = {**vars(last), "epochs": np.array(self.epochs), "before": self.before, "after": self.after}
        write_npz(path, {name: array for name, array in arrays.items() if array is not None})

    @classmethod
    def read(cls, path: Path, last_epoch: int | None = None) -> "SpectrumHistory":
        """Read spectrum_history.npz up to `last_epoch`.

        Raises RunError: the file is missing (trainer.probe_images=0) or damaged.
        """
        if not path.exists():
            reason = "saved no spectra by epoch (trainer.probe_images=0, or an earlier version)"
            raise RunError(f"{path}: no such file; the run {reason}: repeat it")
        arrays = _read(path, ("before", "epochs"))
        before, after = _before_and_after(arrays, path, "(E, n, d)")
        epochs = arrays["epochs"]
        if epochs.shape != before.shape[:1] or epochs.dtype.kind != "i":
            raise _damaged(path, f"'epochs' is {epochs.dtype} of shape {epochs.shape}, not {len(before)}")
        targets, indices = _images(arrays, path, before.shape[1])
        count = sum(last_epoch is None or epoch <= last_epoch for epoch in epochs)
        spectra = [Spectrum(before[i], None if after is None else after[i], targets, indices) for i in range(count)]
        return cls([int(epoch) for epoch in epochs[:count]], spectra)


def _read(path: Path, needed: tuple[str, ...]) -> dict[str, np.ndarray]:
    try:
        arrays = read_npz(path)
    except (OSError, ValueError) as error:
        raise _damaged(path, f"cannot be read ({' '.join(str(error).split())})") from error
    for name in needed:
        if name not in arrays:
            raise _damaged(path, f"no array {name!r}, found {sorted(arrays) or 'none'}")
    return arrays


def _before_and_after(arrays: Mapping[str, np.ndarray], path: Path, shape: str) -> tuple[np.ndarray, np.ndarray | None]:
    before = _eigenvalues(arrays["before"], path, "before", shape)
    after = _eigenvalues(arrays["after"], path, "after", shape) if "after" in arrays else None
    if after is not None and after.shape != before.shape:
        raise _damaged(path, f"'after' has shape {after.shape}, 'before' {before.shape}")
    return before, after


def _eigenvalues(array: np.ndarray, path: Path, name: str, shape: str) -> np.ndarray:
    if array.ndim != shape.count(",") + 1 or 0 in array.shape or array.dtype.kind != "f":
        raise _damaged(path, f"{name!r} is {array.dtype} of shape {array.shape}, not floats {shape}")
    if not (np.abs(array) < _LARGEST).all():  # false for NaN
        what = f"holds NaN, infinity or numbers beyond {_LARGEST:g}"
        raise RunError(f"{path}: {name!r} {what}: the training diverged; repeat it with a lower rate")
    if (np.diff(array, axis=-1) > 0).any():
        raise _damaged(path, f"{name!r} is not in descending order")
    return array.astype(np.float64)


def _images(arrays: Mapping[str, np.ndarray], path: Path, n: int) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Return targets and indices of n images; None if absent."""
    for name in ("targets", "indices"):
        array = arrays.get(name)
        if array is not None and (array.shape != (n,) or array.dtype.kind != "i"):
            raise _damaged(path, f"{name!r} is {array.dtype} of shape {array.shape}, not one integer per image")
    return arrays.get("targets"), arrays.get("indices")


def _damaged(path: Path, what: str) -> RunError:
    return RunError(f"{path}: {what}; restore the file or repeat the run")


def eigenvalue_curve(eigenvalues: np.ndarray) -> np.ndarray:
    """Lower quartile, median and upper quartile over images of the i-th largest eigenvalue, (n, d) -> (3, d).

    Quantiles rather than a geometric mean and its spread: they commute with the logarithm, so they are right on a log
    axis, and one exact zero does not pull the whole position to zero. They are order statistics (no interpolation):
    each drawn value is the eigenvalue of some image.
    """
    curve: np.ndarray = np.quantile(eigenvalues, [0.25, 0.5, 0.75], axis=0, method="inverted_cdf")
    return curve


def numerical_rank(eigenvalues: np.ndarray) -> np.ndarray:
    """Number of numerically non-zero eigenvalues: those above d * eps * largest, eps = 2.2e-16.

    The threshold of `numpy.linalg.matrix_rank`; below it an eigenvalue cannot be told from the solver's rounding.
    """
    threshold = eigenvalues.shape[1] * np.finfo(np.float64).eps * eigenvalues[:, :1]
    rank: np.ndarray = (eigenvalues > np.maximum(threshold, 0)).sum(axis=1)
    return rank


def median_rank(eigenvalues: np.ndarray) -> int:
    """Median over images of the numerical rank (the lower one of two, so that it is that of an image)."""
    return int(np.quantile(numerical_rank(eigenvalues), 0.5, method="inverted_cdf"))


def condition_number(eigenvalues: np.ndarray) -> np.ndarray:
    """Largest over smallest eigenvalue, as tracked in [Song, Sebe, Wang, ICCV 2021]; infinite where the latter is <= 0.

    For a rank-deficient matrix the smallest is rounding noise, and so is this number: it says "singular", no more.
    """
    return _ratio(eigenvalues[:, 0], eigenvalues[:, -1])


def nonzero_condition_number(eigenvalues: np.ndarray) -> np.ndarray:
    """Largest over smallest numerically non-zero eigenvalue (`numerical_rank`); NaN for a zero matrix."""
    rank = numerical_rank(eigenvalues)
    smallest = np.take_along_axis(eigenvalues, np.maximum(rank - 1, 0)[:, None], axis=1)[:, 0]
    return np.where(rank > 0, _ratio(eigenvalues[:, 0], smallest), np.nan)


def effective_rank(eigenvalues: np.ndarray) -> np.ndarray:
    """exp(-sum_i p_i log p_i), p = eigenvalues / trace: from 1 to d, 0 for a zero matrix, NaN for an indefinite one.

    Roy and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007; the singular values
    of a positive semi-definite matrix are its eigenvalues. Negative ones (rounding) count as zero, and 0 log 0 = 0.
    """
    p = _shares(eigenvalues)
    entropy = -(p * np.log(np.where(p > 0, p, 1))).sum(axis=1)
    return np.where(p.any(axis=1), np.exp(entropy), 0)


def participation_ratio(eigenvalues: np.ndarray) -> np.ndarray:
    """(sum_i l_i)^2 / sum_i l_i^2: d for equal eigenvalues, 1 for one alone, 0 for a zero matrix, NaN if indefinite.

    Weighs the large eigenvalues more than `effective_rank` does. Negative ones (rounding) count as zero.
    """
    p = _shares(eigenvalues)
    return np.where(p.any(axis=1), 1 / np.maximum((p**2).sum(axis=1), np.finfo(np.float64).tiny), 0)


def smallest_share(eigenvalues: np.ndarray, k: int, rank: np.ndarray | None = None) -> np.ndarray:
    """Share of the trace in the k smallest non-zero eigenvalues; NaN for a zero matrix or an indefinite one.

    All of it where there are no more than k; null eigenvalues and negative ones (rounding) hold none.

    Args:
        eigenvalues: (n, d).
        k: how many.
        rank: (n,) number of non-zero eigenvalues; None means `numerical_rank`. A normalised matrix has that of its
            covariance, whose null eigenvalues the map puts at a floor; NaN where they are at none, as for an inverse.
    """
    rank = numerical_rank(eigenvalues) if rank is None else rank
    place, shares = np.arange(eigenvalues.shape[1]), _shares(eigenvalues)
    among = (place < rank[:, None]) & (place >= rank[:, None] - k)
    at_floor = (shares * (place >= rank[:, None])).sum(axis=1) < 1e-4
    return np.where((rank > 0) & at_floor, (shares * among).sum(axis=1), np.nan)


def median_over_images(values: np.ndarray) -> float:
    """Median of (n,), those of a zero matrix (NaN) left out; the lower one of two, so that it is of an image."""
    known = values[~np.isnan(values)]
    return float(np.quantile(known, 0.5, method="inverted_cdf")) if len(known) else np.nan


def _ratio(largest: np.ndarray, smallest: np.ndarray) -> np.ndarray:
    positive = smallest > 0
    return np.where(positive, largest / np.where(positive, smallest, 1), np.inf)


def _shares(eigenvalues: np.ndarray) -> np.ndarray:
    """Eigenvalues as shares of their sum, (n, d); all zero for a zero matrix, NaN for one that is indefinite."""
    positive = np.maximum(eigenvalues, 0)
    total = positive.sum(axis=1, keepdims=True)
    shares: np.ndarray = np.divide(positive, total, out=np.zeros_like(positive), where=total > 0)
    # a logarithm, say, has no shares
    indefinite = eigenvalues.min(axis=1) < -_ROUNDING * np.abs(eigenvalues).max(axis=1)
    return np.where(indefinite[:, None], np.nan, shares)
