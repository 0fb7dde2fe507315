"""One optimiser step over the images of all processes, in one or several micro-batches."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from fgvc.spectral import EigendecompositionError
from fgvc.training.learner import Learner
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
    """

    def __init__(
        self, learner: Learner, *, accumulation: int, clip_norm: float | None, before_step: BeforeStep | None = None
    ) -> None:
        self._learner = learner
        self._accumulation = accumulation
        self._clip_norm = clip_norm
        self._before_step = before_step

    def optimizer_step(
        self,
        micro_batches: Iterable[tuple[Tensor, Tensor]],
        size: int,
        number: int,
        flags: Callable[[], list[bool]],
    ) -> StepResult:
        """Take one step. If a number in it is not finite, take none and leave weights and buffers unchanged.

        Args:
            micro_batches: (inputs, targets) of this process on its device, `accumulation` of them; may be empty
                tensors.
            size: number of images in the step, over all processes.
            number: number of the step, from 1.
            flags: function to call once per micro-batch; the result holds the sums of its flags over all processes.
        """
        learner, accelerator, module = self._learner, self._learner.accelerator, self._learner.module
        objective, optimizer = learner.objective, learner.optimizer
        buffers = copy_buffers(module)
        optimizer.zero_grad()
        raised: tuple[int, ...] = ()
        loss, correct = 0.0, 0
        for index, (inputs, targets) in enumerate(micro_batches):
            random_state = torch.get_rng_state()
            inputs, mixed = objective.mix(inputs, targets)
            if self._before_step is not None and index == 0:
                self._before_step(number, module, inputs, partial(objective.mean, targets=mixed))
            batch = MicroBatch(index, inputs, mixed, random_state)
            # the last micro-batch also sums the gradients over all processes
            last = index == self._accumulation - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(module):
                micro_loss, right, failure = self._forward(batch, targets)
                numbers = [float(micro_loss.detach()), right, failure is not None, *flags()]
                total_loss, total_right, failed, *raised_here = sum_over_processes(
                    accelerator, list(map(float, numbers))
                )
                raised = tuple(map(int, raised_here))
                if failed:
                    restore_buffers(module, buffers)
                    optimizer.zero_grad()
                    elsewhere = Failure("loss", "a number in another process is not finite", None)
                    return StepResult(math.nan, 0, raised, failure or elsewhere)
                # torch averages the processes' gradients, but their sum is needed
                accelerator.backward(micro_loss * (accelerator.num_processes / size))
            loss, correct = loss + total_loss, correct + int(total_right)

        # from here on the gradient is the same in all processes
        result = StepResult(loss / size, correct, raised)
        accelerator.unscale_gradients(optimizer)
        norm = get_total_norm([p.grad for p in module.parameters() if p.grad is not None])
        if torch.isfinite(norm):
            if self._clip_norm is not None:
                clip_grads_with_norm_(module.parameters(), self._clip_norm, norm)
        elif accelerator.mixed_precision != "fp16":  # the loss scaler of fp16 skips such a step by itself
            restore_buffers(module, buffers)
            return replace(result, failure=Failure("gradient", f"the norm of the gradient is {float(norm)}", batch))
        optimizer.step()
        if getattr(optimizer, "step_was_skipped", False):
            return replace(result, scaled_down=True)
        if learner.average is not None:
            learner.average.update(learner.plain, step=number)
        return result

    def _forward(self, batch: MicroBatch, classes: Tensor) -> tuple[Tensor, int, Failure | None]:
        """Return the summed loss and the number of right answers of a micro-batch, or its failure."""
        nothing = batch.inputs.new_zeros(())
        try:
            logits = self._learner.module(batch.inputs)
        except EigendecompositionError as error:
            return nothing, 0, Failure("eigenvalues", str(error), batch, tuple(error.items))
        loss = self._learner.objective.total(logits, batch.targets)
        if not torch.isfinite(loss):
            return nothing, 0, Failure("loss", f"the loss is {float(loss.detach())}", batch)
        return loss, int((logits.detach().argmax(dim=1) == classes).sum()), None


def copy_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Copy the buffers, e.g. the running statistics of batch normalisation, since a forward pass changes them."""
    return {name: buffer.detach().clone() for name, buffer in module.named_buffers()}


@torch.no_grad()
def restore_buffers(module: nn.Module, buffers: dict[str, Tensor]) -> None:
    """Restore the copy from `copy_buffers`: a failed step must not change the running statistics."""
    for name, buffer in module.named_buffers():
        buffer.copy_(buffers[name])


@contextlib.contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Restore a module's buffers and modes and torch's random state at the end of the block."""
    buffers, modes = copy_buffers(module), [(part, part.training) for part in module.modules()]
    devices = {parameter.device for parameter in module.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            restore_buffers(module, buffers)
            for part, training in modes:
                part.training = training
