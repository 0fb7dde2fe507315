"""The spectrum of a fixed batch of test images, looked at again and again while a run trains."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from fgvc.errors import RunError
from fgvc.files import atomic_path
from fgvc.models import FineGrainedModel, PoolingHead
from fgvc.pooling import pooling_spectrum
from fgvc.reading import read_npz
from fgvc.spectrum_measures import (
    condition_number,
    effective_rank,
    median_over_images,
    nonzero_condition_number,
)


def evenly_spaced(total: int, count: int) -> list[int]:
    """Up to `count` indices of `total`, evenly spaced: images beside each other are of one class."""
    indices: list[int] = torch.linspace(0, total - 1, min(count, total), dtype=torch.float64).round().long().tolist()
    return indices


@dataclass(frozen=True)
class ProbeSpectrum:
    """Eigenvalues of n images, descending.

    Attributes:
        before: (n, d) float64, of the covariance of what the pooling reads.
        after: (n, d) float64, of the normalised matrix; None for a pooling without one.
        targets: (n,) class indices of the images.
        indices: of the images in their split.
    """

    before: Tensor
    after: Tensor | None
    targets: Tensor
    indices: list[int]

    def medians(self) -> dict[str, float]:
        """What metrics.csv says of the covariance: measures of `spectrum_measures`, medians over images."""
        measures = (condition_number, nonzero_condition_number, effective_rank)
        return {measure.__name__: median_over_images(measure(self.before.numpy())) for measure in measures}

    def arrays(self) -> dict[str, np.ndarray]:
        """What spectrum.npz holds."""
        arrays = {"before": self.before.numpy(), "targets": self.targets.numpy(), "indices": np.array(self.indices)}
        return arrays if self.after is None else arrays | {"after": self.after.numpy()}


class SpectrumProbe:
    """Some images of a split.

    Args:
        samples: of the split, as the trained module reads them.
        count: how many, at most; evenly spaced.
        indices: of other images than those, for another look at them.
    """

    def __init__(self, samples: Dataset[Any], count: int, indices: Sequence[int] = ()) -> None:
        total = len(samples)  # type: ignore[arg-type]  # a Dataset need not have a length
        self.indices = list(indices) or evenly_spaced(total, count)
        self._samples = Subset(samples, self.indices)

    @torch.inference_mode()
    def measure(self, module: FineGrainedModel | PoolingHead, device: torch.device) -> ProbeSpectrum:
        """The spectra under the weights of `module`, which is put in evaluation mode; draws no random number."""
        module.eval()
        before, after, targets = [], [], []
        for inputs, classes in DataLoader(self._samples, batch_size=32, generator=torch.Generator()):
            head = module.head if isinstance(module, FineGrainedModel) else module
            first, second = pooling_spectrum(head.pooling, module.pooling_input(inputs.to(device)))
            before.append(first.cpu())
            after += [] if second is None else [second.cpu()]
            targets.append(classes)
        return ProbeSpectrum(torch.cat(before), torch.cat(after) if after else None, torch.cat(targets), self.indices)


@dataclass
class SpectrumHistory:
    """The spectra of a run's probe, one entry an epoch; epoch 0 is before the first step."""

    epochs: list[int] = field(default_factory=list)
    spectra: list[ProbeSpectrum] = field(default_factory=list)

    @property
    def indices(self) -> list[int]:
        """Of the images in their split; none before the first entry."""
        return self.spectra[-1].indices if self.spectra else []

    def look(
        self,
        epoch: int,
        samples: Dataset[Any],
        count: int,
        module: FineGrainedModel | PoolingHead,
        device: torch.device,
    ) -> dict[str, float]:
        """Add the spectra of `count` samples after `epoch`; returns measures of them, for metrics.csv.

        A continued run looks at the images of its history, whose epochs could not be compared otherwise.
        """
        spectrum = SpectrumProbe(samples, count, self.indices).measure(module, device)
        self.add(epoch, spectrum)
        return spectrum.medians()

    def add(self, epoch: int, spectrum: ProbeSpectrum) -> None:
        self.epochs.append(epoch)
        self.spectra.append(spectrum)

    def write(self, path: Path) -> None:
        """Write `epochs` (E,), `before` (E, n, d), `after` (absent for a pooling without one), `targets`, `indices`."""
        last = self.spectra[-1]
        arrays = last.arrays() | {"epochs": np.array(self.epochs), "before": _stack([s.before for s in self.spectra])}
        if last.after is not None:
            arrays["after"] = _stack([s.after for s in self.spectra if s.after is not None])
        write_arrays(path, arrays)

    @classmethod
    def read(cls, path: Path, last_epoch: int) -> "SpectrumHistory":
        """What was written up to `last_epoch`; empty where there is no file. Raises RunError where it is damaged."""
        if not path.is_file():
            return cls()
        try:
            arrays = {key: torch.from_numpy(array) for key, array in read_npz(path).items()}
            epochs = [int(epoch) for epoch in arrays["epochs"] if epoch <= last_epoch]
            after, indices = arrays.get("after"), arrays["indices"].tolist()
            spectra = [
                ProbeSpectrum(arrays["before"][i], None if after is None else after[i], arrays["targets"], indices)
                for i in range(len(epochs))
            ]
        except Exception as error:  # zip, NumPy and key errors alike: the file cannot be used
            raise RunError(f"{path} is damaged: {error}; delete it to go on without its epochs") from error
        return cls(epochs, spectra)


def _stack(values: Sequence[Tensor]) -> np.ndarray:
    stacked: np.ndarray = torch.stack(list(values)).numpy()
    return stacked


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write an .npz file, whole or not at all."""
    with atomic_path(path) as temporary:
        np.savez(temporary, **arrays)  # type: ignore[arg-type]  # numpy's stub takes the names for options
