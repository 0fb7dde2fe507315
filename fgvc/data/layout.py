"""What the adapters share: finding or filling a dataset's folder, reading its text files, refusing what is wrong."""

import contextlib
import csv
import functools
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fgvc.errors import DatasetError
from fgvc.foreign import read_foreign_text, read_json
from fgvc.io import replaced_folder, write_json_atomic
from fgvc.resources import resource_folder

logger = logging.getLogger(__name__)
_SHOWN = 5  # names in a message before "and N more"
COARSE = "coarse.csv"
MAX_TEXT = 1 << 28  # bytes; lists of a million images have half of it
_WHOLE_NUMBER = re.compile(r"[0-9]{1,18}")  # Python refuses to read thousands of digits


@contextlib.contextmanager
def reachable() -> Iterator[None]:
    """Turn errors of the file system, while a dataset is searched, into DatasetError."""
    try:
        yield
    except OSError as error:
        reason = f"cannot be read ({error.strerror})"
        raise DatasetError(f"{error.filename}: {reason}; correct its name or its permissions") from error


@functools.cache  # a folder is read many times
def say_once(level: int, note: str) -> None:
    """Log a line unless it was logged before."""
    logger.log(level, "%s", note)


def listing(items: Iterable[str]) -> str:
    """The first few names and how many more there are."""
    found = list(items)
    return ", ".join(found[:_SHOWN]) + (f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")


def find_folder(dataset: str, root: Path, *layouts: Sequence[str], nested: str | None = None) -> Path:
    """The folder that holds every entry of one of the layouts: `root`, or the folder `nested` in it.

    Args:
        dataset: name of the card that the message points to.
        root: the folder that the user gives.
        layouts: alternatives, each a list of files and folders.
        nested: name of the folder that the archive unpacks to.

    Raises:
        DatasetError: no layout is complete, and the message names what is missing in the nearest one and what is there
            instead; or the folder cannot be read.
    """
    places = [root] if nested is None else [root, root / nested]
    candidates = [(place, layout) for place in places for layout in layouts]
    with reachable():
        missing = [[name for name in layout if not (place / name).exists()] for place, layout in candidates]
        # the nearest: most entries found, then fewest missing
        counts = [(len(gone) - len(layout), len(gone)) for gone, (_, layout) in zip(missing, candidates, strict=True)]
        nearest = counts.index(min(counts))
        place = candidates[nearest][0]
        if not missing[nearest]:
            return place
        exists = root.exists()
        present = listing(sorted(entry.name for entry in place.iterdir())) if place.is_dir() else "no folder but a file"
    expected = "; or ".join(", ".join(layout) for layout in layouts)
    here = f"{place}" if nested is None else f"{root} or {root / nested}"
    fix = (
        f"Set root to the unpacked dataset, or get it: fgvc prepare_data {dataset}; "
        f"{resource_folder('datasets') / dataset}.yaml shows the layout and the source"
    )
    if not exists:
        raise DatasetError(f"{root}: no such folder; expected dataset {dataset!r} there ({expected}). {fix}")
    raise DatasetError(
        f"{place}: {', '.join(missing[nearest])} missing, so this is not dataset {dataset!r}. "
        f"Looked in {here} for {expected}; found in {place}: {present or 'nothing'}. {fix}"
    )


def read_text(path: Path) -> str:
    """The text of a file, without a byte order mark.

    Raises DatasetError: missing, no regular file, too long, or not UTF-8.
    """
    try:
        text = read_foreign_text(path, MAX_TEXT)
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{path}: not UTF-8 text (byte 0x{error.object[error.start]:02x} at offset {error.start}); save it as UTF-8"
        ) from error
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path}: {getattr(error, 'strerror', error)}; unpack the archive again") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: Path) -> list[str]:
    """The lines of a file except blank ones. Raises DatasetError as `read_text`.

    Only a line feed ends a line: `str.splitlines` also splits at seven other characters, which a name may hold.
    """
    return [line for line in read_text(path).split("\n") if line.strip()]


