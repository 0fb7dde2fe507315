"""Which dataset lies in a folder: the adapter that reads it, and a sentence that says what was found."""

import os
import re
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from fgvc.data.cars import is_cars
from fgvc.data.folder import SPLIT_FOLDERS, holds_runs, is_litter
from fgvc.data.image_file import image_endings
from fgvc.data.inaturalist import find_years
from fgvc.data.layout import COARSE, listing, reachable
from fgvc.data.table import ENDINGS, find_columns, table_columns
from fgvc.errors import ConfigError, DatasetError
from fgvc.io import expanded

_LOOKED_AT = 50  # entries of a folder that are looked at

_BIRDS = ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt")


def find_layout(root: Path) -> tuple[str, str]:
    """Find what lies in a folder, from its names and a few of those below, not from a whole tree.

    Official datasets come first, also in the folder that their archive unpacks to; then folders with splits, a table
    with columns of paths and labels, and class folders.

    Args:
        root: the folder; "~" is expanded.

    Returns:
        Name of the adapter, and one sentence without a full stop, such as "found class folders without a split".

    Raises:
        DatasetError: none of them is there, or several tables are; the message says what was found and expected.
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
        tables = _tables(root)
        if len(tables) == 1:
            return "table", f"found {tables[0].name}, a table of image paths and labels"
        if "train" in roles and len(folders) == 1 and _folders(roles["train"]):
            return "folder", f"found class folders in {splits[0]} without a test split"
        others = [folder for folder in folders if folder.name.lower() not in SPLIT_FOLDERS]
        if others and sum(map(_holds_images, folders[:_LOOKED_AT])) > 1:
            return "folder", f"found {len(folders)} class folders without a split: {listing(f.name for f in folders)}"
        raise DatasetError(_nothing(root, folders, tables))


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


def _tables(root: Path) -> list[Path]:
    """Tables with a column of paths and one of labels."""
    found = []
    for path in sorted(root.iterdir()):
        if path.suffix.lower() in ENDINGS and path.name != COARSE and not is_litter(path.name):
            try:
                find_columns(path, table_columns(path), dict.fromkeys(("image_column", "label_column", "split_column")))
            except (ConfigError, DatasetError):
                continue
            found.append(path)
    return found


def _nothing(root: Path, folders: list[Path], tables: list[Path]) -> str:
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
    unread = [path.name for path in sorted(root.iterdir()) if path.suffix.lower() in ENDINGS and path.name != COARSE]
    if len(unread) == 1 and not tables:
        columns = listing(table_columns(root / unread[0]))
        return (
            f"{root}: {unread[0]} has the columns {columns}; say which are the paths and the labels: dataset=table "
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
