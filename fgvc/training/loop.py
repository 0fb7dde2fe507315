"""The training loop: epochs of steps, an evaluation after each, and saved states to resume the run."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from torch import Tensor
from tqdm import tqdm

from fgvc.errors import Interrupted, RunError
from fgvc.models.files import write_weights
from fgvc.runs.config import TrainerConfig
from fgvc.runs.folder import RunFolder
from fgvc.spectral import EigendecompositionError
from fgvc.training.batches import Loader, Loaders, duration, progress_bar
from fgvc.training.evaluation import Evaluation, evaluate
from fgvc.training.guard import Guard
from fgvc.training.hybrid import Stages
from fgvc.training.learner import Learner
from fgvc.training.optim import set_learning_rate
from fgvc.training.probe import SpectrumProbe, spectrum_measures
from fgvc.training.processes import Interruption, any_process, gather_objects
from fgvc.training.seeds import derived_seed, generator_states, seed_epoch, set_generator_states
from fgvc.training.states import EpochProgress, Progress, RunLog, StateStore
from fgvc.training.step import Stepper

_log = logging.getLogger(__name__)

_SAY_SECONDS, _SAY_EPOCH_SECONDS = 60.0, 5.0  # least time between two lines: within an epoch, at the end of epochs


class Trainer:
    """Trains a module epoch by epoch. Read `fit` first: it is the whole run.

    Args:
        settings: length of the run, when to save, how many images to probe.
        seed: seed of the run.
        schedule: factor on the learning rate at a position in epochs, with fraction.
        learner: module, loss and optimiser. After `fit` its module holds the weights of the last evaluation.
        stepper: stepper that takes the optimiser steps.
        loaders: batches of the splits.
        guard: guard that checks every step.
        log: progress of the run and its written records.
        folder: folder of the run.
        states: saved states of the run.
        digests: digests of what the run is made from, saved with each state.
        interruption: request to stop, checked between steps.
        stages: poolings of a hybrid run by epoch; None for a run with one stage.
    """

    def __init__(
        self,
        settings: TrainerConfig,
        *,
        seed: int,
        schedule: Callable[[float], float],
        learner: Learner,
        stepper: Stepper,
        loaders: Loaders,
        guard: Guard,
        log: RunLog,
        folder: RunFolder,
        states: StateStore,
        digests: dict[str, str],
        interruption: Interruption,
        stages: Stages | None = None,
    ) -> None:
        self.settings = settings
        self.seed = seed
        self.schedule = schedule
        self.learner = learner
        self.stepper = stepper
        self.loaders = loaders
        self.guard = guard
        self.log = log
        self.folder = folder
        self.states = states
        self.digests = digests
        self.interruption = interruption
        self.stages = stages
        self.accelerator = learner.accelerator
        self._generators: dict[str, Any] | None = None
        self._saved = self._began = self._said = time.perf_counter()
        self._steps_here = 0  # steps since `_began`, with the evaluations between them
        self._probes = settings.probe_images > 0 and self.accelerator.is_main_process
        self._max_steps = math.inf if settings.max_steps is None else settings.max_steps

    @property
    def progress(self) -> Progress:
        """The progress so far."""
        return self.log.progress

    def fit(self) -> Evaluation:
        """Train to the end, from the start or a restored state; return the last evaluation on the test split.

        Raises:
            DivergenceError: a number is not finite, or the loss diverges and `trainer.on_divergence` is "stop".
            Interrupted: a signal asked to stop; the state is saved.
        """
        test = None
        # a started epoch is evaluated and counted, even if the run was stopped after its last step
        self._began = time.perf_counter()
        while self.progress.part is not None or (
            self.progress.epoch < self.settings.epochs and self.progress.step < self._max_steps
        ):
            epoch = self.progress.epoch + 1
            self._train_epoch(epoch)
            self._stop_if_asked()
            test = self._evaluate_epoch(epoch)
            self._save()
        if test is None:
            test = self._evaluate(self.loaders.test, "test")
            _log.info("no epoch to train: test top-1 %.2f %%", test.accuracy.top1)
        if self.progress.best is None:  # no epochs: the initial weights are the result
            held_out = self.loaders.validation
            self._select_best(
                self.progress.epoch, test if held_out is None else self._evaluate(held_out, "validation"), test
            )
        if self.accelerator.is_main_process:
            write_weights(self.folder.weights_file("last"), self.learner.weights(), epoch=self.progress.epoch)
        self.learner.finish()
        return test

    def restore(self, source: RunFolder, states: StateStore) -> None:
        """Continue from the newest undamaged state of the run in `source`.

        Raises:
            RunError: there is no state, or the processes read different ones because that run is still training.
        """
        state = states.read()
        if len(set(gather_objects(self.accelerator, state["progress"]["step"]))) > 1:
            raise RunError(f"{source.path} is still training: its states change; wait for it, or stop it")
        self.learner.load_state_dict(state)
        self.log.load_state_dict(state, source)
        if self.progress.watch is not None:
            self.guard.watch.load_state_dict(self.progress.watch)
        generators, processes = state["generators"], self.accelerator.num_processes
        if generators is not None and len(generators) == processes:
            self._generators = generators[self.accelerator.process_index]
        elif generators is not None:
            _log.warning(
                "the state is from %d processes and there are now %d: mixup and dropout draw other random numbers for "
                "the rest of this epoch",
                *(len(generators), processes),
            )
        _log.info("continuing %s after %s", source.path, self._position())

    def _train_epoch(self, epoch: int) -> None:
        """Take the remaining steps of an epoch, or those until a signal."""
        part = self._begin_epoch(epoch)
        batches = self.loaders.batches
        bar = progress_bar(self.loaders.train, f"epoch {epoch}/{self.settings.epochs}", self.accelerator)
        loaded = iter(bar)
        for step in range(part.steps, batches.steps):
            if self.progress.step >= self._max_steps:
                break
            part.rate = set_learning_rate(self.learner.optimizer, self.schedule(epoch - 1 + step / batches.steps))
            size, micro_batches = batches.step_size(step), self._micro_batches(loaded, step)
            result = self.stepper.optimizer_step(micro_batches, size, self.progress.step + 1, self._flags)
            for _ in micro_batches:  # drop the rest of a failed step
                pass
            self.progress.step += 1
            part.steps += 1
            part.scaled_down += result.scaled_down
            if result.failure is None:
                part.loss += result.loss * size
                part.correct += result.correct
                part.seen += size
            self.guard.check(result, self.progress)
            self._say_where(bar, part)
            stop, save = result.flags
            # several processes must agree through the flags; a single process can stop at once
            if stop or (self.accelerator.num_processes == 1 and self.interruption.requested is not None):
                break
            if save:
                part.seconds += self.log.count_time("train")
                self._save()
        part.seconds += self.log.count_time("train")

    def _say_where(self, bar: "tqdm[Any]", part: EpochProgress) -> None:
        """Show the time left of the whole run and the best result so far, without a terminal once a minute."""
        progress, steps, now = self.progress, self.loaders.batches.steps, time.perf_counter()
        self._steps_here += 1
        total = min(self.settings.epochs * steps, self._max_steps)
        left = (now - self._began) / self._steps_here * (total - progress.step)
        best = "" if progress.best is None else f", best test top-1 {progress.best['top1']:.2f} %"
        bar.set_postfix_str(f"run: {duration(left)} left{best}", refresh=False)
        if bar.disable and now - self._said >= _SAY_SECONDS:
            self._said = now
            loss = part.loss / part.seen if part.seen else math.nan
            epoch = f"epoch {progress.epoch + 1}/{self.settings.epochs}, step {part.steps}/{steps}"
            _log.info("%s: loss %.4f%s, %s left", epoch, loss, best, duration(left))

    def _begin_epoch(self, epoch: int) -> EpochProgress:
        """Seed an epoch, shuffle its images and put its pooling into the model; or continue a started epoch."""
        begun = self.progress.part
        self.progress.part = part = EpochProgress() if begun is None else begun
        if self.stages is not None:
            for head in self.learner.heads:
                self.stages.enter(head, epoch)
            if epoch == self.stages.switch + 1:
                before, after = self.stages.method(epoch - 1), self.stages.method(epoch)
                _log.info("hybrid: switched from %s to %s at epoch %d", before, after, epoch)
        seed_epoch(self.seed, epoch, self.accelerator.process_index)
        if self._generators is not None and begun is not None:
            set_generator_states(self._generators)
        self._generators = None
        if self._probes and epoch == 1 and begun is None:
            self._probe(0)
        self.log.count_time()
        self.learner.module.train()
        self.loaders.batches.start_epoch(epoch, part.steps)
        self.loaders.samples.start_epoch(derived_seed(self.seed, "samples", epoch))
        return part

    def _micro_batches(self, loaded: Iterator[tuple[Tensor, Tensor]], step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this process's micro-batches of a step, on its device."""
        device, batches = self.accelerator.device, self.loaders.batches
        for index, (inputs, targets) in enumerate(islice(loaded, batches.accumulation)):
            size = len(batches.indices(step, index))  # 0 if one image was loaded for an empty micro-batch
            yield inputs[:size].to(device, non_blocking=True), targets[:size].to(device, non_blocking=True)

    def _flags(self) -> list[bool]:
        """Return whether a signal asked this process to stop, and, in the main process, whether a save is due."""
        settings, now = self.settings, time.perf_counter()
        due = settings.save_minutes is not None and now - self._saved >= 60 * settings.save_minutes
        due |= settings.save_steps is not None and (self.progress.step + 1) % settings.save_steps == 0
        return [self.interruption.requested is not None, due and self.accelerator.is_main_process]

    def _evaluate_epoch(self, epoch: int) -> Evaluation:
        """Evaluate after an epoch, add its row of metrics, select the best; return the evaluation on the test split."""
        part = self.progress.part
        assert part is not None
        held_out = self.loaders.validation
        validation = None if held_out is None else self._evaluate(held_out, "validation")
        test = self._evaluate(self.loaders.test, "test")
        row = part.row(epoch)
        if self.settings.precision == "fp16":
            row["loss_scale_skips"] = part.scaled_down
        if self.settings.on_non_finite == "skip":
            row["skipped_steps"] = part.skipped
        for name, evaluation in (("val", validation), ("test", test)):
            if evaluation is not None:
                row[f"{name}_loss"] = evaluation.loss
                row |= {f"{name}_{key}": value for key, value in vars(evaluation.accuracy).items()}
        row |= self._probe(epoch) if self._probes else {}
        if self.stages is not None:
            row["method"] = self.stages.method(epoch)
        row["seconds"] = round(part.seconds + self.log.count_time("eval"), 3)
        self.log.finish_epoch(row)
        self._select_best(epoch, validation or test, test)
        self.accelerator.log({key: value for key, value in row.items() if key not in ("epoch", "method")}, step=epoch)
        now = time.perf_counter()
        if now - self._said >= _SAY_EPOCH_SECONDS or epoch in (1, self.settings.epochs):
            self._said = now
            shown = f"loss {row['train_loss']:.4f}, test top-1 {test.accuracy.top1:.2f} %"
            _log.info("epoch %d/%d: %s, %.1f s", epoch, self.settings.epochs, shown, row["seconds"])
        return test

    def _evaluate(self, loader: Loader, name: str) -> Evaluation:
        try:
            evaluation = evaluate(
                self.learner.evaluated, loader, self.accelerator, name, before_batch=self._stop_if_asked
            )
        except EigendecompositionError as error:
            raise self.guard.stopped(f"on the {name} split: {error}", self.progress) from error
        if not math.isfinite(evaluation.loss):
            raise self.guard.stopped(f"the loss on the {name} split is {evaluation.loss}", self.progress)
        return evaluation

    def _probe(self, epoch: int) -> dict[str, float]:
        """Record the spectra of a few test images; return their measures for metrics.csv."""
        history = self.log.spectra
        # a resumed run keeps the images of its history, otherwise its epochs could not be compared
        kept = history.spectra[-1].indices if history.spectra else None
        indices = [] if kept is None else kept.tolist()
        probe = SpectrumProbe(self.loaders.test.dataset, self.settings.probe_images, indices)
        try:
            spectrum = probe.measure(self.learner.plain_evaluated, self.accelerator.device)
        except EigendecompositionError as error:
            raise self.guard.stopped(f"on the probe's images: {error}", self.progress) from error
        history.epochs.append(epoch)
        history.spectra.append(spectrum)
        return spectrum_measures(spectrum)

    def _select_best(self, epoch: int, decisive: Evaluation, test: Evaluation) -> None:
        selected_on = "test" if self.loaders.validation is None else "validation"
        switch = 0 if self.stages is None else self.stages.switch
        # after the hybrid switch only later epochs count, since the first stage is another method
        since = switch + 1 if epoch > switch else 0
        if self.progress.select(epoch, decisive.accuracy, test.accuracy, selected_on, since=since):
            self.log.keep_best(self.learner.weights())

    def _stop_if_asked(self) -> None:
        """Save and end the run in all processes if one of them got a signal."""
        requested = self.interruption.requested
        if not any_process(self.accelerator, requested is not None):
            return
        self._save()
        name = "SIGTERM" if requested is None else requested.name  # another process got the signal
        done = f"{name}: stopped after {self._position()}, saved"
        raise Interrupted(name, f"{done}; start the same command again to continue")

    def _save(self) -> None:
        """Write the state; all processes must call this."""
        self.log.count_time()
        self._saved = time.perf_counter()
        # between two epochs the generators are not needed, since the next epoch seeds them
        begun = self.progress.part is not None
        generators = gather_objects(self.accelerator, generator_states()) if begun else None
        if not self.accelerator.is_main_process:
            return
        self.log.write()
        self.progress.watch = self.guard.watch.state_dict()
        state = {**self.learner.state_dict(), **self.log.state_dict(), "generators": generators}
        if not begun and self.progress.best is not None and self.progress.best["epoch"] == self.progress.epoch:
            state["best"] = self.learner.weights()  # equal to the copy; torch writes the same tensor once
        self.states.write(state, epoch=self.progress.epoch, step=self.progress.step, digests=self.digests)

    def _position(self) -> str:
        """Return the position of the run in words."""
        part, steps = self.progress.part, self.loaders.batches.steps
        if part is None:
            return f"epoch {self.progress.epoch}"
        return f"step {part.steps} of {steps} of epoch {self.progress.epoch + 1}"
