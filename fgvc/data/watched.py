"""Which file a worker process of a loader was reading when it died."""

import multiprocessing
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from fgvc.errors import DatasetError, UserError

Result = TypeVar("Result")

_IDLE = -1
_PATIENCE = 2.0  # seconds
_PID = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:exited unexpectedly|is killed by signal)")
_CAUSE = re.compile(r"(?<=killed by )signal: [^.]+|exit code \d+")
_CAUGHT = re.compile(r"Caught \w+ in DataLoader worker process \d+\.")


class WatchedSamples(Dataset[Any]):
    """The same samples, with a note in shared memory of the one that each worker process is at.

    A worker that dies (a decoder crashes, the system kills it for its memory) leaves nothing but its process id to the
    loader; the note outlives it. Without worker processes nothing is noted.

    Args:
        dataset: what is read; has a length.
        workers: worker processes of the loader, its `num_workers`.
    """

    def __init__(self, dataset: Dataset[Any], workers: int) -> None:
        self.dataset = dataset
        notes = torch.full((workers, 2), _IDLE, dtype=torch.int64)  # process id, index
        self._notes: Tensor = notes.share_memory_()  # type: ignore[no-untyped-call]  # not annotated

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]  # a Dataset need not have a length

    def __getitem__(self, index: int) -> Any:
        worker = get_worker_info()
        if worker is None:  # the main process dies with its own message
            return self.dataset[index]
        note = self._notes[worker.id]
        note[0], note[1] = os.getpid(), index
        try:
            return self.dataset[index]
        finally:  # an exception is told to the loader; a process that dies does not come here
            note[1] = _IDLE

    def pids(self) -> list[int]:
        """Process ids of the workers that have begun to read."""
        return [pid for pid, _ in self._notes.tolist() if pid != _IDLE]

    def in_progress(self, pids: Sequence[int] | None = None) -> list[int]:
        """Indices that workers began to read and have not finished; only of those with these process ids if given."""
        return [index for pid, index in self._notes.tolist() if index != _IDLE and (pids is None or pid in pids)]


def naming_files(body: Callable[[], Result], watched: WatchedSamples, paths: Sequence[Path | str]) -> Result:
    """Call `body`, which reads the loader; raise `loader_failure` in place of its exception, where it has one.

    No context manager, since leaving one is a call, and torch's signal of a dead worker may raise on any.
    """
    try:
        try:
            return body()
        except Exception as error:
            _raise_failure(error, watched, paths)
            raise
    except RuntimeError as late:  # that signal came in the middle of these lines
        _raise_failure(late, watched, paths)
        raise


def loader_failure(error: BaseException, watched: WatchedSamples, paths: Sequence[Path | str]) -> UserError | None:
    """What an exception of a loader with worker processes means to a user; None where it is of another kind.

    A worker that died becomes a DatasetError that names the file it was reading. A UserError that was raised in a
    worker, and carries the worker's traceback as its message, gets its own message back.

    Args:
        error: raised in the process that reads the loader. Torch notices a dead worker by a signal, so it may come out
            of any line of the loop, not only out of the loader.
        watched: the loader's dataset.
        paths: of its samples, in their order.
    """
    if isinstance(error, UserError):
        return _own_message(error)
    try:
        notice = _notice(error)
    except RuntimeError as late:  # torch raises on the signal that a worker has ended, wherever Python is by then
        notice = str(late)
    found = _PID.search(notice)
    if found is not None:
        indices = watched.in_progress([int(pid) for pid in found[1].split(",")])
    else:  # a broken pipe may be another one: only a worker that has ended over a file is to blame
        indices = watched.in_progress(_dead(watched)) if _pipe_broke(error) else []
        if not indices:
            return None
    cause = _CAUSE.search(notice)
    how = "died" + (f" ({cause[0].strip()})" if cause else "")
    files = ", ".join(str(paths[index]) for index in indices)
    where = f"{files}: a worker process of the loader {how} while it read this file"
    if not files:
        where = f"a worker process of the loader {how} between two images"
    fix = "If the file crashes its decoder, replace it; if the system killed the worker for its memory, lower"
    if "Bus error" in notice:
        fix = (
            "A bus error mostly means that shared memory is full: raise its limit (docker run --shm-size=8g), or lower"
        )
    return DatasetError(f"{where}. {fix} trainer.workers")


def _raise_failure(error: BaseException, watched: WatchedSamples, paths: Sequence[Path | str]) -> None:
    failure = loader_failure(error, watched, paths)
    if failure is not None:
        raise failure from error


def _notice(error: BaseException) -> str:
    """What torch says of a dead worker; empty where it says nothing."""
    known = [str(e) for e in (error.__cause__, error.__context__, error) if e is not None]
    said = next((text for text in known if _PID.search(text)), "")
    if said or not _pipe_broke(error):
        return said
    time.sleep(_PATIENCE)  # the pipe broke before that signal has arrived
    return ""


def _pipe_broke(error: BaseException) -> bool:
    """Whether the loader lost the connection to a worker; not where the worker raised such an exception itself."""
    return isinstance(error, ConnectionError | EOFError) and not _CAUGHT.match(str(error))


def _dead(watched: WatchedSamples) -> list[int]:
    """Process ids of the workers that have ended."""
    alive = {process.pid for process in multiprocessing.active_children()}
    return [pid for pid in watched.pids() if pid not in alive]


def _own_message(error: UserError) -> UserError | None:
    """The error as it was raised in the worker; None where it was not raised in one."""
    kind, text = type(error), str(error)
    head = f"\n{kind.__module__}.{kind.__qualname__}: "
    if not _CAUGHT.match(text) or head not in text:
        return None
    return kind(text.rsplit(head, 1)[1].strip())
