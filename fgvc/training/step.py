"""One optimiser step over the images of all processes, in one batch or several."""

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from fgvc.runs.config import TrainerConfig
from fgvc.spectral import EigendecompositionError
from fgvc.training.learner import Learner, Objective
from fgvc.training.processes import total
from fgvc.training.untouched import copy_buffers, restore_buffers

BeforeStep = Callable[[int, nn.Module, Tensor, Callable[[Tensor], Tensor]], None]
"""Called with a step's number from 1, the module, its inputs as mixed, and logits -> their mean loss."""


@dataclass(frozen=True)
class Failure:
    """Why a step was not taken.

    Attributes:
        what: is not finite: "loss", "eigenvalues" or "gradient".
        reason: e.g. "the loss is nan".
        round_: of the step's batches, from 0, the one that failed; of a gradient the last.
        inputs, wanted: of that batch in this process, as mixed; None where it failed in another process.
        items: places in the batch that are known to be the cause.
        generator: state of torch's generator before the batch.
    """

    what: str
    reason: str
    round_: int = 0
    inputs: Tensor | None = None
    wanted: Tensor | None = None
    items: tuple[int, ...] = ()
    generator: Tensor | None = None


@dataclass(frozen=True)
class StepResult:
    """What a step came to, the same in all processes but for the details of a failure.

    Attributes:
        loss: mean over its images.
        correct: images whose class had the largest logit; of mixed ones, the class of the unmixed one.
        flags: how many processes raised each flag.
        failure: None where the step was taken.
        scaled_down: the loss scaler of fp16 left the step out, and lowered its scale.
    """

    loss: float
    correct: int
    flags: tuple[int, ...]
    failure: Failure | None = None
    scaled_down: bool = False


class Stepper:
    """Takes the optimiser steps of a run.

    Args:
        config: of the loop.
        learner: what takes them.
        objective: the loss.
        before_step: looks at the module before each step, on its first batch.
    """

    def __init__(
        self, config: TrainerConfig, learner: Learner, objective: Objective, before_step: BeforeStep | None
    ) -> None:
        self._config = config
        self._learner = learner
        self._module = learner.module
        self._optimizer = learner.optimizer
        self._accelerator = learner.accelerator
        self._objective = objective
        self._before_step = before_step

    def take(
        self, batches: Iterable[tuple[Tensor, Tensor]], size: int, number: int, flags: Callable[[], list[bool]]
    ) -> StepResult:
        """One step, or none where a number in it is not finite; then weights and statistics are what they were.

        Args:
            batches: the parts of this process, (inputs, targets) on its device, as many as `accumulation`; may be
                empty tensors.
            size: images in the step, over all its parts.
            number: of the step, from 1.
            flags: asked once a batch; what they are in all processes is part of the result.
        """
        buffers = copy_buffers(self._module)
        self._optimizer.zero_grad()
        loss, correct, raised = 0.0, 0, [0.0]
        last: Failure | None = None
        for round_, (inputs, targets) in enumerate(batches):
            generator = torch.get_rng_state()
            inputs, wanted = self._objective.mix(inputs, targets)
            if self._before_step is not None and round_ == 0:
                self._before_step(number, self._module, inputs, partial(self._objective.loss, targets=wanted))
            # the gradients of all processes are summed up with those of the last round
            alone = self._accelerator.no_sync(self._module) if round_ < self._config.accumulation - 1 else nullcontext()
            last = Failure("gradient", "", round_, inputs, wanted, (), generator)
            with alone:
                part, own, failure = self._forward(inputs, targets, wanted, last)
                numbers = [float(part.detach()), own, failure is not None, *flags()]
                part_loss, part_correct, failed, *raised = total(self._accelerator, [float(n) for n in numbers])
                if failed:
                    self._undo(buffers)
                    elsewhere = Failure("loss", "a number in another process is not finite", round_)
                    return StepResult(math.nan, 0, tuple(map(int, raised)), failure or elsewhere)
                # the processes' gradients are averaged: their sum is meant
                self._accelerator.backward(part * (self._accelerator.num_processes / size))
            loss, correct = loss + part_loss, correct + int(part_correct)
        assert last is not None
        return self._update(StepResult(loss / size, correct, tuple(map(int, raised))), number, buffers, last)

    def _forward(
        self, inputs: Tensor, targets: Tensor, wanted: Tensor, batch: Failure
    ) -> tuple[Tensor, int, Failure | None]:
        """Summed loss, right answers, and what is wrong."""
        try:
            logits = self._module(inputs)
        except EigendecompositionError as error:
            failure = replace(batch, what="eigenvalues", reason=str(error), items=tuple(error.items))
            return inputs.new_zeros(()), 0, failure
        loss = self._objective.total(logits, wanted)
        if not torch.isfinite(loss):
            failure = replace(batch, what="loss", reason=f"the loss is {float(loss.detach())}")
            return inputs.new_zeros(()), 0, failure
        return loss, int((logits.detach().argmax(dim=1) == targets).sum()), None

    def _update(self, result: StepResult, number: int, buffers: dict[str, Tensor], last: Failure) -> StepResult:
        """Clip the gradient, which is the same in all processes by now, and step."""
        self._accelerator.unscale_gradients(self._optimizer)
        norm = get_total_norm([p.grad for p in self._module.parameters() if p.grad is not None])
        if torch.isfinite(norm):
            if self._config.clip_norm is not None:
                clip_grads_with_norm_(self._module.parameters(), self._config.clip_norm, norm)
        elif self._config.precision != "fp16":  # whose loss scaler leaves out such a step by itself
            self._undo(buffers, keep_gradient=True)
            return replace(result, failure=replace(last, reason=f"the norm of the gradient is {float(norm)}"))
        self._optimizer.step()
        scaled_down = bool(getattr(self._optimizer, "step_was_skipped", False))
        if not scaled_down:
            self._learner.average_in(number)
        return replace(result, scaled_down=scaled_down)

    def _undo(self, buffers: dict[str, Tensor], *, keep_gradient: bool = False) -> None:
        restore_buffers(self._module, buffers)
        if not keep_gradient:
            self._optimizer.zero_grad()
