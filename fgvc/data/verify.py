"""Whether a copy of a dataset is whole: its counts, every image decoded, and a fingerprint that reveals changes."""

import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fgvc import __version__
from fgvc.data.cards import Card
from fgvc.data.checks import (
    FINGERPRINT,
    BadImage,
    bad_images_summary,
    content_digest,
    examine,
    is_unchanged,
    map_images,
    read_record,
)
from fgvc.data.dataset import ImageDataset, fingerprint
from fgvc.data.layout import listing, read_lines
from fgvc.data.registry import read_splits
from fgvc.errors import DatasetError
from fgvc.io import atomic_path, file_digests, write_json_atomic

FILES = "fingerprint.sha256"  # in the format of sha256sum: `sha256sum -c fingerprint.sha256` checks it too
_SHOWN = 5
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
            "content": file_digests(files, ["sha256"])["sha256"],
            "splits": {
                split: _split_state(dataset) | {"content": contents[split]} for split, dataset in splits.items()
            },
        }
        if known:
            _refuse_changes(root, known, result, files)
        if write:
            listed = root / FILES
            if os.path.lexists(listed) and (
                not listed.is_file() or file_digests(listed, ["sha256"])["sha256"] != result["content"]
            ):
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

    Raises:
        DatasetError: an image cannot be decoded.
    """
    bad: list[BadImage] = []
    contents = {}
    with path.open("w", encoding="utf-8") as file:
        for split, dataset in splits.items():
            results = list(map_images(examine, dataset, workers))
            digests = [result for result in results if isinstance(result, str)]
            bad += [result for result in results if isinstance(result, BadImage)]
            if not bad:
                file.writelines(map(_line, digests, dataset.relative_paths()))
                contents[split] = content_digest(dataset, digests)
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
        more = [f"and {len(changes) - _SHOWN} more"] if len(changes) > _SHOWN else []
        raise DatasetError(
            f"{root}: changed since {FINGERPRINT} was written ({known.get('date')}):\n  "
            + "\n  ".join(changes[:_SHOWN] + more)
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
