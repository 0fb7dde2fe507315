"""What a run does about a step with NaN or infinity in it, and about a loss that has left its bounds."""

import logging
from dataclasses import replace

from torch import Tensor

from fgvc.errors import DivergenceError
from fgvc.runs.config import RunConfig
from fgvc.runs.folder import RunFolder
from fgvc.training.batches import Loaders
from fgvc.training.diagnosis import (
    Diagnosis,
    diagnose,
    non_finite_gradients,
    non_finite_parameters,
    non_finite_samples,
)
from fgvc.training.divergence import LossWatch
from fgvc.training.learner import Learner, Objective
from fgvc.training.replay import Replay, keep_replay
from fgvc.training.states import PartOfEpoch, Progress
from fgvc.training.step import Failure, StepResult

_log = logging.getLogger(__name__)


class Guard:
    """Keeps a failed step for `scripts/replay.py`, names its cause, and stops the run or leaves the step out.

    Args:
        config: the run.
        learner: what takes the steps; of a failed one it has the weights before it.
        objective: the loss.
        loaders: say which images are in a step.
        folder: of the run.
    """

    def __init__(
        self, config: RunConfig, learner: Learner, objective: Objective, loaders: Loaders, folder: RunFolder
    ) -> None:
        trainer = config.trainer
        self.watch = LossWatch(
            num_classes=objective.num_classes, factor=trainer.divergence_factor, window=trainer.divergence_window
        )
        self._config = config
        self._learner = learner
        self._objective = objective
        self._loaders = loaders
        self._folder = folder

    def check(self, result: StepResult, progress: Progress, part: PartOfEpoch) -> None:
        """Look at the last step, which is counted in `progress` already.

        Raises:
            DivergenceError: it failed, or the loss has left its bounds, and the policy is to stop.
        """
        trainer = self._config.trainer
        if result.failure is None:
            problem = self.watch.update(result.loss)
            if problem is None or trainer.on_divergence == "ignore":
                return
            if trainer.on_divergence == "stop":
                raise self.stopped(problem, progress)
            _log.warning("%s (epoch %d, step %d)", problem, progress.epoch + 1, progress.step)
            return
        failure, details = result.failure, self._investigate(result.failure, progress, part)
        if trainer.on_non_finite == "stop":
            raise self.stopped(failure.reason, progress, *details)
        progress.skipped += 1
        part.skipped += 1
        if progress.skipped > trainer.max_skips:
            limit = f"more than trainer.max_skips={trainer.max_skips} steps failed"
            raise self.stopped(failure.reason, progress, limit, *details)
        told = "; ".join([failure.reason, *details])
        _log.warning("left out step %d (%d of %d): %s", progress.step, progress.skipped, trainer.max_skips, told)

    def stopped(self, reason: str, progress: Progress, *details: str) -> DivergenceError:
        """The error that ends the run for a reason, with what is known of it."""
        good = self._folder.weights_file("best")
        kept = f"the best weights so far are kept in {good}" if good.is_file() else "no epoch was finished"
        rate = self._learner.optimizer.param_groups[0]["lr"]
        where = f"{reason} in epoch {progress.epoch + 1}, step {progress.step}, learning rate {rate:g}"
        advice = "Lower optimizer.lr or trainer.clip_norm, or try method.gradient=exact"
        return DivergenceError(f"{'; '.join([where, *details, kept])}. {advice}")

    def _investigate(self, failure: Failure, progress: Progress, part: PartOfEpoch) -> list[str]:
        """Causes, and where the step is kept; nothing where it failed in another process."""
        if failure.inputs is None or failure.wanted is None or failure.generator is None:
            return []
        module, inputs, wanted = self._learner.plain, failure.inputs, failure.wanted
        images = self._images(part.steps - 1, failure.round_, inputs, wanted)
        if self._learner.accelerator.num_processes == 1:
            with self._learner.accelerator.autocast():
                found = diagnose(module, inputs, wanted, self._objective.loss)
        else:  # to repeat the step here alone, batch normalisation would wait for the other processes
            # where all images show it, batch normalisation has spread it
            spread = len(failure.items) == len(inputs)
            found = Diagnosis(
                failure.what,
                parameters=non_finite_parameters(module),
                inputs=non_finite_samples(inputs),
                samples=[] if spread else list(failure.items),
            )
        if failure.what == "gradient":  # of the whole step, of which this batch may be a part
            found = replace(found, what="gradient", gradients=non_finite_gradients(module))
        lines = [line for line in found.lines(images) if line != failure.reason]
        replay = Replay(
            what=failure.what,
            reason=failure.reason,
            config=self._config,
            weights=dict(module.state_dict()),
            inputs=inputs,
            targets=wanted,
            num_classes=self._objective.num_classes,
            paths=images,
            epoch=progress.epoch + 1,
            step=progress.step,
            learning_rate=float(self._learner.optimizer.param_groups[0]["lr"]),
            random_state=failure.generator,
            process=self._learner.accelerator.process_index,
        )
        file = keep_replay(self._folder.path, replay)
        return [*lines, *([] if file is None else [f"the step is kept: fgvc replay {file}"])]

    def _images(self, step: int, round_: int, inputs: Tensor, wanted: Tensor) -> list[str]:
        """What each input is made of."""
        indices = self._loaders.batches.indices(step, round_)[: len(inputs)]
        names = [self._loaders.paths[index] for index in indices]
        mixed = wanted.dim() == 2 and len(names) % 2 == 0
        return [f"{a} + {b}" for a, b in zip(names, reversed(names), strict=True)] if mixed else names
