"""One optimiser step over the images of all processes, in one or several micro-batches."""

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from fgvc.models import PoolingHead
from fgvc.spectral import EigendecompositionError
from fgvc.training.learner import Learner, head_of
from fgvc.training.optim import change_reduction
from fgvc.training.processes import sum_over_processes

BeforeStep = Callable[[int, nn.Module, Tensor, Callable[[Tensor], Tensor]], None]
"""Called with a step's number from 1, the module, its inputs after mixing, and a function logits -> mean loss."""


@dataclass(frozen=True)
class MicroBatch:
    """A part of a step that one process computes at once.

    Attributes:
        index: Index in the step, from 0.
        inputs: Inputs (B, ...) on the device, after mixing.
        targets: Classes (B,), or shares (B, num_classes) if inputs are mixed.
        random_state: State of torch's generator before the micro-batch.
    """

    index: int
    inputs: Tensor
    targets: Tensor
    random_state: Tensor


@dataclass(frozen=True)
class Failure:
    """The reason why a step was not taken: a number in it is not finite.

    Attributes:
        what: Kind of number that is not finite: "loss", "eigenvalues" or "gradient".
        reason: Message, e.g. "the loss is nan".
        batch: Micro-batch that failed; for a gradient, the last one. None if it failed in another process.
        samples: Indices in the micro-batch that are known to be the cause.
    """

    what: str
    reason: str
    batch: MicroBatch | None
    samples: tuple[int, ...] = ()


@dataclass(frozen=True)
class StepResult:
    """Result of a step, the same in all processes except for the details of a failure.

    Attributes:
        loss: Mean loss over its images; NaN if the step failed.
        correct: Number of images whose class had the largest logit; for mixed images, the class before mixing.
        flags: Number of processes that raised each flag.
        failure: Reason why the step was not taken; None if it was.
        scaled_down: Whether the loss scaler of fp16 skipped the step and lowered its scale.
    """

    loss: float
    correct: int
    flags: tuple[int, ...]
    failure: Failure | None = None
    scaled_down: bool = False


class Stepper:
    """Takes the optimiser steps of a run.

    Args:
        learner: module, loss and optimiser.
        accumulation: number of micro-batches per process and step.
        clip_norm: largest norm of the gradient; None for no clipping.
        before_step: function to call before each step, with its first micro-batch.
        reduction_gradient: change of the gradient of the reduction after clipping, see `change_reduction`.
    """

    def __init__(
        self,
        learner: Learner,
        *,
        accumulation: int,
        clip_norm: float | None,
        before_step: BeforeStep | None = None,
        reduction_gradient: str | None = None,
    ) -> None:
        self._learner = learner
        self._accumulation = accumulation
        self._clip_norm = clip_norm
        self._before_step = before_step
        self._head = head_of(learner.plain)
        self._reduction_gradient = reduction_gradient
        self._buffers = BufferCopy(learner.module)

    def optimizer_step(
        self,
        micro_batches: Iterable[tuple[Tensor, Tensor]],
        size: int,
        number: int,
        flags: Callable[[], list[bool]],
    ) -> StepResult:
        """Take one step. If a number in it is not finite, take none and leave weights and buffers unchanged.

        All numbers stay on the device until the last gradient is there. They are then summed over the processes and
        read, once each. Before that, only an eigendecomposition waits for the device.

        Args:
            micro_batches: (inputs, targets) of this process on its device, `accumulation` of them; may be empty
                tensors.
            size: number of images in the step, over all processes.
            number: number of the step, from 1.
            flags: function to call once, at the end; the result holds the sums of its flags over all processes.
        """
        learner, accelerator, module = self._learner, self._learner.accelerator, self._learner.module
        objective, optimizer = learner.objective, learner.optimizer
        self._buffers.update()
        optimizer.zero_grad()
        batches: list[MicroBatch] = []
        errors: dict[int, EigendecompositionError] = {}
        losses: list[Tensor] = []
        right: list[Tensor] = []
        for index, (inputs, targets) in enumerate(micro_batches):
            random_state = torch.get_rng_state()
            inputs, mixed = objective.mix(inputs, targets)
            if self._before_step is not None and index == 0:
                self._before_step(number, module, inputs, partial(objective.mean, targets=mixed))
            batches.append(MicroBatch(index, inputs, mixed, random_state))
            # the last micro-batch also sums the gradients over all processes
            last = index == self._accumulation - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(module):
                with _nan_for_eigenvalues(self._head, partial(errors.setdefault, index)):
                    logits = module(inputs)
                loss = objective.total(logits, mixed)
                # torch averages the processes' gradients, but their sum is needed
                accelerator.backward(loss * (accelerator.num_processes / size))
            losses.append(loss.detach())
            right.append((logits.detach().argmax(dim=1) == targets).sum())

        # from here on the gradient is the same in all processes
        accelerator.unscale_gradients(optimizer)
        norm = get_total_norm([p.grad for p in module.parameters() if p.grad is not None])
        # filled, not copied from the CPU, since a copy would wait for the device
        raised = [torch.full_like(norm, float(flag)) for flag in flags()]
        own = torch.stack([value.float() for value in (*losses, *right, *raised)])
        count = len(batches)
        values = torch.cat([own[:count], norm[None], sum_over_processes(accelerator, own)]).tolist()
        own_losses, total_norm, sums = values[:count], values[count], values[count + 1 :]

        total_loss, correct = sum(sums[:count]), sum(sums[count : 2 * count])
        result = StepResult(total_loss / size, int(correct), tuple(map(int, sums[2 * count :])))
        failure = None
        if not math.isfinite(total_loss):
            result = StepResult(math.nan, 0, result.flags)
            failure = _failure(batches, own_losses, errors)
            optimizer.zero_grad()
        elif not math.isfinite(total_norm) and accelerator.mixed_precision != "fp16":
            # the loss scaler of fp16 skips such a step by itself
            failure = Failure("gradient", f"the norm of the gradient is {total_norm}", batches[-1])
        if failure is not None:
            self._buffers.restore()
            if accelerator.scaler is not None:
                accelerator.scaler.update(accelerator.scaler.get_scale())  # ready for the next step, at the same scale
            return replace(result, failure=failure)
        if self._clip_norm is not None and math.isfinite(total_norm):
            clip_grads_with_norm_(module.parameters(), self._clip_norm, norm)
        if self._reduction_gradient is not None and math.isfinite(total_norm):
            change_reduction(optimizer, self._head.get_parameter("reduction.0.weight"), self._reduction_gradient)
        optimizer.step()
        if getattr(optimizer, "step_was_skipped", False):
            return replace(result, scaled_down=True)
        if learner.average is not None:
            learner.average.update(learner.plain, step=number)
        return result


