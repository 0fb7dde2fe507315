"""Writing files so that a reader never sees half of one: write to a temporary name beside the target, then rename.

And locks between processes.
"""

import contextlib
import errno
import json
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

if sys.platform != "win32":
    import fcntl


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
        _flush_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.truncate(temporary, 0)  # a writer in the traceback still has it open, which would keep its room
        temporary.unlink(missing_ok=True)
        if _says_disk_full(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise


def _flush_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, where the system can."""
    with contextlib.suppress(OSError):  # Windows opens no folders, some file systems flush none
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


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


def lock_file(file: IO[bytes], *, shared: bool = False, wait: bool = False) -> bool | None:
    """Lock an open file against other openings of it, in this process and others, and tell whether that was possible.

    The lock lasts until the file is closed, and with it every duplicate of its descriptor: that of a memory map made
    from it, those of forked processes. However a process ends, its locks end with it.

    Args:
        file: open; for a lock that is not shared also for writing, which network file systems ask for.
        shared: other shared locks may be held at the same time.
        wait: until other locks allow it.

    Returns:
        None where the system or the file system has no locks: nobody can know who else uses the file.
    """
    if sys.platform == "win32":
        return None
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(file, kind if wait else kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def is_in_place(file: IO[bytes], path: Path) -> bool:
    """Whether an open file is still what `path` names: it may have been deleted or replaced since it was opened."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def locked(path: Path, *, on_wait: Callable[[], object] | None = None) -> Iterator[bool]:
    """Hold the lock file `path` while the block runs.

    Where another call holds it, yields False; or, with `on_wait`, calls that and waits, so that it always yields True.

    The lock ends with the process, however that ends, even where a process that it has forked lives on; the empty file
    of a killed one is in nobody's way. Where the system or the file system has no such locks, it is always had.
    """
    with contextlib.ExitStack() as held:
        while True:
            file = held.enter_context(path.open("ab"))
            free = lock_file(file)
            if free is False and on_wait is not None:
                on_wait()
                free = lock_file(file, wait=True)
            # a call that ended meanwhile has deleted the file that was opened here: it locks nothing any more
            if not free or is_in_place(file, path):
                break
            held.pop_all().close()
        _own_locks.add(file)
        try:
            yield free is not False
        finally:
            _own_locks.discard(file)
            if free is not False:
                path.unlink(missing_ok=True)


_own_locks: set[IO[bytes]] = set()
"""What `locked` holds in this process."""


def _leave_locks_to_the_parent() -> None:
    """A loader's worker that outlives a killed run would hold its locks for a while."""
    for file in _own_locks:
        file.close()
    _own_locks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_locks_to_the_parent)


def write_text_atomic(path: Path, text: str) -> None:
    """Write `text` as UTF-8 to `path`, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json_atomic(path: Path, value: Any) -> None:
    """Write `value` as indented JSON to `path`, whole or not at all. NaN and infinity are refused (ValueError)."""
    write_text_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
