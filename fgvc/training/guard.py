"""Reaction of a run to a step with numbers that are not finite, and to a loss that grew and stays high.

"Not finite" is NaN or infinite. A failed step is saved in RUN/failed_steps/; docs/running.md shows how to load it.
"""

import logging
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from fgvc.errors import DivergenceError
from fgvc.io import atomic_path
from fgvc.runs.config import TrainerConfig
from fgvc.runs.folder import RunFolder
from fgvc.spectral import EigendecompositionError
from fgvc.training.batches import Loaders
from fgvc.training.learner import Learner
from fgvc.training.states import Progress
from fgvc.training.step import Failure, MicroBatch, StepResult, untouched

_log = logging.getLogger(__name__)

SAVED_STEPS = 3  # at most per process: later failures are usually consequences of the first ones
_LISTED = 5  # names in one message


class LossWatch:
    """Watches the loss of each step and reports divergence.

    The smoothed loss is the median of the last `window` losses, fewer at first. The loss diverges if the smoothed loss
    stays above two limits for `window` steps in a row: `factor` times its lowest value so far and 0.9 times
    `guessing`, the loss of guessing. This ignores a few bad batches, a warm-up, a restart of the learning rate and a
    run that never learns. It reports a network that learned and then collapses to guessing.

    The defaults were measured with heads on frozen features of 80 classes. Heads that learn in the end (AdamW or SGD,
    up to 1000 times the recipe's learning rate) reach up to 3.8 times the lowest value. Heads that do not learn (SGD,
    10000 times that rate) reach 1e10 times within 70 steps.
    """

    def __init__(self, *, guessing: float, factor: float = 5.0, window: int = 50) -> None:
        self.factor, self.window = factor, window
        # collapsed networks stay near the loss of guessing, or below it if the classes have unequal sizes
        self._guessing = 0.9 * guessing
        self._recent: deque[float] = deque(maxlen=window)
        self._lowest = math.inf
        self._above = 0

    def update(self, loss: float) -> str | None:
        """Add the finite loss of a step; return a message if the loss diverges, at most once per window, else None."""
        self._recent.append(loss)
        if len(self._recent) < self.window / 5:  # a median of fewer losses is not a reliable starting level
            return None
        smoothed = median(self._recent)
        self._lowest = min(self._lowest, smoothed)
        grown = smoothed > max(self.factor * self._lowest, self._guessing)
        self._above = self._above + 1 if grown else 0
        if self._above < self.window:
            return None
        self._above = 0
        return (
            f"the training loss diverges: for {self.window} steps its median over {self.window} steps has been above "
            f"{self.factor:g} times its lowest value, {self._lowest:.4g}, and above guessing, {self._guessing:.4g}; "
            f"it is {smoothed:.4g} now"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers; another watch with the same arguments can continue from them."""
        return {"recent": list(self._recent), "lowest": self._lowest, "above": self._above}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state; a shorter window keeps only the last losses."""
        self._recent = deque(state["recent"], maxlen=self.window)
        self._lowest, self._above = float(state["lowest"]), int(state["above"])


class Guard:
    """Checks every step: names the cause of a failure, saves the failed step, and stops the run or skips the step.

    Args:
        settings: policies and their limits: `on_non_finite`, `max_skips`, `on_divergence`, `divergence_*`.
        learner: learner of the run; after a failed step it still has the weights from before.
        loaders: loaders with the images of each step.
        folder: folder of the run.
    """

    def __init__(self, settings: TrainerConfig, learner: Learner, loaders: Loaders, folder: RunFolder) -> None:
        self.watch = LossWatch(
            guessing=learner.objective.guessing,
            factor=settings.divergence_factor,
            window=settings.divergence_window,
        )
        self._settings = settings
        self._learner = learner
        self._loaders = loaders
        self._folder = folder

    def check(self, result: StepResult, progress: Progress) -> None:
        """Check the last step; `progress` already counts it.

        Raises:
            DivergenceError: the step failed or the loss diverges, and the policy is to stop.
        """
        settings = self._settings
        if result.failure is None:
            problem = self.watch.update(result.loss)
            if problem is None or settings.on_divergence == "ignore":
                return
            if settings.on_divergence == "stop":
                raise self.stopped(problem, progress)
            _log.warning("%s (epoch %d, step %d)", problem, progress.epoch + 1, progress.step)
            return
        reason, details = result.failure.reason, self._investigate(result.failure, progress)
        if settings.on_non_finite == "stop":
            raise self.stopped(reason, progress, *details)
        assert progress.part is not None
        progress.skipped += 1
        progress.part.skipped += 1
        if progress.skipped > settings.max_skips:
            limit = f"more than trainer.max_skips={settings.max_skips} steps failed"
            raise self.stopped(reason, progress, limit, *details)
        text = "; ".join([reason, *details])
        _log.warning("skipped step %d (%d of %d): %s", progress.step, progress.skipped, settings.max_skips, text)

    def stopped(self, reason: str, progress: Progress, *details: str) -> DivergenceError:
        """Return the error that ends the run, with the reason, details and the best weights so far."""
        best = self._folder.weights_file("best")
        kept = f"the best weights so far are saved in {best}" if best.is_file() else "no epoch was finished"
        rate = self._learner.optimizer.param_groups[0]["lr"]
        where = f"{reason} in epoch {progress.epoch + 1}, step {progress.step}, learning rate {rate:g}"
        advice = "Lower optimizer.lr or trainer.clip_norm, or try method.gradient=exact"
        return DivergenceError(f"{'; '.join([where, *details, kept])}. {advice}")

    def _investigate(self, failure: Failure, progress: Progress) -> list[str]:
        """Return the causes in words and the file of the saved step; empty if the step failed in another process."""
        batch, module = failure.batch, self._learner.plain
        if batch is None or progress.part is None:
            return []
        images = [self._loaders.paths[i] for i in self._loaders.batches.indices(progress.part.steps - 1, batch.index)]
        if batch.targets.dim() == 2 and len(images) % 2 == 0:  # mixed in pairs
            images = [f"{a} + {b}" for a, b in zip(images, reversed(images), strict=True)]
        # repeating the step in one of several processes would wait for the others forever
        cause = Cause(None, list(failure.samples) if len(failure.samples) < len(images) else [])
        if self._learner.accelerator.num_processes == 1:
            with self._learner.accelerator.autocast():
                cause = find_cause(module, batch.inputs, batch.targets, self._learner.objective.mean)
        bad_inputs = non_finite_samples(batch.inputs)
        bad_weights = non_finite_entries(dict(module.named_parameters()))
        lines = []
        if bad_inputs:
            lines.append(f"inputs that are not finite: {_listed([images[i] for i in bad_inputs])}")
        if bad_weights:
            lines.append(f"weights that are not finite: {_listed(bad_weights)}")
        if cause.layer is not None:
            lines.append(f"first seen in {cause.layer}")
        if cause.samples and not bad_inputs and not bad_weights:
            lines.append(f"caused by {_listed([images[i] for i in cause.samples])}")
        if failure.what == "gradient":  # the gradient of the whole step; this micro-batch may be only a part of it
            bad = non_finite_entries({name: p.grad for name, p in module.named_parameters() if p.grad is not None})
            finite = "each gradient is finite, but their norm is not"
            lines.append(f"gradients that are not finite: {_listed(bad)}" if bad else finite)
        file = self._save(failure.reason, batch, images, progress)
        return [*lines, *([] if file is None else [f"the step is saved in {file}"])]

    def _save(self, reason: str, batch: MicroBatch, images: list[str], progress: Progress) -> Path | None:
        """Save a failed step; return None if `SAVED_STEPS` are saved already, or on a write error."""
        rank, folder = self._learner.accelerator.process_index, self._folder.failed_steps
        if len(list(folder.glob(f"process{rank}-*.pt"))) >= SAVED_STEPS:
            return None
        content = {
            "reason": reason,
            "epoch": progress.epoch + 1,
            "step": progress.step,
            "images": images,
            "num_classes": self._learner.objective.num_classes,
            "adjustment": self._learner.objective.adjustment,
            "soft": self._learner.objective.soft,
            "inputs": batch.inputs.cpu(),
            "targets": batch.targets.cpu(),
            "random_state": batch.random_state,
            "weights": {name: tensor.cpu() for name, tensor in self._learner.plain.state_dict().items()},
        }
        file = folder / f"process{rank}-step-{progress.step:06d}.pt"
        try:
            # opened here, since torch does not report a full disk for files that it opens itself
            with atomic_path(file) as temporary, temporary.open("wb") as opened:
                torch.save(content, opened)
        except OSError as error:  # only a warning, since the message about the step matters more
            _log.warning("step %d could not be saved: %s", progress.step, error)
            return None
        return file


@dataclass(frozen=True)
class Cause:
    """The origin of a number that is not finite, found by repeating a step.

    Attributes:
        layer: Description of the first place with such a number, e.g. "the output of head.pooling"; None if there is
            none.
        samples: Indices in the batch of the samples with such a number.
    """

    layer: str | None
    samples: list[int]


def find_cause(
    module: nn.Module, inputs: Tensor, targets: Tensor, loss_of: Callable[[Tensor, Tensor], Tensor]
) -> Cause:
    """Repeat a step and find the first layer, and the samples, with a number that is not finite.

    Batch normalisation in training mixes the samples. So if no sample or every sample is affected, each is repeated
    alone, in evaluation mode. Weights, buffers, gradients, modes and torch's random numbers do not change.

    Args:
        module: inputs -> logits, not wrapped for several processes.
        inputs: (B, ...) inputs of the step; targets: (B,) classes or (B, num_classes) shares.
        loss_of: mean loss of logits and targets.
    """
    with untouched(module):
        found = _repeat(module, inputs, targets, loss_of)
    if found is None:
        return Cause(None, [])
    if len(found.samples) not in (0, len(inputs)):
        return found
    with untouched(module):
        module.eval()
        singles = zip(torch.split(inputs, 1), torch.split(targets, 1), strict=True)
        alone = [i for i, single in enumerate(singles) if _repeat(module, *single, loss_of) is not None]
    return Cause(found.layer, alone or found.samples)


def _repeat(
    module: nn.Module, inputs: Tensor, targets: Tensor, loss_of: Callable[[Tensor, Tensor], Tensor]
) -> Cause | None:
    """Return the cause found in one forward and backward pass; None if all numbers are finite."""
    found: list[Cause] = []
    entered: list[str] = []

    def note(where: str, tensor: Tensor) -> None:
        if not found and not tensor.isfinite().all():
            rows, rest = divmod(len(tensor) if tensor.dim() else 0, len(inputs))  # several rows per sample: windows
            bad = sorted({row // rows for row in non_finite_samples(tensor)}) if rows and not rest else []
            found.append(Cause(where, bad))

    def before(layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        entered.append(names[layer])
        for argument in arguments:
            # nested layers read the same tensor; name the innermost one
            if isinstance(argument, Tensor) and argument.requires_grad and not any(layer.children()):
                where = f"the input gradient of {names[layer]}"
                argument.register_hook(partial(note, where))  # type: ignore[no-untyped-call]

    def after(_layer: nn.Module, _arguments: tuple[Any, ...], output: object) -> None:
        name = entered.pop()
        if isinstance(output, Tensor):
            note(f"the output of {name}", output)

    names = {layer: name or "the model" for name, layer in module.named_modules()}
    handles = [layer.register_forward_pre_hook(before) for layer in names]
    handles += [layer.register_forward_hook(after) for layer in names]
    try:
        with torch.enable_grad():
            loss = loss_of(module(inputs), targets)
            if not found:
                trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
                gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
                for name, gradient in zip(trained, gradients, strict=True):
                    if gradient is not None and not found and not gradient.isfinite().all():
                        found.append(Cause(f"the gradient of {name}", []))
    except EigendecompositionError as error:
        return found[0] if found else Cause(f"the eigenvalues of {entered[-1]}", list(error.items))
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def non_finite_samples(tensor: Tensor) -> list[int]:
    """Return the indices of the samples in (B, ...) that are not finite."""
    return (~tensor.isfinite().reshape(len(tensor), -1).all(dim=1)).nonzero().flatten().tolist()


def non_finite_entries(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the tensors that are not finite, as "head.reduction.0.weight (3 of 512 entries)"."""
    counts = {name: int((~tensor.isfinite()).sum()) for name, tensor in tensors.items()}
    return [f"{name} ({count} of {tensors[name].numel()} entries)" for name, count in counts.items() if count]


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
