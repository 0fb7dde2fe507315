"""Training with several processes, and signals that stop a run."""

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
from torch import Tensor

from fgvc.errors import Interrupted, ProcessLostError

_log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)

_LOST = ("closed by peer", "reset by peer", "broken pipe", "timed out waiting", "connection refused", "socket timeout")


def sum_over_processes(accelerator: Accelerator, numbers: Tensor) -> Tensor:
    """Return the sums (N,) of `numbers` (N,) over all processes, in float64 if there are several, on the device."""
    if accelerator.num_processes == 1:
        return numbers
    sums = numbers.double()  # accelerate's reduce would convert to float32
    dist.all_reduce(sums)
    return sums


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Return whether the flag is set in any process, the same in every process."""
    if accelerator.num_processes == 1:
        return flag
    return bool(sum_over_processes(accelerator, torch.full((1,), float(flag), device=accelerator.device)) > 0)


def gather_objects(accelerator: Accelerator, value: object) -> list[object]:
    """Return the values of all processes, ordered by rank."""
    if accelerator.num_processes == 1:
        return [value]
    values: list[object] = [None] * accelerator.num_processes
    dist.all_gather_object(values, value)
    return values


def is_lost_connection(error: BaseException) -> bool:
    """Return whether an exception means that the connection to another process of the run has ended."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return several and isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _LOST)


def lost_process() -> ProcessLostError:
    """Return the error to raise for a lost connection; it points to the message of the other process."""
    return ProcessLostError(
        f"process {os.environ.get('RANK')} ends because another process of the run has ended: see its message"
    )


class Interruption:
    """Context in which SIGTERM or SIGINT asks a run to stop; a second signal ends it at once.

    While `patient` is False there is nothing to save, so the first signal ends the run, too. Python receives signals
    only in its main thread; in another thread this context does nothing.

    Attributes:
        requested: Signal that was received, or None.
        patient: Whether the run checks `requested` between its steps.
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
            if handler is not None:  # Python cannot restore a handler that was not set from Python
                signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a child process that inherited the handler
        name = signal.Signals(number).name
        if not self.patient or self.requested is not None:
            raise Interrupted(name, f"{name}: ended at once")
        self.requested = signal.Signals(number)
        _log.warning("%s: stopping after this step; a second signal stops at once, without saving", name)


def leave_signals_to_the_main_process(_worker: int) -> None:
    """Ignore signals in a loader's worker: a signal to the whole job must not end it before the state is saved."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@atexit.register  # registered after the exit handler of multiprocessing.util, so it runs before it
def _end_workers() -> None:
    """End loader workers that are still running after an exception.

    At exit Python sends them SIGTERM, which they ignore, and would wait forever.
    """
    workers = [child for child in multiprocessing.active_children() if child.daemon]
    if workers and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would raise for a killed worker
    for worker in workers:
        worker.kill()
