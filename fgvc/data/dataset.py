"""The datasets: labelled images behind every adapter, decoded on access, and their feature maps, read from files."""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from fgvc.data.image_file import Box, Region, UnreadableImageError, decode_rgb
from fgvc.errors import ConfigError, DatasetError, OutOfMemoryError
from fgvc.foreign import open_foreign

Transform = Callable[[Image.Image], Any]


@dataclass(frozen=True)
class Samples:
    """The images that an adapter finds.

    Attributes:
        classes: Class names; a target is an index into this list.
        paths: Image files.
        targets: Class index of each file.
        boxes: Bounding box of the object in each file, in pixels of the file; None where they were not read.
        banner: Number of rows at the bottom of every file that are not part of the picture.
        upright: Whether pictures are turned by their EXIF orientation; boxes and banner refer to the turned picture.
        coarse: Coarser labels by the name of their level, e.g. "family": one for each class, in the order of `classes`,
            "" where it is unknown.
        whole: Paths and targets of all images, where `divide` made the split, since the dataset has none; otherwise
            None.
    """

    classes: list[str]
    paths: list[Path]
    targets: list[int]
    boxes: list[Box] | None = None
    banner: int = 0
    upright: bool = False
    coarse: Mapping[str, Sequence[str]] = field(default_factory=dict)
    whole: tuple[list[Path], list[int]] | None = None

    @property
    def own_split(self) -> bool:
        """Whether `divide` made the split."""
        return self.whole is not None

    def take(self, indices: Sequence[int]) -> "Samples":
        """The samples at `indices`, in that order, with all classes kept."""
        return replace(
            self,
            paths=[self.paths[i] for i in indices],
            targets=[self.targets[i] for i in indices],
            boxes=None if self.boxes is None else [self.boxes[i] for i in indices],
        )


class ImageDataset(Dataset[tuple[Any, int]]):
    """Labelled images in a fixed order.

    `dataset[i]` is (image, target): an RGB `PIL.Image`, or what `transform` makes of it, and the class index.

    Args:
        samples: the images; `classes`, `paths`, `targets`, `boxes` and `coarse` are also attributes of the dataset.
        root: the folder of the files.
        transform: a function of the RGB image; None leaves the image unchanged. One with an attribute
            `shorter_side` may get a smaller image, see `side` of `decode_rgb`.
        crop: "bbox" cuts each image to its bounding box first; None takes the whole picture.
        content: SHA-256 that tells these images from others, by the bytes of their files too, or that of the images
            they were taken from; None where nobody has read them.

    Raises:
        ConfigError: unknown `crop`, or "bbox" without boxes.
    """

    def __init__(
        self,
        samples: Samples,
        root: Path,
        transform: Transform | None = None,
        crop: str | None = None,
        content: str | None = None,
    ) -> None:
        if crop not in (None, "bbox"):
            raise ConfigError(f"crop={crop!r} is unknown; choose bbox, or leave it out for the whole picture")
        if crop is not None and samples.boxes is None:
            raise ConfigError("crop='bbox' needs bounding boxes, and these samples have none; leave crop out")
        self.samples = samples
        self.classes, self.paths = samples.classes, samples.paths
        self.targets, self.boxes, self.coarse = samples.targets, samples.boxes, samples.coarse
        self.root = root
        self.transform = transform
        self.crop = crop
        self.content = content

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Raises DatasetError where the file cannot be decoded or its box is empty."""
        try:
            image = self.decode(index, side=getattr(self.transform, "shorter_side", 0))
        except UnreadableImageError as error:
            raise DatasetError(
                f"{self.paths[index]}: {error}. Replace it, or leave such files out with trainer.on_bad_image=skip."
            ) from error
        return (image if self.transform is None else self.transform(image)), self.targets[index]

    def decode(self, index: int, side: int = 0) -> Image.Image:
        """The image before the transform: RGB, cut to its region; `side` as in `decode_rgb`.

        Raises UnreadableImageError as `decode_rgb`.
        """
        return decode_rgb(self.paths[index], self.region(index), upright=self.samples.upright, side=side)

    def region(self, index: int) -> Region:
        """The part of a file that is the image."""
        box = None if self.crop is None or self.boxes is None else self.boxes[index]
        return Region(box, self.samples.banner)

    @property
    def class_sizes(self) -> list[int]:
        """Number of images of each class index."""
        sizes: list[int] = np.bincount(self.targets, minlength=len(self.classes)).tolist()
        return sizes

    def relative_paths(self) -> list[str]:
        """Path of every image below `root`, with forward slashes on every system."""
        return [path.relative_to(self.root).as_posix() for path in self.paths]

    def with_transform(self, transform: Transform | None) -> "ImageDataset":
        """The same images with another transform."""
        return ImageDataset(self.samples, self.root, transform, self.crop, self.content)

    def with_content(self, content: str) -> "ImageDataset":
        """The same images with the digest of their files."""
        return ImageDataset(self.samples, self.root, self.transform, self.crop, content)

    def subset(self, indices: Sequence[int]) -> "ImageDataset":
        """The images at `indices`, in that order, with all classes kept."""
        return ImageDataset(self.samples.take(indices), self.root, self.transform, self.crop, self.content)


def collate(samples: list[Any]) -> Any:
    """Make a batch; in a loader's worker its tensors lie in shared memory. Raises OutOfMemoryError if that is full."""
    try:
        return default_collate(samples)
    except RuntimeError as error:
        if "shared memory" not in str(error):
            raise
        place = "/dev/shm"
        size = f", which has {shutil.disk_usage(place).total / 2**20:,.0f} MiB," if Path(place).is_dir() else ""
        raise OutOfMemoryError(
            f"an image-loading process has no room for a batch in shared memory: {place}{size} is full; set "
            f"trainer.workers=0, or enlarge {place} (mount -o remount,size=2G {place}; docker run --shm-size=2g)"
        ) from error


