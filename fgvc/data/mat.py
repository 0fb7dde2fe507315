"""Reading MATLAB files of level 5, as far as datasets need it: numbers, text, cell arrays and struct arrays.

scipy's reader is faster, but some damaged or deeply nested files end the process. A file from the network must not do
that. Format: "MAT-File Format", The MathWorks. An element is a tag (type, size) and its data, padded to 8
bytes; a matrix is an element that holds elements: flags, dimensions, name, then what depends on its class.
"""

import math
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from fgvc.errors import DatasetError
from fgvc.io import growth_limit

Array = NDArray[Any]

_HEADER = 128  # bytes of a file before its first element
_MATRIX, _COMPRESSED = 14, 15  # types of elements
_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_DTYPES = {order: {kind: np.dtype(order + code) for kind, code in _NUMBERS.items()} for order in "<>"}
_TAGS = {order: struct.Struct(f"{order}II") for order in "<>"}
_CODECS = {1: "latin-1", 2: "latin-1", 4: "utf-16", 16: "utf-8", 17: "utf-16", 18: "utf-32"}
_CELL, _STRUCT, _CHAR, _FIRST_NUMERIC, _LAST_NUMERIC = 1, 2, 4, 6, 15  # classes of matrices
_COMPLEX = 0x0800
_MAX_DEPTH = 16

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
    if isinstance(found, float) and found.is_integer():  # MATLAB's numbers are doubles by default
        found = int(found)
    if not isinstance(found, kind):
        expected = "a line of text" if kind is str else "a whole number"
        raise DatasetError(f"{path}: expected {expected}, found {cell!r}; is it the official file?")
    return found


@dataclass(slots=True)
class _Elements:
    """The elements in a stretch of bytes, taken one after the other.

    Attributes:
        content: The bytes.
        order: Byte order of numbers, "<" or ">".
        place: Index of the first byte of the next element.
    """

    content: memoryview
    order: str
    place: int = 0

    @property
    def left(self) -> int:
        return len(self.content) - self.place

    def take(self) -> tuple[int, memoryview]:
        """Type and data of the next element."""
        if self.left < 8:
            raise ValueError("ends within an element")
        kind, size = _TAGS[self.order].unpack_from(self.content, self.place)
        start = self.place + 8
        if kind >> 16:  # a small element has its size in the upper half and its data in the tag
            kind, size, start = kind & 0xFFFF, kind >> 16, self.place + 4
            if size > 4:
                raise ValueError(f"a small element of {size} bytes")
        if start + size > len(self.content):
            raise ValueError("ends within an element")
        padding = 0 if kind == _COMPRESSED else -(start + size - self.place) % 8
        self.place = start + size + padding
        return kind, self.content[start : start + size]

    def numbers(self) -> Array:
        """The next element, of numbers, (n,)."""
        kind, data = self.take()
        dtype = _DTYPES[self.order].get(kind)
        if dtype is None:
            raise ValueError(f"an element of type {kind} in place of numbers")
        return np.frombuffer(data, dtype)

    def within(self, content: memoryview) -> "_Elements":
        return _Elements(content, self.order)


def variables(content: bytes, limit: int) -> Iterator[tuple[str, Callable[[], Array]]]:
    """The variables of a file, each with a function that reads its value.

    A value is (n,), in MATLAB's order (column by column): numbers, lines of text, cells as objects, or a struct array
    whose fields are objects.

    Args:
        content: content of the file.
        limit: largest number of bytes of the unpacked content.

    Raises:
        NotImplementedError: the file is of version 7.3, which is another format.
        ValueError: not a MATLAB file of level 5, damaged, or more than `limit`; also raised while a value is read.
    """
    if len(content) < _HEADER or content[126:128] not in (b"IM", b"MI"):
        raise ValueError("no MATLAB file of version 5 to 7.2")
    order = "<" if content[126:128] == b"IM" else ">"
    (version,) = struct.unpack_from(f"{order}H", content, 124)
    if version >> 8 != 1:
        raise NotImplementedError(f"version {version:#06x}")
    elements = _Elements(memoryview(content), order, _HEADER)
    while elements.left > 0:
        kind, data = elements.take()
        if kind == _COMPRESSED:
            data = _unpacked(data, limit)
            limit -= len(data)
            kind, data = elements.within(data).take()
        if kind == _MATRIX and len(data):
            matrix = _Matrix(elements.within(data), 0)
            yield matrix.name, matrix.value


