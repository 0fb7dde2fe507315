"""Which images can be decoded, and what is in their files: read before a run, or known from an earlier reading."""

import hashlib
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tqdm import tqdm

from fgvc.data.dataset import ImageDataset, fingerprint
from fgvc.data.image_file import UnreadableImageError
from fgvc.data.registry import read_splits
from fgvc.errors import ConfigError, DatasetError
from fgvc.foreign import read_json
from fgvc.io import file_digests, write_json_atomic

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
    return [bad for bad in map_images(examine, dataset, workers) if isinstance(bad, BadImage)]


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


def examine(dataset: ImageDataset, index: int) -> str | BadImage:
    """SHA-256 of an image file that can be decoded."""
    path = dataset.paths[index]
    try:
        dataset.decode(index)
    except UnreadableImageError as error:
        return BadImage(path, str(error))
    return file_digests(path, ["sha256"])["sha256"]  # the system's cache makes the second reading fast


def content_digest(dataset: ImageDataset, files: Iterable[str]) -> str:
    """SHA-256 over `fingerprint` without times and the digest of each file: equal for a copy in another folder."""
    digest = hashlib.sha256(fingerprint(dataset, times=False).encode())
    for file in files:
        digest.update(file.encode())
    return digest.hexdigest()


def require_readable(
    dataset: ImageDataset,
    on_bad_image: str = "refuse",
    stamp_dir: Path | None = None,
    workers: int = 4,
) -> ImageDataset:
    """Return the dataset with its `content` if all its images can be decoded; known files are not read again.

    Args:
        dataset: the images to check.
        on_bad_image: "refuse" raises where an image is bad; "skip" leaves bad images out, with a logged warning.
        stamp_dir: folder for a stamp file that remembers a passed check and `content` until a file of the dataset
            changes or the dataset moves; None reads every time.
        workers: decoding threads.

    Raises:
        ConfigError: unknown `on_bad_image`.
        DatasetError: bad images with "refuse", or no good image with "skip".
    """
    if on_bad_image not in ("refuse", "skip"):
        raise ConfigError(f"on_bad_image={on_bad_image!r} is unknown; choose one of refuse, skip")
    stamp = None if stamp_dir is None else stamp_dir / _stamp_name(dataset)
    content = _verified_split(dataset).get("content")  # an earlier version wrote none
    if content is None and stamp is not None:
        content = _read_stamp(stamp)
    if isinstance(content, str):
        return dataset.with_content(content)
    results = list(map_images(examine, dataset, workers))
    bad = [result for result in results if isinstance(result, BadImage)]
    good = {index: result for index, result in enumerate(results) if isinstance(result, str)}
    if bad:
        summary = bad_images_summary(dataset.root, bad, len(dataset.paths))
        if on_bad_image == "refuse":
            raise DatasetError(f"{summary}\nReplace these files, or go on without them: trainer.on_bad_image=skip")
        if not good:
            raise DatasetError(f"{summary}\nNone is left; is {dataset.root} the right folder?")
        logger.warning("left out: %s", summary)
        dataset = dataset.subset(list(good))
    content = content_digest(dataset, good.values())
    if stamp is not None and not bad:
        write_json_atomic(stamp, {"root": str(dataset.root), "images": len(dataset.paths), "content": content})
    return dataset.with_content(content)


def _stamp_name(dataset: ImageDataset) -> str:
    """Name of the stamp of a dataset in this place; the time at which a file's entry changed can be set by nobody."""
    state = hashlib.sha256(f"{fingerprint(dataset)} {dataset.root.resolve()}".encode())
    for path in dataset.paths:
        state.update(f" {path.stat().st_ctime_ns}".encode())
    return f"readable-{state.hexdigest()[:32]}.json"


def _read_stamp(path: Path) -> str | None:
    try:
        content = read_json(path)["content"]
    except (OSError, ValueError, KeyError, TypeError):  # missing, or of an earlier version
        return None
    return content if isinstance(content, str) else None


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
    return bool(_verified_split(dataset))


def _verified_split(dataset: ImageDataset) -> dict[str, Any]:
    """The entry of these images in the record of a verification; empty where there is none."""
    splits = read_record(dataset.root).get("splits", {}).values()
    state = fingerprint(dataset) if splits else None
    found: dict[str, Any] = next((split for split in splits if split["state"] == state), {})
    return found


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
