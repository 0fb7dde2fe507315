"""Several processes that train as one would, and signals that ask a run to stop."""

import atexit
import logging
import multiprocessing
import multiprocessing.util
import os
import signal
import threading
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator

from fgvc.errors import Interrupted, ProcessLostError

_log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)

_LOST = ("closed by peer", "reset by peer", "broken pipe", "timed out waiting", "connection refused", "socket timeout")


def sum_over_processes(accelerator: Accelerator, numbers: list[float]) -> list[float]:
    """Sums over all processes, in float64, the same in each of them."""
    if accelerator.num_processes == 1:
        return numbers
    # not accelerate's reduce, which would go through float32
    sums = torch.tensor(numbers, dtype=torch.float64, device=accelerator.device)
    dist.all_reduce(sums)
    values: list[float] = sums.tolist()
    return values


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Whether the flag is set in some process; the same answer in each of them."""
    return sum_over_processes(accelerator, [float(flag)])[0] > 0


def gather_objects(accelerator: Accelerator, value: object) -> list[object]:
    """The values of all processes, in their order."""
    if accelerator.num_processes == 1:
        return [value]
    values: list[object] = [None] * accelerator.num_processes
    dist.all_gather_object(values, value)
    return values


def is_lost_connection(error: BaseException) -> bool:
    """Whether an exception says that the connection to another process of the run has ended."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return several and isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _LOST)


def lost_process() -> ProcessLostError:
    """The error to raise in place of a lost connection: the reason is in the message of the other process."""
    return ProcessLostError(
        f"process {os.environ.get('RANK')} ends, as another process of the run has ended: see its message"
    )


class Interruption:
    """While this context is entered, SIGTERM or SIGINT asks a run to stop; a second one ends it at once.

    As long as `patient` is False, where there is nothing to save, the first one ends it, too. Python receives signals
    in its main thread only; in another one this does nothing.

    Attributes:
        requested: signal that came, or None.
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
            return  # a child process that has inherited this
        name = signal.Signals(number).name
        if not self.patient or self.requested is not None:
            raise Interrupted(name, f"{name}: ended at once")
        self.requested = signal.Signals(number)
        _log.warning("%s: stopping after this step; a second one stops at once, without saving", name)


def leave_signals_to_the_main_process(_worker: int) -> None:
    """For a loader's worker: a signal to the whole job must not end the workers before the run has saved its state."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@atexit.register  # registered later than the exit of multiprocessing.util, so it runs before it
def _end_workers() -> None:
    """End the workers of a loader that an exception has left open.

    At its exit Python sends them SIGTERM, which they ignore, and would wait for them without end.
    """
    workers = [child for child in multiprocessing.active_children() if child.daemon]
    if workers and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would raise on a worker that was killed
    for worker in workers:
        worker.kill()
