"""The images of a run that are explained: some of its test split, or files of the user's."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fgvc.data import ImageDataset, TransformSpec
from fgvc.data.folder import image_files
from fgvc.data.image_file import UnreadableImageError, decode_rgb
from fgvc.errors import ConfigError, ImageError


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


def choose_subjects(images: ImageDataset, which: str, seed: int = 0) -> Subjects:
    """The images to explain, through the transform of the run's tests.

    Args:
        images: the test split.
        which: a number N for N test images, see `spread`; else a file, or a folder whose image files are taken. A file
            of the test split is known by its path.
        seed: of the choice.

    Raises:
        ConfigError: N is 0 or more than there are.
        ImageError: no such file or folder, or one that cannot be read.
        DatasetError: a test image cannot be read.
    """
    if which.isdecimal():
        indices = spread(images.targets, int(which), seed)
        found: list[tuple[str, int | None, Tensor]] = [
            (images.relative_path(i), images.targets[i], images[i][0]) for i in indices
        ]
    else:
        place = {path.resolve(): index for index, path in enumerate(images.paths)}
        found = [_of_file(images, path, place.get(path.resolve())) for path in _files(Path(which))]
    names, targets, inputs = (list(part) for part in zip(*found, strict=True))
    transform = images.transform
    assert isinstance(transform, TransformSpec)
    pictures = torch.stack([transform.picture(item) for item in inputs]).numpy()
    return Subjects(names, targets, torch.stack(inputs), pictures)


def spread(targets: Sequence[int], count: int, seed: int) -> list[int]:
    """Indices of `count` images, ascending: of classes evenly spaced in their order, drawn within each.

    No class has two more than another one, but where its images do not suffice.

    Raises:
        ConfigError: `count` is 0 or more than there are.
    """
    if not 1 <= count <= len(targets):
        raise ConfigError(f"images={count}: the test split has {len(targets)}; give a number from 1 to that")
    rng = np.random.default_rng(seed)
    order = [rng.permutation(np.flatnonzero(np.asarray(targets) == target)).tolist() for target in sorted(set(targets))]
    chosen: list[int] = []
    while len(chosen) < count:
        order = [rest for rest in order if rest]
        places = np.linspace(0, len(order) - 1, min(count - len(chosen), len(order))).round().astype(int)
        chosen += [order[place].pop() for place in places]
    return sorted(chosen)


def _files(path: Path) -> list[Path]:
    found = image_files(path) if path.is_dir() else [path]
    if not found:
        raise ImageError(f"{path}: no image files (known by extension, such as .jpg or .png); give another folder")
    return found


def _of_file(images: ImageDataset, path: Path, index: int | None) -> tuple[str, int | None, Tensor]:
    """Name, target and input of a file, which is the test image at `index` unless that is None."""
    if index is not None:
        return images.relative_path(index), images.targets[index], images[index][0]
    assert images.transform is not None
    try:
        return path.as_posix(), None, images.transform(decode_rgb(path, upright=True))
    except (UnreadableImageError, OSError) as error:
        raise ImageError(
            f"{path}: {error}; give an image file, a folder of them, or a number of test images"
        ) from error
