"""The images of each step, and the loaders that read them.

The number of processes, the number of loader workers and interruptions do not change the images of a step.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from fgvc.data import FeatureSet, ImageDataset, TransformSpec, collate
from fgvc.training.processes import leave_signals_to_the_main_process
from fgvc.training.seeds import SeededSamples, derived_seed

_log = logging.getLogger(__name__)


class StepBatches(Sampler[list[int]]):
    """Yields the micro-batches of one process: indices of range(n), shuffled in each epoch and cut into steps.

    With `weights` an epoch draws n images with replacement. To get other random augmentation, the image i drawn at
    position p is then index i + p n: `SeededSamples` takes it for image i, with random numbers of its own.

    A step has `batch_size` images, fewer at the end of an epoch. They are split evenly among `accumulation` x
    `processes` micro-batches. In the last step some of these may be empty. A loader cannot load an empty batch, so it
    loads one image instead, and the loop drops it.

    There is no `set_epoch` on purpose: accelerate would call it with its own count, which starts at 0 in a resumed run.

    Args:
        n: number of images.
        batch_size: number of images in a step, over all processes.
        seed: seed of the run.
        accumulation: number of micro-batches per process and step.
        process: rank of this process.
        processes: number of processes.
        weights: (n,) relative frequency of each image in an epoch, see `sampling_weights`; None takes each once.
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        seed: int,
        *,
        accumulation: int = 1,
        process: int = 0,
        processes: int = 1,
        weights: Tensor | None = None,
    ) -> None:
        self.n = n
        self.batch_size = batch_size
        self.accumulation = accumulation
        self.steps = -(-n // batch_size)  # per epoch, rounded up
        self._seed = seed
        self._process = process
        self._processes = processes
        self._weights = weights
        self.start_epoch(0)

    def start_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Draw the order of an epoch and start at `first_step`; earlier steps are done already."""
        generator = torch.Generator().manual_seed(derived_seed(self._seed, "shuffle", epoch))
        if self._weights is None:
            order = torch.randperm(self.n, generator=generator)
        else:
            drawn = torch.multinomial(self._weights, self.n, replacement=True, generator=generator)
            order = drawn + self.n * torch.arange(self.n)
        self._order: list[int] = order.tolist()
        self._first_step = first_step

    def __len__(self) -> int:
        return (self.steps - self._first_step) * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self._first_step, self.steps):
            for micro_batch in range(self.accumulation):
                yield self._draws(step, micro_batch) or [self._order[step * self.batch_size]]

    def indices(self, step: int, micro_batch: int) -> list[int]:
        """Return the images of one micro-batch of this process, may be empty; `step` and `micro_batch` count from 0."""
        return [draw % self.n for draw in self._draws(step, micro_batch)]

    def _draws(self, step: int, micro_batch: int) -> list[int]:
        draws = self._order[step * self.batch_size : (step + 1) * self.batch_size]
        part, parts = micro_batch * self._processes + self._process, self.accumulation * self._processes
        return draws[len(draws) * part // parts : len(draws) * (part + 1) // parts]

    def step_size(self, step: int) -> int:
        """Return the number of images in a step, over all processes."""
        return min(self.batch_size, self.n - step * self.batch_size)


def sampling_weights(sampler: str, targets: Sequence[int]) -> Tensor | None:
    """Return `weights` of `StepBatches` for a `trainer.sampler`: 1 / number of images of the class, (n,) float64."""
    classes = torch.tensor(targets)
    return None if sampler == "shuffle" else 1 / classes.bincount().double()[classes]


class DeviceLoader:
    """Batches (inputs, targets) on a device, as the trained module reads them.

    Cached feature maps become float32 on the device, and maps that are not cached are computed there.

    Attributes:
        dataset: The inputs one by one.

    Args:
        loader: loader of the batches.
        dataset: see above.
        device: device of the batches.
    """

    def __init__(self, loader: DataLoader[tuple[Tensor, Tensor]], dataset: Dataset[Any], device: torch.device) -> None:
        self.dataset = dataset
        self._loader = loader
        self._device = device

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        ready = self.dataset.maps if isinstance(self.dataset, ComputedFeatures) else Tensor.float
        for inputs, targets in self._loader:
            moved = inputs.to(self._device, non_blocking=True)
            yield ready(moved), targets.to(self._device, non_blocking=True)


Loader = DataLoader[tuple[Tensor, Tensor]] | DeviceLoader


def smallest_batch(n: int, batch_size: int, accumulation: int) -> int:
    """Return the number of images in the smallest micro-batch of an epoch over n images, over all processes."""
    return max((n % batch_size or batch_size) // accumulation, 1)


class ComputedFeatures(Dataset[tuple[Tensor, int]]):
    """Feature maps of labelled images that are computed whenever they are read; used like a `FeatureSet`.

    `features[i]` is (feature map (C, h, w), class index). Before `start_epoch` it is that of the image without random
    augmentation.

    Attributes:
        images: The images with the augmentation of an epoch.

    Args:
        images: dataset whose transform is a `TransformSpec`.
        extract: (B, 3, H, W) float32 on `device`, channels last -> (B, C, h, w), in evaluation mode.
        batch_size: number of images in one call of `extract`.
        device: device of `extract`.
    """

    def __init__(
        self, images: ImageDataset, extract: Callable[[Tensor], Tensor], batch_size: int, device: torch.device
    ) -> None:
        assert isinstance(images.transform, TransformSpec)
        self.images = SeededSamples(images)
        self._plain = images.with_transform(images.transform.deterministic())
        self._read: ImageDataset | SeededSamples = self._plain
        self._extract = extract
        self._batch_size = batch_size
        self._device = device

    def start_epoch(self, seed: int) -> None:
        """Use `seed` for the augmentation from now on."""
        self.images.start_epoch(seed)
        self._read = self.images

    @torch.no_grad()
    def maps(self, images: Tensor) -> Tensor:
        """Compute maps: (B, 3, H, W) -> (B, C, h, w) on the device."""
        batch = images.to(self._device, non_blocking=True).contiguous(memory_format=torch.channels_last)
        return torch.cat([self._extract(part) for part in torch.split(batch, self._batch_size)])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, int]]:
        """Several items in one computation; a DataLoader calls this."""
        images, targets = collate([self._read[index] for index in indices])
        return list(zip(self.maps(images), targets.tolist(), strict=True))


@dataclass(frozen=True)
class Loaders:
    """Batches of (inputs, targets).

    Attributes:
        train: Loader of the training batches.
        batches: Batch sampler of `train`; needs `start_epoch`.
        samples: Samples of `train`; need `start_epoch`.
        paths: Files of the training images.
        test: Loader of the test split.
        validation: Loader of the held-out images; None if the best epoch is selected on the test split.
    """

    train: Loader
    batches: StepBatches
    samples: FeatureSet | ComputedFeatures | SeededSamples
    paths: list[str]
    test: Loader
    validation: Loader | None


def create_loaders(
    train: ImageDataset | FeatureSet | ComputedFeatures,
    test: Dataset[Any],
    validation: Dataset[Any] | None,
    accelerator: Accelerator,
    *,
    paths: list[str],
    seed: int,
    batch_size: int,
    accumulation: int,
    eval_batch_size: int,
    workers: int | None,
    weights: Tensor | None = None,
) -> Loaders:
    """Create the loaders of all splits (images or feature maps) for this process."""
    batches = StepBatches(
        len(paths),
        batch_size,
        seed,
        accumulation=accumulation,
        process=accelerator.process_index,
        processes=accelerator.num_processes,
        weights=weights,
    )
    samples = SeededSamples(train) if isinstance(train, ImageDataset) else train
    return Loaders(
        train=create_loader(samples, workers, accelerator, batch_sampler=batches),
        batches=batches,
        samples=samples,
        paths=paths,
        test=create_loader(test, workers, accelerator, batch_size=eval_batch_size),
        validation=None
        if validation is None
        else create_loader(validation, workers, accelerator, batch_size=eval_batch_size),
    )


def progress_bar(loader: Loader, name: str, accelerator: Accelerator) -> "tqdm[tuple[Tensor, Tensor]]":
    """Wrap a loader in a progress bar, shown only on a terminal, by one process, and if the log shows progress."""
    shown = accelerator.is_local_main_process and _log.isEnabledFor(logging.INFO)
    # None: off if stderr is not a terminal
    return tqdm(loader, desc=name, leave=False, disable=None if shown else True, unit="batch")


def duration(seconds: float) -> str:
    """Return a duration in words, e.g. "2 h 5 min", "3 min" or "40 s"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min" if minutes else f"{rest} s"


def loader_workers(workers: int | None) -> int:
    """Return the number of image-loading processes; None means the share of this process of the cores, at most 8."""
    if workers is not None:
        return workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1), 8)