def read_table(path: Path, *, numeric_ids: bool = False) -> dict[str, str]:
    """Lines "id value" as {id: value}, in the file's order; the value may hold spaces.

    Args:
        path: text file.
        numeric_ids: whether ids must be whole numbers; their leading zeros are dropped.

    Raises:
        DatasetError: missing, empty, not UTF-8, a line without id and value, or a repeated id.
    """
    table: dict[str, str] = {}
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        key, _, value = line.strip().partition(" ")
        if not value.strip() or (numeric_ids and not _WHOLE_NUMBER.fullmatch(key)):
            raise DatasetError(f'{path}:{number}: expected "<id> <value>", found {line!r}; correct or remove the line')
        key = str(int(key)) if numeric_ids else key
        if key in table:
            raise DatasetError(f"{path}:{number}: id {key} appears a second time ({line!r}); keep one of the lines")
        table[key] = value.strip()
    if not table:
        raise DatasetError(f"{path}: no entries; unpack the archive again")
    return table


def read_integers(path: Path, *, numeric_ids: bool = False, allowed: tuple[int, ...] | None = None) -> dict[str, int]:
    """Lines "id value" as in `read_table`, with whole numbers as values.

    Raises DatasetError as `read_table`; also where a value is not a whole number, or none of those `allowed`.
    """
    table = read_table(path, numeric_ids=numeric_ids)
    for key, value in table.items():
        if not _WHOLE_NUMBER.fullmatch(value) or (allowed is not None and int(value) not in allowed):
            expected = " or ".join(map(str, allowed)) if allowed else "a whole number"
            raise DatasetError(f"{path}: id {key} has the value {value!r}; expected {expected}")
    return {key: int(value) for key, value in table.items()}


def read_csv_rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """The column names and the rows of a CSV file, all of it text without blanks around it.

    Raises DatasetError as `read_text`; no header, a column twice, a cell with a line end, or a row with more or fewer
    cells.
    """
    lines = (row for row in csv.reader(read_text(path).splitlines(keepends=True), strict=True) if any(row))
    try:
        header, *rows = [[cell.strip() for cell in row] for row in lines]
    except (csv.Error, ValueError) as error:
        reason = error if isinstance(error, csv.Error) else "it is empty"
        raise DatasetError(f"{path}: not a table ({reason}); save it as CSV with a header") from error
    if repeated := [name for name, count in Counter(header).items() if count > 1]:
        raise DatasetError(f"{path}: the column {repeated[0]!r} appears twice; rename one")
    for number, row in enumerate(rows, start=1):
        if not {"\n", "\r"}.isdisjoint("".join(row)):  # a quote that nobody closed takes the next rows
            shown = str(row)[:80]
            raise DatasetError(f"{path}: row {number} has a line end in a cell ({shown}); is a quote missing there?")
        if len(row) != len(header):
            raise DatasetError(
                f"{path}: row {number} has {len(row)} cells, but there are {len(header)} columns ({listing(row)}); "
                "correct the row; a cell with a comma stands in quotes"
            )
    return header, [dict(zip(header, row, strict=True)) for row in rows]


def read_coarse(path: Path, classes: Sequence[str]) -> dict[str, list[str]]:
    """Coarser labels from a CSV file: {level: label of each class, in the order of `classes`}; "" where unknown.

    The column "class" has the class names; every other column is a level, named by its header.

    Rows of other classes are left out. Where classes have no row, a warning says so with both.

    Raises DatasetError as `read_csv_rows`; no column "class", no other column, a class twice, or no row names a class.
    """
    header, rows = read_csv_rows(path)
    levels = [name for name in header if name != "class"]
    if "class" not in header or not levels:
        raise DatasetError(f"{path}: columns {listing(header)}; expected class, and a column for each coarser level")
    repeated = [name for name, count in Counter(row["class"] for row in rows).items() if count > 1]
    if repeated:
        raise DatasetError(f"{path}: the class {repeated[0]!r} appears twice; keep one of the rows")
    by_class = {row["class"]: row for row in rows}
    without = [name for name in classes if name not in by_class]
    others = [name for name in by_class if name not in set(classes)]
    if len(without) == len(classes):
        raise DatasetError(
            f"{path}: no row names a class of the dataset; it names {listing(others)}, the classes are "
            f"{listing(without)}; write them as the class folders or labels are"
        )
    if without:
        left_out = f"; rows of other classes: {listing(others)}" if others else ""
        say_once(logging.WARNING, f"{path}: no coarser label for the classes {listing(without)}{left_out}")
    return {level: [by_class.get(name, {}).get(level, "") for name in classes] for level in levels}


