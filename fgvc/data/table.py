"""Any dataset as a table: a CSV or Parquet file of image paths and labels."""

import contextlib
import io
import logging
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pandas as pd

from fgvc.data.dataset import Samples
from fgvc.data.folder import SPLIT_FOLDERS, is_litter, take_own_split
from fgvc.data.layout import COARSE, MAX_TEXT, image_paths, listing, reachable, read_coarse, say_once
from fgvc.errors import ConfigError, DatasetError, is_unicode
from fgvc.foreign import MAX_GROWTH, growth_limit, open_foreign
from fgvc.io import MAX_COLUMNS, expanded

ENDINGS = (".csv", ".tsv", ".parquet")
_MAX_PARQUET = 1 << 33  # bytes; the images may be in other columns
_MAX_ROWS, _ALLOWED_ROWS = 50_000_000, 1 << 20  # of a Parquet file of any size, of the smallest
_NAMES = {
    "image_column": (
        *("path", "image", "images", "file", "files", "filename", "filenames", "filepath", "filepaths", "imagepath"),
        *("imagename", "imagefile", "img", "imgpath", "relativepath"),
    ),
    "label_column": ("label", "labels", "class", "classname", "target", "species", "category"),
    "split_column": ("split", "splits", "set", "subset", "fold", "partition", "dataset"),
}
"""Names of the columns by option, as `_plain` gives them."""
Columns = dict[str, str | None]
NO_COLUMNS: Columns = dict.fromkeys(_NAMES)
_OWN = {"image_column": "path", "label_column": "label", "split_column": "split"}
"""Columns of a split.csv that a run writes; it may hold others of the names above."""
_WHOLE = re.compile(r"-?[0-9]{1,18}")


def read_image_table(
    root: Path,
    split: str,
    *,
    file: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    split_column: str | None = None,
    coarse_columns: Sequence[str] | None = None,
    test_fraction: float = 0.2,
    split_seed: int = 0,
) -> Samples:
    """Read one split, in the order of the rows; classes are the sorted labels, by number if all are whole numbers.

    Paths are relative to `root`, wherever the table is. Values of the split column are those of folders: train, val
    (valid, validation) and test, in any case; without test, val is the test split. Without a split column, or with
    training images only, the images are divided by `divide`. A run writes such a division as a table for this adapter,
    split.csv. The images are turned by their EXIF orientation.

    Args:
        root: folder of the images.
        split: "train", "val" or "test"; "val" has no images where the table has no validation split.
        file: the table, relative to `root`, or an absolute path; None takes the only .csv, .tsv or .parquet file in
            `root`, or the only one with these columns. A file coarse.csv is no such table but gives coarser labels, see
            `read_coarse`.
        image_column, label_column, split_column: names of columns; None finds each by a usual name, such as path,
            label and split.
        coarse_columns: columns of coarser labels, each a level; a class must have one label at each.
        test_fraction: share of the test images of each class, where the table has no split.
        split_seed: seed of that division.

    Raises:
        ConfigError: a column is missing, or several may be meant; the message names the option.
        DatasetError: no table, or several; it is damaged, a cell is empty or has a line end, a path leaves `root` or is
            missing, or an unknown split.
    """
    levels = list(coarse_columns or ())
    given = {"image_column": image_column, "label_column": label_column, "split_column": split_column}
    with reachable():
        path = find_table(root, given, levels) if file is None else root / expanded(file)
    chosen = find_columns(path, given, levels)
    used = [name for name in chosen.values() if name is not None]
    frame = _read(path, [*used, *levels])
    names, labels = (_texts(path, frame, str(chosen[option])) for option in ("image_column", "label_column"))
    splits = _splits(path, frame, chosen["split_column"], given["split_column"])
    whole = all(map(_WHOLE.fullmatch, labels))
    classes = sorted(set(labels), key=lambda name: (int(name) if whole else 0, name))
    index = {name: target for target, name in enumerate(classes)}
    targets = [index[label] for label in labels]
    coarse = {level: _coarse(path, _texts(path, frame, level, empty=True), labels, level, classes) for level in levels}
    if (root / COARSE).is_file() and root / COARSE != path:
        coarse |= read_coarse(root / COARSE, classes)
    fix = f"paths are relative to {root}; correct them or dataset.root"
    samples = Samples(classes, image_paths(root, names, path, fix), targets, upright=True, coarse=coarse)
    if set(splits) <= {"train"}:
        what = "without a split" if not splits else "with training images only"
        return take_own_split(samples, names, split, test_fraction, split_seed, f"{path}: found a table {what}")
    if "test" not in splits:
        splits = ["test" if name == "val" else name for name in splits]
    counts = Counter(splits)
    say_once(logging.INFO, f"{path}: found a table with {', '.join(f'{n} {s}' for s, n in counts.items())} images")
    return samples.take([i for i, name in enumerate(splits) if name == split])


