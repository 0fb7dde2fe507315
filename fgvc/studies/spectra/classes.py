"""Spectra by class, and of the layers of a head, from what a run saved or from another look at its test images."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader, Subset

from fgvc.csv_files import read_csv
from fgvc.errors import RunError
from fgvc.inference.restore import restore_run
from fgvc.pooling import pooling_spectrum
from fgvc.runs.spectra import Spectrum, effective_rank, nonzero_condition_number
from fgvc.runs.summary import Run
from fgvc.spectral import covariance_eigenvalues
from fgvc.spectral.descriptor import null_as_zero
from fgvc.studies.spectra.measure import MethodSpectrum
from fgvc.training.probe import SpectrumProbe, evenly_spaced

CLASS_COLUMNS = (
    *("label", "class", "images", "effective_rank", "effective_rank_lower", "effective_rank_upper"),
    "nonzero_condition_number",
)


def look_again(run: Run, images: int, *, root: str | None = None, cache: str | None = None) -> Spectrum:
    """Spectra of up to `images` test images of a finished run, evenly spaced, under its last weights.

    Raises:
        RunError, DatasetError, WeightsError: as `restore_run`.
    """
    restored = restore_run(run.path, root=root, cache=cache)
    return SpectrumProbe(restored.inputs(), images).measure(restored.trained, restored.device)


def spectra_by_class(label: str, runs: Sequence[Run], spectra: Sequence[Spectrum]) -> pd.DataFrame:
    """Measures of the covariance by class, the images of all runs of one method pooled.

    Args:
        label: of the method.
        runs: the class names are theirs.
        spectra: one a run.

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
    table: pd.DataFrame = pd.DataFrame(rows, columns=CLASS_COLUMNS)
    return table


def load_classes(path: Path) -> pd.DataFrame:
    """`spectra_by_class` of one method or several, saved as CSV. Raises RunError where it is missing or damaged."""
    return read_csv(path, CLASS_COLUMNS, names=("label", "class"))


def layer_spectra(run: Run, images: int, *, root: str | None = None, cache: str | None = None) -> list[MethodSpectrum]:
    """Spectra of what enters the head, of what its pooling reads, and of the normalised matrix, as shares of the trace.

    Returns:
        One spectrum a layer, labelled, in `before`; the last is missing for a head that normalises no covariance.

    Raises:
        RunError, DatasetError, WeightsError: as `restore_run`.
    """
    restored = restore_run(run.path, root=root, cache=cache)
    restored.trained.eval()
    samples = restored.inputs()
    chosen = Subset(samples, evenly_spaced(len(samples), images))
    found: dict[str, list[np.ndarray]] = {}
    with torch.inference_mode():
        for inputs, _ in DataLoader(chosen, batch_size=32):
            moved = inputs.to(restored.device)
            maps = moved if restored.config.backbone.frozen else restored.backbone(moved)
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


def as_shares(spectrum: MethodSpectrum) -> MethodSpectrum:
    """The covariance's eigenvalues divided by their sum, image by image, for spectra of other scales."""
    trace = np.maximum(spectrum.before.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)
    return replace(spectrum, before=spectrum.before / trace, after=None)
