"""Several processes that train as one, and signals that ask a run to stop."""

import atexit
import contextlib
import logging
import multiprocessing
import multiprocessing.util
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from timm.layers.norm_act import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fgvc.errors import ConfigError, Interrupted, ProcessLostError

_LOST = ("closed by peer", "reset by peer", "broken pipe", "timed out waiting", "connection refused", "socket timeout")


def total(accelerator: Accelerator, numbers: list[float]) -> list[float]:
    """Sums over all processes, in float64, the same in each of them."""
    if accelerator.num_processes == 1:
        return numbers
    # not of accelerate: its reduce would go through float32
    sums = torch.tensor(numbers, dtype=torch.float64, device=accelerator.device)
    dist.all_reduce(sums)
    values: list[float] = sums.tolist()
    return values


def any_of(accelerator: Accelerator, flag: bool) -> bool:
    """Whether the flag is set in some process; the same answer in each of them."""
    return total(accelerator, [float(flag)])[0] > 0


def gather_objects(accelerator: Accelerator, value: object) -> list[object]:
    """The values of all processes, in their order."""
    if accelerator.num_processes == 1:
        return [value]
    values: list[object] = [None] * accelerator.num_processes
    dist.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def lost_processes_named() -> Iterator[None]:
    """Turn the end of a connection to another process into a message: what happened there, that process says itself.

    Raises:
        ProcessLostError: another process of the run has ended.
    """
    try:
        yield
    except RuntimeError as error:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and any(text in str(error).lower() for text in _LOST):
            raise ProcessLostError(
                f"process {os.environ.get('RANK')} ends, as another process of the run has ended: see its message"
            ) from error
        raise


def synchronise_batch_norm(module: nn.Module, accelerator: Accelerator) -> nn.Module:
    """With several processes: `module` with batch normalisation over the images of all of them, else as it is.

    On GPUs this is torch's SyncBatchNorm; on the CPU, where that does not run, the same in plain torch.
    """
    if accelerator.num_processes == 1:
        return module
    if accelerator.device.type != "cpu":
        converted: nn.Module = convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]
        return converted
    for name, layer in module.named_modules():
        if type(layer) is nn.BatchNorm2d:
            layer.__class__ = _SynchronisedBatchNorm  # parameters, buffers and their names stay
        elif type(layer) is BatchNormAct2d:
            layer.__class__ = _SynchronisedBatchNormAct
        elif isinstance(layer, _BatchNorm):
            raise ConfigError(
                f"{name}: {type(layer).__name__} is not synchronised on a CPU; train in one process there"
            )
    return module


class _SynchronisedBatchNorm(nn.BatchNorm2d):
    """Batch normalisation with the statistics of all processes; torch's own runs on GPUs only."""

    def forward(self, input: Tensor) -> Tensor:
        return _normalised(self, input) if self.training else super().forward(input)


class _SynchronisedBatchNormAct(BatchNormAct2d):
    """The same followed by dropout and activation: timm's layer."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            activated: Tensor = self.act(self.drop(_normalised(self, x)))
            return activated
        return super().forward(x)  # type: ignore[no-untyped-call, no-any-return]


def _normalised(layer: _BatchNorm, input: Tensor) -> Tensor:
    """What `layer` makes in training of its part of a batch, (B, C, H, W), B may be 0; keeps its running statistics."""
    # (C, B H W) in float64, so that the order of the sums does not show in a float32 result
    values = input.transpose(0, 1).flatten(1).double()
    count = _sum(values.new_tensor([values.shape[1]]))
    mean = _sum(values.sum(dim=1)) / count
    variance = _sum((values - mean[:, None]).square().sum(dim=1)) / count
    with torch.no_grad():
        if layer.running_mean is not None and layer.running_var is not None:
            assert layer.num_batches_tracked is not None
            layer.num_batches_tracked.add_(1)
            momentum = 1 / float(layer.num_batches_tracked) if layer.momentum is None else layer.momentum
            unbiased = variance * count / (count - 1).clamp(min=1)
            layer.running_mean.lerp_(mean.to(layer.running_mean.dtype), momentum)
            layer.running_var.lerp_(unbiased.to(layer.running_var.dtype), momentum)
    scale = (variance + layer.eps).rsqrt()
    result = (input.double() - mean[:, None, None]) * scale[:, None, None]
    if layer.affine:
        result = result * layer.weight.double()[:, None, None] + layer.bias.double()[:, None, None]
    return result.to(input.dtype)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: object, values: Tensor) -> Tensor:
        sums = values.clone()
        dist.all_reduce(sums)
        return sums

    @staticmethod
    def backward(_ctx: object, grad: Tensor) -> Tensor:
        # each process's loss depends on the sum: its gradient is the sum of theirs
        sums = grad.clone()
        dist.all_reduce(sums)
        return sums


def _sum(values: Tensor) -> Tensor:
    result: Tensor = _Sum.apply(values)
    return result


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
