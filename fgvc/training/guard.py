"""What a run does about a step whose numbers are not finite, and about a loss that grows and stays grown.

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

SAVED_STEPS = 3  # per process at most: later ones are a consequence more often than a cause
_LISTED = 5  # names in a line of a message


class LossWatch:
    """Watches the loss of each step and names a divergence.

    The smoothed loss is the median of the last `window` losses, fewer at first. A divergence is a smoothed loss above
    both `factor` times its lowest value so far and 0.9 log(num_classes), about the loss of guessing, for `window` steps
    in a row. So a few bad batches are none, nor a warm-up or a restart of the learning rate, nor a run that never
    learns; a network that collapses to guessing after it has learned is one.

    The defaults were measured on heads on frozen features of 80 classes. Heads that learn in the end, with AdamW or SGD
    at up to 1000 times the recipe's learning rate, reach up to 3.8 times the lowest value; heads that do not, with SGD
    at 10000 times it, reach 1e10 times within 70 steps.
    """

    def __init__(self, *, num_classes: int, factor: float = 5.0, window: int = 50) -> None:
        self.factor, self.window = factor, window
        # collapsed networks hover about log(num_classes), or below it where the classes are of unequal size
        self._guessing = 0.9 * math.log(num_classes)
        self._recent: deque[float] = deque(maxlen=window)
        self._lowest = math.inf
        self._above = 0

    def update(self, loss: float) -> str | None:
        """Take the finite loss of a step; returns what is wrong with the run, once a window at most, or None."""
        self._recent.append(loss)
        if len(self._recent) < self.window / 5:  # a median of fewer says little about where the run began
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
            f"{self.factor:g} times the lowest so far, {self._lowest:.4g}, and above guessing, {self._guessing:.4g}; "
            f"it is {smoothed:.4g} now"
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, from which another watch with the same arguments goes on in the same way."""
        return {"recent": list(self._recent), "lowest": self._lowest, "above": self._above}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; a shorter window takes the last losses."""
        self._recent = deque(state["recent"], maxlen=self.window)
        self._lowest, self._above = float(state["lowest"]), int(state["above"])


class Guard:
    """Looks at every step: names the cause of a failed one, saves it, and stops the run or leaves the step out.

    Args:
        settings: policies and their limits: `on_non_finite`, `max_skips`, `on_divergence`, `divergence_*`.
        learner: takes the steps; after a failed step it has the weights before it.
        loaders: say which images are in a step.
        folder: folder of the run.
    """

    def __init__(self, settings: TrainerConfig, learner: Learner, loaders: Loaders, folder: RunFolder) -> None:
        self.watch = LossWatch(
            num_classes=learner.objective.num_classes,
            factor=settings.divergence_factor,
            window=settings.divergence_window,
        )
        self._settings = settings
        self._learner = learner
        self._loaders = loaders
        self._folder = folder

    def check(self, result: StepResult, progress: Progress) -> None:
        """Look at the last step, which is counted in `progress` already.

        Raises:
            DivergenceError: the step failed, or the loss diverges, and the policy is to stop.
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
        _log.warning("left out step %d (%d of %d): %s", progress.step, progress.skipped, settings.max_skips, text)

    def stopped(self, reason: str, progress: Progress, *details: str) -> DivergenceError:
        """The error that ends the run for a reason, with what is known of it."""
        good = self._folder.weights_file("best")
        kept = f"the best weights so far are kept in {good}" if good.is_file() else "no epoch was finished"
        rate = self._learner.optimizer.param_groups[0]["lr"]
        where = f"{reason} in epoch {progress.epoch + 1}, step {progress.step}, learning rate {rate:g}"
        advice = "Lower optimizer.lr or trainer.clip_norm, or try method.gradient=exact"
        return DivergenceError(f"{'; '.join([where, *details, kept])}. {advice}")

    def _investigate(self, failure: Failure, progress: Progress) -> list[str]:
        """Causes in words, and the file of the saved step; nothing where it failed in another process."""
        batch, module = failure.batch, self._learner.plain
        if batch is None or progress.part is None:
            return []
        images = [self._loaders.paths[i] for i in self._loaders.batches.indices(progress.part.steps - 1, batch.index)]
        if batch.targets.dim() == 2 and len(images) % 2 == 0:  # mixed in pairs
            images = [f"{a} + {b}" for a, b in zip(images, reversed(images), strict=True)]
        # to repeat the step in one of several processes would wait for the others
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
            lines.append(f"it begins in {cause.layer}")
        if cause.samples and not bad_inputs and not bad_weights:
            lines.append(f"it comes from {_listed([images[i] for i in cause.samples])}")
        if failure.what == "gradient":  # of the whole step, of which this micro-batch may be a part
            bad = non_finite_entries({name: p.grad for name, p in module.named_parameters() if p.grad is not None})
            finite = "each gradient is finite, their norm is not"
            lines.append(f"gradients that are not finite: {_listed(bad)}" if bad else finite)
        file = self._save(failure.reason, batch, images, progress)
        return [*lines, *([] if file is None else [f"the step is saved in {file}"])]

    def _save(self, reason: str, batch: MicroBatch, images: list[str], progress: Progress) -> Path | None:
        """Save a failed step; None where `SAVED_STEPS` are saved already, or it cannot be written."""
        rank, folder = self._learner.accelerator.process_index, self._folder.failed_steps
        if len(list(folder.glob(f"process{rank}-*.pt"))) >= SAVED_STEPS:
            return None
        content = {
            "reason": reason,
            "epoch": progress.epoch + 1,
            "step": progress.step,
            "images": images,
            "num_classes": self._learner.objective.num_classes,
            "inputs": batch.inputs.cpu(),
            "targets": batch.targets.cpu(),
            "random_state": batch.random_state,
            "weights": {name: tensor.cpu() for name, tensor in self._learner.plain.state_dict().items()},
        }
        file = folder / f"process{rank}-step-{progress.step:06d}.pt"
        try:
            # opened here: of a file that torch opens, it does not say that the disk is full
            with atomic_path(file) as temporary, temporary.open("wb") as opened:
                torch.save(content, opened)
        except OSError as error:  # the message about the step matters more
            _log.warning("step %d could not be saved: %s", progress.step, error)
            return None
        return file


