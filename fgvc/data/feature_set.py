"""A dataset of feature maps that are read from a memory-mapped file."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from fgvc.foreign import open_foreign


def open_maps(path: Path) -> NDArray[np.floating]:
    """Map a .npy file of feature maps into memory.

    Raises:
        FileNotFoundError: it is missing, or was evicted.
        ValueError: it is not such a file, or shorter than its header says.
    """
    with open_foreign(path), np.errstate(over="ignore"):  # a damaged header may promise any size
        maps = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(maps, np.memmap) or maps.dtype.kind != "f":
        raise ValueError("no array of floating-point numbers")
    return maps


class FeatureSet(Dataset[tuple[Tensor, int]]):
    """Feature maps of labelled images, in the order of the image dataset.

    `features[i]` is (feature map (C, h, w) float32, class index). With two views, `start_epoch` draws
    one for each image; before the first call it is the plain image. The set takes no more memory than the batches that
    are read, and can be sent to worker processes. As long as it lives, this process does not evict its file; where
    another one does, it stays readable.

    Attributes:
        path: .npy file of shape (views, N, C, h, w).
        targets: Class index of each image.
        classes: Class names.
        seconds: Time that the computation of the maps took, in this call or in an earlier one.
        from_cache: Whether the maps were computed by an earlier call.
    """

    def __init__(self, path: Path, targets: list[int], classes: list[str], *, seconds: float, from_cache: bool) -> None:
        self.path = path
        self.targets = targets
        self.classes = classes
        self.seconds = seconds
        self.from_cache = from_cache
        self._maps = open_maps(path)
        self._target_tensor = torch.tensor(targets)
        self._views = np.zeros(len(targets), dtype=np.int64)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_maps": None}  # a pickled memory map would carry the whole file

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._maps = open_maps(self.path)

    @property
    def shape(self) -> tuple[int, ...]:
        """(views, N, C, h, w)."""
        return self._maps.shape

    def start_epoch(self, seed: int) -> None:
        """Draw a view for each image; the seed fixes the choice."""
        generator = torch.Generator().manual_seed(seed)
        self._views = torch.randint(self.shape[0], (len(self),), generator=generator).numpy()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, int]]:
        """Several items in one read; a DataLoader calls this."""
        maps, targets = self.batch(indices)
        return list(zip(maps.float(), targets.tolist(), strict=True))

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Feature maps (B, C, h, w) as stored, in the current view of each image, and targets (B,) int64."""
        chosen = np.asarray(indices, dtype=np.int64)
        return torch.from_numpy(self._maps[self._views[chosen], chosen]), self._target_tensor[chosen]
