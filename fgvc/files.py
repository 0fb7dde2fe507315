"""Writing files so that a reader never sees half of one: write to a temporary name beside the target, then rename."""

import contextlib
import json
import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if sys.platform != "win32":
    import fcntl


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; rename it to `path` on success, delete it on any failure.

    The folder is created where missing. The content is flushed to the disk before the rename, so that after a crash
    `path` holds either the old content or the new one.

    Raises:
        OSError: as the writing code or the rename raises it (disk full, no permission); nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # the suffix stays last: some writers choose their format by it or append a missing one
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.tmp{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


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
def locked(path: Path) -> Iterator[bool]:
    """Hold the lock file `path` while the block runs; yields False where another call holds it.

    The lock ends with the process, however that ends; the empty file of a killed one is in nobody's way. Where the
    system or the file system has no such locks, it is always had.
    """
    if sys.platform == "win32":
        yield True
        return
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # a call that ended meanwhile has deleted the file that was opened here: it locks nothing any more
            free = path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
        except BlockingIOError:
            free = False
        except OSError:
            free = True
        try:
            yield free
        finally:
            if free:
                path.unlink(missing_ok=True)


def write_text_atomic(path: Path, text: str) -> None:
    """Write `text` as UTF-8 to `path`, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json_atomic(path: Path, value: Any) -> None:
    """Write `value` as indented JSON to `path`, whole or not at all. NaN and infinity are refused (ValueError)."""
    write_text_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
