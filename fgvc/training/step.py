"""One optimiser step over the images of all processes, in one micro-batch or several."""

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
"""Called with a step's number from 1, the module, its inputs as mixed, and a function logits -> their mean loss."""


@dataclass(frozen=True)
class MicroBatch:
    """A part of a step that one process handles at once.

    Attributes:
        index: place in the step, from 0.
        inputs: (B, ...) on the device, as mixed.
        targets: (B,) classes, or (B, num_classes) shares where inputs are mixed.
        random_state: state of torch's generator before it.
    """

    index: int
    inputs: Tensor
    targets: Tensor
    random_state: Tensor


@dataclass(frozen=True)
class Failure:
    """Why a step was not taken: a number in it is not finite.

    Attributes:
        what: numbers that are not finite: "loss", "eigenvalues" or "gradient".
        reason: message, e.g. "the loss is nan".
        batch: micro-batch that failed, for a gradient the last one; None where it failed in another process.
        samples: places in the micro-batch that are known to be the cause.
    """

    what: str
    reason: str
    batch: MicroBatch | None
    samples: tuple[int, ...] = ()


@dataclass(frozen=True)
class StepResult:
    """What became of a step, the same in all processes but for the details of a failure.

    Attributes:
        loss: mean over its images; NaN where the step failed.
        correct: number of images whose class had the largest logit; of mixed ones, the class of the unmixed one.
        flags: number of processes that raised each flag.
        failure: reason why the step was not taken; None where it was.
        scaled_down: whether the loss scaler of fp16 left the step out, and lowered its scale.
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
        accumulation: micro-batches that each process makes of its images of a step.
        clip_norm: largest norm of the gradient; None for no clipping.
        before_step: looks at the module before each step, on its first micro-batch.
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
        """Take one step, or none where a number in it is not finite; then weights and buffers are what they were.

        Args:
            micro_batches: (inputs, targets) of this process on its device, as many as `accumulation`; may be empty
                tensors.
            size: number of images in the step, over all processes.
            number: number of the step, from 1.
            flags: asked once a micro-batch; their sums over all processes are part of the result.
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
            # the gradients of all processes are summed up with those of the last micro-batch
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
                # the processes' gradients are averaged, but their sum is needed
                accelerator.backward(micro_loss * (accelerator.num_processes / size))
            loss, correct = loss + total_loss, correct + int(total_right)

        # from here on the gradient is the same in all processes
        result = StepResult(loss / size, correct, raised)
        accelerator.unscale_gradients(optimizer)
        norm = get_total_norm([p.grad for p in module.parameters() if p.grad is not None])
        if torch.isfinite(norm):
            if self._clip_norm is not None:
                clip_grads_with_norm_(module.parameters(), self._clip_norm, norm)
        elif accelerator.mixed_precision != "fp16":  # whose loss scaler leaves out such a step by itself
            restore_buffers(module, buffers)
            return replace(result, failure=Failure("gradient", f"the norm of the gradient is {float(norm)}", batch))
        optimizer.step()
        if getattr(optimizer, "step_was_skipped", False):
            return replace(result, scaled_down=True)
        if learner.average is not None:
            learner.average.update(learner.plain, step=number)
        return result

    def _forward(self, batch: MicroBatch, classes: Tensor) -> tuple[Tensor, int, Failure | None]:
        """Summed loss and right answers of a micro-batch, or what is not finite in it."""
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
    """A copy of the buffers, such as the running statistics of batch normalisation, which a forward pass changes."""
    return {name: buffer.detach().clone() for name, buffer in module.named_buffers()}


@torch.no_grad()
def restore_buffers(module: nn.Module, buffers: dict[str, Tensor]) -> None:
    """Put back what `copy_buffers` took: the images of a failed step must not stay in the running statistics."""
    for name, buffer in module.named_buffers():
        buffer.copy_(buffers[name])


@contextlib.contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """When the block ends, give a module back its buffers and modes, and torch its random numbers."""
    buffers, modes = copy_buffers(module), [(part, part.training) for part in module.modules()]
    devices = {parameter.device for parameter in module.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            restore_buffers(module, buffers)
            for part, training in modes:
                part.training = training
