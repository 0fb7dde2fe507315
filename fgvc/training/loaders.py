"""Loaders of a run's splits."""

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from fgvc.data import FeatureSet
from fgvc.training.batches import SeededSamples, StepBatches, epoch_samples
from fgvc.training.config import RunConfig
from fgvc.training.evaluation import Loader
from fgvc.training.interruption import leave_signals_to_the_main_process


@dataclass(frozen=True)
class Loaders:
    """Batches of (inputs, targets); `validation` is None where the best epoch is selected on the test split.

    `train` loads what `batches` says, of `samples`; both are told of each epoch.
    """

    train: Loader
    batches: StepBatches
    samples: FeatureSet | SeededSamples
    test: Loader
    validation: Loader | None


def create_loaders(
    config: RunConfig, accelerator: Accelerator, train: Any, test: Any, validation: Any | None
) -> Loaders:
    """Loaders of the splits, images or feature maps, for one of the accelerator's processes."""
    batches = StepBatches(
        len(train),
        config.trainer.batch_size,
        config.seed,
        accumulation=config.trainer.accumulation,
        process=accelerator.process_index,
        processes=accelerator.num_processes,
    )
    samples = epoch_samples(train)
    training: Any = samples  # its items are tensors by now: an image's transform makes one
    return Loaders(
        train=DataLoader(training, batch_sampler=batches, **_loading(config)),
        batches=batches,
        samples=samples,
        test=in_order(config, test),
        validation=None if validation is None else in_order(config, validation),
    )


def in_order(config: RunConfig, split: Any) -> Loader:
    """Batches for an evaluation of the trained module."""
    return DataLoader(split, batch_size=config.trainer.eval_batch_size, **_loading(config))


def _loading(config: RunConfig) -> dict[str, Any]:
    """How a loader works; of the run's random numbers it takes none."""
    return {
        # cached features are read faster than a worker process could hand them over
        "num_workers": 0 if config.backbone.frozen else config.trainer.workers,
        "worker_init_fn": leave_signals_to_the_main_process,
        "generator": torch.Generator(),
    }
