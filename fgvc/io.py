"""Files: written whole or not at all, locked between processes, read without trust, and known by their checksums.

A file that comes from a stranger executes nothing here, and takes memory and time in proportion to its size. A reader
raises OSError where a file cannot be opened, and ValueError with the reason where its content is wrong; the caller adds
the file's name and the fix.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import pickle
import re
import shutil
import uuid
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from filelock import FileLock, Timeout
from tqdm import tqdm


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; rename it to `path` on success, delete it on any failure.

    The folder is created where missing. The content is flushed to the disk before the rename, so that after a crash
    `path` holds either the old content or the new one.

    Raises:
        OSError: as the writing code or the rename raises it; where the disk is full also in place of what a library
            made of that, with `path`. Nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # the suffix stays last: some writers choose their format by it or append a missing one
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.tmp{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        with contextlib.suppress(OSError):  # Windows opens no folders, some file systems flush none
            descriptor = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(descriptor)  # brings the name to the disk
            finally:
                os.close(descriptor)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.truncate(temporary, 0)  # a writer in the traceback still has it open, which would keep its room
        temporary.unlink(missing_ok=True)
        if _says_disk_full(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise


def _says_disk_full(error: BaseException) -> bool:
    """Whether a full disk is behind an exception; libraries hide it: torch in the context, safetensors in the text."""
    chain: BaseException | None = error
    while chain is not None:
        if getattr(chain, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "(os error 28)" in str(chain):
            return True
        chain = chain.__cause__ or chain.__context__
    return False


@contextlib.contextmanager
def atomic_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a new temporary folder beside `path`; rename it to `path` on success, delete it on any failure.

    The folder above is created where missing. `path` must be absent or an empty folder, unless `replace` allows another
    one, which is deleted only when the new one has taken its place.

    Raises:
        FileExistsError: `path` is in the way, or cannot be replaced; it is what it was.
        OSError: as the writing code raises it.
    """
    temporary, old = (path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.{kind}") for kind in ("tmp", "old"))
    temporary.mkdir(parents=True)
    try:
        yield temporary
        try:
            if replace and path.exists():
                path.rename(old)
            elif path.exists():
                path.rmdir()  # a rename replaces an empty folder on some systems only
            temporary.rename(path)
        except BaseException as error:
            if old.exists():
                old.rename(path)
            if isinstance(error, OSError):
                reason = f"cannot be made or replaced ({error.strerror})"
                raise FileExistsError(error.errno, reason, str(path)) from error
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def locked(path: Path, *, on_wait: Callable[[], object] | None = None) -> Iterator[bool | None]:
    """Hold the lock file `path` while the block runs.

    Yields True; False where another call holds it. With `on_wait` it calls that and waits in place of False. None where
    the file system has no locks: nobody can know who else is there.

    The lock ends with the process, however that ends, even where a process that it has forked lives on; the empty file
    of a killed one is in nobody's way.
    """
    lock = FileLock(path, fallback_to_soft=False)
    free: bool | None = True
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if on_wait is None:
                free = False
            else:
                on_wait()
                lock.acquire()
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
            raise
        free = None
    try:
        yield free
    finally:
        if free:
            with contextlib.suppress(OSError):  # Windows deletes it with the release
                path.unlink()  # before the release: who waits for it notices, and makes another
            lock.release()


def write_text_atomic(path: Path, text: str) -> None:
    """Write `text` as UTF-8 to `path`, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json_atomic(path: Path, value: Any) -> None:
    """Write `value` as indented JSON to `path`, whole or not at all. NaN and infinity are refused (ValueError)."""
    write_text_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


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


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an .npz archive, whole or not at all."""
    with atomic_path(path) as temporary:
        np.savez(temporary, **arrays)  # type: ignore[arg-type]  # numpy's stub takes the names for options


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


_CHUNK = 1 << 20  # bytes
_SHOW_ABOVE = 1 << 28  # bytes; smaller files take less than a second


def checksum_problem(path: Path, checksums: Mapping[str, str]) -> str | None:
    """How the file's checksums differ from the expected ones ("md5 is ..., expected ..."); None where they agree."""
    found = file_digests(path, checksums)
    pairs = [(name, found[name], expected) for name, expected in checksums.items() if found[name] != expected]
    return "; ".join(f"{name} is {actual}, expected {expected}" for name, actual, expected in pairs) or None


def file_digests(path: Path, algorithms: Collection[str]) -> dict[str, str]:
    """Hexadecimal digests of a file's content by algorithm, read once; nothing is read where none is asked for."""
    digests = {name: hashlib.new(name, usedforsecurity=False) for name in algorithms}
    if not digests:
        return {}
    size = path.stat().st_size
    with path.open("rb") as file, byte_bar(f"checking {path.name}", size, hide=size < _SHOW_ABOVE) as bar:
        while chunk := file.read(_CHUNK):
            for digest in digests.values():
                digest.update(chunk)
            bar.update(len(chunk))
    return {name: digest.hexdigest() for name, digest in digests.items()}


def byte_bar(name: str, total: int | None, initial: int = 0, hide: bool = False) -> "tqdm[Any]":
    """A progress bar that counts bytes, shown on a terminal only."""
    # disable=None: no bar where stderr is not a terminal
    return tqdm(total=total, initial=initial, desc=name, unit="B", unit_scale=True, disable=hide or None)
