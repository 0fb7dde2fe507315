"""Randomness that depends only on the seed, the epoch and the image, so a resumed run gives the same result."""

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
    """Return a seed for one purpose, 0 <= result < 2**32."""
    return int.from_bytes(hashlib.sha256(repr((seed, *parts)).encode()).digest()[:4], "big")


def seed_epoch(seed: int, epoch: int, process: int = 0) -> None:
    """Seed Python, NumPy and torch for an epoch; epoch 0 is the model's initialisation, equal in all processes."""
    set_seed(derived_seed(seed, "epoch", epoch, *([process] if process else [])))


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the CPU generators of Python, NumPy and torch for a block, and restore them afterwards."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed also seeds GPUs, which a worker must not use
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


class SeededSamples(Dataset[tuple[Any, int]]):
    """Images with random augmentation from a separate seed for each index and epoch.

    An index from n to n^2 - 1 is another draw of image index % n, see `StepBatches`.

    Args:
        images: dataset with a transform that uses the generators of Python, NumPy and torch.
    """

    def __init__(self, images: ImageDataset) -> None:
        self.images = images
        # shared, since loader workers outlive an epoch
        self._seed = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    @property
    def paths(self) -> list[Path]:
        """The image files."""
        return self.images.paths

    def start_epoch(self, seed: int) -> None:
        """Use `seed` for the augmentation from now on."""
        self._seed.fill_(seed)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if not 0 <= index < len(self) ** 2:
            raise IndexError(index)
        with seeded(derived_seed(int(self._seed), index)):
            return self.images[index % len(self.images)]


def generator_states() -> dict[str, Any]:
    """Return the states of this process's generators, as tensors and plain numbers."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_generator_states(states: dict[str, Any]) -> None:
    """Restore this process's generators from `generator_states`."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])


def set_deterministic(enabled: bool) -> None:
    """Let torch use only bit-reproducible algorithms; with False, any.

    Torch then raises a RuntimeError with the name of an operation that has no such algorithm. For GPUs this also turns
    off cuDNN's search for the fastest algorithm, since its outcome depends on timing, and sets CUBLAS_WORKSPACE_CONFIG
    if unset. cuBLAS reads that variable at its first use, so call this before anything runs on a GPU. It follows
    torch's notes on reproducibility; the authors have not run it on a GPU.
    """
    torch.use_deterministic_algorithms(enabled)
    if enabled:
        torch.backends.cudnn.benchmark = False
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
