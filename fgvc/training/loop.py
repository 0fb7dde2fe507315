"""The training loop: epochs of steps, an evaluation after each, the state saved so that a run can be continued."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import pandas as pd
import torch
from accelerate import Accelerator
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer

from fgvc.errors import ConfigError, DivergenceError
from fgvc.models import FineGrainedModel, PoolingHead
from fgvc.spectral import EigendecompositionError
from fgvc.training.config import RunConfig
from fgvc.training.evaluation import Evaluation, Loader, evaluate, progress_bar
from fgvc.training.hybrid import Stages
from fgvc.training.objective import Objective
from fgvc.training.optim import create_optimizer, schedule_factor, set_learning_rate
from fgvc.training.probe import SpectrumHistory, SpectrumProbe
from fgvc.training.progress import Progress
from fgvc.training.run_folder import RunFolder
from fgvc.training.seeding import EpochShuffle, seed_epoch

_log = logging.getLogger(__name__)

BeforeStep = Callable[[int, nn.Module, Tensor, Callable[[Tensor], Tensor]], None]
"""Called with a step's number from 1, the module, its inputs as mixed, and logits -> the step's loss."""


@dataclass(frozen=True)
class Loaders:
    """Batches of (inputs, targets); `validation` is None where the best epoch is selected on the test split.

    `shuffle` is the sampler of `train`, told the epoch before each pass.
    """

    train: Loader
    shuffle: EpochShuffle
    test: Loader
    validation: Loader | None


class Trainer:
    """Trains one module on prepared loaders and keeps the books in a run folder.

    Args:
        config: the run.
        module: inputs -> logits; a whole model, or a head on cached feature maps. After `fit` it holds the weights
            that were evaluated last.
        loaders: batches for it.
        num_classes: width of the logits.
        accelerator: device, precision and processes.
        folder: where checkpoints and metrics go.
        before_step: looks at the module before each optimiser step; leaves it and the generators as they are.

    Raises:
        ConfigError: unknown optimiser or rate, or `max_steps` ends a hybrid run before its switch.
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
        before_step: BeforeStep | None = None,
    ) -> None:
        self.config = config
        self._before_step = before_step
        self.accelerator = accelerator
        self.folder = folder
        self.progress = Progress()
        self.spectra = SpectrumHistory()
        self._counted = time.perf_counter()
        self.stages = Stages(config, _head(module))
        self.objective = Objective(config.trainer, num_classes)
        self.average = _moving_average(module, config.trainer.ema_decay, accelerator)
        optimizer = create_optimizer(module, config.optimizer)
        self.module: nn.Module = accelerator.prepare(module)
        self.optimizer: Optimizer = accelerator.prepare(optimizer)
        self.loaders = Loaders(
            train=accelerator.prepare(loaders.train),
            shuffle=loaders.shuffle,
            test=accelerator.prepare(loaders.test),
            validation=None if loaders.validation is None else accelerator.prepare(loaders.validation),
        )
        first_stage, limit = self.stages.switch * len(self.loaders.train), config.trainer.max_steps
        if limit is not None and limit <= first_stage:
            raise ConfigError(
                f"trainer.max_steps={limit} ends before the hybrid protocol switches, after {first_stage} steps; "
                "raise it, or lower hybrid.switch_epoch"
            )

    @property
    def evaluated(self) -> nn.Module:
        """What is evaluated and saved: the moving average of the weights where there is one."""
        return self.module if self.average is None else self.average.module

    def fit(self) -> Evaluation:
        """Train to the end, from where `restore` left it; returns the last epoch's evaluation on the test split."""
        evaluation = None
        while self.progress.epoch < self.config.trainer.epochs and not self._out_of_steps():
            evaluation = self._epoch(self.progress.epoch + 1)
            self._save()
        if evaluation is None:
            evaluation = self._evaluate(self.loaders.test, "test")
            _log.info("no epoch to train: test top-1 %.2f %%", evaluation.accuracy.top1)
        if self.progress.best is None:  # no epoch was asked for: the weights the run started from are its result
            held_out = self.loaders.validation
            selector = evaluation if held_out is None else self._evaluate(held_out, "validation")
            self._select_best(self.progress.epoch, selector, evaluation)
        self._write_weights("last")
        self.accelerator.unwrap_model(self.module).load_state_dict(self._weights())
        return evaluation

    def restore(self, source: RunFolder) -> None:
        """Continue from the state saved in a run folder. Raises RunError where it is damaged."""
        state = source.read_state()
        if source.path != self.folder.path and self.accelerator.is_main_process:
            self.folder.write_weights("best", source.read_weights("best"))
        self.accelerator.unwrap_model(self.module).load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.module.load_state_dict(state["average"])
        self.progress = Progress(**state["progress"])
        self.spectra = SpectrumHistory.read(source.spectrum_history_file, self.progress.epoch)
        _log.info("continuing %s after epoch %d", source.path, self.progress.epoch)

    def _epoch(self, epoch: int) -> Evaluation:
        seed_epoch(self.config.seed, epoch)
        self._enter_stage(epoch)
        if epoch == 1:
            self._probe(0)
        start = time.perf_counter()
        row: dict[str, Any] = {"epoch": epoch, **self._train_epoch(epoch)}
        if self.stages.switch:
            row["method"] = self.stages.method(epoch)
        trained = time.perf_counter()
        held_out = self.loaders.validation
        validation = None if held_out is None else self._evaluate(held_out, "validation")
        test = self._evaluate(self.loaders.test, "test")
        for name, evaluation in (("val", validation), ("test", test)):
            if evaluation is not None:
                row |= {f"{name}_loss": evaluation.loss}
                row |= {f"{name}_{key}": value for key, value in evaluation.accuracy.as_dict().items()}
        row |= self._probe(epoch)
        row["seconds"] = round(time.perf_counter() - start, 3)
        self.progress.seconds["train"] += trained - start
        self.progress.seconds["eval"] += time.perf_counter() - trained
        self.progress.epoch = epoch
        self.progress.history.append(row)
        self._select_best(epoch, validation or test, test)
        self.accelerator.log({key: value for key, value in row.items() if key not in ("epoch", "method")}, step=epoch)
        shown = f"loss {row['train_loss']:.4f}, test top-1 {test.accuracy.top1:.2f} %"
        _log.info("epoch %d/%d: %s, %.1f s", epoch, self.config.trainer.epochs, shown, row["seconds"])
        return test

    def _enter_stage(self, epoch: int) -> None:
        """Put the pooling of the epoch's stage into the model and into the average of it."""
        for module in (self.module, self.evaluated):
            self.stages.enter(_head(self.accelerator.unwrap_model(module)), epoch)
        if epoch == self.stages.switch + 1 > 1:
            _log.info(
                "hybrid: from %s to %s, epoch %d on", self.stages.method(epoch - 1), self.stages.method(epoch), epoch
            )

    def _train_epoch(self, epoch: int) -> dict[str, float]:
        """One pass over the training images; returns learning rate, mean loss and top-1 in per cent.

        Of mixed inputs the top-1 counts the class of the unmixed one.
        """
        self.module.train()
        total_loss, correct, seen = 0.0, 0, 0
        rate = 0.0
        for position, (inputs, targets) in self._steps(epoch):
            factor = schedule_factor(self.config.schedule, position, self.config.trainer.epochs)
            rate = set_learning_rate(self.optimizer, factor)
            loss, logits = self._step(inputs, targets, epoch)
            total_loss += loss * len(targets)
            correct += int((logits.argmax(dim=1) == targets).sum())
            seen += len(targets)
        return {"lr": rate, "train_loss": total_loss / seen, "train_top1": 100 * correct / seen}

    def _steps(self, epoch: int) -> "Iterator[tuple[float, tuple[Tensor, Tensor]]]":
        """Batches of an epoch, each with its position in the run in epochs."""
        loader = self.loaders.train
        self.loaders.shuffle.epoch = epoch
        for index, batch in enumerate(progress_bar(loader, f"epoch {epoch}", self.accelerator)):
            if self._out_of_steps():
                return
            yield epoch - 1 + index / len(loader), batch

    def _step(self, inputs: Tensor, targets: Tensor, epoch: int) -> tuple[float, Tensor]:
        """One optimiser step; returns the loss and the logits. Raises DivergenceError on a non-finite number."""
        inputs, wanted = self.objective.mix(inputs, targets)
        if self._before_step is not None:
            loss_of = partial(self.objective.loss, targets=wanted)
            self._before_step(self.progress.step + 1, self.module, inputs, loss_of)
        try:
            logits = self.module(inputs)
        except EigendecompositionError as error:
            raise self._divergence(str(error), epoch) from error
        loss = self.objective.loss(logits, wanted)
        value = float(loss.detach())
        if not torch.isfinite(loss):
            raise self._divergence(f"the loss is {value}", epoch)
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        if self.config.trainer.clip_norm is not None:
            norm = self.accelerator.clip_grad_norm_(self.module.parameters(), self.config.trainer.clip_norm)
            # the loss scaler of fp16 skips such a step by itself
            if self.config.trainer.precision != "fp16" and norm is not None and not torch.isfinite(norm):
                raise self._divergence(f"the norm of the gradient is {float(norm)}", epoch)
        self.optimizer.step()
        self.progress.step += 1
        if self.average is not None:
            self.average.update(self.accelerator.unwrap_model(self.module), step=self.progress.step)
        return value, logits.detach()

    def _divergence(self, what: str, epoch: int) -> DivergenceError:
        good = self.folder.weights_file("best")
        kept = f"the best weights so far are kept in {good}" if good.is_file() else "no epoch was finished"
        return DivergenceError(
            f"{what} in epoch {epoch}, step {self.progress.step + 1}, learning rate "
            f"{self.optimizer.param_groups[0]['lr']:g}; {kept}. Lower optimizer.lr or trainer.clip_norm, "
            "or try method.gradient=exact"
        )

    def _evaluate(self, loader: Loader, name: str) -> Evaluation:
        try:
            evaluation = evaluate(self.evaluated, loader, self.objective.num_classes, self.accelerator, name)
        except EigendecompositionError as error:
            raise self._divergence(f"on the {name} split: {error}", self.progress.epoch + 1) from error
        if not math.isfinite(evaluation.loss):
            raise self._divergence(f"the loss on the {name} split is {evaluation.loss}", self.progress.epoch + 1)
        return evaluation

    def _probe(self, epoch: int) -> dict[str, float]:
        """Look at the spectra of a few test images; returns measures of them, for metrics.csv."""
        count = self.config.trainer.probe_images
        if not (count and self.accelerator.is_main_process):
            return {}
        module = self.accelerator.unwrap_model(self.evaluated)
        # a continued run looks at the images of its history, whose epochs could not be compared otherwise
        probe = SpectrumProbe(self.loaders.test.dataset, count, self.spectra.indices)
        try:
            spectrum = probe.measure(module, self.accelerator.device)
        except EigendecompositionError as error:
            raise self._divergence(f"on the probe's images: {error}", max(epoch, 1)) from error
        self.spectra.add(epoch, spectrum)
        return spectrum.medians()

    def _select_best(self, epoch: int, selector: Evaluation, test: Evaluation) -> None:
        selected_on = "test" if self.loaders.validation is None else "validation"
        # after the switch of the hybrid protocol the selection starts anew: the first stage is another method
        since = self.stages.switch + 1 if epoch > self.stages.switch else 0
        if self.progress.select(epoch, selector.accuracy, test.accuracy, selected_on, since=since):
            self._write_weights("best")

    def _write_weights(self, which: str) -> None:
        if self.accelerator.is_main_process:
            self.folder.write_weights(which, self._weights())

    def _weights(self) -> dict[str, Tensor]:
        return dict(self.accelerator.unwrap_model(self.evaluated).state_dict())

    def count_time(self) -> None:
        """Add the time since the last call to the run's total."""
        now = time.perf_counter()
        self.progress.seconds["total"] += now - self._counted
        self._counted = now

    def _save(self) -> None:
        self.count_time()
        if not self.accelerator.is_main_process:
            return
        self.folder.write_table(self.folder.metrics_file, pd.DataFrame(self.progress.history))
        if self.spectra.epochs:
            self.spectra.write(self.folder.spectrum_history_file)
        state = {
            "model": dict(self.accelerator.unwrap_model(self.module).state_dict()),
            "average": None if self.average is None else self._weights(),
            "optimizer": self.optimizer.state_dict(),
            "progress": asdict(self.progress),
        }
        self.folder.write_state(state)

    def _out_of_steps(self) -> bool:
        limit = self.config.trainer.max_steps
        return limit is not None and self.progress.step >= limit


def _head(module: nn.Module) -> PoolingHead:
    head = module.head if isinstance(module, FineGrainedModel) else module
    assert isinstance(head, PoolingHead)
    return head


def _moving_average(module: nn.Module, decay: float | None, accelerator: Accelerator) -> ModelEmaV3 | None:
    """timm's average, with its warm-up, without which a run of a few thousand steps would keep its first weights."""
    if decay is None:
        return None
    average = ModelEmaV3(module, decay=decay, use_warmup=True)
    accelerator.prepare_model(average.module, evaluation_mode=True)
    return average