def fingerprint(dataset: ImageDataset, *, times: bool = True) -> str:
    """SHA-256 over classes, relative paths, targets, regions, file sizes and times of change; reads no file's content.

    Without `times`, a copy of the files on another machine has the same fingerprint, but a changed file of the same
    size is not noticed.

    Raises DatasetError: an image file is missing.
    """
    digest = hashlib.sha256(json.dumps(dataset.classes).encode())
    if dataset.samples.upright:
        digest.update(b"upright\n")
    images = zip(dataset.paths, dataset.relative_paths(), dataset.targets, strict=True)
    for index, (path, relative_path, target) in enumerate(images):
        try:
            status = path.stat()
        except OSError as error:
            raise DatasetError(f"{path}: {error.strerror}; restore the file or load the dataset again") from error
        region = dataset.region(index)
        cut = () if region == Region() else region
        changed = (status.st_mtime_ns,) if times else ()
        entry = (relative_path, target, status.st_size, *changed, *cut)
        digest.update(json.dumps(entry).encode() + b"\n")
    return digest.hexdigest()


def divide(targets: Sequence[int], names: Sequence[str], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Divide images without a split by class: indices of the training images and of the test images, both ascending.

    A class gives round(fraction * count) images to the test, at least one and never all; a class of one image stays in
    training. The images of a class are ordered by a hash of `seed` and their name, and the first are the test images,
    so that a new image changes the side of one other image at most, and of none of another class.

    Args:
        targets: class index of each image.
        names: name of each image, unique in its class.
        fraction: share of the test images, between 0 and 1.
        seed: whole number.

    Raises:
        ConfigError: `fraction` or `seed` is out of range.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"test_fraction must lie between 0 and 1 (both excluded), found {fraction}")
    if not isinstance(seed, int):
        raise ConfigError(f"split_seed must be a whole number, found {seed!r}")
    members: dict[int, list[int]] = {}
    for index, target in enumerate(targets):
        members.setdefault(target, []).append(index)
    held_out: set[int] = set()
    for indices in members.values():
        order = sorted(indices, key=lambda index: hashlib.sha256(f"{seed}/{names[index]}".encode()).digest())
        if len(indices) > 1:
            held_out.update(order[: min(max(round(fraction * len(indices)), 1), len(indices) - 1)])
    return [i for i in range(len(targets)) if i not in held_out], sorted(held_out)


