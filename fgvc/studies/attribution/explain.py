"""Which pixels the scores of a finished run rest on, for all eigenvalues or a band of them."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fgvc.data import ImageDataset, TransformSpec
from fgvc.errors import ConfigError
from fgvc.inference.predict import Predictor, find_images
from fgvc.inference.restore import restore_run
from fgvc.models import FineGrainedModel
from fgvc.runs.spectra import median_rank
from fgvc.runs.summary import read_run
from fgvc.spectral import Band
from fgvc.studies.attribution.eigenvectors import EigenvectorMaps, eigenvector_maps
from fgvc.studies.attribution.methods import METHODS, require_methods
from fgvc.studies.attribution.question import BandLike, as_found, pose, require_finite
from fgvc.studies.truncation.bands import parse_band


@dataclass(frozen=True)
class Attribution:
    """Maps of B images, without gradients.

    Attributes:
        maps: (B, H, W) float32, at the images' size.
        classes: (B,) whose logit is explained.
        scores: (B,) that logit, of the head that sees `band` only.
        predicted: (B,) classes that the whole head predicts.
        band: eigenvalues that the head saw; None for all.
        method: name in `METHODS`.
    """

    maps: Tensor
    classes: Tensor
    scores: Tensor
    predicted: Tensor
    band: Band | None
    method: str


def explain(
    model: FineGrainedModel,
    images: Tensor,
    *,
    method: str = "gradcam",
    band: BandLike = None,
    classes: Tensor | Sequence[int] | int | None = None,
    **options: Any,
) -> Attribution:
    """Explain the logit of a class, of the model whose head sees a band of the eigenvalues only.

    The gradient through the spectral layer is the exact one whatever rule the head was trained with: an explanation
    wants the derivative of the score, not the one that trained well. The model is left as it was found.

    Args:
        model: on any device, in any mode; it is evaluated in evaluation mode.
        images: (B, 3, H, W), normalised as the model's were, of any size that its backbone takes.
        method: name in `METHODS`.
        band: eigenvalues that the head sees: N for the N largest, a pair (start, stop), or a text of `parse_band`, for
            which the rank is the median over these images; None for all. Other eigenvalues are set to the floor.
        classes: whose logit; one for all images or one for each. None: of each image the one that the whole head
            predicts, so that bands explain the same class.
        options: of the method, see `METHODS[method].options`.

    Raises:
        ConfigError: an unknown method, option, band or class, or images that are none.
        RunError: a head without a spectrum asked for a part of it, logits or gradients that are not finite, or a model
            that the method cannot explain.
    """
    return explain_bands(model, images, [band], method=method, classes=classes, **options)[0]


def explain_bands(
    model: FineGrainedModel,
    images: Tensor,
    bands: Sequence[BandLike],
    *,
    method: str = "gradcam",
    classes: Tensor | Sequence[int] | int | None = None,
    **options: Any,
) -> list[Attribution]:
    """As `explain`, for several bands, which share what they can: most methods run the backbone once for all."""
    require_methods([method])
    known = METHODS[method].options
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ConfigError(f"unknown option {', '.join(unknown)} of {method}; it takes {', '.join(known) or 'none'}")
    with as_found(model):
        question, predicted = pose(model, images, bands, classes)
        maps = METHODS[method].maps(question, **options).detach().float()
        with torch.no_grad():
            scores = [question.scores(question.features, band) for band in question.bands]
    for found, score in zip(maps, scores, strict=True):
        require_finite(found, f"maps of {method}")
        require_finite(score, "scores")
    return [
        Attribution(found, question.classes, score, predicted, band, method)
        for found, score, band in zip(maps, scores, question.bands, strict=True)
    ]


@dataclass(frozen=True)
class Subjects:
    """N images as the model reads them.

    Attributes:
        names: path of each below the root of the dataset; of a file from elsewhere as it was given.
        targets: class index of each; None where it is no image of the test split.
        inputs: (N, 3, H, W), normalised.
        pictures: (N, H, W, 3) float32 from 0 to 1, the same to be looked at.
    """

    names: list[str]
    targets: list[int | None]
    inputs: Tensor
    pictures: np.ndarray


def choose_subjects(images: ImageDataset, which: str, prepare: Callable[[Path], Tensor], seed: int = 0) -> Subjects:
    """The images to explain, through the transform of the run's tests.

    Args:
        images: the test split.
        which: a number N for N test images, see `spread`; else a file, or a folder whose image files are taken. A file
            of the test split is known by its path.
        prepare: what the model reads of another file, (3, H, W).
        seed: of the choice.

    Raises:
        ConfigError: N is 0 or more than there are, or `seed` is negative.
        ImageError: no such file or folder, or one that cannot be read.
        DatasetError: a test image cannot be read.
    """
    if which.isdecimal():
        found = [_test_image(images, index) for index in spread(images.targets, int(which), seed)]
    else:
        place = {path.resolve(): index for index, path in enumerate(images.paths)}
        found = [
            (str(path), None, prepare(path)) if index is None else _test_image(images, index)
            for path in find_images(Path(which))
            for index in [place.get(path.resolve())]
        ]
    names, targets, inputs = (list(part) for part in zip(*found, strict=True))
    transform = images.transform
    assert isinstance(transform, TransformSpec)
    pictures = torch.stack([transform.picture(item) for item in inputs]).numpy()
    return Subjects(names, targets, torch.stack(inputs), pictures)


def _test_image(images: ImageDataset, index: int) -> tuple[str, int | None, Tensor]:
    """Name, target and input."""
    return images.relative_paths()[index], images.targets[index], images[index][0]


def spread(targets: Sequence[int], count: int, seed: int) -> list[int]:
    """Indices of `count` images, ascending: of classes evenly spaced in their order, drawn within each.

    No class has two more than another one, but where its images do not suffice.

    Raises:
        ConfigError: `count` is 0 or more than there are, or `seed` is negative.
    """
    if not 1 <= count <= len(targets):
        raise ConfigError(f"images={count}: the test split has {len(targets)}; give a number from 1 to that")
    if seed < 0:
        raise ConfigError(f"seed must be at least 0, got {seed}")
    rng = np.random.default_rng(seed)
    order = [rng.permutation(np.flatnonzero(np.asarray(targets) == target)).tolist() for target in sorted(set(targets))]
    chosen: list[int] = []
    while len(chosen) < count:
        order = [rest for rest in order if rest]
        places = np.linspace(0, len(order) - 1, min(count - len(chosen), len(order))).round().astype(int)
        chosen += [order[place].pop() for place in places]
    return sorted(chosen)


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
