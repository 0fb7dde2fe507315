"""Randomness that depends on nothing but the seed and the epoch, so that a continued run repeats itself exactly."""

import hashlib
from collections.abc import Iterator

import torch
from accelerate.utils import set_seed
from torch.utils.data import Sampler


def derived_seed(seed: int, *parts: object) -> int:
    """A seed for one purpose, 0 <= result < 2**32."""
    return int.from_bytes(hashlib.sha256(repr((seed, *parts)).encode()).digest()[:4], "big")


def seed_epoch(seed: int, epoch: int) -> None:
    """Seed Python, NumPy and torch for an epoch; epoch 0 is the initialisation of the model."""
    set_seed(derived_seed(seed, "epoch", epoch))


class EpochShuffle(Sampler[int]):
    """A permutation of range(n) for each epoch, the same for the same seed.

    The loop sets `epoch`. There is no `set_epoch` on purpose: accelerate would call it with a count of its own, which
    starts anew in a continued run.
    """

    def __init__(self, n: int, seed: int) -> None:
        self.n = n
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "shuffle", self.epoch))
        yield from torch.randperm(self.n, generator=generator).tolist()