@contextlib.contextmanager
def _nan_for_eigenvalues(head: PoolingHead, note: Callable[[EigendecompositionError], object]) -> Iterator[None]:
    """Note an error of the pooling and let it return NaN: other processes wait for the gradient of this one."""
    pooling, forward = head.pooling, head.pooling.forward

    def noted(maps: Tensor) -> Tensor:
        try:
            return forward(maps)
        except EigendecompositionError as error:
            note(error)
            return (maps.flatten(1).sum(dim=1, keepdim=True) * math.nan).expand(-1, pooling.out_features)

    pooling.__dict__["forward"] = noted
    try:
        yield
    finally:
        del pooling.__dict__["forward"]


def _failure(batches: list[MicroBatch], losses: list[float], errors: Mapping[int, EigendecompositionError]) -> Failure:
    """Return the first failure of this process, by its losses, or that of another one."""
    for batch, loss in zip(batches, losses, strict=True):
        if (error := errors.get(batch.index)) is not None:
            return Failure("eigenvalues", str(error), batch, tuple(error.items))
        if not math.isfinite(loss):
            return Failure("loss", f"the loss is {loss}", batch)
    return Failure("loss", "a number in another process is not finite", None)


class BufferCopy:
    """A copy of a module's buffers in memory of its own, e.g. of the running statistics of batch normalisation.

    A forward pass changes them in place, and a failed step must not change them.

    Args:
        module: module whose buffers stay the same tensors.
    """

    def __init__(self, module: nn.Module) -> None:
        groups: defaultdict[torch.dtype, list[Tensor]] = defaultdict(list)
        for buffer in module.buffers():
            groups[buffer.dtype].append(buffer.detach())
        # by type: on a GPU, buffers of one type are copied together
        self._pairs = [(group, [buffer.clone() for buffer in group]) for group in groups.values()]

    def update(self) -> None:
        """Copy the buffers."""
        for buffers, copies in self._pairs:
            torch._foreach_copy_(copies, buffers)

    def restore(self) -> None:
        """Give the buffers the values of the last copy."""
        for buffers, copies in self._pairs:
            torch._foreach_copy_(buffers, copies)


@contextlib.contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Restore a module's buffers and modes and torch's random state at the end of the block."""
    buffers, modes = BufferCopy(module), [(part, part.training) for part in module.modules()]
    devices = {parameter.device for parameter in module.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            buffers.restore()
            for part, training in modes:
                part.training = training
