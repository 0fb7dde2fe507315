"""Which images can be decoded: checked before a run, or known from an earlier verification of the folder."""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tqdm import tqdm

from fgvc.data.cards import SPLITS
from fgvc.data.dataset import ImageDataset, fingerprint
from fgvc.data.image_file import UnreadableImageError
from fgvc.data.registry import create_dataset
from fgvc.errors import ConfigError, DatasetError
from fgvc.foreign import read_json
from fgvc.io import write_json_atomic

logger = logging.getLogger(__name__)

FINGERPRINT = "fingerprint.json"

_SHOWN = 10
_WAITING = 16  # images for each thread that may be decoded before their results are taken

_Result = TypeVar("_Result")


class BadImage(NamedTuple):
    """An image file that cannot be decoded or cut to its box, and why."""

    path: Path
    reason: str


def check_images(dataset: ImageDataset, workers: int = 4) -> list[BadImage]:
    """Decode every image fully, in `workers` threads, and return those that fail, in the dataset's order."""
    return [bad for bad in map_images(_failure, dataset, workers) if bad is not None]


def map_images(
    function: Callable[[ImageDataset, int], _Result], dataset: ImageDataset, workers: int
) -> Iterator[_Result]:
    """Results of `function` (dataset, index) on each image, in order, from `workers` threads, with a progress bar.

    Threads are as fast as processes here, because decoding and hashing release the interpreter's lock. Only a few
    results wait at a time, so the memory does not grow with the dataset.
    """
    waiting: deque[Future[_Result]] = deque()
    # disable=None: no bar where stderr is not a terminal
    with (
        ThreadPoolExecutor(max_workers=max(workers, 1)) as pool,
        tqdm(total=len(dataset.paths), desc="checking images", unit="image", disable=None) as bar,
    ):
        for index in range(len(dataset.paths)):
            waiting.append(pool.submit(function, dataset, index))
            if len(waiting) > _WAITING * max(workers, 1):
                yield waiting.popleft().result()
                bar.update()
        while waiting:
            yield waiting.popleft().result()
            bar.update()


def _failure(dataset: ImageDataset, index: int) -> BadImage | None:
    try:
        dataset.decode(index)
    except UnreadableImageError as error:
        return BadImage(dataset.paths[index], str(error))
    return None


def require_readable(
    dataset: ImageDataset,
    on_bad_image: str = "refuse",
    stamp_dir: Path | None = None,
    workers: int = 4,
    look_in: Path | None = None,
) -> ImageDataset:
    """Return the dataset if all its images can be decoded; a verified folder is not decoded again.

    Args:
        dataset: the images to check.
        on_bad_image: "refuse" raises where an image is bad; "skip" leaves bad images out, with a logged warning.
        stamp_dir: folder for a stamp file that remembers a passed check until a file of the dataset changes; None
            checks every time.
        workers: decoding threads.
        look_in: another folder that may hold the stamp file; it is only read.

    Raises:
        ConfigError: unknown `on_bad_image`.
        DatasetError: bad images with "refuse", or no good image with "skip".
    """
    if on_bad_image not in ("refuse", "skip"):
        raise ConfigError(f"on_bad_image={on_bad_image!r} is unknown; choose one of refuse, skip")
    if (dataset.root / FINGERPRINT).is_file() and was_verified(dataset):
        return dataset
    stamp = None if stamp_dir is None else stamp_dir / f"readable-{fingerprint(dataset)[:32]}.json"
    if stamp is not None and (stamp.is_file() or (look_in is not None and (look_in / stamp.name).is_file())):
        return dataset
    bad = check_images(dataset, workers)
    if not bad:
        if stamp is not None:
            write_json_atomic(stamp, {"root": str(dataset.root), "images": len(dataset.paths)})
        return dataset
    summary = bad_images_summary(dataset.root, bad, len(dataset.paths))
    if on_bad_image == "refuse":
        raise DatasetError(f"{summary}\nReplace these files, or go on without them: trainer.on_bad_image=skip")
    bad_paths = {image.path for image in bad}
    good = [index for index, path in enumerate(dataset.paths) if path not in bad_paths]
    if not good:
        raise DatasetError(f"{summary}\nNone is left; is {dataset.root} the right folder?")
    logger.warning("left out: %s", summary)
    return dataset.subset(good)


def bad_images_summary(root: Path, bad: list[BadImage], total: int) -> str:
    """A text: how many of the `total` images in `root` are bad, and the first of them with the reasons."""
    lines = [f"{root}: {len(bad)} of {total} images cannot be decoded"]
    lines += [f"  {path}: {reason}" for path, reason in bad[:_SHOWN]]
    if len(bad) > _SHOWN:
        lines.append(f"  and {len(bad) - _SHOWN} more")
    return "\n".join(lines)


def was_verified(dataset: ImageDataset) -> bool:
    """Whether a verification decoded all these images and no file's size or time has changed since.

    False for a part of a verified dataset and for its cropped images: they were not verified as such.
    """
    known = read_record(dataset.root)
    states = {split.get("state") for split in known.get("splits", {}).values()}
    return bool(states) and fingerprint(dataset) in states


def verified_content(root: Path) -> str | None:
    """SHA-256 over the content of all images in `root`, from the last verification: the same on every machine.

    None where there was no verification, or where the size or time of an image has changed since.
    """
    if not (root / FINGERPRINT).is_file():
        return None
    known = read_record(root)
    content = known.get("content")
    return content if isinstance(content, str) and is_unchanged(known, root) else None


def is_unchanged(known: Mapping[str, Any], root: Path) -> bool:
    """Whether no image's size or time has changed since `known` was written."""
    try:
        splits = read_splits(str(known.get("name")), root)
        states = {split: known["splits"].get(split, {}).get("state") for split in splits}
        return all(states[split] == fingerprint(dataset) for split, dataset in splits.items())
    except (ConfigError, DatasetError):
        return False  # a verification will give the reason


def read_record(root: Path) -> dict[str, Any]:
    """The record of a verification in `root`; empty where there is none or it cannot be read."""
    try:
        found = read_json(root / FINGERPRINT)
    except (OSError, ValueError):
        return {}
    splits = found.get("splits") if isinstance(found, dict) else None
    whole = isinstance(splits, dict) and all(
        isinstance(split, dict) and isinstance(split.get("state"), str) for split in splits.values()
    )
    return found if whole else {}


def read_splits(name: str, root: Path) -> dict[str, ImageDataset]:
    """Both splits, as training will read them.

    Raises:
        DatasetError: as the adapter raises it.
    """
    return {split: create_dataset(name, root=root, split=split) for split in SPLITS}