def find_tables(root: Path, given: Columns = NO_COLUMNS, levels: Sequence[str] = ()) -> tuple[list[Path], list[Path]]:
    """The tables in a folder, and those of them that have the columns of `find_columns`. Raises OSError."""
    found = sorted(path for path in root.iterdir() if path.suffix.lower() in ENDINGS and not is_litter(path.name))
    found = [path for path in found if path.name != COARSE and path.is_file()]
    fitting = []
    for path in found:
        with contextlib.suppress(ConfigError, DatasetError):
            find_columns(path, given, levels)
            fitting.append(path)
    return found, fitting


def read_paths_and_labels(path: Path) -> tuple[list[str], list[str]]:
    """The columns with the usual names. Raises ConfigError as `find_columns`, DatasetError as `read_image_table`."""
    chosen = find_columns(path)
    used = [str(chosen[option]) for option in ("image_column", "label_column")]
    frame = _read(path, used)
    return _texts(path, frame, used[0]), _texts(path, frame, used[1])


def find_table(root: Path, given: Columns, levels: Sequence[str]) -> Path:
    """The only table in a folder, or the only one with the columns.

    Raises:
        DatasetError: none or several.
        OSError: the folder cannot be read.
    """
    if not root.is_dir():
        raise DatasetError(f"{root}: no such folder; set root to the folder of the images")
    found, fitting = find_tables(root, given, levels)
    found = fitting or found
    if len(found) != 1:
        names = f"{len(found)} tables ({listing(path.name for path in found)})" if found else "no table"
        fix = "set dataset.options.file=NAME" if found else "expected a .csv, .tsv or .parquet file of image paths"
        raise DatasetError(f"{root}: {names} in it; {fix}")
    return found[0]


def table_columns(path: Path, wanted: Sequence[str] = ()) -> list[str]:
    """Names of the columns of a table. Only its head is read.

    Args:
        path: the table.
        wanted: names that help to find the separator of a CSV, besides the usual ones.

    Raises:
        DatasetError: it is damaged, or two columns have one name.
    """
    try:
        if path.suffix.lower() == ".parquet":
            import pyarrow.parquet  # here, since it is slow to import

            with open_foreign(path, _MAX_PARQUET) as file:
                names = pyarrow.parquet.read_schema(file).names
        else:
            with open_foreign(path, MAX_TEXT) as file:
                line = _header(file)
            # not as a header, since pandas would rename a name that comes again
            options: dict[str, Any] = {"sep": _separator(line, wanted), "dtype": str, "keep_default_na": False}
            names = pd.read_csv(io.StringIO(line), header=None, **options).iloc[0].tolist()
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error
    repeated = [name for name, count in Counter(names).items() if count > 1 and name]
    if repeated:
        raise DatasetError(f"{path}: the column {repeated[0]!r} appears twice; rename or remove one")
    return [str(name) for name in names]


def find_columns(path: Path, given: Columns = NO_COLUMNS, levels: Sequence[str] = ()) -> Columns:
    """The column of a table for each option; None only for the split.

    Raises:
        ConfigError: a given column is missing, none has a usual name, or several have.
        DatasetError: as `table_columns`.
    """
    columns = table_columns(path, [*filter(None, given.values()), *levels])
    own = all(name in columns for name in _OWN.values())
    found: Columns = {}
    for option, known in _NAMES.items():
        name = given[option]
        if name is None:
            fitting = [column for column in columns if _plain(column) in known and column not in levels]
            fitting = [_OWN[option]] if own else fitting
            if len(fitting) > 1 or (not fitting and option != "split_column"):
                problem = f"{listing(fitting)} may each be it" if fitting else "none has a usual name for it"
                raise ConfigError(
                    f"{path}: which column is the {option}? Of the columns {', '.join(columns)}, {problem}; set "
                    f"dataset.options.{option}=NAME"
                )
            name = fitting[0] if fitting else None
        found[option] = name
    missing = [name for name in (*found.values(), *levels) if name is not None and name not in columns]
    if missing:
        raise ConfigError(f"{path}: no column {missing[0]!r}; its columns are {', '.join(columns)}")
    return found


def _plain(name: str) -> str:
    """The letters and digits of a name, in lower case."""
    return re.sub(r"[\W_]+", "", name).lower()


def _separator(line: str, wanted: Iterable[str]) -> str:
    """What separates most of the usual and wanted names in a header, then most cells."""
    known = {name for names in _NAMES.values() for name in names} | set(map(_plain, wanted))
    return max(",;\t", key=lambda sep: (sum(_plain(cell) in known for cell in line.split(sep)), line.count(sep)))


def _damaged(path: Path, error: Exception) -> DatasetError:
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    return DatasetError(f"{path}: cannot be read as a table ({reason}); save it as CSV with a header, or as Parquet")


def _read(path: Path, columns: list[str]) -> pd.DataFrame:
    """These columns; every cell of a CSV is text."""
    read = _read_parquet if path.suffix.lower() == ".parquet" else _read_csv
    try:
        return read(path, list(dict.fromkeys(columns)))
    except (OSError, ValueError) as error:  # pyarrow and pandas raise kinds of them
        raise _damaged(path, error) from error


