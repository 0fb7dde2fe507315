"""SIGTERM and SIGINT as a request to stop at the next good moment."""

import atexit
import logging
import multiprocessing
import multiprocessing.util
import os
import signal
import threading
from types import FrameType
from typing import Any

from fgvc.errors import Interrupted

_log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interruption:
    """While this context is entered, SIGTERM or SIGINT asks a run to stop; a second one ends it at once.

    Outside the block of `patient`, where there is nothing to save, the first one ends it, too. Signals can be received
    in the main thread only; in another one this does nothing.

    Attributes:
        requested: the signal that came, or None.
        patient: whether the run asks for `requested` by itself, between its steps.
    """

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self.patient = False
        self._before: dict[signal.Signals, Any] = {}
        self._process = os.getpid()

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            if handler is not None:  # one that was not set from Python cannot be put back from it
                signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a child that has inherited this
        name = signal.Signals(number).name
        if not self.patient or self.requested is not None:
            raise Interrupted(name, f"{name}: ended at once")
        self.requested = signal.Signals(number)
        _log.warning("%s: stopping after this step; a second one stops at once, without saving", name)


def leave_signals_to_the_main_process(_worker: int) -> None:
    """For a loader's worker: a signal to the whole job must not end the workers before the run has saved its state."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@atexit.register  # later than multiprocessing.util registers its own, so that it runs before that
def _end_workers() -> None:
    """End the workers of a loader that an exception has left open.

    At its exit Python sends them SIGTERM, which they ignore, and would wait for them without end.
    """
    workers = [child for child in multiprocessing.active_children() if child.daemon]
    if workers and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would raise on a worker that was killed
    for worker in workers:
        worker.kill()
