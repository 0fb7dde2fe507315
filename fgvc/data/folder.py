"""Any dataset as class folders: <root>/train/<class>/<image> and val/ or test/, or <root>/<class>/<image>."""

import errno
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from fgvc.data.dataset import Samples, divide
from fgvc.data.image_file import HEIF_ENDINGS, HEIF_FIX, image_endings
from fgvc.data.layout import COARSE, listing, reachable, read_coarse, say_once
from fgvc.errors import ConfigError, DatasetError, is_unicode

logger = logging.getLogger(__name__)

_SHOWN = 5  # kinds in a note
_LITTER = ("@eadir", "#recycle", "__macosx", "$recycle.bin", "thumbs.db", "desktop.ini", "lost+found")
"""Names, in lower case, of what systems and network drives put into folders."""
_CACHED = re.compile(r"(features|readable)-[0-9a-f]{32}\.\w+|CACHEDIR\.TAG")
"""Names of files in `cache.dir`."""
SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "val": "val",
    "valid": "val",
    "validation": "val",
}
"""Names of the folders of a split, in lower case, and their split."""
SUPERCATEGORY = "supercategory"
_EXPECTED = "{root}/train/<class>/<image> and {root}/test/<class>/<image> (or val/, or both), or {root}/<class>/<image>"


def read_folder(root: Path, split: str, *, levels: int = 1, test_fraction: float = 0.2, split_seed: int = 0) -> Samples:
    """Read one split; classes are the sorted names of the class folders, images are sorted by path.

    Layouts: train/, val/ and test/; train/ and test/; train/ and val/, which is the test split then; train/ alone, or
    class folders in `root` itself: these are divided by `divide`. "valid" and "validation" are other names of val/. A
    root with other folders than these is one of class folders, unless it has train/ and test/ or val/.

    The images are turned by their EXIF orientation: cameras and phones store what the sensor saw, but people who sort
    images see them upright. A file coarse.csv in `root` gives coarser labels, see `read_coarse`.

    Args:
        root: folder with one of the layouts.
        split: "train", "val" or "test"; "val" has no images where the layout has no validation split.
        levels: 1 for <class>/<image>; 2 for <supercategory>/<class>/<image>, where the supercategory becomes a coarser
            label and is added to the names of classes that several supercategories have.
        test_fraction: share of the test images of each class, where the layout has no split.
        split_seed: seed of that division; it is not the seed of a run, so all runs have the same test images.

    Raises:
        ConfigError: an option is out of range.
        DatasetError: a folder is missing or cannot be read, two folders are the same split, a class folder holds no
            image, or a name is not Unicode.
    """
    if levels not in (1, 2):
        raise ConfigError(f"folder: levels={levels!r} is unknown; choose 1 (class folders) or 2 (supercategory/class)")
    with reachable():
        folders = split_folders(root)
    if "test" in folders:
        samples = read_class_folders(folders, split, levels)
        say_once(logging.INFO, f"{root}: found {_words(root, folders)}")
    else:
        samples = _divided(root, folders["train"], split, levels, test_fraction, split_seed)
    file = root / COARSE
    coarse = {**samples.coarse, **(read_coarse(file, samples.classes) if file.is_file() else {})}
    return replace(samples, upright=True, coarse=coarse)


def split_folders(root: Path) -> dict[str, Path]:
    """The folder of each split: train and test, perhaps val; or train alone, which is to be divided.

    Raises:
        DatasetError: no such folder, no folders in it, two folders of one split, or none of the training split.
        OSError: a folder cannot be read.
    """
    if not root.is_dir():
        raise DatasetError(f"{root}: no such folder. Set root to a folder with {_EXPECTED.format(root='ROOT')}.")
    names = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not is_litter(entry.name))
    if not names:
        raise DatasetError(f"{root}: {_no_folders(root)}")
    found: dict[str, Path] = {}
    for name in names:
        split = SPLIT_FOLDERS.get(name.lower())
        if split in found:
            raise DatasetError(f"{root}: holds both {found[split].name}/ and {name}/; keep one {split} split")
        if split is not None:
            found[split] = root / name
    others = (name for name in names if name.lower() not in SPLIT_FOLDERS and not holds_runs(root / name))
    if ("train" not in found or len(found) == 1) and any(others):  # "train" may be a class
        return {"train": root}
    if "train" not in found:
        raise DatasetError(
            f"{root / 'train'}: no such folder, but {', '.join(names)}. Set root to a folder with "
            f"{_EXPECTED.format(root='ROOT')}."
        )
    if "test" not in found and "val" in found:
        found["test"] = found.pop("val")
    return found


def _no_folders(root: Path) -> str:
    """What to do with a root without folders."""
    endings = image_endings()
    if any(path.suffix.lower() in endings for path in root.iterdir()):
        return (
            "images, but no class folders. Sort the images into one folder for each class, "
            f"{root}/<class>/<image>, or list them with their labels in a CSV file in it (dataset=table)"
        )
    return f"no class folders; expected {_EXPECTED.format(root=root)}"


def _words(root: Path, folders: Mapping[str, Path]) -> str:
    """The layout in words."""
    names = {split: f"{folder.relative_to(root)}/" for split, folder in folders.items()}
    if "val" in folders:
        return f"{names['train']}, {names['val']} (selects the best epoch) and {names['test']} (only reported)"
    return f"{names['train']} and {names['test']} (the test split)"


