"""Reading of files that may come from anyone: images, JSON, YAML, arrays and states of torch.

No code in a file is executed, and reading takes memory and time in proportion to its size. Only regular files are
opened, see `open_regular`. A reader raises OSError if a file cannot be opened, and ValueError with the reason if its
content is wrong. The caller adds the file's name and the fix.
"""

import contextlib
import json
import math
import os
import pickle
import re
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
import yaml


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is a pipe, a device or a socket: reading those may wait, or never end.
    """
    wait_for_nobody = getattr(os, "O_NONBLOCK", 0)  # of a pipe, opening alone would wait for a writer
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | wait_for_nobody))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ValueError("not a regular file, but a pipe, a device or a socket")
    return file


_BOM = b"\xef\xbb\xbf"
_STAND_INS = {
    b"version https://git-lfs": "a Git LFS pointer in place of the file; get the file by: git lfs pull",
    b"<!doctype html": "a web page in place of the file (an error or a login page?); get the file itself",
    b"<html": "a web page in place of the file (an error or a login page?); get the file itself",
}


def stand_in(head: bytes) -> str | None:
    """Return what took the place of a file that begins with these bytes, and the fix; None if it may be the file."""
    text = head.removeprefix(_BOM).lstrip().lower()
    return next((meaning for start, meaning in _STAND_INS.items() if text.startswith(start)), None)


def open_foreign(path: Path, limit: int | None = None) -> BinaryIO:
    """Open a file whose content may be anything.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is no regular file, has more than `limit` bytes, or something else took its place (`stand_in`).
    """
    file = open_regular(path)
    try:
        size = os.fstat(file.fileno()).st_size
        if limit is not None and size > limit:
            raise ValueError(f"longer than {limit} bytes ({size})")
        head = os.read(file.fileno(), 64)
        os.lseek(file.fileno(), 0, os.SEEK_SET)
        if head and not size:
            raise ValueError("not a regular file, but one of the system, which may have no end")
        if problem := stand_in(head):
            raise ValueError(problem)
    except BaseException:
        file.close()
        raise
    return file


def read_foreign_text(path: Path, limit: int) -> str:
    """Return the text of a file without a byte order mark. Raises as `open_foreign`, ValueError if it is not UTF-8."""
    with open_foreign(path, limit) as file:
        return file.read().removeprefix(_BOM).decode("utf-8")


_MAX_JSON = 1 << 25  # bytes; summaries of ImageNet have a tenth of it
_MAX_YAML = 1 << 16  # bytes; cards and configurations have a tenth of it, and reading takes seconds a megabyte
_MAX_YAML_DEPTH = 32
YAML_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""PyYAML's safe loader: in C, ten times as fast, where PyYAML has been built with it."""
_MAX_NUMBER = 1000  # characters; Python limits only decimal numbers, to 4300
# fgvc's own archives are not compressed, or hardly shrink
MAX_GROWTH, ALLOWANCE = 20, 1 << 26
"""A file that unpacks to more than MAX_GROWTH times its size and ALLOWANCE bytes is a decompression bomb."""


def read_json(path: Path) -> Any:
    """Return the value in a JSON file.

    Raises ValueError: it is not UTF-8, not JSON, too long or nested too deeply; or it holds NaN, infinity or a lone
    surrogate.
    """
    try:
        value = json.loads(read_foreign_text(path, _MAX_JSON))
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
        return value
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises ValueError as `read_json`, and if the file holds something else."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"it holds {type(value).__name__}, not an object")
    return value


def read_plain_yaml(path: Path) -> str:
    """Return the text of a YAML file after checking that any YAML library can load it safely.

    Aliases and interpolations can expand a few lines to more than the memory holds. Tags call constructors.

    Raises ValueError: not UTF-8 or not YAML; too long, too deeply nested, or with an alias, a tag, an interpolation, a
    number that is too long or a lone surrogate.
    """
    text = read_foreign_text(path, _MAX_YAML)
    depth = 0
    try:
        # events come while the text is parsed, so parsing stops at the first refused event
        for event in yaml.parse(text, Loader=YAML_LOADER):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            problem = f"nested deeper than {_MAX_YAML_DEPTH}" if depth > _MAX_YAML_DEPTH else _problem(event)
            if problem is not None:
                place = f"line {event.start_mark.line + 1}: " if event.start_mark else ""
                raise ValueError(f"{place}{problem}")
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    return text


