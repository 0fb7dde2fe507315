"""Which dataset lies in a folder: the adapter that reads it, and a sentence that says what was found."""

import os
import re
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from fgvc.data.folder import SPLIT_FOLDERS, holds_runs, image_files, is_litter
from fgvc.data.image_file import image_endings
from fgvc.data.inaturalist import find_years
from fgvc.data.layout import listing, reachable
from fgvc.data.stanford import is_cars
from fgvc.data.table import find_tables, read_paths_and_labels, table_columns
from fgvc.errors import DatasetError
from fgvc.io import expanded

_LOOKED_AT = 50  # entries of a folder that are looked at

_BIRDS = ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt")


def find_layout(root: Path) -> tuple[str, str]:
    """Find what lies in a folder, from its names and a few of those below, not from a whole tree.

    Official datasets come first, also in the folder that their archive unpacks to; then folders with splits, a table
    with columns of paths and labels, and class folders. "~" is expanded in `root`.

    Returns:
        Name of the adapter, and one sentence without a full stop, such as "found class folders without a split".

    Raises:
        DatasetError: none of them is there, several tables are, or a table lists only some of the images in class
            folders; the message says what was found and expected.
    """
    root = expanded(root)
    with reachable():
        if not root.is_dir():
            raise DatasetError(f"{root}: no such folder; give the folder of the images or of an unpacked dataset")
        for name, (title, holds) in _OFFICIAL.items():
            if holds(root):
                return name, f"found the files of {title}"
        folders = [f for f in _folders(root) if f.name.lower() in SPLIT_FOLDERS or not holds_runs(f)]
        roles = {SPLIT_FOLDERS.get(folder.name.lower()): folder for folder in folders}
        splits = [f"{roles[role].name}/" for role in ("train", "val", "test") if role in roles]
        if "train" in roles and len(splits) > 1 and _folders(roles["train"]):
            return "folder", f"found folders with splits: {listing(splits)}"
        others = [folder for folder in folders if folder.name.lower() not in SPLIT_FOLDERS]
        classes, found = [], ""
        if "train" in roles and len(folders) == 1:
            classes, found = _folders(roles["train"]), f"found class folders in {splits[0]} without a test split"
        elif others and sum(map(_holds_images, folders[:_LOOKED_AT])) > 1:
            classes = folders
            found = f"found {len(folders)} class folders without a split: {listing(f.name for f in folders)}"
        every, tables = find_tables(root)
        if len(tables) == 1:
            _refuse_excerpt(root, tables[0], classes)
            return "table", f"found {tables[0].name}, a table of image paths and labels"
        if classes:
            return "folder", found
        raise DatasetError(_nothing(root, folders, every, tables))


def _folders(root: Path) -> list[Path]:
    return [path for path in sorted(root.iterdir()) if path.is_dir() and not is_litter(path.name)]


def _files(root: Path) -> list[str]:
    with os.scandir(root) as entries:
        return [entry.name for entry in islice(entries, _LOOKED_AT) if entry.is_file() and not is_litter(entry.name)]


def _holds_images(folder: Path) -> bool:
    """Whether an image is in a folder or in one of the first folders in it."""
    endings = image_endings()
    places = [folder, *islice(_folders(folder), _LOOKED_AT)]
    return any(Path(name).suffix.lower() in endings for place in places for name in _files(place))


def _refuse_excerpt(root: Path, table: Path, folders: list[Path]) -> None:
    """Refuse a table that lists some of the images in class folders: either may be the dataset.

    The folders count if one has the name of a label; otherwise only those that the table takes images from.
    """
    paths, labels = read_paths_and_labels(table)
    if not {folder.name for folder in folders} & set(labels):
        places = {root / path.rpartition("/")[0] for path in paths}
        folders = [folder for folder in folders if any(place.is_relative_to(folder) for place in places)]
    images = sum(len(image_files(folder)) for folder in folders if _holds_images(folder))
    if len(paths) < images:
        raise DatasetError(
            f"{root}: {table.name} lists {len(paths)} images, but {listing(f'{folder.name}/' for folder in folders)} "
            f"hold {images}; choose one: dataset=table for those of the table, dataset=folder for all of the folders "
            "(and experiment=first for the settings of a first run)"
        )


def _nothing(root: Path, folders: list[Path], every: list[Path], tables: list[Path]) -> str:
    if len(tables) > 1:
        names = listing(path.name for path in tables)
        return (
            f"{root}: {len(tables)} tables ({names}); choose one: dataset=table dataset.options.file={tables[0].name}"
        )
    if not folders and not _files(root):
        return f"{root}: no images in it; expected CLASS/IMAGE, or another layout of docs/datasets.md"
    if not folders and _holds_images(root):
        return (
            f"{root}: images, but no class folders; sort the images into one folder for each class, or list them in a "
            "CSV file with columns path and label"
        )
    if len(folders) == 1 and _holds_images(folders[0]) and not _folders(folders[0]):
        return f"{root}: one class folder, {folders[0].name}; two or more classes are needed"
    if len(every) == 1:
        columns = listing(table_columns(every[0]))
        return (
            f"{root}: {every[0].name} has the columns {columns}; say which are the paths and the labels: dataset=table "
            "dataset.options.image_column=NAME dataset.options.label_column=NAME"
        )
    inside = listing([*(f"{folder.name}/" for folder in folders), *_files(root)]) or "nothing"
    fix = f" Or is {folders[0]} the folder of the classes?" if len(folders) == 1 and _folders(folders[0]) else ""
    return (
        f"{root}: found {inside}, which is no layout of a dataset; expected CLASS/IMAGE, train/CLASS/IMAGE and "
        "test/CLASS/IMAGE, a table (.csv, .parquet) of image paths and labels, or the files of one of "
        f"{', '.join(_OFFICIAL)}.{fix}"
    )


def _holds(*names: str, nested: str | None = None) -> Callable[[Path], bool]:
    def test(root: Path) -> bool:
        places = [root] if nested is None else [root, root / nested]
        return any(all((place / name).exists() for name in names) for place in places)

    return test


def _is_imagenet(root: Path) -> bool:
    if not all((root / name).is_dir() for name in ("train", "val")):
        return False
    with os.scandir(root / "train") as entries:
        names = [entry.name for entry in islice(entries, _LOOKED_AT) if not is_litter(entry.name)]
    return bool(names) and all(re.fullmatch("n[0-9]{8}", name) for name in names)


_OFFICIAL: dict[str, tuple[str, Callable[[Path], bool]]] = {
    "nabirds": ("NABirds", _holds(*_BIRDS, "hierarchy.txt", nested="nabirds")),
    "cub": ("CUB-200-2011", _holds(*_BIRDS, nested="CUB_200_2011")),
    "cars": ("Stanford Cars", is_cars),
    "aircraft": ("FGVC-Aircraft", _holds("data/images", "data/variants.txt", nested="fgvc-aircraft-2013b")),
    "dogs": ("Stanford Dogs", lambda root: _holds("Images", "train_list.mat")(root) or _holds("Images", "lists")(root)),
    "inaturalist": ("iNaturalist", lambda root: bool(find_years(root))),
    "imagenet": ("ImageNet", _is_imagenet),
}
