"""Spectra of a fixed set of test images, measured repeatedly during training."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset

from fgvc.models import FineGrainedModel, PoolingHead
from fgvc.pooling import pooling_spectrum
from fgvc.runs.spectra import (
    Spectrum,
    condition_number,
    effective_rank,
    median_over_images,
    nonzero_condition_number,
)


def evenly_spaced(total: int, count: int) -> list[int]:
    """Return up to `count` evenly spaced indices below `total`: neighbouring images belong to one class."""
    return torch.linspace(0, total - 1, min(count, total), dtype=torch.float64).round().long().tolist()


class SpectrumProbe:
    """Measures the spectra of some images of a split.

    Args:
        samples: samples of the split, as the trained module reads them.
        count: largest number of images; they are evenly spaced.
        indices: indices of the images to measure instead, e.g. those of an earlier probe.
    """

    def __init__(self, samples: Dataset[Any], count: int, indices: Sequence[int] = ()) -> None:
        total = len(samples)  # type: ignore[arg-type]  # a Dataset need not have a length
        self.indices = list(indices) or evenly_spaced(total, count)
        self._samples = Subset(samples, self.indices)

    @torch.inference_mode()
    def measure(self, module: FineGrainedModel | PoolingHead, device: torch.device) -> Spectrum:
        """Return the spectra with the weights of `module` in evaluation mode (set here); draw no random numbers."""
        module.eval()
        before, after, targets = [], [], []
        for inputs, classes in DataLoader(self._samples, batch_size=32, generator=torch.Generator()):
            head = module.head if isinstance(module, FineGrainedModel) else module
            first, second = pooling_spectrum(head.pooling, module.pooling_input(inputs.to(device)))
            before.append(first.cpu())
            after += [] if second is None else [second.cpu()]
            targets.append(classes)
        return Spectrum(
            torch.cat(before).numpy(),
            torch.cat(after).numpy() if after else None,
            torch.cat(targets).numpy(),
            np.array(self.indices),
        )


def spectrum_measures(spectrum: Spectrum) -> dict[str, float]:
    """Return the covariance measures for metrics.csv: medians over images of condition numbers and effective rank."""
    measures = (condition_number, nonzero_condition_number, effective_rank)
    return {measure.__name__: median_over_images(measure(spectrum.before)) for measure in measures}