def split_validation(dataset: ImageDataset, fraction: float, seed: int) -> tuple[ImageDataset, ImageDataset]:
    """Hold out a part of every class: (train, validation), both in the dataset's order; the seed fixes the choice.

    A class gives round(fraction * count) images, at least one and never all; a class of one image stays in training.

    Raises DatasetError: no class has two images.
    """
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


def open_maps(path: Path) -> NDArray[np.floating]:
    """Map a .npy file of feature maps into memory.

    Raises:
        FileNotFoundError: it is missing, or was evicted.
        ValueError: it is not such a file, or shorter than its header says.
    """
    with open_foreign(path), np.errstate(over="ignore"):  # a damaged header may promise any size
        maps = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(maps, np.memmap) or maps.dtype.kind != "f":
        raise ValueError("no array of floating-point numbers")
    return maps


class FeatureSet(Dataset[tuple[Tensor, int]]):
    """Feature maps of labelled images, in the order of the image dataset.

    `features[i]` is (feature map (C, h, w) float32, class index). With two views, `start_epoch` draws
    one for each image; before the first call it is the plain image. The set takes no more memory than the batches that
    are read, and can be sent to worker processes. As long as it lives, this process does not evict its files; where
    another one does, they stay readable.

    Attributes:
        paths: .npy files of shape (views, images, C, h, w), one after the other.
        targets: Class index of each image.
        classes: Class names.
        seconds: Time that the computation of the maps took, in this call or in an earlier one.
        from_cache: Whether the maps were computed by earlier calls.

    Args:
        maps: opened files by path, see `open_maps`; the others are attributes.
    """

    def __init__(
        self,
        maps: Mapping[Path, NDArray[np.floating]],
        targets: list[int],
        classes: list[str],
        *,
        seconds: float,
        from_cache: bool,
    ) -> None:
        self.paths = list(maps)
        self.targets = targets
        self.classes = classes
        self.seconds = seconds
        self.from_cache = from_cache
        self._maps = list(maps.values())
        self._ends = np.cumsum([part.shape[1] for part in self._maps])
        self._target_tensor = torch.tensor(targets)
        self._views = np.zeros(len(targets), dtype=np.int64)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_maps": None}  # a pickled memory map would carry the whole file

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._maps = [open_maps(path) for path in self.paths]

    @property
    def shape(self) -> tuple[int, ...]:
        """(views, N, C, h, w)."""
        views, _, *rest = self._maps[0].shape
        return (views, len(self), *rest)

    def start_epoch(self, seed: int) -> None:
        """Draw a view for each image; the seed fixes the choice."""
        generator = torch.Generator().manual_seed(seed)
        self._views = torch.randint(self.shape[0], (len(self),), generator=generator).numpy()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, int]]:
        """Several items in one read; a DataLoader calls this."""
        maps, targets = self.batch(indices)
        return list(zip(maps.float(), targets.tolist(), strict=True))

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Feature maps (B, C, h, w) as stored, in the current view of each image, and targets (B,) int64."""
        chosen = np.asarray(indices, dtype=np.int64)
        views, targets = self._views[chosen], self._target_tensor[chosen]
        if len(self._maps) == 1:
            return torch.from_numpy(self._maps[0][views, chosen]), targets
        files = np.searchsorted(self._ends, chosen, side="right")
        maps = np.empty((len(chosen), *self.shape[2:]), self._maps[0].dtype)
        for file in np.unique(files):
            here, part = files == file, self._maps[file]
            maps[here] = part[views[here], chosen[here] - self._ends[file] + part.shape[1]]
        return torch.from_numpy(maps), targets
