"""FGVC-Aircraft 2013b in its official layout [Maji, Kannala, Rahtu, Blaschko, Vedaldi, arXiv:1306.5151]."""

from pathlib import Path

from fgvc.data.dataset import Samples
from fgvc.data.image_file import Box
from fgvc.data.layout import find_folder, image_paths, listing, read_lines, read_table
from fgvc.errors import ConfigError, DatasetError

_CLASS_FILES = {"variant": "variants.txt", "family": "families.txt", "manufacturer": "manufacturers.txt"}
_SPLITS = ("train", "val", "trainval", "test")
_BOXES = "images_box.txt"
BANNER = 20
"""Rows at the bottom of an image with the photographer's name."""


def read_aircraft(
    root: Path,
    split: str,
    *,
    boxes: bool = False,
    level: str = "variant",
    remove_banner: bool = True,
    train_split: str = "trainval",
    test_split: str = "test",
) -> Samples:
    """Read one split, in the order of its list; classes are in the order of the class list.

    Coarser labels: the family and the manufacturer of each variant, or the manufacturer of each family.

    Args:
        root: the folder fgvc-aircraft-2013b or its parent.
        split: "train" or "test"; the last two options say which official split that is.
        boxes: also read images_box.txt.
        level: "variant" (100 classes), "family" (70) or "manufacturer" (30).
        remove_banner: cut off the 20 rows at the bottom that name the photographer, as the authors ask.
        train_split: official split to train on: "train", "val" or both, "trainval".
        test_split: official split to test on.

    Raises:
        ConfigError: unknown level or split, or the two splits share images.
        DatasetError: a file is missing or malformed, an image is missing, or a class is not in the list.
    """
    _check(level, train_split, test_split)
    layout = ("data/images", f"data/{_CLASS_FILES[level]}")
    data = find_folder("aircraft", root, layout, nested="fgvc-aircraft-2013b") / "data"
    source = data / f"images_{level}_{train_split if split == 'train' else test_split}.txt"
    classes = [line.strip() for line in read_lines(data / _CLASS_FILES[level])]
    names = read_table(source)
    index = {name: position for position, name in enumerate(classes)}
    unknown = sorted(set(names.values()) - set(index))
    if unknown:
        raise DatasetError(
            f"{source}: classes {listing(map(repr, unknown))} are not in {_CLASS_FILES[level]}; add them"
        )
    if len(index) < len(classes):
        raise DatasetError(f"{data / _CLASS_FILES[level]}: a class is listed twice; keep one of the lines")
    return Samples(
        classes=classes,
        paths=image_paths(data / "images", [f"{image_id}.jpg" for image_id in names], source),
        targets=[index[name] for name in names.values()],
        boxes=_read_boxes(data / _BOXES, list(names)) if boxes else None,
        banner=BANNER if remove_banner else 0,
        coarse=_read_coarse(data, level, classes),
    )


def _read_coarse(data: Path, level: str, classes: list[str]) -> dict[str, list[str]]:
    """Label of each class at the levels above, from the lists that name the same images at both; "" if they differ."""
    coarse = {}
    levels = list(_CLASS_FILES)
    for upper in levels[levels.index(level) + 1 :]:
        found: dict[str, set[str]] = {}
        for split in ("trainval", "test"):
            files = [data / f"images_{name}_{split}.txt" for name in (level, upper)]
            if all(file.is_file() for file in files):
                own, above = map(read_table, files)
                for image_id in own.keys() & above.keys():
                    found.setdefault(own[image_id], set()).add(above[image_id])
        if found:
            only = {name: next(iter(labels)) for name, labels in found.items() if len(labels) == 1}
            coarse[upper] = [only.get(name, "") for name in classes]
    return coarse


def _check(level: str, train_split: str, test_split: str) -> None:
    splits = (("train_split", train_split, _SPLITS), ("test_split", test_split, _SPLITS))
    for option, value, known in (("level", level, tuple(_CLASS_FILES)), *splits):
        if value not in known:
            raise ConfigError(f"aircraft: {option}={value!r} is unknown; choose one of {', '.join(known)}")
    if train_split == test_split or {train_split, test_split} in ({"trainval", "train"}, {"trainval", "val"}):
        raise ConfigError(f"aircraft: train_split={train_split!r} and test_split={test_split!r} share images")


def _read_boxes(path: Path, image_ids: list[str]) -> list[Box]:
    """Lines "id xmin ymin xmax ymax"; the file counts pixels from 1 and includes the last one."""
    table = read_table(path)
    missing = [image_id for image_id in image_ids if image_id not in table]
    if missing:
        raise DatasetError(f"{path}: no box for {len(missing)} images, first {missing[0]}; unpack the archive again")
    boxes: list[Box] = []
    for image_id in image_ids:
        try:
            left, top, right, bottom = map(int, table[image_id].split())
        except ValueError as error:
            raise DatasetError(
                f"{path}: id {image_id} has the box {table[image_id]!r}; expected xmin ymin xmax ymax"
            ) from error
        boxes.append((left - 1, top - 1, right, bottom))
    return boxes