@dataclass(frozen=True)
class Cause:
    """Where a number that is not finite appears first when a step is repeated.

    Attributes:
        layer: description of the first layer that hands on such a number, e.g. "the output of head.pooling"; None where
            there is none.
        samples: places in the batch that show it.
    """

    layer: str | None
    samples: list[int]


def find_cause(
    module: nn.Module, inputs: Tensor, targets: Tensor, loss_of: Callable[[Tensor, Tensor], Tensor]
) -> Cause:
    """Repeat a step and find the first layer, and the samples, with a number that is not finite.

    Batch normalisation in training mixes the samples. Where no sample or every one shows the number, each is repeated
    alone, in evaluation mode. Weights, buffers, gradients, modes and torch's random numbers are left as they are.

    Args:
        module: inputs -> logits, not wrapped for several processes.
        inputs: (B, ...), as the step saw them; targets: (B,) classes or (B, num_classes) shares.
        loss_of: the mean loss of logits and targets.
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
    """The cause that one forward and backward pass show; None where all numbers are finite."""
    found: list[Cause] = []
    entered: list[str] = []

    def note(where: str, tensor: Tensor) -> None:
        if not found and not tensor.isfinite().all():
            rows, rest = divmod(len(tensor) if tensor.dim() else 0, len(inputs))  # several rows a sample: windows
            bad = sorted({row // rows for row in non_finite_samples(tensor)}) if rows and not rest else []
            found.append(Cause(where, bad))

    def before(layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        entered.append(names[layer])
        for argument in arguments:
            # nested layers read the same tensor; the innermost one is named
            if isinstance(argument, Tensor) and argument.requires_grad and not any(layer.children()):
                where = f"the gradient that leaves {names[layer]}"
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
    """Indices of the samples of (B, ...) that are not finite."""
    indices: list[int] = (~tensor.isfinite().reshape(len(tensor), -1).all(dim=1)).nonzero().flatten().tolist()
    return indices


def non_finite_entries(tensors: Mapping[str, Tensor]) -> list[str]:
    """The tensors that are not finite, as "head.reduction.0.weight (3 of 512 entries)"."""
    counts = {name: int((~tensor.isfinite()).sum()) for name, tensor in tensors.items()}
    return [f"{name} ({count} of {tensors[name].numel()} entries)" for name, count in counts.items() if count]


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