def leads_out(name: str) -> bool:
    """Whether a name from outside may lead out of its folder, on this system or another.

    A colon counts anywhere: on Windows a part "C:" starts at a drive, wherever it is in the path.
    """
    slashes = name.replace("\\", "/")
    return slashes.startswith("/") or ".." in slashes.split("/") or ":" in name or "\0" in name


def require_inside(folder: Path, name: str, source: Path) -> Path:
    """`folder` / `name`, for a name that `source`, a file of the dataset, gives.

    Raises DatasetError: the path is absolute, climbs up or names a drive.
    """
    if leads_out(name):
        raise DatasetError(
            f"{source}: names {name!r}, a path that leaves {folder}; paths must be relative and without '..' and ':'"
        )
    return folder / name


def image_paths(folder: Path, names: Sequence[str], source: Path, fix: str = "unpack the archive again") -> list[Path]:
    """The image files below `folder` that `source` names.

    Raises:
        DatasetError: a path leaves the folder or cannot be read, or files are missing: their number and the first few.
    """
    paths = [require_inside(folder, name, source) for name in names]
    with reachable():
        missing = [name for name, path in zip(names, paths, strict=True) if not path.is_file()]
    if missing:
        raise DatasetError(
            f"{folder}: {len(missing)} of {len(paths)} images named in {source.name} are missing: {listing(missing)}; "
            f"{fix}, or take them out of {source.name}"
        )
    return paths


def unique_names(names: Mapping[str, str]) -> dict[str, str]:
    """{id: name} with the id added, "crane (n02012849)", where several ids share a name."""
    counts = Counter(names.values())
    return {key: name if counts[name] == 1 else f"{name} ({key})" for key, name in names.items()}


def write_once(root: Path, record: str, recipe: Mapping[str, Any], write: Callable[[Path], None]) -> Path:
    """Fill `root` by `write(folder)` unless it holds the same content already; returns `root`.

    The folder appears whole or not at all, even if several processes write it; what a killed one has left is deleted.

    Args:
        root: folder to make; it must not exist, or be empty, or be made by the same recipe.
        record: name of the JSON file in `root` for the recipe.
        recipe: everything that determines the content, in types that JSON keeps.
        write: a function that fills the given folder.

    Raises:
        DatasetError: `root` holds something else.
    """
    if _holds(root, record, recipe):
        return root

    try:
        with replaced_folder(root.resolve(), on_wait=lambda: None) as temporary:
            write(temporary)
            write_json_atomic(temporary / record, recipe)
    except OSError:
        if not _holds(root, record, recipe):  # another process was faster: its folder has the same content
            raise
    return root


def _holds(root: Path, record: str, recipe: Mapping[str, Any]) -> bool:
    """Whether `root` was made by this recipe; DatasetError where it holds anything else."""
    if not root.exists():
        return False
    if not root.is_dir():
        raise DatasetError(f"{root}: is a file; set root to a folder")
    if not any(root.iterdir()):
        return False
    try:
        found = read_json(root / record)
    except FileNotFoundError as error:
        raise DatasetError(f"{root}: not empty and without {record}; set root to a new folder") from error
    except ValueError as error:
        raise DatasetError(f"{root / record}: not valid JSON; delete {root}, it will be made again") from error
    if found != recipe:
        raise DatasetError(
            f"{root / record}: made with {found}, asked for {dict(recipe)}; delete {root} or set another root"
        )
    return True