def _unpacked(data: memoryview, limit: int) -> memoryview:
    try:
        found = zlib.decompressobj().decompress(data, limit + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if len(found) > limit:
        raise ValueError("unpacks to many times its size")
    return memoryview(found)


class _Matrix:
    """One matrix: flags, size and name are read immediately, the value on request."""

    def __init__(self, elements: _Elements, depth: int) -> None:
        if depth > _MAX_DEPTH:
            raise ValueError(f"cells or structs nested deeper than {_MAX_DEPTH}")
        self._elements, self._depth = elements, depth
        flags = elements.numbers().tolist()
        if len(flags) != 2 or not isinstance(flags[0], int):
            raise ValueError("a matrix without flags")
        self._kind, self._complex = flags[0] & 0xFF, bool(flags[0] & _COMPLEX)
        self._shape = elements.numbers().tolist()
        if len(self._shape) < 2 or not all(isinstance(side, int) and side >= 0 for side in self._shape):
            raise ValueError(f"a matrix of shape {self._shape}")
        self._count = math.prod(self._shape)
        self.name = bytes(elements.take()[1]).decode("latin-1")

    def value(self) -> Array:
        if self._kind == _CELL:
            return _objects(self._matrices(1))
        if self._kind == _STRUCT:
            return self._structs()
        if self._kind == _CHAR:
            return self._lines()
        if _FIRST_NUMERIC <= self._kind <= _LAST_NUMERIC and not self._complex:
            values = self._elements.numbers()
            if len(values) != self._count:
                raise ValueError(f"{len(values)} numbers in a matrix of shape {self._shape}")
            return values
        raise ValueError(f"a matrix of class {self._kind}{', complex' if self._complex else ''}")

    def _matrices(self, each: int) -> list[Array]:
        """`each` matrices for each element of this one."""
        if 8 * self._count * each > self._elements.left:  # a tag takes 8 bytes
            raise ValueError(f"ends within a matrix of shape {self._shape}")
        found = []
        for _ in range(self._count * each):
            kind, data = self._elements.take()
            if kind != _MATRIX:
                raise ValueError(f"an element of type {kind} in place of a matrix")
            nothing: Array = np.empty(0)
            found.append(_Matrix(self._elements.within(data), self._depth + 1).value() if len(data) else nothing)
        return found

    def _structs(self) -> Array:
        width = self._elements.numbers()
        _, data = self._elements.take()
        if len(width) != 1 or width.dtype.kind != "i" or width[0] < 1:
            raise ValueError("a struct whose field names have no length")
        cells = np.frombuffer(bytes(data), f"S{min(width[0], max(len(data), 1))}")
        names = [name.decode("latin-1") for name in cells.tolist()]
        if not names or "" in names or len(set(names)) < len(names):
            raise ValueError(f"a struct with the fields {names}")
        values = self._matrices(len(names))
        found = np.empty(self._count, dtype=[(name, object) for name in names])
        for place, name in enumerate(names):
            found[name] = _objects(values[place :: len(names)])
        return found

    def _lines(self) -> Array:
        kind, data = self._elements.take()
        if kind not in _CODECS:
            raise ValueError(f"an element of type {kind} in place of text")
        ending = {"<": "-le", ">": "-be"}[self._elements.order] if kind in (4, 17, 18) else ""
        text = bytes(data).decode(_CODECS[kind] + ending)
        if len(text) != self._count:
            raise ValueError(f"{len(text)} characters in a matrix of shape {self._shape}")
        rows = self._shape[0]
        return np.array([text[row::rows] for row in range(rows)], dtype=str) if text else np.array([], dtype=str)


def _objects(values: list[Array]) -> Array:
    found = np.empty(len(values), dtype=object)
    for place, value in enumerate(values):  # one by one: NumPy would turn arrays of equal shape into one matrix
        found[place] = value
    return found
