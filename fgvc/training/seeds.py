"""Randomness that depends on nothing but the seed, the epoch and the image, so that a continued run repeats itself."""

import contextlib
import hashlib
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from torch.utils.data import Dataset

from fgvc.data import ImageDataset


def derived_seed(seed: int, *parts: object) -> int:
    """A seed for one purpose, 0 <= result < 2**32."""
    return int.from_bytes(hashlib.sha256(repr((seed, *parts)).encode()).digest()[:4], "big")


def seed_epoch(seed: int, epoch: int, process: int = 0) -> None:
    """Seed Python, NumPy and torch for an epoch; epoch 0 is the initialisation of the model, alike in all processes."""
    set_seed(derived_seed(seed, "epoch", epoch, *([process] if process else [])))


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the CPU's generators of Python, NumPy and torch for a block, and put them back afterwards."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs too, which a worker may not touch
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


class SeededSamples(Dataset[tuple[Any, int]]):
    """Images whose augmentation is drawn from a seed of their own in each epoch.

    Args:
        images: dataset whose transform draws from the generators of Python, NumPy and torch.
    """

    def __init__(self, images: ImageDataset) -> None:
        self.images = images
        self._seed = 0

    @property
    def paths(self) -> list[Path]:
        """Image files."""
        return self.images.paths

    def start_epoch(self, seed: int) -> None:
        """Draw what is random in the images from `seed` from now on."""
        self._seed = seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        with seeded(derived_seed(self._seed, index)):
            return self.images[index]


def generator_states() -> dict[str, Any]:
    """States of the generators of this process, as tensors and plain numbers."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_generator_states(states: dict[str, Any]) -> None:
    """Put the generators of this process into the states that `generator_states` returned."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])


def set_deterministic(enabled: bool) -> None:
    """Let torch use only algorithms that repeat themselves bit for bit; with False, any.

    Torch then raises a RuntimeError, which names the operation, where there is no such algorithm. On a GPU it also
    turns off cuDNN's search for the fastest algorithm, whose outcome depends on timing, and sets
    CUBLAS_WORKSPACE_CONFIG where it is unset. cuBLAS reads that variable when it is first used: call this before
    anything runs there. Written after torch's notes on reproducibility; not run on a GPU by the authors.
    """
    torch.use_deterministic_algorithms(enabled)
    if enabled:
        torch.backends.cudnn.benchmark = False
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
