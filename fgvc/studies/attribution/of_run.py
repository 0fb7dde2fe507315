"""Attributions of a finished run: its saved weights, its own images and transform, bands by the rank it found."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fgvc.data import TransformSpec
from fgvc.errors import ConfigError
from fgvc.inference.predict import Predictor
from fgvc.inference.restore import restore_run
from fgvc.models import FineGrainedModel
from fgvc.runs.spectra import median_rank
from fgvc.runs.summary import read_run
from fgvc.spectral import Band
from fgvc.studies.attribution.eigenvectors import EigenvectorMaps, eigenvector_maps
from fgvc.studies.attribution.explanation import explain_bands
from fgvc.studies.attribution.methods import require_methods
from fgvc.studies.attribution.subjects import Subjects, choose_subjects
from fgvc.studies.truncation.bands import parse_band


@dataclass(frozen=True)
class RunAttribution:
    """What a run's model rests on, in N images, for K bands.

    Attributes:
        run: its folder.
        root: of its dataset.
        checkpoint: "last" or "best".
        class_names: by index.
        subjects: the images.
        bands: as they were asked for, with what they are of the run's eigenvalues.
        predicted, explained: (N,) class indices: of the whole head, and whose logit the maps explain.
        scores: (K, N) that logit, of the head that sees the band only.
        maps: of each method, (K, N, H, W) float32.
        seconds: of each method, for an image and all bands.
        eigenvectors: of each image, by the end of the spectrum, "largest" and "smallest"; none if not asked for.
    """

    run: Path
    root: Path
    checkpoint: str
    class_names: list[str]
    subjects: Subjects
    bands: dict[str, Band]
    predicted: np.ndarray
    explained: np.ndarray
    scores: np.ndarray
    maps: dict[str, np.ndarray]
    seconds: dict[str, float]
    eigenvectors: dict[str, EigenvectorMaps]


def attribute_run(
    path: Path,
    images: str,
    *,
    bands: Sequence[str] = ("all",),
    methods: Sequence[str] = ("gradcam",),
    classes: Sequence[str] | None = None,
    eigenvectors: int = 0,
    checkpoint: str = "last",
    root: str | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> RunAttribution:
    """Explain images by a run.

    Args:
        path: the run folder.
        images: as in `choose_subjects`.
        bands: texts of `parse_band`, the rank being the median of the run's spectrum.npz.
        methods: names in `METHODS`, with their default options.
        classes: names of the classes to explain, one for all images or one for each; "true" for the true ones. None:
            those that the whole head predicts.
        eigenvectors: how many of each end of the spectrum are pictured.
        checkpoint: "last" or "best".
        root: folder of the dataset, where it has moved since training.
        batch_size: images that are explained at once.
        seed: of the choice of images.

    Raises:
        ConfigError: an unknown method, band or class, or numbers out of range.
        RunError: as `restore_run` and `explain`.
        ImageError: as `choose_subjects`.
        DatasetError, WeightsError: as in training.
    """
    require_methods(methods)
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
    chosen = _bands(path, bands)
    restored = restore_run(path, checkpoint=checkpoint, root=root)
    model, names = restored.model, restored.images.classes
    transform = restored.images.transform
    assert isinstance(transform, TransformSpec)
    subjects = choose_subjects(restored.images, images, Predictor(model, transform, names).prepare, seed)
    targets = None if classes is None else _targets(classes, names, subjects)
    batches = [slice(start, start + batch_size) for start in range(0, len(subjects.names), batch_size)]
    # first: what is wrong with them should not be told after minutes of perturbations
    ends = _eigenvectors(model, subjects, batches, eigenvectors) if eigenvectors else {}
    found, seconds = {}, {}
    for method in dict.fromkeys(methods):
        start = time.perf_counter()
        found[method] = _explain(model, subjects.inputs, batches, list(chosen.values()), method, targets)
        seconds[method] = (time.perf_counter() - start) / len(subjects.names)
    last = found[method]  # all of them explain the same
    return RunAttribution(
        run=path,
        root=Path(restored.config.dataset.root),
        checkpoint=checkpoint,
        class_names=names,
        subjects=subjects,
        bands=chosen,
        predicted=last.predicted.numpy(),
        explained=last.classes.numpy(),
        scores=last.scores.numpy(),
        maps={method: part.maps.numpy() for method, part in found.items()},
        seconds=seconds,
        eigenvectors=ends,
    )


class _Explained(NamedTuple):
    """Of N images, on the CPU: maps (K, N, H, W), scores (K, N), classes (N,), predicted (N,)."""

    maps: Tensor
    scores: Tensor
    classes: Tensor
    predicted: Tensor


def _explain(
    model: FineGrainedModel,
    inputs: Tensor,
    batches: Sequence[slice],
    bands: Sequence[Band],
    method: str,
    targets: Tensor | None,
) -> _Explained:
    parts = []
    for batch in batches:
        classes = None if targets is None else targets[batch]
        found = explain_bands(model, inputs[batch], bands, method=method, classes=classes)
        maps, scores = (torch.stack(field) for field in zip(*((item.maps, item.scores) for item in found), strict=True))
        parts.append((maps.cpu(), scores.cpu(), found[0].classes.cpu(), found[0].predicted.cpu()))
    all_maps, all_scores, explained, predicted = zip(*parts, strict=True)
    return _Explained(
        torch.cat(all_maps, dim=1), torch.cat(all_scores, dim=1), torch.cat(explained), torch.cat(predicted)
    )


def _bands(path: Path, texts: Sequence[str]) -> dict[str, Band]:
    run = read_run(path)  # the run is there and readable, whatever its bands
    rank = median_rank(run.spectrum().before) if set(texts) - {"all"} else 0
    if not texts:
        raise ConfigError("no band to explain; give all, top16, bottom16 or 8:24")
    return {text: parse_band(text, rank) for text in texts}


def _targets(classes: Sequence[str], names: Sequence[str], subjects: Subjects) -> Tensor:
    """Class index of each image, (N,)."""
    count = len(subjects.names)
    if list(classes) == ["true"]:
        lost = [name for name, target in zip(subjects.names, subjects.targets, strict=True) if target is None]
        if lost:
            raise ConfigError(f"the true class of {lost[0]} is not known, as it is no test image; name a class")
        return torch.tensor(subjects.targets)
    unknown = [name for name in classes if name not in names]
    if unknown:
        raise ConfigError(f"unknown class {unknown[0]!r}; the run has {len(names)}, such as {', '.join(names[:3])}")
    if len(classes) not in (1, count):
        raise ConfigError(f"{len(classes)} classes for {count} images; name one for all, or one for each")
    return torch.tensor([names.index(name) for name in classes]).expand(count)


def _eigenvectors(
    model: FineGrainedModel, subjects: Subjects, batches: Sequence[slice], count: int
) -> dict[str, EigenvectorMaps]:
    found = {}
    for end in ("largest", "smallest"):
        smallest = end == "smallest"
        parts = [eigenvector_maps(model, subjects.inputs[batch], count, smallest=smallest) for batch in batches]
        fields = zip(*(vars(part).values() for part in parts), strict=True)
        found[end] = EigenvectorMaps(*(torch.cat(field).cpu() for field in fields))
    return found
