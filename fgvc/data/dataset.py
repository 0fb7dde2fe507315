"""The one image dataset behind every adapter: classes, paths and targets, decoded on access."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset

from fgvc.errors import ConfigError, DatasetError

Transform = Callable[[Image.Image], Any]


@dataclass(frozen=True)
class Samples:
    """What an adapter finds: class names, image files and the class index of each file."""

    classes: list[str]
    paths: list[Path]
    targets: list[int]


class ImageDataset(Dataset[tuple[Any, int]]):
    """Labelled images in a fixed order.

    `dataset[i]` is (image, target): an RGB `PIL.Image`, or what `transform` makes of it, and the class index.

    Attributes:
        root: folder that `paths` lie in.
        classes: class names; a target is an index into it.
        paths: image files.
        targets: class index of each file.
        transform: applied to the RGB image; None for the image as it is.
    """

    def __init__(self, samples: Samples, root: Path, transform: Transform | None = None) -> None:
        self.root = root
        self.classes = samples.classes
        self.paths = samples.paths
        self.targets = samples.targets
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Raises DatasetError where the file cannot be decoded."""
        path = self.paths[index]
        try:
            image = decode_rgb(path)
        except UnreadableImageError as error:
            raise DatasetError(
                f"{path}: {error}. Replace the file, or leave such files out with on_bad_image=skip."
            ) from error
        return (image if self.transform is None else self.transform(image)), self.targets[index]

    def relative_path(self, index: int) -> str:
        """Path of an image below `root`, with forward slashes on every system."""
        return self.paths[index].relative_to(self.root).as_posix()

    def relative_paths(self) -> list[str]:
        """`relative_path` of every image."""
        return [self.relative_path(index) for index in range(len(self))]

    def with_transform(self, transform: Transform | None) -> "ImageDataset":
        """The same images with another transform."""
        return ImageDataset(Samples(self.classes, self.paths, self.targets), self.root, transform)

    def subset(self, indices: Sequence[int]) -> "ImageDataset":
        """The images at `indices`, in that order, with all classes kept."""
        samples = Samples(self.classes, [self.paths[i] for i in indices], [self.targets[i] for i in indices])
        return ImageDataset(samples, self.root, self.transform)


class UnreadableImageError(Exception):
    """An image file cannot be decoded; the message is the reason, without the path."""


def decode_rgb(path: Path) -> Image.Image:
    """Decode a whole image file to RGB.

    Raises:
        UnreadableImageError: missing, empty, truncated, not an image, or more pixels than Pillow's limit against
            decompression bombs.
    """
    try:
        with Image.open(path) as image:
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and image.width * image.height > limit:  # Pillow itself refuses only twice the limit
                raise UnreadableImageError(
                    f"{image.width} x {image.height} pixels, more than Pillow's limit of {limit}"
                )
            rgb: Image.Image = image.convert("RGB")
            return rgb
    except UnreadableImageError:
        raise
    except (
        Exception
    ) as error:  # Pillow's decoders raise many types on damaged files (OSError, SyntaxError, struct.error)
        raise UnreadableImageError(_reason(path, error)) from error


def _reason(path: Path, error: Exception) -> str:
    if path.is_file() and path.stat().st_size == 0:
        return "empty file (0 bytes)"
    if isinstance(error, UnidentifiedImageError):
        return "not an image in a format that Pillow knows"
    return str(error) or type(error).__name__


def fingerprint(dataset: ImageDataset) -> str:
    """SHA-256 over classes, relative paths, targets, file sizes and modification times; reads no file's content.

    Raises:
        DatasetError: an image file is missing.
    """
    digest = hashlib.sha256(json.dumps(dataset.classes).encode())
    for index, (path, target) in enumerate(zip(dataset.paths, dataset.targets, strict=True)):
        try:
            status = path.stat()
        except OSError as error:
            raise DatasetError(f"{path}: {error.strerror}; restore the file or load the dataset again") from error
        entry = (dataset.relative_path(index), target, status.st_size, status.st_mtime_ns)
        digest.update(json.dumps(entry).encode() + b"\n")
    return digest.hexdigest()


def split_validation(dataset: ImageDataset, fraction: float, seed: int) -> tuple[ImageDataset, ImageDataset]:
    """Hold out a part of every class: (train, validation), both in the dataset's order, the same for the same seed.

    A class gives round(fraction * count) images, at least one and never all; a class of one image stays in training.

    Raises:
        ConfigError: `fraction` is not between 0 and 1.
        DatasetError: no class has two images.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"the validation fraction must lie between 0 and 1 (both excluded), found {fraction}")
    rng = np.random.default_rng(seed)
    targets = np.asarray(dataset.targets)
    held_out = np.zeros(len(dataset), dtype=bool)
    for target in range(len(dataset.classes)):
        members = np.flatnonzero(targets == target)
        if members.size > 1:
            count = min(max(round(fraction * members.size), 1), members.size - 1)
            held_out[rng.permutation(members)[:count]] = True
    if not held_out.any():
        raise DatasetError(f"{dataset.root}: no class has two images, so none can be held out; set the fraction to 0")
    return dataset.subset(np.flatnonzero(~held_out).tolist()), dataset.subset(np.flatnonzero(held_out).tolist())
