"""What the adapters share: finding a dataset's folder, reading its text files, and refusing what does not fit."""

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from fgvc.errors import DatasetError
from fgvc.resources import resource_folder

_SHOWN = 5  # names listed in a message before "and N more"
_MAX_DIGITS = 18  # of a whole number; Python refuses to read thousands of them


@contextlib.contextmanager
def reachable() -> Iterator[None]:
    """Errors of the file system, while a dataset is looked for, as DatasetError."""
    try:
        yield
    except OSError as error:
        reason = f"cannot be looked at ({error.strerror})"
        raise DatasetError(f"{error.filename}: {reason}; mend its name or its permissions") from error


def listing(items: Iterable[str]) -> str:
    """The first few names and how many more there are."""
    found = list(items)
    return ", ".join(found[:_SHOWN]) + (f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")


def find_folder(dataset: str, root: Path, *layouts: Sequence[str], nested: str | None = None) -> Path:
    """The folder that holds every entry of one of the layouts: `root`, or the folder `nested` in it.

    Args:
        dataset: name of the card that the message points to.
        root: as set by the user.
        layouts: alternatives, each a list of files and folders.
        nested: name of the folder that the archive unpacks to.

    Raises:
        DatasetError: no layout is complete; says what is missing from the nearest one and what is there instead. Or the
            folder cannot be looked at.
    """
    with reachable():
        return _nearest_folder(dataset, root, layouts, nested)


def _nearest_folder(dataset: str, root: Path, layouts: Sequence[Sequence[str]], nested: str | None) -> Path:
    places = [root] if nested is None else [root, root / nested]
    candidates = [(place, layout) for place in places for layout in layouts]
    missing = [[name for name in layout if not (place / name).exists()] for place, layout in candidates]
    # the nearest: most entries found, then fewest missing
    counts = [(len(gone) - len(layout), len(gone)) for gone, (_, layout) in zip(missing, candidates, strict=True)]
    nearest = counts.index(min(counts))
    place = candidates[nearest][0]
    if not missing[nearest]:
        return place
    wanted = "; or ".join(", ".join(layout) for layout in layouts)
    here = f"{place}" if nested is None else f"{root} or {root / nested}"
    fix = (
        f"Set root to the unpacked dataset, or get it: fgvc prepare_data {dataset}; "
        f"{resource_folder('datasets') / dataset}.yaml shows the layout and the source"
    )
    if not root.exists():
        raise DatasetError(f"{root}: no such folder; expected dataset {dataset!r} there ({wanted}). {fix}")
    raise DatasetError(
        f"{place}: {', '.join(missing[nearest])} missing, so this is not dataset {dataset!r}. "
        f"Looked in {here} for {wanted}; found in {place}: {_entries(place)}. {fix}"
    )


def _entries(folder: Path) -> str:
    if not folder.is_dir():
        return "no folder but a file"
    return listing(sorted(entry.name for entry in folder.iterdir())) or "nothing"


def read_text(path: Path) -> str:
    """The text of a file, without a byte order mark.

    Raises:
        DatasetError: missing, or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DatasetError(f"{path}: {error.strerror}; unpack the archive again") from error
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{path}: not UTF-8 text (byte 0x{error.object[error.start]:02x} at offset {error.start}); save it as UTF-8"
        ) from error


def read_lines(path: Path) -> list[str]:
    """The lines of a file, without those that are blank. Raises DatasetError as `read_text`.

    Only a line feed ends one: to `str.splitlines` a name may hold seven other characters that do.
    """
    return [line for line in read_text(path).split("\n") if line.strip()]


def read_table(path: Path, *, numeric_ids: bool = False) -> dict[str, str]:
    """Lines "id value" as {id: value}, in the file's order; the value may hold spaces.

    Args:
        path: text file.
        numeric_ids: demand whole numbers and drop their leading zeros.

    Raises:
        DatasetError: missing, empty, not UTF-8, a line without id and value, or an id that comes twice.
    """
    table: dict[str, str] = {}
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        key, _, value = line.strip().partition(" ")
        if not value.strip() or (numeric_ids and not is_whole_number(key)):
            raise DatasetError(f'{path}:{number}: expected "<id> <value>", found {line!r}; mend or remove the line')
        key = str(int(key)) if numeric_ids else key
        if key in table:
            raise DatasetError(f"{path}:{number}: id {key} appears a second time ({line!r}); keep one of the lines")
        table[key] = value.strip()
    if not table:
        raise DatasetError(f"{path}: no entries; unpack the archive again")
    return table


def is_whole_number(text: str) -> bool:
    """Whether a text is a whole number in plain digits, and not too many of them."""
    return text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS


def leads_out(name: str) -> bool:
    """Whether a name from outside may lead out of the folder it is meant for, on this system or another.

    A colon is refused anywhere: on Windows a part "C:" starts over at a drive, wherever it stands.
    """
    slashes = name.replace("\\", "/")
    return slashes.startswith("/") or ".." in slashes.split("/") or ":" in name or "\0" in name


def require_inside(folder: Path, name: str, source: Path) -> Path:
    """`folder` / `name`, where a file of the dataset, `source`, gives the name.

    Raises:
        DatasetError: the path is absolute, climbs up or names a drive.
    """
    if leads_out(name):
        raise DatasetError(
            f"{source}: names {name!r}, a path that leaves {folder}; paths must be relative and without '..' and ':'"
        )
    return folder / name


def image_paths(folder: Path, names: Sequence[str], source: Path) -> list[Path]:
    """The image files below `folder` that `source` names.

    Raises:
        DatasetError: a path that leaves the folder or cannot be looked at, or missing files, counted and the first few
            named.
    """
    paths = [require_inside(folder, name, source) for name in names]
    with reachable():
        missing = [name for name, path in zip(names, paths, strict=True) if not path.is_file()]
    if missing:
        raise DatasetError(
            f"{folder}: {len(missing)} of {len(paths)} images named in {source.name} are missing: {listing(missing)}; "
            f"unpack the archive again, or take them out of {source.name}"
        )
    return paths


def unique_names(names: Mapping[str, str]) -> dict[str, str]:
    """{id: name} with the id added, "crane (n02012849)", where several ids share a name."""
    counts = Counter(names.values())
    return {key: name if counts[name] == 1 else f"{name} ({key})" for key, name in names.items()}
