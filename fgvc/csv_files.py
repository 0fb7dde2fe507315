"""Tables as CSV that a spreadsheet does not run as formulas, read back without loss.

A spreadsheet runs a cell that begins with "=", "+", "-" or "@" as a formula, which may start programs and send the
content of other cells. Names of classes, files and runs come from data sets. Such text therefore gets an apostrophe in
front, as OWASP advises ("CSV Injection"); columns of numbers do not. Text that has apostrophes before such a character
gets one more. The reader removes one apostrophe from both, so nothing is lost.
"""

import csv
import re
from collections import Counter
from collections.abc import Hashable
from pathlib import Path

import pandas as pd

from fgvc.errors import RunError

# also the full-width characters of East Asian scripts; a spreadsheet drops or splits at the white space before them
_FORMULA = re.compile(r"(?=\s*[=+\-@\uff1d\uff0b\uff0d\uff20]|[\t\r\n])")


def to_csv(table: pd.DataFrame, float_format: str | None = "%.6g", *, index: bool = False) -> str:
    """Return a frame as CSV with disarmed text; `fgvc.csv_files.read_csv` restores the text."""
    safe = table.rename(columns=_disarmed)
    if index:
        safe = safe.rename(index=_disarmed)
    for place, kind in enumerate(safe.dtypes):
        if not pd.api.types.is_numeric_dtype(kind):
            safe.isetitem(place, safe.iloc[:, place].map(_disarmed))
    text: str = safe.to_csv(index=index, float_format=float_format)
    if "\r" in text:  # before Python 3.13 it is not quoted and would end the row
        text = safe.to_csv(index=index, float_format=float_format, quoting=csv.QUOTE_NONNUMERIC)
    return text


def armed(cell: str) -> str:
    """Return the text that `to_csv` wrote as `cell`."""
    bare = cell.lstrip("'")
    return cell[1:] if bare != cell and _is_formula(bare) else cell


def _disarmed(value: Hashable) -> Hashable:
    return f"'{value}" if isinstance(value, str) and _is_formula(value.lstrip("'")) else value


def _is_formula(text: str) -> bool:
    return _FORMULA.match(text) is not None


def read_csv(
    path: Path,
    columns: tuple[str, ...],
    *,
    as_text: bool = False,
    numbers: tuple[str, ...] = (),
    names: tuple[str, ...] = (),
) -> pd.DataFrame:
    """Read a CSV file that must have `columns` (and may have more); parse numbers unless `as_text`.

    Columns in `numbers` must hold only numbers. Columns in `names`, if present, stay text, since a class may be called
    007 or NA. Text is as before `to_csv` disarmed it.

    Pandas alone would take an extra cell in a row for an index and move every number to the next column.

    Raises:
        RunError: the file is missing, not CSV, lacks a column or has one twice, a row is longer or shorter than the
            header, or a column in `numbers` holds text or an empty cell.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header, *rows = ([armed(cell) for cell in row] for row in csv.reader(file, strict=True))
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
    """Return the table with pandas' types, except for the columns in `names`.

    Raises:
        RunError: pandas and the strict reader read the file differently.
    """
    try:
        table: pd.DataFrame = pd.read_csv(path, index_col=False)
    except Exception as error:  # pandas' parsers raise many types
        raise RunError(f"{path}: cannot be read as CSV ({error}); restore the file") from error
    if table.shape != text.shape:
        raise RunError(f"{path}: {len(text)} rows, but pandas reads {len(table)}; restore the file")
    table.columns = text.columns
    for name in table.columns:
        if name in names:
            table[name] = text[name]
        elif not pd.api.types.is_numeric_dtype(table[name]):
            # besides text it may hold True, or integers beyond 64 bits
            table[name] = [armed(cell) if isinstance(cell, str) else cell for cell in table[name]]
    return table