def _read_csv(path: Path, columns: list[str]) -> pd.DataFrame:
    with open_foreign(path, MAX_TEXT) as file:
        line = _header(file)
        file.seek(0)
        separator = _separator(line, columns)
        if line.count(separator) >= MAX_COLUMNS:
            raise ValueError(f"more than {MAX_COLUMNS} columns")
        options: dict[str, Any] = {"sep": separator, "encoding": "utf-8-sig", "chunksize": 1 << 14}
        parts = []
        for rows in pd.read_csv(file, dtype=str, keep_default_na=False, **options):
            if not isinstance(rows.index, pd.RangeIndex):  # pandas takes what is too much for an index
                raise ValueError("the rows have more cells than the header; quote a cell with a comma")
            parts.append(rows[columns])
    whole: pd.DataFrame = pd.concat(parts, ignore_index=True)
    return whole


def _read_parquet(path: Path, columns: list[str]) -> pd.DataFrame:
    import pyarrow.parquet

    with open_foreign(path, _MAX_PARQUET) as file:
        packed = path.stat().st_size
        table = pyarrow.parquet.ParquetFile(file, read_dictionary=columns)  # a repeated text takes its memory once
        rows, size = table.metadata.num_rows, table.metadata.serialized_size
        size += sum(table.metadata.row_group(i).total_byte_size for i in range(table.num_row_groups))
        if rows > min(_MAX_ROWS, MAX_GROWTH * packed + _ALLOWED_ROWS) or size > growth_limit(packed):
            raise ValueError(f"it unpacks to {rows} rows and {size} bytes")
        found = table.read(columns=columns)
    texts = [name for name in columns if str(found[name].type).startswith("dictionary<values=string")]
    size = sum(_decoded_size(chunk) for name in texts for chunk in found[name].chunks)
    if size > 5 * growth_limit(packed):  # labels repeat
        raise ValueError(f"its columns {', '.join(columns)} unpack to {size} bytes")
    for name in texts:
        found = found.set_column(found.schema.get_field_index(name), name, found[name].cast("string"))
    # whole numbers stay whole next to an empty cell
    frame: pd.DataFrame = found.to_pandas(integer_object_nulls=True, ignore_metadata=True)
    return frame


def _header(file: BinaryIO) -> str:
    return file.readline(1 << 16).decode("utf-8-sig")


def _decoded_size(texts: Any) -> int:
    """Bytes of the texts of a dictionary array of pyarrow, each as often as it stands there."""
    import pyarrow.compute as pc

    return pc.sum(pc.take(pc.binary_length(texts.dictionary), texts.indices)).as_py() or 0


def _texts(path: Path, frame: pd.DataFrame, column: str, *, empty: bool = False) -> list[str]:
    """The cells of a column as text.

    Raises DatasetError: an empty one, one with a line end, or one that is neither text nor a whole number.
    """
    found = []
    for row, value in enumerate(frame[column].tolist(), start=1):
        missing = value is None or value != value
        if isinstance(value, float) and value.is_integer():  # whole numbers with a missing one
            value = int(value)
        text = "" if missing else str(value).strip()
        if not missing and not isinstance(value, str | int):
            raise DatasetError(
                f"{path}: row {row} has {type(value).__name__} in the column {column!r}; expected text or whole numbers"
            )
        if not (text or empty):
            raise DatasetError(f"{path}: row {row} has nothing in the column {column!r}; fill it in or remove the row")
        if not {"\n", "\r"}.isdisjoint(text):  # a quote that nobody closed takes the rows up to the next one
            raise DatasetError(
                f"{path}: row {row} has a line end in the column {column!r} ({text[:40]!r}); is a quote missing there?"
            )
        if not is_unicode(text):
            raise DatasetError(f"{path}: row {row} has {text!r} in the column {column!r}, no Unicode")
        found.append(text)
    if not found:
        raise DatasetError(f"{path}: no rows below the header; add the images")
    return found


def _splits(path: Path, frame: pd.DataFrame, column: str | None, given: str | None) -> list[str]:
    """The split of each row; empty without a split column."""
    if column is None:
        return []
    texts = _texts(path, frame, column, empty=True)
    unknown = Counter(text for text in texts if text.lower() not in SPLIT_FOLDERS)
    if given is None and unknown.total() == len(texts):  # such as numbers of folds
        say_once(logging.WARNING, f"{path}: the column {column!r} names no splits, so fgvc divides the images")
        return []
    if unknown:
        value, count = unknown.most_common(1)[0]
        raise DatasetError(
            f"{path}: {count} rows have {value!r} in the column {column!r}; expected train, val or test. Correct them, "
            "or set dataset.options.split_column to another column"
        )
    return [SPLIT_FOLDERS[text.lower()] for text in texts]


def _coarse(path: Path, values: Sequence[str], labels: Sequence[str], level: str, classes: Sequence[str]) -> list[str]:
    """The label of each class at a level; a cell may be empty."""
    found: dict[str, str] = {}
    for row, (label, value) in enumerate(zip(labels, values, strict=True), start=1):
        if value and found.setdefault(label, value) != value:
            raise DatasetError(
                f"{path}: row {row} has {value!r} in the column {level!r}, another row of the class {label!r} has "
                f"{found[label]!r}; a class has one label at a level"
            )
    return [found.get(name, "") for name in classes]
