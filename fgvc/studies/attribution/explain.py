"""Which pixels a class's score rests on, for all eigenvalues or a band of them: of a model, and of a finished run."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from fgvc.studies.attribution.methods import METHODS, EigenvectorMaps, eigenvector_maps, require_methods
from fgvc.studies.attribution.score import BandLike, frozen_evaluation, prepare_score, require_finite
from fgvc.studies.truncation.bands import parse_band


@dataclass(frozen=True)
class Attribution:
    """Maps of B images, without gradients.

    Attributes:
        maps: Maps (B, H, W) at the size of the images, float32.
        classes: Classes (B,) whose logit is explained.
        scores: That logit, (B,), from the head that sees only `band`.
        predicted: Classes (B,) that the whole head predicts.
        band: Eigenvalues that the head saw; None for all.
        method: Name in `METHODS`.
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
    """Explain the logit of a class, from a head that sees only a band of the eigenvalues.

    The gradient through the spectral layer is exact, whatever rule the head was trained with: an explanation needs the
    derivative of the score. The model is not changed.

    Args:
        model: a model on any device, in any mode; it is run in evaluation mode.
        images: (B, 3, H, W), normalised as the model's were, of any size that its backbone takes.
        method: name in `METHODS`.
        band: eigenvalues that the head sees: N for the N largest, a pair (start, stop), or a text of `parse_band`, with
            the median rank of these images; None for all. Other eigenvalues are set to the floor.
        classes: one class for all images or one for each. None: the class that the whole head predicts for the image;
            all bands explain the same class.
        options: options of the method, see `METHODS[method].options`.

    Raises:
        ConfigError: an unknown method, option, band or class, or bad images.
        RunError: the head has no spectrum to take a band of, logits or gradients are not finite, or the method cannot
            explain the model.
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
    """As `explain`, for several bands. Most methods run the backbone once for all of them."""
    require_methods([method])
    known = METHODS[method].options
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ConfigError(f"unknown option {', '.join(unknown)} of {method}; it takes {', '.join(known) or 'none'}")
    with frozen_evaluation(model):
        score, predicted = prepare_score(model, images, bands, classes)
        maps = METHODS[method].maps(score, **options).detach().float()
        with torch.no_grad():
            values = [score.values(score.features, band) for band in score.bands]
    found = []
    for of_band, value, band in zip(maps, values, score.bands, strict=True):
        require_finite(of_band, f"maps of {method}")
        require_finite(value, "scores")
        found.append(Attribution(of_band, score.classes, value, predicted, band, method))
    return found


@dataclass(frozen=True)
class ChosenImages:
    """N images as the model reads them.

    Attributes:
        names: Paths below the root of the dataset; of a file from elsewhere the path as the user gave it.
        targets: Class indices; None for an image that is not in the test split.
        inputs: Normalised images, (N, 3, H, W).
        pictures: The same to look at, (N, H, W, 3) float32 from 0 to 1.
    """

    names: list[str]
    targets: list[int | None]
    inputs: Tensor
    pictures: np.ndarray


def choose_images(dataset: ImageDataset, which: str, predictor: Predictor, seed: int = 0) -> ChosenImages:
    """The images to explain, as the run's tests transform them.

    Args:
        dataset: the test split.
        which: a number of test images, see `spread`, or a file, or a folder of image files. A file of the test split
            is recognised by its path.
        predictor: the run's; it reads any other file.
        seed: as in `spread`.

    Raises:
        ImageError: no such file or folder, or one that cannot be read.
        DatasetError: a test image cannot be read.
    """
    names = dataset.relative_paths()
    if which.isdecimal():
        indices: list[int | None] = [*spread(dataset.targets, int(which), seed)]
        files = [dataset.paths[index] for index in indices if index is not None]
    else:
        files = find_images(Path(which))
        place = {path.resolve(): index for index, path in enumerate(dataset.paths)}
        indices = [place.get(path.resolve()) for path in files]
    chosen = list(zip(files, indices, strict=True))
    inputs = [predictor.prepare(file) if index is None else dataset[index][0] for file, index in chosen]
    return ChosenImages(
        [str(file) if index is None else names[index] for file, index in chosen],
        [None if index is None else dataset.targets[index] for index in indices],
        torch.stack(inputs),
        torch.stack([predictor.transform.picture(item) for item in inputs]).numpy(),
    )


def spread(targets: Sequence[int], count: int, seed: int) -> list[int]:
    """Indices of `count` images, ascending, from classes evenly spaced in their order; a class's images are drawn.

    No class has two more than another one, unless that one has no more images.

    Raises ConfigError: `count` is 0 or more than there are, or `seed` is negative.
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
    """Attributions of N images by a run, for K bands.

    Attributes:
        run: Run folder.
        root: Root of its dataset.
        checkpoint: "last" or "best".
        class_names: Names by class index.
        images: The images.
        bands: Bands of the run's eigenvalues, by the text that the user gave.
        predicted, explained: Class indices (N,): of the whole head's prediction, and of the explained logit.
        scores: That logit, (K, N), from the head that sees only the band.
        maps: Maps (K, N, H, W) float32 of each method.
        seconds: Seconds of each method for one image and all bands.
        eigenvectors: Maps of the "largest" and "smallest" eigenvalues; empty where the user asked for none.
    """

    run: Path
    root: Path
    checkpoint: str
    class_names: list[str]
    images: ChosenImages
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
    classes: str | Sequence[str] | None = None,
    eigenvectors: int = 0,
    checkpoint: str = "last",
    root: str | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> RunAttribution:
    """Explain images by a run.

    Args:
        path: the run folder.
        images, seed: which ones, as in `choose_images`.
        bands: texts of `parse_band`; the rank is the median of the run's spectrum.npz.
        methods: names in `METHODS`, with their default options.
        classes: names of the classes to explain, one for all images or one for each, as a list or as a text with
            commas; "true" for the true ones. None: those that the whole head predicts.
        eigenvectors: number of eigenvectors at each end of the spectrum to picture.
        checkpoint: "last" or "best".
        root: folder of the dataset, where it has moved since training.
        batch_size: number of images that are explained at once.

    Raises:
        ConfigError: an unknown method, band or class, or a number out of range.
        RunError, DatasetError, WeightsError, ImageError: as `restore_run`, `explain` and `choose_images`.
    """
    require_methods(methods)
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
    run = read_run(path)
    rank = median_rank(run.spectrum().before) if set(bands) - {"all"} else 0
    parsed = {text: parse_band(text, rank) for text in bands}
    restored = restore_run(path, checkpoint=checkpoint, root=root)
    model, names, transform = restored.model, restored.images.classes, restored.images.transform
    assert isinstance(transform, TransformSpec)
    chosen = choose_images(restored.images, images, Predictor(model, transform, names), seed)
    batches = torch.split(chosen.inputs, batch_size)
    targets: Sequence[Tensor | None] = [None] * len(batches)
    if classes is not None:
        targets = torch.split(_explained_classes(classes, names, chosen), batch_size)
    # first, so that an error about eigenvectors does not come after minutes of perturbations
    ends = {}
    for end in ("largest", "smallest") if eigenvectors else ():
        parts = [eigenvector_maps(model, batch, eigenvectors, smallest=end == "smallest") for batch in batches]
        ends[end] = EigenvectorMaps(*(torch.cat(field).cpu() for field in zip(*parts, strict=True)))
    maps, seconds, of_bands = {}, {}, list(parsed.values())
    for method in dict.fromkeys(methods):
        start, inputs = time.perf_counter(), zip(batches, targets, strict=True)
        found = [explain_bands(model, batch, of_bands, method=method, classes=own) for batch, own in inputs]
        maps[method] = _joined(found, "maps")
        seconds[method] = (time.perf_counter() - start) / len(chosen.names)
    return RunAttribution(
        run=path,
        root=Path(restored.config.dataset.root),
        checkpoint=checkpoint,
        class_names=names,
        images=chosen,
        bands=parsed,
        predicted=_joined(found, "predicted")[0],  # the same for all methods and bands
        explained=_joined(found, "classes")[0],
        scores=_joined(found, "scores"),
        maps=maps,
        seconds=seconds,
        eigenvectors=ends,
    )