def _read_maps(maps: FeatureSet, indices: list[int]) -> tuple[Tensor, Tensor]:
    return maps.batch([index % len(maps) for index in indices])


def create_loader(
    samples: Any,
    workers: int | None,
    accelerator: Accelerator,
    *,
    batch_size: int = 1,
    batch_sampler: StepBatches | None = None,
) -> DeviceLoader:
    """Create a loader of images or feature maps, in their order or in that of `batch_sampler`.

    Without a `batch_sampler`, each process gets its part of the batches. `workers` as in `loader_workers`.
    """
    cached = isinstance(samples, FeatureSet)
    read: Any = samples.images if isinstance(samples, ComputedFeatures) else samples
    join: Callable[[list[Any]], Any] = collate
    if cached:  # a whole batch is read at once, by the indices of `StepBatches`
        read, join = range(len(samples) ** (1 if batch_sampler is None else 2)), partial(_read_maps, samples)
    # reading cached features is faster than sending them from a worker process
    number = 0 if cached else loader_workers(workers)
    loader = DataLoader(
        read,
        batch_size=1 if batch_sampler is not None else batch_size,
        batch_sampler=batch_sampler,
        num_workers=number,
        persistent_workers=number > 0,
        collate_fn=join,
        pin_memory=accelerator.device.type == "cuda",
        worker_init_fn=leave_signals_to_the_main_process,
        generator=torch.Generator(),  # its own, so a loader draws none of the run's random numbers
    )
    if batch_sampler is None:
        loader = accelerator.prepare(loader)
    return DeviceLoader(loader, samples, accelerator.device)
