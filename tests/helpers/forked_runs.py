"""Runs in forked processes; some end at a chosen moment. And the reader of MATLAB files in a fork."""

import os
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from accelerate import Accelerator
from command_line import SMALL, fresh_process, import_for, run_script
from torch.optim import SGD

from fgvc.data import mat_child

MOMENTS: dict[str, tuple[Any, str]] = {
    "step": (SGD, "step"),  # in the middle of a step, before the weights change
    "evaluation": (Accelerator, "gather_for_metrics"),
    "save": (torch, "save"),
    "flush": (os, "fsync"),  # a file is written, not yet renamed
    "rename": (Path, "replace"),
}
"""What a run does again and again, as what is called then."""

End = tuple[str, int]
"""A moment, and how often it has come when something happens; from 1."""


def train_until(
    cwd: Path, overrides: list[str], *ends: End, number: int = signal.SIGKILL, base: list[str] = SMALL
) -> int:
    """`fgvc train` on the small set; returns its exit status, or minus the signal that ended it.

    Stdout and stderr go to `log` in `cwd`. At each of `ends` the process sends itself the signal `number`. `base` are
    overrides before the others.
    """
    (cwd / "log").unlink(missing_ok=True)
    events = {moment: (count, _signal_to_self(number)) for moment, count in ends}
    return _wait(_fork(cwd, [*base, *overrides], events))


def train_in_processes(
    cwd: Path, overrides: list[str], count: int, *, at: End = ("step", 0), happens: Callable[[], None] | None = None
) -> list[int]:
    """The same in `count` processes, of which the last does `happens` at a moment; returns their exit statuses."""
    (cwd / "log").unlink(missing_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children = []
    for rank in range(count):
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        environment = {key: str(value) for key, value in ranks.items()}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
        last = rank == count - 1 and happens is not None
        children.append(_fork(cwd, [*SMALL, *overrides], {at[0]: (at[1], happens)} if last else {}, environment))
    return [_wait(child) for child in children]


def _signal_to_self(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def _wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _fork(
    cwd: Path, overrides: list[str], events: Mapping[str, Any], environment: Mapping[str, str] | None = None
) -> int:
    import_for("train.py")
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        os.environ.update(environment or {})
        status = _train(cwd, overrides, events)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _train(cwd: Path, overrides: list[str], events: Mapping[str, Any]) -> int:
    log = os.open(cwd / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    fresh_process(cwd, log, log)
    for moment, (count, happens) in events.items():
        owner, name = MOMENTS[moment]
        setattr(owner, name, _counted(getattr(owner, name), count, happens))
    return run_script("train.py", overrides)


def _counted(function: Callable[..., Any], count: int, happens: Callable[[], None]) -> Callable[..., Any]:
    """`function`, before whose `count`-th call something happens."""
    calls = 0

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            happens()
        return function(*arguments, **options)

    return counted


def read_mat_in_a_fork(file: IO[bytes], arguments: list[str]) -> tuple[int, bytes]:
    """`fgvc.data.mat._run_child` without the start of Python and the imports, half a second a file."""
    with tempfile.TemporaryFile() as out:
        child = os.fork()
        if not child:
            status = 70
            try:
                os.dup2(file.fileno(), 0)
                sys.argv, sys.stdin = ["mat_child.py", *arguments], os.fdopen(0, encoding="utf-8")
                sys.stdout = os.fdopen(out.fileno(), "w", closefd=False)
                mat_child.main()
                sys.stdout.flush()
                status = 0
            finally:
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0)
        return status, out.read()
