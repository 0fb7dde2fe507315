"""Tables as CSV that no spreadsheet takes for a program, and back without a loss.

A spreadsheet runs a cell that begins with "=", "+", "-" or "@" as a formula, which may start programs and send what
stands in other cells. Names of classes, files and runs come from data sets, so such text gets an apostrophe in front,
as OWASP advises ("CSV Injection"); columns of numbers have none. So does a name that begins with apostrophes and goes
on like that, and the reader takes one away from both: nothing is lost.
"""

import csv
import re
from collections.abc import Hashable

import pandas as pd

# also in the full width of East Asian scripts; what may stand before it, a spreadsheet drops or splits at
_FORMULA = re.compile(r"(?=\s*[=+\-@\uff1d\uff0b\uff0d\uff20]|[\t\r\n])")


def to_csv(table: pd.DataFrame, float_format: str | None = "%.6g", *, index: bool = False) -> str:
    """A frame as CSV, with text disarmed; `fgvc.analysis.read_csv` reads the text as it was."""
    safe = table.rename(columns=_disarmed)
    if index:
        safe = safe.rename(index=_disarmed)
    for place, kind in enumerate(safe.dtypes):
        if not pd.api.types.is_numeric_dtype(kind):
            safe.isetitem(place, safe.iloc[:, place].map(_disarmed))
    text: str = safe.to_csv(index=index, float_format=float_format)
    if "\r" in text:  # which is quoted as a line feed is since Python 3.13 only, and would end the row
        text = safe.to_csv(index=index, float_format=float_format, quoting=csv.QUOTE_NONNUMERIC)
    return text


def armed(cell: str) -> str:
    """The text that `to_csv` wrote as `cell`."""
    bare = cell.lstrip("'")
    return cell[1:] if bare != cell and _is_formula(bare) else cell


def _disarmed(value: Hashable) -> Hashable:
    return f"'{value}" if isinstance(value, str) and _is_formula(value.lstrip("'")) else value


def _is_formula(text: str) -> bool:
    return _FORMULA.match(text) is not None
