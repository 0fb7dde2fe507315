"""CUB-200-2011 and NABirds in their official layouts: text files with one line "id value" an image, a class or a box.

CUB: [Wah, Branson, Welinder, Perona, Belongie, Caltech CNS-TR-2011-001]. NABirds: [Van Horn, Branson, Farrell, Haber,
Barry, Ipeirotis, Perona, Belongie, CVPR 2015].
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from fgvc.data.dataset import Samples
from fgvc.data.image_file import Box
from fgvc.data.layout import find_folder, image_paths, listing, read_integers, read_table, unique_names
from fgvc.errors import DatasetError

_IMAGES, _LABELS, _SPLIT, _CLASSES = "images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt"
_BOXES, _HIERARCHY = "bounding_boxes.txt", "hierarchy.txt"


def read_cub(root: Path, split: str, *, boxes: bool = False) -> Samples:
    """Read one split of CUB, in the order of images.txt; classes are in the order of their ids.

    Args:
        root: the folder CUB_200_2011 or its parent. A subset of the classes or images is fine.
        split: "train" or "test", by train_test_split.txt.
        boxes: also read bounding_boxes.txt.

    Raises:
        DatasetError: a file is missing, malformed or contradicts another one; an image is missing; empty split.
    """
    folder = find_folder("cub", root, (_IMAGES, _LABELS, _SPLIT, _CLASSES), nested="CUB_200_2011")
    return _read(folder, split, boxes, numeric_ids=True, unused_classes=True)


def read_nabirds(root: Path, split: str, *, boxes: bool = False) -> Samples:
    """Read one split of NABirds, in the order of images.txt.

    classes.txt lists the whole hierarchy; the classes are those that hold an image in either split, in the order of
    their ids. Where two of them share a name, the id is added to both. Coarser labels, where hierarchy.txt is there:
    "parent", the node above a class, and "group", the highest one below the root, such as "Ducks, Geese, and Swans".

    Args:
        root: the folder nabirds or its parent.
        split: "train" or "test", by train_test_split.txt.
        boxes: also read bounding_boxes.txt.

    Raises:
        DatasetError: a file is missing, malformed or contradicts another one; an image is missing; empty split.
    """
    folder = find_folder("nabirds", root, (_IMAGES, _LABELS, _SPLIT, _CLASSES), nested="nabirds")
    samples = _read(folder, split, boxes, numeric_ids=False, unused_classes=False)
    if not (folder / _HIERARCHY).is_file():
        return samples
    return replace(samples, coarse=_read_hierarchy(folder))


def _read_hierarchy(folder: Path) -> dict[str, list[str]]:
    """Names of two nodes above each class that holds images, in the order of the class ids."""
    source = folder / _HIERARCHY
    parents = read_integers(source, numeric_ids=True)  # lines "child parent"
    names = read_table(folder / _CLASSES, numeric_ids=True)
    nodes: dict[str, list[str]] = {"parent": [], "group": []}
    for class_id in sorted(set(read_integers(folder / _LABELS).values())):
        path = [str(class_id)]
        while path[-1] in parents and str(parents[path[-1]]) not in path:
            path.append(str(parents[path[-1]]))
        below_root = path[:-1] or path  # the root holds every class
        nodes["parent"].append(below_root[min(1, len(below_root) - 1)])
        nodes["group"].append(below_root[-1])
    unnamed = sorted({node for found in nodes.values() for node in found} - set(names))
    if unnamed:
        raise DatasetError(f"{folder / _CLASSES}: no name for nodes {listing(unnamed)} of {_HIERARCHY}; add the lines")
    shown = {level: unique_names({node: names[node] for node in found}) for level, found in nodes.items()}
    return {level: [shown[level][node] for node in found] for level, found in nodes.items()}


def _read(folder: Path, split: str, boxes: bool, *, numeric_ids: bool, unused_classes: bool) -> Samples:
    """Read one split; `numeric_ids`: image ids are numbers, `unused_classes`: classes without an image count."""
    names = read_table(folder / _IMAGES, numeric_ids=numeric_ids)
    labels = read_integers(folder / _LABELS, numeric_ids=numeric_ids)
    in_train = read_integers(folder / _SPLIT, numeric_ids=numeric_ids, allowed=(0, 1))
    class_names = read_table(folder / _CLASSES, numeric_ids=True)
    found = _read_boxes(folder / _BOXES, numeric_ids) if boxes else None
    tables: dict[str, Mapping[str, object]] = {_IMAGES: names, _LABELS: labels, _SPLIT: in_train}
    _check_same_ids(folder, tables if found is None else tables | {_BOXES: found})

    used = set(labels.values())
    unnamed = sorted(used - {int(key) for key in class_names})
    if unnamed:
        raise DatasetError(
            f"{folder / _CLASSES}: no name for class ids {listing(map(str, unnamed))}, "
            f"which {_LABELS} uses; add the lines"
        )
    class_ids = sorted(int(key) for key in class_names if unused_classes or int(key) in used)
    chosen = [i for i in names if (in_train[i] == 1) == (split == "train")]
    if not chosen:
        raise DatasetError(f"{folder / _SPLIT}: no image belongs to split {split!r} (1 means train, 0 means test)")
    index = {class_id: position for position, class_id in enumerate(class_ids)}
    return Samples(
        classes=list(unique_names({str(class_id): class_names[str(class_id)] for class_id in class_ids}).values()),
        paths=image_paths(folder / "images", [names[i] for i in chosen], folder / _IMAGES),
        targets=[index[labels[i]] for i in chosen],
        boxes=None if found is None else [found[i] for i in chosen],
    )


def _read_boxes(path: Path, numeric_ids: bool) -> dict[str, Box]:
    """Lines "id x y width height" in pixels; x and y are the left and the upper edge."""
    if not path.is_file():
        raise DatasetError(f"{path}: missing; it holds the bounding boxes. Unpack the archive again, or do not crop")
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