def _problem(event: yaml.Event) -> str | None:
    if isinstance(event, yaml.AliasEvent):
        return f"the alias *{event.anchor}, which is refused; write out its content"
    tag = getattr(event, "tag", None)
    if tag is not None:
        return f"the tag {tag!r}, which is refused; leave it out"
    if isinstance(event, yaml.ScalarEvent):
        if "${" in event.value:
            return f"the interpolation {event.value[:40]!r}, which is refused; write out its value"
        if len(event.value) > _MAX_NUMBER and re.match(r"[-+]?\d", event.value):
            return f"a number of {len(event.value)} characters"
        if re.search("[\ud800-\udfff]", event.value):
            return "a lone surrogate, which is no character"
    return None


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of an .npz archive by name.

    Raises ValueError: it is not such an archive, cut off, damaged, a decompression bomb, or holds objects.
    """
    with open_foreign(path) as file, _damage_as_value_error():
        if not zipfile.is_zipfile(file):  # NumPy would assume a pickle and advise to load it as one
            raise ValueError("not an .npz archive, or cut off")
        refuse_growth(file)
        _refuse_short_arrays(file)
        file.seek(0)
        with np.load(file, allow_pickle=False) as archive:
            return {name: np.asarray(archive[name]) for name in archive.files}


@contextlib.contextmanager
def _damage_as_value_error() -> Iterator[None]:
    """Raise the many types of zipfile, its decompressors and NumPy's header as ValueError."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise ValueError(str(error) or type(error).__name__) from error


def _refuse_short_arrays(file: IO[bytes]) -> None:
    """Raise ValueError for an array shorter than its header says, since NumPy first allocates the announced size."""
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            with archive.open(member) as content:
                version = np.lib.format.read_magic(content)
                if version not in ((1, 0), (2, 0)):
                    raise ValueError(f"{member.filename}: version {version} of the format")
                read = np.lib.format.read_array_header_1_0 if version[0] == 1 else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(content)
                # objects are a pickle of unknown size; np.load refuses them without reading
                if not dtype.hasobject and math.prod(shape) * dtype.itemsize > member.file_size:
                    raise ValueError(f"{member.filename}: cut off, announces {dtype} of shape {shape}")


def refuse_growth(file: IO[bytes]) -> None:
    """Refuse a zip that is a decompression bomb, before unpacking anything.

    Raises ValueError: it is a decompression bomb, or not a readable zip.
    """
    with _damage_as_value_error(), zipfile.ZipFile(file) as archive:
        size = sum(member.file_size for member in archive.infolist())
    if size > growth_limit(os.fstat(file.fileno()).st_size):
        raise ValueError(f"unpacks to {size} bytes, more than {MAX_GROWTH} times its size")


def load_pytorch(path: Path) -> Any:
    """Load a file written by torch.save, on the CPU; code in it is refused, not executed.

    Raises:
        pickle.UnpicklingError: it holds more than tensors and plain values, or asks for a bytearray. Torch allows that,
            but a few bytes can request one of any size.
        ValueError: it is a decompression bomb, or two of its members have one name.
        Exception: other types, if the file is damaged.
    """
    with open_foreign(path) as file:
        if file.read(4) == b"PK\3\4":  # as torch decides
            refuse_growth(file)
            with zipfile.ZipFile(file) as archive:
                names = archive.namelist()
                if len({name.lower() for name in names}) < len(names):  # torch and Python may take different ones
                    raise ValueError("two members have one name")
                programs = [archive.read(name) for name in names if name.lower().endswith(".pkl")]
        else:
            file.seek(0)
            programs = [file.read(os.fstat(file.fileno()).st_size)]
        if any(b"\nbytearray\n" in program for program in programs):
            raise pickle.UnpicklingError("GLOBAL builtins.bytearray")
        import torch  # here, since tables do not need it

        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)


def growth_limit(size: int) -> int:
    """Return the largest allowed size of what a file of `size` bytes unpacks to, in bytes."""
    return MAX_GROWTH * size + ALLOWANCE
