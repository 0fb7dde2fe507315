"""The folder of the feature cache: what is in it, what may go, and room for a new file."""

import contextlib
import gc
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from fgvc.errors import ConfigError
from fgvc.io import is_in_place, lock_file, locked

logger = logging.getLogger(__name__)


class Entry(NamedTuple):
    """A file of feature maps.

    Attributes:
        path: of it; its card lies beside it.
        size: in bytes; that of a file being written is its final one.
        used: when it was last used, in seconds as of time.time().
    """

    path: Path
    size: int
    used: float


def card_of(path: Path) -> Path:
    """The JSON file that makes a file of feature maps valid."""
    return path.with_suffix(".json")


def mark_used(path: Path) -> None:
    """Note that a file of feature maps is used now, as the time of its card; nothing where the folder is read-only."""
    with contextlib.suppress(OSError):
        os.utime(card_of(path))


@contextlib.contextmanager
def reserved(temporary: Path, size: int, max_gb: float | None) -> Iterator[IO[bytes]]:
    """A new file that counts with its full `size` from the start, in use until it is closed.

    Leftover files of killed runs are deleted; where `max_gb` would be exceeded, so are entries that nobody uses, the
    least recently used first.

    Raises:
        ConfigError: what is in use leaves too little room below `max_gb`; nothing is evicted then.
        OSError: the file cannot be written.
    """
    with contextlib.ExitStack() as held:
        # one process at a time: else two would find the same room
        with locked(temporary.parent / "cache.lock", on_wait=lambda: None):
            _remove_leftovers(temporary.parent)
            if max_gb is not None:
                _make_room(temporary.parent, size, max_gb)
            file = held.enter_context(temporary.open("xb"))
            lock_file(file, shared=True)
            file.truncate(size)
        yield file


def _remove_leftovers(folder: Path) -> None:
    """Delete temporary files that no living process writes."""
    for path in folder.glob(".features-*.tmp.npy"):
        with contextlib.ExitStack() as held:
            if _unused(path, held):
                logger.info("%s: left over by a run that was killed, deleted", path)
                path.unlink(missing_ok=True)


def _make_room(folder: Path, needed: int, max_gb: float) -> None:
    """Evict until there is room for `needed` bytes. Raises ConfigError, evicting nothing, where that is impossible."""
    entries = _entries(folder)
    excess = sum(entry.size for entry in entries) + needed - int(max_gb * 1e9)
    if excess <= 0:
        return
    gc.collect()  # what an earlier run of this process left behind in reference cycles is not in use
    with contextlib.ExitStack() as held:
        going: list[Entry] = []
        while entries and sum(entry.size for entry in going) < excess:
            if _unused(entries[0].path, held):
                going.append(entries[0])
            entries.pop(0)
        if sum(entry.size for entry in going) < excess:
            raise _no_room(folder, needed, max_gb, [entry for entry in _entries(folder) if entry not in going])
        for entry in going:
            _evict(entry)


def _entries(folder: Path) -> list[Entry]:
    """All files of feature maps, also those being written, the least recently used first."""
    found = []
    for path in [*folder.glob("features-*.npy"), *folder.glob(".features-*.tmp.npy")]:
        with contextlib.suppress(FileNotFoundError):
            card = card_of(path)
            used = (card if card.exists() else path).stat().st_mtime
            found.append(Entry(path, path.stat().st_size, used))
    return sorted(found, key=lambda entry: entry.used)


def _unused(path: Path, held: contextlib.ExitStack) -> bool:
    """Whether nobody uses a file; then it is locked until `held` is closed.

    False also where that cannot be known: there are no locks, or no permission.
    """
    try:
        file = held.enter_context(path.open("r+b"))
    except OSError:
        return False
    return lock_file(file) is True and is_in_place(file, path)


def _evict(entry: Entry) -> None:
    card_of(entry.path).unlink(missing_ok=True)  # first: without it the rest counts for nothing
    entry.path.unlink(missing_ok=True)
    used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
    logger.info("evicted from the feature cache: %s, %.3g GB, last used %s", entry.path, entry.size / 1e9, used)


def _no_room(folder: Path, needed: int, max_gb: float, staying: list[Entry]) -> ConfigError:
    listed = ", ".join(f"{entry.path.name} ({entry.size / 1e9:.3g})" for entry in staying) or "nothing else"
    return ConfigError(
        f"{folder}: the new features need {needed / 1e9:.3g} GB of cache.max_gb={max_gb:g}, and these files are in use "
        f"by running jobs, or cannot be locked (in GB): {listed}. Raise cache.max_gb, wait for the other jobs, set "
        "cache.dir to another folder, or train with backbone.frozen=false"
    )
