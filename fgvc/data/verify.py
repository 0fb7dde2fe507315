"""Which images can be decoded and what is in their files; whether a copy of a dataset is whole and has not changed."""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from fgvc import __version__
from fgvc.data.cards import Card
from fgvc.data.dataset import ImageDataset, fingerprint
from fgvc.data.image_file import UnreadableImageError
from fgvc.data.layout import listing, read_lines
from fgvc.data.registry import read_splits
from fgvc.errors import ConfigError, DatasetError
from fgvc.foreign import read_json
from fgvc.io import atomic_path, sha256, write_json_atomic

logger = logging.getLogger(__name__)

FINGERPRINT = "fingerprint.json"

_SHOWN = 10  # bad images in a message
_TOGETHER = 1024  # images that are decoded before their results are taken


class BadImage(NamedTuple):
    """An image file that cannot be decoded or cut to its box, and why."""

    path: Path
    reason: str


def examine_images(dataset: ImageDataset, workers: int = 4) -> tuple[list[BadImage], dict[int, str]]:
    """Decode every image fully, in `workers` threads, with a progress bar.

    Threads are as fast as processes here, because decoding and hashing release the interpreter's lock.

    Returns:
        The images that cannot be decoded, and the SHA-256 of the files of the others by index, both in order.
    """

    def examine(index: int) -> str | BadImage:
        path = dataset.paths[index]
        try:
            dataset.decode(index)
        except UnreadableImageError as error:
            return BadImage(path, str(error))
        return sha256(path)  # the system's cache makes the second reading fast

    bad, digests, indices = [], {}, range(len(dataset.paths))
    # disable=None: no bar where stderr is not a terminal
    with (
        ThreadPoolExecutor(max_workers=max(workers, 1)) as pool,
        tqdm(total=len(indices), desc="checking images", unit="image", disable=None) as bar,
    ):
        for start in range(0, len(indices), _TOGETHER):
            part = indices[start : start + _TOGETHER]
            for index, found in zip(part, pool.map(examine, part), strict=True):
                if isinstance(found, BadImage):
                    bad.append(found)
                else:
                    digests[index] = found
                bar.update()
    return bad, digests


def content_digest(dataset: ImageDataset, files: Iterable[str]) -> str:
    """SHA-256 over `fingerprint` without times and the digest of each file: equal for a copy in another folder."""
    digest = hashlib.sha256(fingerprint(dataset, times=False).encode())
    for file in files:
        digest.update(file.encode())
    return digest.hexdigest()


def require_readable(
    dataset: ImageDataset, on_bad_image: str = "refuse", stamp_dir: Path | None = None
) -> ImageDataset:
    """Return the dataset with its `content` if all its images can be decoded; known files are not read again.

    Args:
        dataset: the images to check.
        on_bad_image: "refuse" raises where an image is bad; "skip" leaves bad images out, with a logged warning.
        stamp_dir: folder for a stamp file that remembers a passed check and `content` until a file of the dataset
            changes or the dataset moves; None reads every time.

    Raises:
        DatasetError: bad images with "refuse", or no good image with "skip".
    """
    stamp = None if stamp_dir is None else stamp_dir / _stamp_name(dataset)
    content = verified_split(dataset).get("content")  # an earlier version wrote none
    if content is None and stamp is not None:
        content = _read_stamp(stamp)
    if isinstance(content, str):
        return dataset.with_content(content)
    bad, good = examine_images(dataset)
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


_COMPARED = 20_000


def copies_in_both(first: ImageDataset, second: ImageDataset) -> list[tuple[Path, Path]]:
    """Pairs of image files of the two datasets with the same bytes; only files whose size is in both are read.

    With more than 20,000 such files nothing is compared, since every run does this before it starts.
    """
    files = [{path: path.stat().st_size for path in dict.fromkeys(split.paths)} for split in (first, second)]
    shared = set(files[0].values()) & set(files[1].values())
    if sum(size in shared for split in files for size in split.values()) > _COMPARED:
        return []
    digests = [{sha256(path): path for path, size in split.items() if size in shared} for split in files]
    return [(path, digests[1][digest]) for digest, path in digests[0].items() if digest in digests[1]]


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


def verified_split(dataset: ImageDataset) -> dict[str, Any]:
    """The entry of these images in the record of a verification that decoded them all; empty where there is none.

    There is none for files whose size or time has changed since, nor for a part of a verified dataset or its cropped
    images: they were not verified as such.
    """
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


FILES = "fingerprint.sha256"  # in the format of sha256sum: `sha256sum -c fingerprint.sha256` checks it too
_CHANGES = 5  # in a message
_AGAIN = "To unpack it again, delete the folder (or give another --root) and start again"

Checksums = Mapping[str, Mapping[str, str]]  # by archive, then by algorithm


def is_current(name: str, root: Path, card: Card) -> bool:
    """Whether the copy in `root` was verified by this card, and no image's size or time has changed since."""
    known = read_record(root)
    if known.get("name") != name or known.get("classes") != card.classes:
        return False
    if any(known["splits"].get(split, {}).get("images") != count for split, count in card.splits.items()):
        return False
    return is_unchanged(known, root)


