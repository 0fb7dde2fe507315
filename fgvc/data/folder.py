"""Any dataset as folders: <root>/train/<class>/<image> and <root>/test/<class>/<image> (or val/ for test/)."""

import errno
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from PIL import Image

from fgvc.data.dataset import Samples
from fgvc.data.layout import reachable
from fgvc.errors import DatasetError


def read_folder(root: Path, split: str) -> Samples:
    """Read one split; classes are the sorted names of the class folders, images are sorted by path.

    The images are turned by their EXIF orientation: cameras and phones store what the sensor saw, but people who sort
    images see them upright.

    Args:
        root: folder with train/ and test/ (or val/).
        split: "train" or "test".

    Raises:
        DatasetError: a folder is missing or cannot be read, both test/ and val/ are there, a class is in one split
            only, a class folder holds no image, or a name is not Unicode.
    """
    with reachable():
        found = [root / name for name in ("test", "val") if (root / name).is_dir()]
    if len(found) == 2:
        raise DatasetError(f"{root}: holds both test/ and val/; keep only the one to test on")
    test = found[0] if found else root / "test"
    return replace(read_class_folders({"train": root / "train", "test": test}, split), upright=True)


def read_class_folders(folders: Mapping[str, Path], split: str) -> Samples:
    """Read one of several splits, each a folder of class folders; a class must be in all of them.

    Raises:
        DatasetError: as `read_folder`.
    """
    with reachable():
        classes = {name: _class_names(folder) for name, folder in folders.items()}
    for present, absent in (("train", "test"), ("test", "train")):
        lonely = sorted(classes[present] - classes[absent])
        if lonely:
            raise DatasetError(
                f"{folders[absent]}: {len(lonely)} classes of {folders[present]} missing here, first {lonely[0]!r}; "
                "every class must be in both splits"
            )
    names = sorted(classes[split])
    paths, targets = [], []
    for target, name in enumerate(names):
        found = image_files(folders[split] / name)
        if not found:
            raise DatasetError(
                f"{folders[split] / name}: no image files (known by extension, such as .jpg or .png); "
                "add some or remove it"
            )
        paths += found
        targets += [target] * len(found)
    return Samples(names, paths, targets)


def image_files(folder: Path) -> list[Path]:
    """Image files at any depth, known by extension and sorted; hidden files and folders are left out.

    The listing of a folder tells files from folders, so a million files need no further call each.

    Raises:
        DatasetError: a folder cannot be read, or a name is not Unicode.
    """
    extensions = Image.registered_extensions()
    with reachable():
        found = [path for path in _files(str(folder)) if f".{path.rpartition('.')[2].lower()}" in extensions]
    # the same order as of sorted paths, part by part, but faster
    return [Path(path) for path in sorted(found, key=lambda path: path.replace(os.sep, "\0"))]


def _files(folder: str) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            require_unicode(folder, entry.name)
            if entry.is_dir(follow_symlinks=False):  # a link to a folder could lead back to where it is
                yield from _files(entry.path)
            elif _is_file(entry):
                yield entry.path


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError as error:  # a link to itself is left out; the check of the images will name any other
        return error.errno != errno.ELOOP


def require_unicode(folder: str | Path, name: str) -> None:
    """Raise DatasetError for a name in another encoding: the text files of a run could not hold it."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise DatasetError(f"{folder}: the name {name!r} is not Unicode (UTF-8); rename it") from error


def _class_names(folder: Path) -> set[str]:
    if not folder.is_dir():
        raise DatasetError(
            f"{folder}: no such folder. Set root to a folder with train/<class>/<image> and test/<class>/<image> "
            "(or val/ for test/)."
        )
    names = {entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
    for name in names:
        require_unicode(folder, name)
    if not names:
        raise DatasetError(f"{folder}: no class folders; expected {folder}/<class>/<image>")
    return names
