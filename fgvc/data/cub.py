"""CUB-200-2011 in its official layout [Wah, Branson, Welinder, Perona, Belongie, Caltech CNS-TR-2011-001]."""

from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from fgvc.data.dataset import Samples
from fgvc.errors import DatasetError

_FOLDER = "CUB_200_2011"
_IMAGES, _LABELS, _SPLIT, _CLASSES = "images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt"
_SHOWN = 5  # names listed in a message before "and N more"


def read_cub(root: Path, split: str) -> Samples:
    """Read one split of the official layout, in the order of images.txt.

    Args:
        root: the folder CUB_200_2011 or its parent. A subset of the classes or images is fine.
        split: "train" or "test", by train_test_split.txt.

    Raises:
        DatasetError: a file is missing, malformed or disagrees with another one; an image is missing; empty split.
    """
    folder = _find_folder(root)
    names = _read_table(folder / _IMAGES)
    labels = _read_integers(folder / _LABELS)
    in_train = _read_integers(folder / _SPLIT, allowed=(0, 1))
    classes = _read_table(folder / _CLASSES)
    _check_same_ids(folder, {_IMAGES: names, _LABELS: labels, _SPLIT: in_train})
    _check_class_ids(folder, labels, classes)
    chosen = [i for i in names if (in_train[i] == 1) == (split == "train")]
    if not chosen:
        raise DatasetError(f"{folder / _SPLIT}: no image belongs to split {split!r} (1 means train, 0 means test)")
    paths = _image_paths(folder, {i: names[i] for i in chosen})
    index = {class_id: position for position, class_id in enumerate(sorted(classes))}
    return Samples([classes[i] for i in sorted(classes)], paths, [index[labels[i]] for i in chosen])


def _find_folder(root: Path) -> Path:
    for folder in (root, root / _FOLDER):
        if (folder / _IMAGES).is_file():
            break
    else:
        raise DatasetError(
            f"{root}: no {_IMAGES} here or in {root / _FOLDER}{'' if root.exists() else ' (no such folder)'}; "
            f"set root to the unpacked folder {_FOLDER} or to its parent"
        )
    missing = [name for name in (_LABELS, _SPLIT, _CLASSES) if not (folder / name).is_file()]
    if missing:
        raise DatasetError(f"{folder}: {', '.join(missing)} missing beside {_IMAGES}; unpack the archive again")
    return folder


def _read_table(path: Path) -> dict[int, str]:
    """Lines "id value" as {id: value}, in the file's order; the value may hold spaces."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{path}: not UTF-8 text (byte 0x{error.object[error.start]:02x} at offset {error.start}); save it as UTF-8"
        ) from error
    table: dict[int, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        key, _, value = line.strip().partition(" ")
        if not (key.isascii() and key.isdigit() and value.strip()):
            raise DatasetError(f'{path}:{number}: expected "<id> <value>", found {line!r}; mend or remove the line')
        if int(key) in table:
            raise DatasetError(f"{path}:{number}: id {key} appears a second time ({line!r}); keep one of the lines")
        table[int(key)] = value.strip()
    if not table:
        raise DatasetError(f"{path}: no entries; unpack the archive again")
    return table


def _read_integers(path: Path, allowed: tuple[int, ...] | None = None) -> dict[int, int]:
    """As `_read_table`, with whole numbers as values."""
    table = _read_table(path)
    for key, value in table.items():
        if not (value.isascii() and value.isdigit()) or (allowed is not None and int(value) not in allowed):
            expected = " or ".join(map(str, allowed)) if allowed else "a whole number"
            raise DatasetError(f"{path}: id {key} has the value {value!r}; expected {expected}")
    return {key: int(value) for key, value in table.items()}


def _check_same_ids(folder: Path, tables: Mapping[str, Mapping[int, object]]) -> None:
    every = set().union(*tables.values())
    for name, table in tables.items():
        missing = sorted(every - set(table))
        if missing:
            source = next(other for other, ids in tables.items() if missing[0] in ids)
            raise DatasetError(
                f"{folder / name}: {len(missing)} image ids missing that other files list, first {missing[0]} "
                f"(in {source}); the files must list the same ids"
            )


def _check_class_ids(folder: Path, labels: Mapping[int, int], classes: Mapping[int, str]) -> None:
    unnamed = sorted(set(labels.values()) - set(classes))
    if unnamed:
        raise DatasetError(
            f"{folder / _CLASSES}: no name for class ids {_listing(map(str, unnamed))}, "
            f"which {_LABELS} uses; add the lines"
        )


def _image_paths(folder: Path, names: Mapping[int, str]) -> list[Path]:
    for image_id, name in names.items():
        if PurePosixPath(name).is_absolute() or Path(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise DatasetError(
                f"{folder / _IMAGES}: id {image_id} names {name!r}, a path that leaves {folder / 'images'}; "
                "paths must be relative and without '..'"
            )
    paths = [folder / "images" / name for name in names.values()]
    missing = [name for name, path in zip(names.values(), paths, strict=True) if not path.is_file()]
    if missing:
        raise DatasetError(
            f"{folder / 'images'}: {len(missing)} of {len(paths)} images named in {_IMAGES} are missing: "
            f"{_listing(missing)}; unpack the archive again, or take their ids out of the text files"
        )
    return paths


def _listing(items: Iterable[str]) -> str:
    found = list(items)
    return ", ".join(found[:_SHOWN]) + (f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")
