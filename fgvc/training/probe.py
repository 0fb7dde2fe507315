"""The spectrum of a fixed batch of test images, looked at again and again while a run trains."""

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
    """Up to `count` indices of `total`, evenly spaced: images beside each other are of one class."""
    indices: list[int] = torch.linspace(0, total - 1, min(count, total), dtype=torch.float64).round().long().tolist()
    return indices


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
    def measure(self, module: FineGrainedModel | PoolingHead, device: torch.device) -> Spectrum:
        """The spectra under the weights of `module`, which is put in evaluation mode; draws no random number."""
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
    """What metrics.csv says of the covariance: condition numbers and effective rank, medians over the images."""
    measures = (condition_number, nonzero_condition_number, effective_rank)
    return {measure.__name__: median_over_images(measure(spectrum.before)) for measure in measures}
