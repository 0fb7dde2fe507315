"""Reading files that may come from strangers: nothing in them is executed, and memory and time stay in proportion.

Each function raises OSError where a file cannot be opened, and ValueError with the reason for everything that is wrong
with its content; the caller names the file and the fix in an error of its own.
"""

import json
import math
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml

_MAX_YAML = 1 << 18  # bytes; cards and configurations are a hundredth of it
_MAX_YAML_DEPTH = 32
_MAX_NUMBER = 1000  # characters; Python refuses decimal ones of more than 4300, and no other base
# what an archive of ours holds is stored as it is, or hardly shrinks
MAX_GROWTH, ALLOWANCE = 20, 1 << 26
"""A file that unpacks to more than MAX_GROWTH times its size and ALLOWANCE bytes is a decompression bomb."""


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        OSError: the file cannot be opened.
        ValueError: not UTF-8, not JSON, or nested deeper than Python reads.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        OSError, ValueError: as `read_json`; also ValueError where the file holds something else.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"it holds {type(value).__name__}, not an object")
    return value


def read_plain_yaml(path: Path) -> str:
    """The text of a YAML file, if what it stands for is no larger than itself; for any YAML library to load.

    Aliases and interpolations let a few lines stand for more than the memory holds, tags call constructors. Neither
    cards nor the configuration of a run need them.

    Raises:
        OSError: the file cannot be opened.
        ValueError: not UTF-8 or not YAML; too long, too deeply nested, or with an alias, a tag, an interpolation or a
            number without measure.
    """
    with path.open("rb") as file:
        content = file.read(_MAX_YAML + 1)
    if len(content) > _MAX_YAML:
        raise ValueError(f"longer than {_MAX_YAML} bytes")
    text = content.decode("utf-8")
    depth = 0
    try:
        # events come while the text is read, so that the reading ends at the first that is refused
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
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
        return f"the alias *{event.anchor}, which is refused; write out what it stands for"
    tag = getattr(event, "tag", None)
    if tag is not None:
        return f"the tag {tag!r}, which is refused; leave it out"
    if isinstance(event, yaml.ScalarEvent):
        if "${" in event.value:
            return f"the interpolation {event.value[:40]!r}, which is refused; write out its value"
        if len(event.value) > _MAX_NUMBER and re.match(r"[-+]?\d", event.value):
            return f"a number of {len(event.value)} characters"
    return None


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Arrays of an .npz archive by name.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is no such archive, is cut off or otherwise damaged, grows without measure, or holds objects.
    """
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):  # NumPy would take it for a pickle, and advise to load it as one
            raise ValueError("no .npz archive, or cut off")
        file.seek(0)
        try:
            refuse_growth(path)
            _refuse_empty_promises(path)
            with np.load(file, allow_pickle=False) as archive:
                return {name: np.asarray(archive[name]) for name in archive.files}
        except OSError:
            raise
        except Exception as error:  # zipfile, its decompressors and NumPy's header raise many types on damaged files
            raise ValueError(str(error) or type(error).__name__) from error


def _refuse_empty_promises(path: Path) -> None:
    """Raise ValueError for an array whose header announces more than follows: NumPy allocates all of it first."""
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            with archive.open(member) as file:
                version = np.lib.format.read_magic(file)
                if version not in ((1, 0), (2, 0)):
                    raise ValueError(f"{member.filename}: version {version} of the format")
                read = np.lib.format.read_array_header_1_0 if version[0] == 1 else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(file)
                # objects are a pickle, whose size the header does not tell; they are refused unread
                if not dtype.hasobject and math.prod(shape) * dtype.itemsize > member.file_size:
                    raise ValueError(f"{member.filename}: cut off, announces {dtype} of shape {shape}")


def refuse_growth(path: Path) -> None:
    """Refuse a zip that is a decompression bomb, before anything in it is unpacked.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is one, or no readable zip.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
    except OSError:
        raise
    except Exception as error:  # on a damaged list of members zipfile raises many types
        raise ValueError(str(error) or type(error).__name__) from error
    if size > growth_limit(path):
        raise ValueError(f"unpacks to {size} bytes, more than {MAX_GROWTH} times its size")


def load_pytorch(path: Path) -> Any:
    """What is in a file that torch.save wrote, on the CPU; code in it is refused, not executed.

    Raises:
        OSError: the file cannot be opened.
        pickle.UnpicklingError: it holds more than tensors and plain values, or asks for a bytearray, which torch allows
            and a few bytes make of any size.
        ValueError: it is a decompression bomb.
        Exception: of other types, where it is damaged.
    """
    if zipfile.is_zipfile(path):
        refuse_growth(path)
        with zipfile.ZipFile(path) as archive:
            programs = [archive.read(name) for name in archive.namelist() if name.endswith(".pkl")]
    else:
        programs = [path.read_bytes()]
    if any(b"\nbytearray\n" in program for program in programs):
        raise pickle.UnpicklingError("GLOBAL builtins.bytearray")
    import torch  # here, as tables are read and made without it

    return torch.load(path, map_location="cpu", weights_only=True)


def growth_limit(path: Path) -> int:
    """Bytes that the content of a file may take once it is unpacked."""
    return MAX_GROWTH * path.stat().st_size + ALLOWANCE
