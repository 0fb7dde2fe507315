"""The images of a run that are explained: some of its test split, or files of the user's."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fgvc.data import ImageDataset, TransformSpec
from fgvc.errors import ConfigError
from fgvc.inference.predict import find_images


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
