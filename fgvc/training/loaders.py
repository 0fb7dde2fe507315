"""Loaders of a run's splits."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from fgvc.data import FeatureSet, WatchedSamples, naming_files
from fgvc.training.batches import SeededSamples, StepBatches, epoch_samples
from fgvc.training.config import RunConfig
from fgvc.training.evaluation import Loader
from fgvc.training.interruption import leave_signals_to_the_main_process

Result = TypeVar("Result")


@dataclass(frozen=True)
class Loaders:
    """Batches of (inputs, targets); `validation` is None where the best epoch is selected on the test split.

    `train` loads what `batches` says, of `samples`; both are told of each epoch. `paths` are the training images'.
    """

    train: Loader
    batches: StepBatches
    samples: FeatureSet | SeededSamples
    paths: list[str]
    test: Loader
    validation: Loader | None


def create_loaders(
    config: RunConfig, accelerator: Accelerator, paths: list[str], train: Any, test: Any, validation: Any | None
) -> Loaders:
    """Loaders of the splits, images or feature maps, for one of the accelerator's processes.

    `paths` are of the training images.
    """
    batches = StepBatches(
        len(train),
        config.trainer.batch_size,
        config.seed,
        accumulation=config.trainer.accumulation,
        process=accelerator.process_index,
        processes=accelerator.num_processes,
    )
    samples = epoch_samples(train)
    return Loaders(
        train=DataLoader(**_loading(config, samples), batch_sampler=batches),
        batches=batches,
        samples=samples,
        paths=paths,
        test=in_order(config, test),
        validation=None if validation is None else in_order(config, validation),
    )


def in_order(config: RunConfig, split: Any) -> Loader:
    """Batches for an evaluation of the trained module."""
    return DataLoader(**_loading(config, split), batch_size=config.trainer.eval_batch_size)


def naming_the_file(loader: Loader, body: Callable[[], Result]) -> Result:
    """Call `body`, which reads the loader; of a worker that dies, DatasetError names the file."""
    watched: Any = loader.dataset
    if not isinstance(watched, WatchedSamples):
        return body()
    samples: Any = watched.dataset
    return naming_files(body, watched, samples.paths)


def _loading(config: RunConfig, samples: Any) -> dict[str, Any]:
    """What is loaded, and how; of the run's random numbers a loader takes none."""
    # cached features are read faster than a worker process could hand them over
    workers = 0 if config.backbone.frozen else config.trainer.workers
    return {
        "dataset": WatchedSamples(samples, workers) if workers else samples,
        "num_workers": workers,
        "worker_init_fn": leave_signals_to_the_main_process,
        "generator": torch.Generator(),
    }
