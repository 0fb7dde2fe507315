"""Strict reading of CSV files."""

import csv
from pathlib import Path

import pandas as pd

from fgvc.errors import RunError


def read_csv(
    path: Path, columns: tuple[str, ...], *, as_text: bool = False, numbers: tuple[str, ...] = ()
) -> pd.DataFrame:
    """Read a CSV file that must have `columns` (and may have more), with numbers parsed unless `as_text`.

    Those of `numbers` must hold nothing else.

    Pandas alone would take one cell too many in a row for an index and move every number to its neighbour's column.

    Raises:
        RunError: the file is missing, not CSV, lacks a column, or a row is longer or shorter than the header, or
            one of `numbers` holds text or nothing.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            header, *rows = csv.reader(file, strict=True)
    except FileNotFoundError as error:
        raise RunError(f"{path}: no such file; restore it") from error
    except (OSError, ValueError, csv.Error) as error:  # ValueError: not UTF-8, or empty
        raise RunError(f"{path}: cannot be read as CSV ({error}); restore the file") from error
    missing = [column for column in columns if column not in header]
    if missing:
        raise RunError(f"{path}: no column {', '.join(missing)}, found {', '.join(header)}; restore the file")
    for number, row in enumerate(rows, start=1):
        if len(row) != len(header):
            raise RunError(f"{path}, row {number}: {len(row)} cells under {len(header)} columns; restore the file")
    text = pd.DataFrame(rows, columns=header, dtype=str)
    for name in numbers:
        bad = text.loc[pd.to_numeric(text[name], errors="coerce").isna(), name]
        if len(bad):
            raise RunError(f"{path}, row {bad.index[0] + 1}: {name} is {bad.iloc[0]!r}, not a number; restore the file")
    return text if as_text else pd.read_csv(path, index_col=False)