def _divided(root: Path, folder: Path, split: str, levels: int, fraction: float, seed: int) -> Samples:
    """One split of class folders that have none."""
    samples = read_class_folders({"train": folder}, "train", levels)
    if len(samples.classes) == 1 and folder == root:
        name = next(iter(_class_folders(folder, levels)))
        raise DatasetError(
            f"{root}: a single class folder, {name}/; if the classes are in it, set root to {root / name}; otherwise "
            f"expected {_EXPECTED.format(root=root)}"
        )
    places = [path.relative_to(folder) for path in samples.paths]
    names = ["/".join(place.parts[levels:]) for place in places]  # a renamed class keeps its split
    what = "class folders without a split" if folder == root else f"{folder.name}/ without a test split"
    return take_own_split(samples, names, split, fraction, seed, f"{root}: found {what}")


def take_own_split(samples: Samples, names: list[str], split: str, fraction: float, seed: int, found: str) -> Samples:
    """One split of `samples` by `divide`; log lines that begin with `found` say so and count classes of one image.

    Raises:
        ConfigError: as `divide`.
        DatasetError: no class has two images.
    """
    train, test = divide(samples.targets, names, fraction, seed)
    if not test:
        raise DatasetError(f"{found}, and no class has two images to divide; add images, or a test split of your own")
    counts = Counter(samples.targets)
    single = [name for target, name in enumerate(samples.classes) if counts[target] == 1]
    shares = f"{100 * (1 - fraction):g} % / {100 * fraction:g} % of each class"
    say_once(logging.INFO, f"{found}: {shares}, {len(train)} training and {len(test)} test images (split_seed={seed})")
    if single:
        say_once(
            logging.WARNING, f"{found}: {len(single)} classes have one image, kept for training: {listing(single)}"
        )
    part = samples.take({"train": train, "val": [], "test": test}[split])
    return replace(part, whole=(samples.paths, samples.targets))


def read_class_folders(folders: Mapping[str, Path], split: str, levels: int = 1) -> Samples:
    """Read one of several splits, each a folder of class folders; "val" without a folder has no images.

    The classes are those of all splits.

    Raises DatasetError as `read_folder`.
    """
    with reachable():
        places = {name: _class_folders(folder, levels) for name, folder in folders.items()}
    parts = {place: place.rpartition("/") for found in places.values() for place in found}
    counts = Counter(name for _, _, name in parts.values())
    shown = {p: name if counts[name] == 1 else f"{name} ({above})" for p, (above, _, name) in parts.items()}
    classes = sorted(shown, key=lambda place: (shown[place], place))
    paths, targets, others, deeper = [], [], Counter[str](), True
    for target, place in enumerate(classes):
        if place not in places.get(split, {}):
            continue
        found, rest = _images(places[split][place])
        if not found:
            raise DatasetError(f"{places[split][place]}: {_no_images(rest)}; add some or remove it")
        paths += found
        targets += [target] * len(found)
        others += rest
        deeper = deeper and all(path.parent != places[split][place] for path in found)
    if split in folders:
        _note_others(folders[split], others)
        if deeper and levels == 1:
            note = "all images are in folders in the class folders; if those are the classes, set"
            say_once(logging.WARNING, f"{folders[split]}: {note} dataset.options.levels=2")
    coarse = {SUPERCATEGORY: [parts[place][0] for place in classes]} if levels == 2 else {}
    return Samples([shown[place] for place in classes], paths, targets, coarse=coarse)


def image_files(folder: Path) -> list[Path]:
    """Image files at any depth, known by their ending and sorted; a log line counts the others by their ending.

    What is hidden, or litter of a system or a network drive, does not count.

    Raises DatasetError: there is no image file, a folder cannot be read, or a name is not Unicode.
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


def _note_others(folder: Path, others: Counter[str]) -> None:
    if others:
        kinds = _counted(others)
        say_once(
            logging.WARNING, f"{folder}: left out {others.total()} files that are no images by their ending: {kinds}"
        )


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
    waiting = [folder]  # no recursion: folders may be deeper than Python's stack
    while waiting:
        place = waiting.pop()
        with os.scandir(place) as entries:
            for entry in entries:
                if is_litter(entry.name):
                    continue
                require_unicode(place, entry.name)
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
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
    if not is_unicode(name):
        raise DatasetError(f"{folder}: the name {name!r} is not Unicode (UTF-8); rename it")


def _class_folders(folder: Path, levels: int) -> dict[str, Path]:
    """Class folders by their path below `folder`."""
    found = {path.name: path for path in _folders(folder)}
    if levels == 2:
        found = {f"{above}/{path.name}": path for above, place in found.items() for path in _folders(place)}
    if not found:
        below = "<supercategory>/<class>/<image>" if levels == 2 else "<class>/<image>"
        raise DatasetError(f"{folder}: no class folders; expected {folder}/{below}, or move it away")
    return found


def holds_runs(folder: str | Path) -> bool:
    """Whether a run or cached features of fgvc are in a folder, at any depth: it is no class, whatever it holds."""
    waiting = [str(folder)]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            inside = [entry for entry in entries if not is_litter(entry.name)]
        names = {entry.name for entry in inside}
        if names >= {"config.yaml", "summary.json"} or any(map(_CACHED.fullmatch, names)):
            return True
        waiting += [entry.path for entry in inside if entry.is_dir(follow_symlinks=False)]
    return False


def _folders(folder: Path) -> list[Path]:
    """The folders in a folder, without litter and those of runs; images next to them are noted."""
    endings, loose, found = image_endings(), 0, []
    for path in sorted(folder.iterdir()):
        if is_litter(path.name):
            continue
        require_unicode(folder, path.name)
        if path.is_dir() and holds_runs(path):
            say_once(logging.WARNING, f"{path}: left out, since runs or cached features of fgvc are in it")
        elif path.is_dir():
            found.append(path)
        else:
            loose += path.suffix.lower() in endings
    if loose:
        say_once(logging.WARNING, f"{folder}: left out {loose} images that are in no class folder")
    return found
