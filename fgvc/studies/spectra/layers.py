"""Another look at the test images of a run: spectra under its last weights, and of the layers of its head."""

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset

from fgvc.inference.restore import restore_run
from fgvc.models import FineGrainedModel
from fgvc.pooling import pooling_spectrum
from fgvc.runs.spectra import Spectrum
from fgvc.runs.summary import Run
from fgvc.spectral import covariance_eigenvalues
from fgvc.spectral.descriptor import null_as_zero
from fgvc.studies.spectra.measure import MethodSpectrum, as_shares
from fgvc.training.probe import SpectrumProbe, evenly_spaced


def look_again(run: Run, images: int, *, root: str | None = None, cache: str | None = None) -> Spectrum:
    """Spectra of up to `images` test images of a finished run, evenly spaced, under its last weights.

    Raises RunError, DatasetError, WeightsError as `restore_run`.
    """
    restored = restore_run(run.path, root=root, cache=cache)
    return SpectrumProbe(restored.inputs(), images).measure(restored.trained, restored.device)


def layer_spectra(run: Run, images: int, *, root: str | None = None, cache: str | None = None) -> list[MethodSpectrum]:
    """Spectra of what enters the head, of what its pooling reads, and of the normalised matrix, as shares of the trace.

    Returns:
        One spectrum a layer, labelled, in `before`; the last is missing for a head that normalises no covariance.

    Raises:
        RunError, DatasetError, WeightsError: as `restore_run`.
    """
    restored = restore_run(run.path, root=root, cache=cache)
    samples = restored.inputs()
    chosen = Subset(samples, evenly_spaced(len(samples), images))
    found: dict[str, list[np.ndarray]] = {}
    with torch.inference_mode():
        for inputs, _ in DataLoader(chosen, batch_size=32):
            moved = inputs.to(restored.device)
            maps = restored.trained.backbone(moved) if isinstance(restored.trained, FineGrainedModel) else moved
            before, after = pooling_spectrum(restored.head.pooling, restored.head.pooling_input(maps))
            if after is not None:  # null eigenvalues, which the map puts at its floor, are none of its making
                after = torch.where(null_as_zero(before.flip(-1), before.shape[1]).flip(-1) > 0, after, 0)
            layers = {
                f"{run.backbone}'s output, {maps.shape[1]} channels": covariance_eigenvalues(maps),
                f"reduced, {before.shape[1]} channels": before,
                f"normalised by {run.label}": after,
            }
            for name, values in layers.items():
                if values is not None:
                    found.setdefault(name, []).append(values.cpu().numpy())
    return [as_shares(MethodSpectrum(name, (run.seed,), np.concatenate(parts), None)) for name, parts in found.items()]
