"""Reading MATLAB files: struct arrays and cell arrays as plain lists."""

import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.io import loadmat

from fgvc.errors import DatasetError
from fgvc.reading import growth_limit

Array = NDArray[Any]
Value = TypeVar("Value", int, str)

_HEADER = 128  # bytes of a file before its first variable
_MATRIX, _COMPRESSED = 14, 15  # types of elements
_CONTAINERS = (1, 2, 3, 16, 17)  # classes of matrices that hold others: cells, structs, objects, functions, opaque ones
_MAX_CONTAINERS = 200  # the official files have less than ten; scipy's reader calls itself for each within another


def read_mat(path: Path, *names: str) -> Mapping[str, Array]:
    """The variables of a MATLAB file (up to version 7.2).

    Raises:
        DatasetError: missing, damaged, of version 7.3, a decompression bomb, or a variable is not in it.
    """
    if not path.is_file():
        raise DatasetError(f"{path}: missing; unpack the archive again")
    try:
        _refuse_bomb(path)
        content: dict[str, Array] = loadmat(path)
    except NotImplementedError as error:
        raise DatasetError(f"{path}: a MATLAB 7.3 (HDF5) file; take the official one, or save it with -v7") from error
    except Exception as error:  # scipy's reader raises many types on damaged files
        raise DatasetError(f"{path}: not a readable MATLAB file ({error}); unpack the archive again") from error
    missing = [name for name in names if name not in content]
    if missing:
        found = ", ".join(name for name in content if not name.startswith("__")) or "nothing"
        raise DatasetError(f"{path}: no variable {missing[0]!r} in it, found {found}; unpack the archive again")
    for name in names:
        if not isinstance(content[name], np.ndarray):
            raise DatasetError(f"{path}: {name!r} is a {type(content[name]).__name__}; is it the official file?")
    return content


def _refuse_bomb(path: Path) -> None:
    """Refuse what scipy's reader would not survive: it unpacks without measure, and its depth ends the process.

    Raises:
        ValueError: the file is a decompression bomb, or may be nested too deeply.
    """
    content, left = path.read_bytes(), growth_limit(path)
    order = "<u4" if content[_HEADER - 2 : _HEADER] == b"IM" else ">u4"
    containers = sum(_count_containers(content[start:], order) for start in range(8))  # elements may begin anywhere
    for packed in _compressed(content, order):
        unpacked = zlib.decompressobj().decompress(packed, left + 1)
        left -= len(unpacked)
        if left < 0:
            raise ValueError("unpacks to many times its size")
        containers += _count_containers(unpacked, order)
    if containers > _MAX_CONTAINERS:
        raise ValueError(f"{containers} structs or cell arrays, which may lie in each other")


def _compressed(content: bytes, order: str) -> Iterator[bytes]:
    """The compressed variables of a file."""
    place = _HEADER
    while place + 8 <= len(content):
        kind, size = np.frombuffer(content, order, 2, place).tolist()
        if kind == _COMPRESSED:
            yield content[place + 8 : place + 8 + size]
        place += 8 + size


def _count_containers(content: bytes, order: str) -> int:
    """Matrices in a row of elements that hold others, at most: data may look like one."""
    words = np.frombuffer(content, order, len(content) // 8 * 2).reshape(-1, 2)  # elements are a multiple of 8 bytes
    # a tag, a tag that is not looked at, the matrix's flags with its class in the lowest byte
    return int(((words[:-2, 0] == _MATRIX) & np.isin(words[2:, 0] & 0xFF, _CONTAINERS)).sum())


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