def _split_names(text: str, names: Sequence[str]) -> list[str]:
    """The names in a text with commas; a name may hold commas itself: of those that fit, the longest counts."""
    parts, found = text.split(","), []
    while parts:
        ends = (end for end in range(len(parts), 1, -1) if ",".join(parts[:end]).strip() in names)
        end = next(ends, 1)
        found.append(",".join(parts[:end]).strip())
        parts = parts[end:]
    return found


def _explained_classes(classes: str | Sequence[str], names: Sequence[str], images: ChosenImages) -> Tensor:
    """Class index of each image, (N,)."""
    if isinstance(classes, str):
        classes = _split_names(classes, names)
    if list(classes) == ["true"]:
        if None in images.targets:
            name = images.names[images.targets.index(None)]
            raise ConfigError(f"the true class of {name} is not known, as it is no test image; name a class")
        return torch.tensor(images.targets)
    unknown = [name for name in classes if name not in names]
    if unknown:
        raise ConfigError(f"unknown class {unknown[0]!r}; the run has {len(names)}, such as {', '.join(names[:3])}")
    count = len(images.names)
    if len(classes) not in (1, count):
        raise ConfigError(f"{len(classes)} classes for {count} images; name one for all, or one for each")
    return torch.tensor([names.index(name) for name in classes]).expand(count)


def _joined(batches: Sequence[Sequence[Attribution]], field: str) -> np.ndarray:
    """A field of the attributions of all images, (K, N, ...), from those of each batch and band."""
    bands = [torch.cat([getattr(item, field).cpu() for item in of_band]) for of_band in zip(*batches, strict=True)]
    return torch.stack(bands).numpy()
