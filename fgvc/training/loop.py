"""The training loop: epochs of steps, an evaluation after each, the state saved so that a run can be continued."""

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from fgvc.errors import Interrupted, RunError
from fgvc.models import FineGrainedModel, PoolingHead
from fgvc.models.files import write_weights
from fgvc.runs.config import RunConfig
from fgvc.runs.folder import RunFolder
from fgvc.spectral import EigendecompositionError
from fgvc.training.batches import Loaders
from fgvc.training.check import check_steps
from fgvc.training.evaluation import Evaluation, Loader, evaluate, progress_bar
from fgvc.training.guard import Guard
from fgvc.training.hybrid import Stages
from fgvc.training.learner import Learner, Objective, head_of
from fgvc.training.optim import schedule_factor, set_learning_rate
from fgvc.training.probe import SpectrumProbe, spectrum_measures
from fgvc.training.processes import Interruption, any_of, gather_objects
from fgvc.training.seeds import derived_seed, generator_states, seed_epoch, set_generator_states
from fgvc.training.states import Books, PartOfEpoch, Progress, StateStore
from fgvc.training.step import BeforeStep, Stepper

_log = logging.getLogger(__name__)

Parts = Iterator[tuple[Tensor, Tensor]]


class Trainer:
    """Trains one module on prepared loaders and keeps the books in a run folder.

    Args:
        config: the run.
        module: inputs -> logits; a whole model, or a head on cached feature maps. After `fit` it holds the weights
            that were evaluated last.
        loaders: batches for it.
        num_classes: width of the logits.
        accelerator: device, precision and processes.
        folder: where states and metrics go.
        interruption: asked between steps whether to stop.
        started: `time.perf_counter` at the beginning of the run; its total counts from there.
        before_step: looks at the module before each optimiser step; leaves it and the generators as they are.

    Raises:
        ConfigError: unknown optimiser or rate, `max_steps` ends a hybrid run before its switch, or a batch that is to
            be mixed is parted into odd parts.
    """

    def __init__(
        self,
        config: RunConfig,
        module: FineGrainedModel | PoolingHead,
        loaders: Loaders,
        *,
        num_classes: int,
        accelerator: Accelerator,
        folder: RunFolder,
        interruption: Interruption,
        started: float,
        before_step: BeforeStep | None = None,
    ) -> None:
        check_steps(config, loaders.batches.steps, accelerator.num_processes)
        self.config = config
        self.accelerator = accelerator
        self.folder = folder
        self.books = Books(config, folder, writes=accelerator.is_main_process, started=started)
        self.stages = Stages(config, head_of(module))
        self.objective = Objective(config.trainer, num_classes)
        self.learner = Learner(config, module, accelerator)
        # the training batches are parted by StepBatches already
        self.loaders = replace(
            loaders,
            test=accelerator.prepare(loaders.test),
            validation=None if loaders.validation is None else accelerator.prepare(loaders.validation),
        )
        self.guard = Guard(config, self.learner, self.objective, self.loaders, folder)
        self._stepper = Stepper(config.trainer, self.learner, self.objective, before_step)
        self._interruption = interruption
        self._generators: dict[str, Any] | None = None
        self._saved = time.perf_counter()

    @property
    def progress(self) -> Progress:
        """What has been done so far."""
        return self.books.progress

    def fit(self) -> Evaluation:
        """Train to the end, from where `restore` left it; returns the last epoch's evaluation on the test split.

        Raises:
            DivergenceError: a number that is not finite, or, as `trainer.on_divergence` has it, a loss out of bounds.
            Interrupted: a signal asked to stop; the state is saved.
        """
        evaluation = None
        # an epoch that was begun is evaluated and counted, even if the run was stopped after the last of its steps
        while self.progress.part is not None or self._has_another_epoch():
            evaluation = self._epoch(self.progress.epoch + 1)
            self._save()
        if evaluation is None:
            evaluation = self._evaluate(self.loaders.test, "test")
            _log.info("no epoch to train: test top-1 %.2f %%", evaluation.accuracy.top1)
        if self.progress.best is None:  # no epoch was asked for: the weights the run started from are its result
            held_out = self.loaders.validation
            selector = evaluation if held_out is None else self._evaluate(held_out, "validation")
            self._select_best(self.progress.epoch, selector, evaluation)
        if self.accelerator.is_main_process:
            write_weights(self.folder.weights_file("last"), self.learner.weights())
        self.learner.finish()
        return evaluation

    def restore(self, source: RunFolder) -> None:
        """Continue from the newest whole state saved in a run folder.

        Raises:
            RunError: there is none, or the processes found different ones, as the run there is still training.
        """
        state = StateStore(source.checkpoints).read()
        if len(set(gather_objects(self.accelerator, state["progress"]["step"]))) > 1:
            raise RunError(f"{source.path} is still training: its states change; wait for it, or stop it")
        self.learner.load_state_dict(state)
        self.books.load_state_dict(state, source)
        if self.progress.watch is not None:
            self.guard.watch.load_state_dict(self.progress.watch)
        where = f"epoch {self.progress.epoch}"
        if self.progress.part is not None:
            self._generators = self._own_generators(state["generators"])
            where = f"step {self.progress.part.steps} of epoch {self.progress.epoch + 1}"
        _log.info("continuing %s after %s", source.path, where)

    def _own_generators(self, states: list[dict[str, Any]]) -> dict[str, Any] | None:
        if len(states) != self.accelerator.num_processes:
            _log.warning(
                "the state is of %d processes, there are %d now: mixup and dropout draw other numbers than they would "
                "have in the rest of this epoch",
                *(len(states), self.accelerator.num_processes),
            )
            return None
        own: dict[str, Any] = states[self.accelerator.process_index]
        return own

    def _epoch(self, epoch: int) -> Evaluation:
        self._enter_stage(epoch)
        begun = self.progress.part
        part = begun or PartOfEpoch()
        if begun is None or self._generators is None:
            seed_epoch(self.config.seed, epoch, self.accelerator.process_index)
        else:
            set_generator_states(self._generators)
        self._generators = None
        if epoch == 1 and begun is None:
            self._probe(0)
        self.books.count_time()
        self.progress.part = part
        self._train_epoch(epoch, part)
        part.seconds += self.books.count_time("train")
        self._stop_if_asked()
        held_out = self.loaders.validation
        validation = None if held_out is None else self._evaluate(held_out, "validation")
        test = self._evaluate(self.loaders.test, "test")
        row = self.books.row(epoch, part, validation, test) | self._probe(epoch)
        if self.stages.switch:
            row["method"] = self.stages.method(epoch)
        row["seconds"] = round(part.seconds + self.books.count_time("eval"), 3)
        self.books.finish_epoch(row)
        self._select_best(epoch, validation or test, test)
        self.accelerator.log({key: value for key, value in row.items() if key not in ("epoch", "method")}, step=epoch)
        shown = f"loss {row['train_loss']:.4f}, test top-1 {test.accuracy.top1:.2f} %"
        _log.info("epoch %d/%d: %s, %.1f s", epoch, self.config.trainer.epochs, shown, row["seconds"])
        return test

    def _enter_stage(self, epoch: int) -> None:
        """Put the pooling of the epoch's stage into the model and into the average of it."""
        for head in self.learner.heads:
            self.stages.enter(head, epoch)
        if epoch == self.stages.switch + 1 > 1:
            _log.info(
                "hybrid: from %s to %s, epoch %d on", self.stages.method(epoch - 1), self.stages.method(epoch), epoch
            )

    def _train_epoch(self, epoch: int, part: PartOfEpoch) -> None:
        """The steps of an epoch that are still to be taken, or those until a signal; counted in `part`."""
        self.learner.module.train()
        batches = self.loaders.batches
        batches.epoch, batches.start = epoch, part.steps
        self.loaders.samples.start_epoch(derived_seed(self.config.seed, "samples", epoch))
        loaded = iter(progress_bar(self.loaders.train, f"epoch {epoch}", self.accelerator))
        for step in range(part.steps, batches.steps):
            if self._out_of_steps():
                return
            position = epoch - 1 + step / batches.steps
            factor = schedule_factor(self.config.schedule, position, self.config.trainer.epochs)
            part.rate = set_learning_rate(self.learner.optimizer, factor)
            size = batches.step_size(step)
            parts = self._parts(loaded, step)
            result = self._stepper.take(parts, size, self.progress.step + 1, self._flags)
            for _ in parts:  # what a failed step has left of its rounds
                pass
            self.progress.step += 1
            part.count(result, size)
            self.guard.check(result, self.progress, part)
            stop, save = result.flags
            # several processes must agree; one need not wait for the next step to see what came in this one
            if stop or (self.accelerator.num_processes == 1 and self._interruption.requested is not None):
                return
            if save:
                part.seconds += self.books.count_time("train")
                self._save()

    def _parts(self, loaded: Parts, step: int) -> Parts:
        """This process's batches of a step, on its device."""
        device, batches = self.accelerator.device, self.loaders.batches
        for round_, (inputs, targets) in enumerate(islice(loaded, batches.accumulation)):
            size = batches.part_size(step, round_)
            yield inputs[:size].to(device, non_blocking=True), targets[:size].to(device, non_blocking=True)

    def _flags(self) -> list[bool]:
        """Of this process: a signal asks to stop; the state is to be saved, which the main process decides."""
        trainer, now = self.config.trainer, time.perf_counter()
        due = trainer.save_minutes is not None and now - self._saved >= 60 * trainer.save_minutes
        due |= trainer.save_steps is not None and (self.progress.step + 1) % trainer.save_steps == 0
        return [self._interruption.requested is not None, due and self.accelerator.is_main_process]

    def _stop_if_asked(self) -> None:
        """Save and end the run, in all processes, where a signal has come to one of them."""
        requested = self._interruption.requested
        if not any_of(self.accelerator, requested is not None):
            return
        self._save()
        part, steps = self.progress.part, self.loaders.batches.steps
        done = f"{self.progress.epoch} epochs"
        if part is not None:
            done = f"step {part.steps} of {steps} of epoch {self.progress.epoch + 1}"
        name = "SIGTERM" if requested is None else requested.name  # another process was asked
        raise Interrupted(name, f"{name}: stopped after {done}, saved; start the same command again to continue")

    def _evaluate(self, loader: Loader, name: str) -> Evaluation:
        model, classes = self.learner.evaluated, self.objective.num_classes
        try:
            evaluation = evaluate(model, loader, classes, self.accelerator, name, before_batch=self._stop_if_asked)
        except EigendecompositionError as error:
            raise self.guard.stopped(f"on the {name} split: {error}", self.progress) from error
        if not math.isfinite(evaluation.loss):
            raise self.guard.stopped(f"the loss on the {name} split is {evaluation.loss}", self.progress)
        return evaluation

    def _probe(self, epoch: int) -> dict[str, float]:
        """Look at the spectra of a few test images; returns measures of them, for metrics.csv."""
        count = self.config.trainer.probe_images
        if not (count and self.accelerator.is_main_process):
            return {}
        history = self.books.spectra
        # a continued run looks at the images of its history, whose epochs could not be compared otherwise
        kept = history.spectra[-1].indices if history.spectra else None
        indices = [] if kept is None else kept.tolist()
        probe = SpectrumProbe(self.loaders.test.dataset, count, indices)
        try:
            spectrum = probe.measure(self.learner.plain_evaluated, self.accelerator.device)
            history.epochs.append(epoch)
            history.spectra.append(spectrum)
            return spectrum_measures(spectrum)
        except EigendecompositionError as error:
            raise self.guard.stopped(f"on the probe's images: {error}", self.progress) from error

    def _select_best(self, epoch: int, selector: Evaluation, test: Evaluation) -> None:
        selected_on = "test" if self.loaders.validation is None else "validation"
        # after the switch of the hybrid protocol the selection starts anew: the first stage is another method
        since = self.stages.switch + 1 if epoch > self.stages.switch else 0
        if self.progress.select(epoch, selector.accuracy, test.accuracy, selected_on, since=since):
            self.books.keep_best(self.learner.weights())

    def _save(self) -> None:
        """Write the state, for which all processes must come here."""
        self.books.count_time()
        self._saved = time.perf_counter()
        # between two epochs nothing is drawn from them that the next one does not seed
        begun = self.progress.part is not None
        generators = gather_objects(self.accelerator, generator_states()) if begun else None
        if not self.accelerator.is_main_process:
            return
        self.books.write()
        self.progress.watch = self.guard.watch.state_dict()
        state = {**self.learner.state_dict(), **self.books.state_dict(), "generators": generators}
        StateStore(self.folder.checkpoints).write(state, epoch=self.progress.epoch, step=self.progress.step)

    def _has_another_epoch(self) -> bool:
        return self.progress.epoch < self.config.trainer.epochs and not self._out_of_steps()

    def _out_of_steps(self) -> bool:
        limit = self.config.trainer.max_steps
        return limit is not None and self.progress.step >= limit
