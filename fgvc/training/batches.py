"""Which images make a step, and what is random in them: functions of seed, epoch and image alone.

Neither the number of processes, nor of loader workers, nor where a run was interrupted has a say in them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset, Sampler

from fgvc.data import FeatureSet, ImageDataset
from fgvc.runs.config import RunConfig
from fgvc.training.evaluation import Loader
from fgvc.training.processes import leave_signals_to_the_main_process
from fgvc.training.seeds import derived_seed, seeded


class StepBatches(Sampler[list[int]]):
    """Indices of range(n), shuffled anew in each epoch and cut into steps; of each step, the parts of one process.

    A step of `batch_size` images, fewer in an epoch's last one, is parted evenly among `accumulation` rounds of
    `processes`. An empty part, as the last step may have, stands as one index: a batch that is loaded has images. Its
    true size is in `part_size`.

    The loop sets `epoch` and `start`. There is no `set_epoch` on purpose: accelerate would call it with a count of its
    own, which starts anew in a continued run.

    Args:
        n: number of images.
        batch_size: images in a step, over all its parts.
        seed: of the run.
        accumulation: batches a process makes of its images of a step.
        process, processes: whose parts these are.
    """

    def __init__(
        self, n: int, batch_size: int, seed: int, *, accumulation: int = 1, process: int = 0, processes: int = 1
    ) -> None:
        self.n = n
        self.batch_size = batch_size
        self.seed = seed
        self.accumulation = accumulation
        self.process = process
        self.processes = processes
        self.epoch = 0
        self.start = 0
        """The first step to be taken, from 0."""

    @property
    def steps(self) -> int:
        """In a whole epoch."""
        return -(-self.n // self.batch_size)

    def __len__(self) -> int:
        return (self.steps - self.start) * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        order = self._order()
        for step in range(self.start, self.steps):
            for round_ in range(self.accumulation):
                yield self._indices(order, step, round_)

    def indices(self, step: int, round_: int) -> list[int]:
        """What is loaded in a round of a step, from 0."""
        return self._indices(self._order(), step, round_)

    def step_size(self, step: int) -> int:
        """Images in a step, over all its parts."""
        return min(self.batch_size, self.n - step * self.batch_size)

    def part_size(self, step: int, round_: int) -> int:
        """Images in this process's part of a round."""
        first, last = self._part(step, round_)
        return last - first

    def _order(self) -> list[int]:
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "shuffle", self.epoch))
        order: list[int] = torch.randperm(self.n, generator=generator).tolist()
        return order

    def _indices(self, order: list[int], step: int, round_: int) -> list[int]:
        images = order[step * self.batch_size : (step + 1) * self.batch_size]
        first, last = self._part(step, round_)
        return images[first:last] or images[:1]

    def _part(self, step: int, round_: int) -> tuple[int, int]:
        size, parts = self.step_size(step), self.accumulation * self.processes
        part = round_ * self.processes + self.process
        return size * part // parts, size * (part + 1) // parts


def epoch_samples(split: ImageDataset | FeatureSet) -> "FeatureSet | SeededSamples":
    """A split for training: feature maps, which bring their randomness along, or images."""
    return split if isinstance(split, FeatureSet) else SeededSamples(split)


class SeededSamples(Dataset[tuple[Any, int]]):
    """Images whose augmentation is drawn from a seed of their own in each epoch.

    Args:
        images: their transform draws from the generators of Python, NumPy and torch.
    """

    def __init__(self, images: ImageDataset) -> None:
        self.images = images
        self._seed = 0

    @property
    def paths(self) -> list[Path]:
        """Image files."""
        return self.images.paths

    def start_epoch(self, seed: int) -> None:
        """Take what is random in the images from `seed` from now on."""
        self._seed = seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        with seeded(derived_seed(self._seed, index)):
            return self.images[index]


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


def _loading(config: RunConfig, samples: Any) -> dict[str, Any]:
    """What is loaded, and how; of the run's random numbers a loader takes none."""
    # cached features are read faster than a worker process could hand them over
    workers = 0 if config.backbone.frozen else config.trainer.workers
    return {
        "dataset": samples,
        "num_workers": workers,
        "worker_init_fn": leave_signals_to_the_main_process,
        "generator": torch.Generator(),
    }
