"""Files: atomic writing, results of commands, locks between processes, tables as CSV, and checksums.

Files that may come from anyone are read by `fgvc.foreign`.
"""

import contextlib
import csv
import errno
import hashlib
import io
import json
import os
import re
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from filelock import FileLock, Timeout
from tqdm import tqdm

from fgvc.errors import RunError, is_unicode
from fgvc.foreign import open_regular, read_foreign_text, read_json_object


def expanded(path: str | Path) -> Path:
    """Return a path with "~" and "~user" as the folder they name; as it is if there is no such user."""
    return Path(os.path.expanduser(path))  # noqa: PTH111  # pathlib's raises where there is none


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; rename it to `path` on success, delete it on any failure.

    A missing folder is created. The content is flushed to the disk before the rename, so that after a crash `path`
    holds either the old or the new content. The file has the mode that the umask gives, whatever the writer made it.

    Raises:
        OSError: as in the writing code or the rename. It names `path`, not the temporary file; for a full disk or a
            file beyond the system's limit it replaces the library's error. No temporary file remains.
        IsADirectoryError: `path` is a folder.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    # the suffix stays last, since some writers choose their format by it or append a missing one; a long name would
    # leave no room for the rest
    temporary = path.with_name(f".{path.stem[:_STEM]}.{uuid.uuid4().hex[:8]}.tmp{path.suffix}")
    try:
        yield temporary
        plain_mode(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        with contextlib.suppress(OSError):  # Windows opens no folders, some file systems flush none
            descriptor = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(descriptor)  # writes the name to the disk
            finally:
                os.close(descriptor)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.truncate(temporary, 0)  # frees its space, since a writer in the traceback still has it open
        temporary.unlink(missing_ok=True)
        number = _no_room(error)
        if number is None and isinstance(error, OSError) and str(error.filename) == str(temporary):
            number = error.errno
        if number is not None:
            raise OSError(number, os.strerror(number), str(path)) from error
        raise


_STEM = 41  # letters of a name in that of its temporary file: those of cached features


def remove_leftovers(folder: Path, path: Path | None = None) -> None:
    """Delete the temporary files of `atomic_path` that killed processes left, all or those of `path`; nothing else."""
    stem, suffix = (".+", ".*") if path is None else (re.escape(path.stem[:_STEM]), re.escape(path.suffix))
    for left in folder.glob(".*.tmp*"):
        if re.fullmatch(rf"\.{stem}\.[0-9a-f]{{8}}\.tmp{suffix}", left.name) and not left.is_dir():
            left.unlink(missing_ok=True)


def plain_mode(path: Path) -> None:
    """Give a file the mode that the umask gives a new one: what safetensors writes, its owner alone could read."""
    probe = path.with_name(f".mode.{uuid.uuid4().hex[:8]}.tmp")
    try:
        probe.touch()
        if (mode := probe.stat().st_mode) != path.stat().st_mode:
            path.chmod(mode)
    finally:
        probe.unlink(missing_ok=True)


def _no_room(error: BaseException) -> int | None:
    """Number of the system's error if it had no room for a file; torch hides it in the context, safetensors in text."""
    chain: BaseException | None = error
    while chain is not None:
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            if getattr(chain, "errno", None) == number or f"(os error {number})" in str(chain):
                return number
        chain = chain.__cause__ or chain.__context__
    return None


@contextlib.contextmanager
def replaced_folder(
    path: Path, check: Callable[[Path], None] | None = None, *, on_wait: Callable[[], object] | None = None
) -> Iterator[Path]:
    """Yield a new temporary folder next to `path`; rename it to `path` on success, delete it on any failure.

    A missing parent folder is created. What lies at `path` is first moved aside and checked there, so nothing can come
    between the check and the replacement. What a killed call has left is put back or deleted.

    Args:
        path: folder to write.
        check: function that raises if a path that exists must not be replaced; None: only an empty folder may be.
        on_wait: as in `locked`: wait for another process that is writing `path`.

    Raises:
        FileExistsError: another process is writing `path` and there is no `on_wait`, or something appeared there
            between two renames.
        Exception: as `check` and the writing code, for no room on the disk as `atomic_path`. What lies at `path` is
            unchanged.
    """
    path = Path(os.path.abspath(path))  # noqa: PTH100  # "." has no name, and a link stays one
    if not path.name:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))

    def require_empty(found: Path) -> None:
        if any(found.iterdir()):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))

    check = check or require_empty
    temporary, old = (path.with_name(f".{path.name}.fgvc-{kind}") for kind in ("tmp", "old"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_name(f".{path.name}.lock"), on_wait=on_wait) as free:
        if free is False:
            raise FileExistsError(errno.EEXIST, "another process is writing it", str(path))
        shutil.rmtree(temporary, ignore_errors=True)
        if os.path.lexists(old) and not os.path.lexists(path):
            old.rename(path)  # a call was killed between the renames
        for found in (path, old):
            if os.path.lexists(found):
                check(found)
        shutil.rmtree(old, ignore_errors=True)
        temporary.mkdir()
        try:
            try:
                yield temporary
            except Exception as error:
                if (number := _no_room(error)) is not None:
                    raise OSError(number, os.strerror(number), str(path)) from error
                raise
            if os.path.lexists(path):
                path.rename(old)
            try:
                if os.path.lexists(old):
                    check(old)
                temporary.rename(path)
            except BaseException as error:
                if os.path.lexists(old) and not os.path.lexists(path):
                    old.rename(path)
                if isinstance(error, OSError):
                    raise FileExistsError(error.errno, f"cannot be replaced ({error.strerror})", str(path)) from error
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
    of a killed one is in nobody's way. A file that holds something is no lock file.

    Raises:
        FileExistsError: `path` holds something; it is unchanged.
        OSError: the file cannot be made.
    """
    if path.is_file() and path.stat().st_size:
        reason = "is not empty, so it is no lock file, and one is needed here; move or delete it"
        raise FileExistsError(errno.EEXIST, reason, str(path))
    lock = FileLock(path, fallback_to_soft=False)
    free: bool | None = True
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            with contextlib.suppress(FileExistsError):  # where no file can be made, the lock would wait for ever
                os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644))
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


_MADE = ".fgvc-made.json"  # in a folder of results: {name: [kind, sha256, sha256 of the version before]}


@contextlib.contextmanager
def output_path(path: Path, kind: str = "") -> Iterator[Path]:
    """Do as `atomic_path`, for a result of a command: a file that was not made here before is never replaced.

    The folder keeps a list of what was made in it. A file that is not on the list, or has changed since, a link, and a
    folder are someone else's.

    Args:
        path: file to write.
        kind: what the file is, where the user chooses its name; another kind of result is not replaced.

    Raises:
        FileExistsError: `path` is someone else's; it is unchanged.
        RunError: its name is not Unicode.
        OSError: as `atomic_path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    record = path.parent / _MADE
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(record.with_suffix(".lock"), on_wait=lambda: None))
        except FileExistsError:
            raise
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error  # the user knows no lock
        require_own(path, kind)
        for own in (path, record):  # this call holds the lock
            remove_leftovers(path.parent, own)
        with atomic_path(path) as temporary:
            yield temporary
            require_own(path, kind)
            made = _read_made(path.parent)
            before = made.get(path.name, ["", ""])[1:2]
            # first, so that a killed command knows its file again
            digest = sha256(temporary)
            write_json_atomic(record, made | {path.name: [kind, digest, *before]})


def write_output(path: Path, text: str, kind: str = "") -> None:
    """Write a result of a command as UTF-8, see `output_path`."""
    with output_path(path, kind) as temporary:
        temporary.write_text(text, encoding="utf-8")


def default_output(within: Path, name: str) -> Path:
    """Return `name` in a folder that may be someone else's, for results of a command that was given no other place.

    Raises RunError: there is no such folder, or `name` leads out of it through a link, to a place that the user has not
    named.
    """
    if not within.is_dir():
        raise RunError(f"{within}: no such folder; correct its name")
    path = within / name
    if not path.resolve().is_relative_to(within.resolve()):
        raise RunError(f"{path}: a link out of {within}, which is not followed; name another place, or delete the link")
    return path


def kind_of(name: str, sources: Iterable[Path]) -> str:
    """Return the kind of a result that was made of some files or folders, see `output_path`."""
    places = "\n".join(os.path.realpath(source) for source in sources)  # a link may lead to itself
    return f"{name} of {hashlib.sha256(places.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"


def require_own(path: Path, kind: str = "") -> None:
    """Raise FileExistsError if something lies at `path` that `output_path` did not write there; RunError as it does."""
    if not is_unicode(path.name):
        raise RunError(f"{path}: the name is not Unicode (UTF-8); give another one")
    if path.name == _MADE:
        raise FileExistsError(errno.EEXIST, "is the record of the files that fgvc made; give another name", str(path))
    if not os.path.lexists(path):
        return
    own, *digests = _read_made(path.parent).get(path.name, [None])
    regular = path.is_file() and not path.is_symlink()
    if not regular or own != kind or sha256(path) not in digests:
        reason = "exists, and this version of the command did not make it, or it changed since; move or delete it"
        raise FileExistsError(errno.EEXIST, reason, str(path))


def _read_made(folder: Path) -> dict[str, list[str]]:
    try:
        made = read_json_object(folder / _MADE)
    except (OSError, ValueError):
        return {}
    return {name: entry for name, entry in made.items() if isinstance(entry, list) and len(entry) > 1}


def write_text_atomic(path: Path, text: str) -> None:
    """Write `text` as UTF-8, completely or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json_atomic(path: Path, value: Any) -> None:
    """Write `to_json`, completely or not at all."""
    write_text_atomic(path, to_json(value))


def to_json(value: Any) -> str:
    """Return indented JSON. Raises ValueError for NaN and infinity."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


_MAX_CSV = 1 << 26  # bytes; predictions of iNaturalist have half of it
MAX_COLUMNS = 1000
"""Most columns of a table of text."""
_MAX_CELLS = 1 << 21  # a cell takes a hundred bytes of memory, however short it is; iNaturalist has 700,000


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an .npz archive, completely or not at all."""
    with atomic_path(path) as temporary:
        np.savez(temporary, **arrays)  # type: ignore[arg-type]  # numpy's stub mistakes the names for options


_CHUNK = 1 << 20  # bytes
_SHOW_ABOVE = 1 << 28  # bytes; smaller files take less than a second


def checksum_problem(path: Path, checksums: Mapping[str, str]) -> str | None:
    """Return how the file's checksums differ ("md5 is ..., expected ..."); None if they are as expected."""
    found = file_digests(path, checksums)
    pairs = [(name, found[name], expected) for name, expected in checksums.items() if found[name] != expected]
    return "; ".join(f"{name} is {actual}, expected {expected}" for name, actual, expected in pairs) or None


def file_digests(path: Path, algorithms: Collection[str]) -> dict[str, str]:
    """Return hexadecimal digests of a file's content by algorithm; the file is read once, or not without algorithms."""
    digests = {name: hashlib.new(name, usedforsecurity=False) for name in algorithms}
    if not digests:
        return {}
    size = path.stat().st_size
    with open_regular(path) as file, byte_bar(f"checking {path.name}", size, hide=size < _SHOW_ABOVE) as bar:
        while chunk := file.read(_CHUNK):
            for digest in digests.values():
                digest.update(chunk)
            bar.update(len(chunk))
    return {name: digest.hexdigest() for name, digest in digests.items()}


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    return file_digests(path, ["sha256"])["sha256"]


def byte_bar(name: str, total: int | None, initial: int = 0, hide: bool = False) -> "tqdm[Any]":
    """Return a progress bar that counts bytes, shown only on a terminal."""
    # disable=None: no bar if stderr is not a terminal
    return tqdm(total=total, initial=initial, desc=name, unit="B", unit_scale=True, disable=hide or None)


def to_csv(table: pd.DataFrame, float_format: str | None = "%.6g", *, index: bool = False) -> str:
    """Return a frame as CSV."""
    text: str = table.to_csv(index=index, float_format=float_format)
    if "\r" in text:  # which is quoted as a line feed is since Python 3.13 only, and would end the row
        text = table.to_csv(index=index, float_format=float_format, quoting=csv.QUOTE_NONNUMERIC)
    return text


def write_tables(
    folder: Path, tables: Mapping[str, pd.DataFrame], float_format: str | None = "%.6g", **others: str | None
) -> list[Path]:
    """Write NAME.csv for each frame, `others` with formats of their own; returns the paths."""
    paths = [folder / f"{name}.csv" for name in tables]
    for path, (name, table) in zip(paths, tables.items(), strict=True):
        write_output(path, to_csv(table, others.get(name, float_format)))
    return paths


def read_tables(
    folder: Path, columns: Mapping[str, tuple[str, ...]], names: tuple[str, ...] = ()
) -> dict[str, pd.DataFrame]:
    """Read NAME.csv for each name in `columns`; arguments and errors as `read_csv`."""
    return {name: read_csv(folder / f"{name}.csv", own, names=names) for name, own in columns.items()}


def read_csv(
    path: Path,
    columns: tuple[str, ...],
    *,
    as_text: bool = False,
    numbers: tuple[str, ...] = (),
    names: tuple[str, ...] = (),
    times: int = 1,
) -> pd.DataFrame:
    """Read a CSV file that must have `columns` (and may have more), and parse numbers unless `as_text`.

    The columns `numbers` must hold nothing else. The columns `names`, if present, are text whatever they hold: a
    class may be called 007 or NA. The file may have `times` the usual limits, 64 MB and two million cells.

    Pandas alone would take an extra cell in a row for an index and move every number to the next column.

    Raises RunError: the file is missing, not CSV, lacks a column or has one twice, or a row is longer or shorter than
    the header, or one of `numbers` holds text or nothing.
    """
    try:
        content = read_foreign_text(path, times * _MAX_CSV)
        header, *rows = _cells(content, times * _MAX_CELLS)
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
    return text if as_text else _typed(path, content, text, names)


def _cells(content: str, most: int) -> Iterator[list[str]]:
    """Yield the rows of a CSV file. Raises ValueError if they would take memory out of proportion, or csv.Error."""
    if any(line.count(",") >= MAX_COLUMNS for line in io.StringIO(content, newline="")):
        raise ValueError(f"more than {MAX_COLUMNS} columns")
    cells = 0
    for row in csv.reader(io.StringIO(content, newline=""), strict=True):
        cells += len(row)
        if cells > most:
            raise ValueError(f"more than {most} cells")
        yield row


def _typed(path: Path, content: str, text: pd.DataFrame, names: tuple[str, ...]) -> pd.DataFrame:
    """Return the table with the types that pandas finds. Raises RunError if pandas reads other rows than `text` has."""
    try:
        table: pd.DataFrame = pd.read_csv(io.StringIO(content, newline=""), index_col=False)
    except Exception as error:  # its parsers raise many types
        raise RunError(f"{path}: cannot be read as CSV ({error}); restore the file") from error
    if table.shape != text.shape:
        raise RunError(f"{path}: pandas reads {len(table)} of {len(text)} rows; restore the file")
    table.columns = text.columns
    for name in set(names) & set(table.columns):
        table[name] = text[name]
    return table
