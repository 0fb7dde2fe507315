"""Reading MATLAB files, as far as datasets need it: numbers, text, cell arrays and struct arrays.

SciPy reads them in a process of its own, as some damaged files end it or take all memory. What it found comes back as
JSON. In each value, the order is MATLAB's (column by column).
"""

import functools
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, TypeVar

from fgvc.errors import DatasetError
from fgvc.foreign import growth_limit, open_foreign

_SECONDS = 60
_CHILD = Path(__file__).with_name("mat_child.py")

Value = TypeVar("Value", int, str)


def read_mat(path: Path, *names: str) -> Mapping[str, Any]:
    """The variables of these names in a MATLAB file (up to version 7.2).

    A matrix of numbers is a list of them, a cell array a list of values, text a list of its lines, and a struct array a
    list of values for each field.

    Raises DatasetError: missing, damaged, of another version, a decompression bomb, or a variable is not in it.
    """
    if not path.exists():
        raise DatasetError(f"{path}: missing; unpack the archive again")
    try:
        state = path.stat()
        answer = _read(path, names, (state.st_ino, state.st_size, state.st_mtime_ns))
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        answer = {"error": str(error), "type": type(error).__name__}
    if answer.get("type") == "NotImplementedError":
        raise DatasetError(f"{path}: a MATLAB 7.3 (HDF5) file; take the official one, or save it with -v7")
    if "error" in answer:
        reason = "unpacks to many times its size" if answer["type"] == "MemoryError" else answer["error"]
        raise DatasetError(f"{path}: not a readable MATLAB file ({reason}); unpack the archive again")
    content: dict[str, Any] = answer["variables"]
    missing = [name for name in names if name not in content]
    if missing:
        found = ", ".join(answer["known"]) or "nothing"
        raise DatasetError(f"{path}: no variable {missing[0]!r} in it, found {found}; unpack the archive again")
    return content


@functools.lru_cache(maxsize=4)  # both splits of a dataset are read from the same files
def _read(path: Path, names: tuple[str, ...], _state: tuple[int, ...]) -> dict[str, Any]:
    """The answer of the child. Raises ValueError where it ends without one."""
    with open_foreign(path) as file:
        status, output = _run_child(file, [str(growth_limit(path.stat().st_size)), *names])
    if status != 0:
        raise ValueError(f"the reader ended with status {status}")
    answer: dict[str, Any] = json.loads(output)
    return answer


def _run_child(file: IO[bytes], arguments: list[str]) -> tuple[int, bytes]:
    """Exit status and output of mat_child.py."""
    command = [sys.executable, str(_CHILD), *arguments]
    done = subprocess.run(command, stdin=file, capture_output=True, timeout=_SECONDS, check=False)
    return done.returncode, done.stdout


def field(path: Path, structs: Any, name: str) -> list[Any]:
    """One field of every element of a struct array. Raises DatasetError: not a struct array with this field."""
    fields = structs if isinstance(structs, dict) else {}
    if name not in fields:
        found = ", ".join(fields) or "no fields"
        raise DatasetError(f"{path}: structs without the field {name!r}, found {found}; is it the official file?")
    column: list[Any] = fields[name]
    return column


def texts(path: Path, cells: Any) -> list[str]:
    """The text in each cell of a cell array. Raises DatasetError: a cell that is not one line of text."""
    return [_only(path, cell, str) for cell in (cells if isinstance(cells, list) else [cells])]


def integers(path: Path, cells: Any) -> list[int]:
    """The whole number in each cell of a cell array, or each element of a matrix.

    Raises DatasetError: a cell that is not one whole number.
    """
    return [_only(path, cell, int) for cell in (cells if isinstance(cells, list) else [cells])]


def _only(path: Path, cell: Any, kind: type[Value]) -> Value:
    found = cell[0] if isinstance(cell, list) and len(cell) == 1 else cell
    if isinstance(found, float) and found.is_integer():  # MATLAB's numbers are doubles by default
        found = int(found)
    if not isinstance(found, kind):
        expected = "a line of text" if kind is str else "a whole number"
        raise DatasetError(f"{path}: expected {expected}, found {cell!r}; is it the official file?")
    return found