def verify(
    name: str, root: Path, card: Card, *, workers: int, write: bool, archives: Checksums | None = None
) -> dict[str, Any]:
    """Check counts, decode every image and compare with the fingerprint of an earlier call; return the fingerprint.

    Args:
        name: name of the dataset.
        root: folder of the dataset.
        card: the card with the expected counts.
        workers: decoding threads.
        write: whether to write the fingerprint to `root`; False changes nothing there.
        archives: checksums of the archives; None takes those of the earlier fingerprint, if any.

    Raises:
        DatasetError: counts differ, images cannot be decoded, files changed since the fingerprint was written, or one
            of its two files is someone else's.
    """
    splits = read_splits(name, root)
    problems = count_problems(card, splits)
    if problems:
        raise DatasetError(
            f"{root}: not the whole of {card.title}:\n  " + "\n  ".join(problems) + f"\n{_AGAIN}. A part of the "
            "classes is fine to train on, though it cannot be verified"
        )
    known = read_record(root)
    if write and not known and os.path.lexists(root / FINGERPRINT):
        raise _not_own(root / FINGERPRINT)
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder) / FILES
        contents = _write_listing(root, splits, files, workers)
        result = {
            "name": name,
            "fgvc": __version__,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "archives": known.get("archives", {}) if archives is None else archives,
            "classes": card.classes,
            "images": sum(map(len, splits.values())),
            "content": sha256(files),
            "splits": {
                split: _split_state(dataset) | {"content": contents[split]} for split, dataset in splits.items()
            },
        }
        if known:
            _refuse_changes(root, known, result, files)
        if write:
            listed = root / FILES
            if os.path.lexists(listed) and (not listed.is_file() or sha256(listed) != result["content"]):
                raise _not_own(listed)
            with atomic_path(listed) as temporary:
                shutil.copyfile(files, temporary)
            write_json_atomic(root / FINGERPRINT, result)
    return result


def _not_own(path: Path) -> DatasetError:
    return DatasetError(f"{path} is not of this dataset, and is not replaced; move or delete it")


def count_problems(card: Card, splits: Mapping[str, ImageDataset]) -> list[str]:
    """The differences between the counts and those of the card, one line each."""
    found = []
    for split, dataset in splits.items():
        if len(dataset) != card.splits[split]:
            found.append(f"{split}: expected {card.splits[split]} images, found {len(dataset)}")
        if len(dataset.classes) != card.classes:
            found.append(f"{split}: expected {card.classes} classes, found {len(dataset.classes)}")
        counts = Counter(dataset.targets)
        low, high = card.images_per_class.get(split, (1, len(dataset)))
        other = [f"{name} ({counts[i]})" for i, name in enumerate(dataset.classes) if not low <= counts[i] <= high]
        if other:
            found.append(f"{split}: expected {low} to {high} images a class, found other counts in {listing(other)}")
    return found


def _write_listing(root: Path, splits: Mapping[str, ImageDataset], path: Path, workers: int) -> dict[str, str]:
    """Decode every image, write "<sha256>  <path below the root>" of each and return `content_digest` of each split.

    Raises DatasetError: an image cannot be decoded.
    """
    bad: list[BadImage] = []
    contents = {}
    with path.open("w", encoding="utf-8") as file:
        for split, dataset in splits.items():
            of_split, digests = examine_images(dataset, workers)
            bad += of_split
            if not bad:
                file.writelines(map(_line, digests.values(), dataset.relative_paths()))
                contents[split] = content_digest(dataset, digests.values())
    if bad:
        summary = bad_images_summary(root, bad, sum(map(len, splits.values())))
        raise DatasetError(f"{summary}\n{_AGAIN}")
    return contents


def _split_state(dataset: ImageDataset) -> dict[str, Any]:
    """Number of images, SHA-256 over classes and targets, and the fingerprint over sizes and times of the files."""
    labels = hashlib.sha256(json.dumps(dataset.classes).encode())
    for name, target in zip(dataset.relative_paths(), dataset.targets, strict=True):
        labels.update(f"{target} {name}\n".encode())
    return {"images": len(dataset), "labels": labels.hexdigest(), "state": fingerprint(dataset)}


def _refuse_changes(root: Path, known: Mapping[str, Any], found: Mapping[str, Any], files: Path) -> None:
    changes = []
    if known.get("content") != found["content"]:
        changes += _changed_files(root / FILES, files)
    for split, state in found["splits"].items():
        if known["splits"].get(split, {}).get("labels") != state["labels"]:
            changes.append(f"the classes, or which image belongs to which, in split {split}")
    if changes:
        more = [f"and {len(changes) - _CHANGES} more"] if len(changes) > _CHANGES else []
        raise DatasetError(
            f"{root}: changed since {FINGERPRINT} was written ({known.get('date')}):\n  "
            + "\n  ".join(changes[:_CHANGES] + more)
            + f"\n{_AGAIN}; to accept the changed files, delete {FINGERPRINT} and {FILES}"
        )


def _changed_files(old: Path, new: Path) -> list[str]:
    if not old.is_file():
        return [f"files (unknown which: {old} is missing)"]
    # all in memory, but needed only for the message
    rows = [[line.partition("  ") for line in read_lines(path)] for path in (old, new)]
    before, after = ({name: digest for digest, _, name in row} for row in rows)
    changed = [f"{path}: other content" for path in after if before.get(path, after[path]) != after[path]]
    gone = [f"{path}: no longer listed" for path in before if path not in after]
    return changed + gone + [f"{path}: new" for path in after if path not in before]


def _line(digest: str, name: str) -> str:
    """A line of the listing; like sha256sum it escapes line breaks, and marks that by a backslash in front."""
    escaped = name.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
    return f"{digest}  {name}\n" if escaped == name else f"\\{digest}  {escaped}\n"
