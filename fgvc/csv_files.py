"""Tables as CSV, and back without a loss."""

import csv
from collections import Counter
from pathlib import Path

import pandas as pd

from fgvc.errors import RunError


def to_csv(table: pd.DataFrame, float_format: str | None = "%.6g", *, index: bool = False) -> str:
    """A frame as CSV."""
    text: str = table.to_csv(index=index, float_format=float_format)
    if "\r" in text:  # which is quoted as a line feed is since Python 3.13 only, and would end the row
        text = table.to_csv(index=index, float_format=float_format, quoting=csv.QUOTE_NONNUMERIC)
    return text


def read_csv(
    path: Path,
    columns: tuple[str, ...],
    *,
    as_text: bool = False,
    numbers: tuple[str, ...] = (),
    names: tuple[str, ...] = (),
) -> pd.DataFrame:
    """Read a CSV file that must have `columns` (and may have more), and parse numbers unless `as_text`.

    The columns `numbers` must hold nothing else. The columns `names`, if present, are text whatever they hold: a
    class may be called 007 or NA.

    Pandas alone would take an extra cell in a row for an index and move every number to the next column.

    Raises:
        RunError: the file is missing, not CSV, lacks a column or has one twice, or a row is longer or shorter than the
            header, or one of `numbers` holds text or nothing.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header, *rows = csv.reader(file, strict=True)
    except FileNotFoundError as error:
        raise RunError(f"{path}: no such file; restore it") from error
    except (OSError, ValueError, csv.Error) as error:  # ValueError: not UTF-8, or empty
        raise RunError(f"{path}: cannot be read as CSV ({error}); restore the file") from error
    missing = [column for column in columns if column not in header]
    if missing:
        raise RunError(f"{path}: no column {', '.join(missing)}, found {', '.join(header)}; restore the file")
    twice = [column for column, count in Counter(header).items() if count > 1]
    if twice:
        raise RunError(f"{path}: column {twice[0]!r} appears {header.count(twice[0])} times; restore the file")
    for number, row in enumerate(rows, start=1):
        if len(row) != len(header):
            raise RunError(f"{path}, row {number}: {len(row)} cells under {len(header)} columns; restore the file")
    text = pd.DataFrame(rows, columns=header, dtype=str)
    for name in numbers:
        bad = text.loc[pd.to_numeric(text[name], errors="coerce").isna(), name]
        if len(bad):
            raise RunError(f"{path}, row {bad.index[0] + 1}: {name} is {bad.iloc[0]!r}, not a number; restore the file")
    return text if as_text else _typed(path, text, names)


def _typed(path: Path, text: pd.DataFrame, names: tuple[str, ...]) -> pd.DataFrame:
    """The table with the types that pandas finds, and text in the columns of `names`.

    Raises:
        RunError: pandas and the strict reader read the file differently.
    """
    try:
        table: pd.DataFrame = pd.read_csv(path, index_col=False)
    except Exception as error:  # its parsers raise many types
        raise RunError(f"{path}: cannot be read as CSV ({error}); restore the file") from error
    if table.shape != text.shape:
        raise RunError(f"{path}: pandas reads {len(table)} of {len(text)} rows; restore the file")
    table.columns = text.columns
    for name in set(names) & set(table.columns):
        table[name] = text[name]
    return table
