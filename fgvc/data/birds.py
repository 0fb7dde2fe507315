"""The text files that CUB-200-2011 and NABirds share: one line "id value" an image, a class or a box."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fgvc.data.dataset import Samples
from fgvc.data.image_file import Box
from fgvc.data.layout import find_folder, image_paths, is_whole_number, listing, read_table, unique_names
from fgvc.errors import DatasetError

_IMAGES, _LABELS, _SPLIT, _CLASSES = "images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt"
_BOXES = "bounding_boxes.txt"


@dataclass(frozen=True)
class BirdFormat:
    """Where the two datasets differ.

    Attributes:
        dataset: name of the card.
        folder: that the archive unpacks to.
        numeric_ids: whether image ids are numbers.
        unused_classes: whether classes without an image count.
    """

    dataset: str
    folder: str
    numeric_ids: bool
    unused_classes: bool


def read_birds(form: BirdFormat, root: Path, split: str, boxes: bool) -> Samples:
    """Read one split, in the order of images.txt; classes are in the order of their ids.

    Raises:
        DatasetError: a file is missing, malformed or disagrees with another one; an image is missing; empty split.
    """
    folder = find_folder(form.dataset, root, (_IMAGES, _LABELS, _SPLIT, _CLASSES), nested=form.folder)
    names = read_table(folder / _IMAGES, numeric_ids=form.numeric_ids)
    labels = _read_integers(folder / _LABELS, form.numeric_ids)
    in_train = _read_integers(folder / _SPLIT, form.numeric_ids, allowed=(0, 1))
    classes = _read_classes(folder, labels, form.unused_classes)
    _check_same_ids(folder, {_IMAGES: names, _LABELS: labels, _SPLIT: in_train})
    chosen = [i for i in names if (in_train[i] == 1) == (split == "train")]
    if not chosen:
        raise DatasetError(f"{folder / _SPLIT}: no image belongs to split {split!r} (1 means train, 0 means test)")
    paths = image_paths(folder / "images", [names[i] for i in chosen], folder / _IMAGES)
    index = {class_id: position for position, class_id in enumerate(classes)}
    found = _read_boxes(folder / _BOXES, form.numeric_ids) if boxes else None
    if found is not None:
        _check_same_ids(folder, {_IMAGES: names, _BOXES: found})
    return Samples(
        classes=list(classes.values()),
        paths=paths,
        targets=[index[labels[i]] for i in chosen],
        boxes=None if found is None else [found[i] for i in chosen],
    )


def _read_integers(path: Path, numeric_ids: bool, allowed: tuple[int, ...] | None = None) -> dict[str, int]:
    """A table with whole numbers as values."""
    table = read_table(path, numeric_ids=numeric_ids)
    for key, value in table.items():
        if not is_whole_number(value) or (allowed is not None and int(value) not in allowed):
            expected = " or ".join(map(str, allowed)) if allowed else "a whole number"
            raise DatasetError(f"{path}: id {key} has the value {value!r}; expected {expected}")
    return {key: int(value) for key, value in table.items()}


def _read_classes(folder: Path, labels: Mapping[str, int], unused: bool) -> dict[int, str]:
    """Unique class names by id, in the order of the ids."""
    names = read_table(folder / _CLASSES, numeric_ids=True)
    used = set(labels.values())
    unnamed = sorted(used - {int(key) for key in names})
    if unnamed:
        raise DatasetError(
            f"{folder / _CLASSES}: no name for class ids {listing(map(str, unnamed))}, "
            f"which {_LABELS} uses; add the lines"
        )
    chosen = sorted(int(key) for key in names if unused or int(key) in used)
    unique = unique_names({str(key): names[str(key)] for key in chosen})
    return {key: unique[str(key)] for key in chosen}


def _read_boxes(path: Path, numeric_ids: bool) -> dict[str, Box]:
    """Lines "id x y width height" in pixels, x and y being the left and upper edge."""
    if not path.is_file():
        raise DatasetError(
            f"{path}: missing, and the bounding boxes are in it; unpack the archive again or do not crop"
        )
    boxes: dict[str, Box] = {}
    for key, value in read_table(path, numeric_ids=numeric_ids).items():
        try:
            x, y, width, height = map(float, value.split())
        except ValueError:
            x = y = width = height = math.nan
        box = (x, y, x + width, y + height)
        if not all(map(math.isfinite, box)):
            raise DatasetError(f"{path}: id {key} has the box {value!r}; expected four numbers x y width height")
        boxes[key] = box
    return boxes


def _check_same_ids(folder: Path, tables: Mapping[str, Mapping[str, object]]) -> None:
    every = dict.fromkeys(key for table in tables.values() for key in table)
    for name, table in tables.items():
        missing = [key for key in every if key not in table]
        if missing:
            source = next(other for other, ids in tables.items() if missing[0] in ids)
            raise DatasetError(
                f"{folder / name}: {len(missing)} image ids missing that other files list, first {missing[0]} "
                f"(in {source}); the files must list the same ids"
            )
