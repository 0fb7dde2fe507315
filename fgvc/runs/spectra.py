"""Eigenvalues that a run saves for some of its test images: after training, and by epoch.

Shapes: n images, d channels, E epochs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fgvc.errors import RunError
from fgvc.io import read_npz, write_npz


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

        Raises:
            RunError: the file is missing (trainer.probe_images=0) or damaged.
        """
        if not path.is_file():
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
    if not np.isfinite(array).all():
        raise RunError(f"{path}: {name!r} holds NaN or infinity: the training diverged; repeat it with a lower rate")
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
