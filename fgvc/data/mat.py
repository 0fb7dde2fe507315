"""Reading MATLAB files: struct arrays and cell arrays as plain lists."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fgvc.data.mat_file import Array, variables
from fgvc.errors import DatasetError
from fgvc.io import growth_limit

Value = TypeVar("Value", int, str)


def read_mat(path: Path, *names: str) -> Mapping[str, Array]:
    """The variables of these names in a MATLAB file (version 5 to 7.2).

    Raises:
        DatasetError: missing, damaged, of another version, a decompression bomb, or a variable is not in it.
    """
    if not path.is_file():
        raise DatasetError(f"{path}: missing; unpack the archive again")
    try:
        readers = dict(variables(path.read_bytes(), growth_limit(path)))
        content = {name: readers[name]() for name in names if name in readers}
    except NotImplementedError as error:
        raise DatasetError(f"{path}: a MATLAB 7.3 (HDF5) file; take the official one, or save it with -v7") from error
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path}: not a readable MATLAB file ({error}); unpack the archive again") from error
    missing = [name for name in names if name not in content]
    if missing:
        found = ", ".join(readers) or "nothing"
        raise DatasetError(f"{path}: no variable {missing[0]!r} in it, found {found}; unpack the archive again")
    return content


def field(path: Path, array: Array, name: str) -> Array:
    """One field of every element of a struct array.

    Raises:
        DatasetError: not a struct array with this field.
    """
    if name not in (array.dtype.names or ()):
        found = ", ".join(array.dtype.names or ()) or "no fields"
        raise DatasetError(f"{path}: structs without the field {name!r}, found {found}; is it the official file?")
    column: Array = array[name]
    return column


def texts(path: Path, array: Array) -> list[str]:
    """The text in each cell of a cell array.

    Raises:
        DatasetError: a cell that is not one line of text.
    """
    return [_only(path, cell, str) for cell in array.ravel()]


def integers(path: Path, array: Array) -> list[int]:
    """The whole number in each cell of a cell array, or each element of a matrix.

    Raises:
        DatasetError: a cell that is not one whole number.
    """
    return [_only(path, cell, int) for cell in array.ravel()]


def _only(path: Path, cell: Any, kind: type[Value]) -> Value:
    value = np.asarray(cell)
    found = value.item() if value.size == 1 else None
    if isinstance(found, float) and found.is_integer():  # MATLAB's numbers are doubles unless told otherwise
        found = int(found)
    if not isinstance(found, kind):
        expected = "a line of text" if kind is str else "a whole number"
        raise DatasetError(f"{path}: expected {expected}, found {cell!r}; is it the official file?")
    return found
