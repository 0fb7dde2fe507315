"""Any dataset as folders: <root>/train/<class>/<image> and <root>/test/<class>/<image> (or val/ for test/)."""

import errno
import functools
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from fgvc.data.dataset import Samples
from fgvc.data.image_file import HEIF_ENDINGS, HEIF_FIX, image_endings
from fgvc.data.layout import reachable
from fgvc.errors import DatasetError

logger = logging.getLogger(__name__)

_SHOWN = 5  # kinds in a note
_LITTER = ("@eadir", "#recycle", "__macosx", "$recycle.bin", "thumbs.db", "desktop.ini", "lost+found")
"""Names, in lower case, of what systems and network drives put into folders."""


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
    paths, targets, others = [], [], Counter[str]()
    for target, name in enumerate(names):
        found, rest = _images(folders[split] / name)
        if not found:
            raise DatasetError(f"{folders[split] / name}: {_no_images(rest)}; add some or remove it")
        paths += found
        targets += [target] * len(found)
        others += rest
    _note_others(folders[split], others)
    return Samples(names, paths, targets)


def image_files(folder: Path) -> list[Path]:
    """Image files at any depth, known by their ending and sorted; a log line counts the others by their ending.

    What is hidden, or litter of a system or a network drive, does not count.

    Raises:
        DatasetError: there is no image file, a folder cannot be read, or a name is not Unicode.
    """
    found, others = _images(folder)
    if not found:
        raise DatasetError(f"{folder}: {_no_images(others)}; give another folder")
    _note_others(folder, others)
    return found


def _images(folder: Path) -> tuple[list[Path], Counter[str]]:
    """Image files, and the numbers of other files by what they are.

    The listing of a folder tells files from folders, so a million files need no further call each.
    """
    endings, found, others = image_endings(), [], Counter[str]()
    with reachable():
        for path, kind in _files(str(folder)):
            _, dot, letters = path.rpartition(os.sep)[2].lower().rpartition(".")
            if kind is None and f".{letters}" in endings:
                found.append(path)
            else:
                clear = f".{letters}" if letters.isprintable() and len(letters) < 40 else "with an odd ending"
                others[kind or (clear if dot else "without an ending")] += 1
    # the same order as of sorted paths, part by part, but faster
    return [Path(path) for path in sorted(found, key=lambda path: path.replace(os.sep, "\0"))], others


def _no_images(others: Counter[str]) -> str:
    found = f", but {_counted(others)}" if others else ""
    return f"no image files (known by their ending, such as .jpg or .png){found}"


@functools.cache  # a folder is read many times
def _say_once(note: str) -> None:
    logger.warning(note)


def _note_others(folder: Path, others: Counter[str]) -> None:
    if others:
        _say_once(f"{folder}: left out {others.total()} files that are no images by their ending: {_counted(others)}")


def _counted(others: Counter[str]) -> str:
    counts = [f"{count} {kind}" for kind, count in others.most_common(_SHOWN)]
    more = others.total() - sum(count for _, count in others.most_common(_SHOWN))
    fix = f" (to read {', '.join(HEIF_ENDINGS)}: {HEIF_FIX})" if set(HEIF_ENDINGS) & set(others) else ""
    return ", ".join([*counts, *([f"{more} of other kinds"] if more else [])]) + fix


def is_litter(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or something that a system or a network drive put there."""
    return name.startswith(".") or name.lower() in _LITTER


def _files(folder: str) -> Iterator[tuple[str, str | None]]:
    """Every file, and what it is if it is no regular one."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_litter(entry.name):
                continue
            require_unicode(folder, entry.name)
            if entry.is_dir(follow_symlinks=False):
                yield from _files(entry.path)
            elif _is_file(entry):
                yield entry.path, None
            else:  # a link to a folder could lead back to where it is
                yield entry.path, "links or special files"


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
    names = {entry.name for entry in folder.iterdir() if entry.is_dir() and not is_litter(entry.name)}
    for name in names:
        require_unicode(folder, name)
    if not names:
        raise DatasetError(f"{folder}: no class folders; expected {folder}/<class>/<image>")
    return names
