"""A dataset of feature maps that are read from memory-mapped files."""

from collections.abc import Mapping, Sequence
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
    are read, and can be sent to worker processes. As long as it lives, this process does not evict its files; where
    another one does, they stay readable.

    Attributes:
        paths: .npy files of shape (views, images, C, h, w), one after the other.
        targets: Class index of each image.
        classes: Class names.
        seconds: Time that the computation of the maps took, in this call or in an earlier one.
        from_cache: Whether the maps were computed by earlier calls.

    Args:
        maps: opened files by path, see `open_maps`; the others are attributes.
    """

    def __init__(
        self,
        maps: Mapping[Path, NDArray[np.floating]],
        targets: list[int],
        classes: list[str],
        *,
        seconds: float,
        from_cache: bool,
    ) -> None:
        self.paths = list(maps)
        self.targets = targets
        self.classes = classes
        self.seconds = seconds
        self.from_cache = from_cache
        self._maps = list(maps.values())
        self._ends = np.cumsum([part.shape[1] for part in self._maps])
        self._target_tensor = torch.tensor(targets)
        self._views = np.zeros(len(targets), dtype=np.int64)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_maps": None}  # a pickled memory map would carry the whole file

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._maps = [open_maps(path) for path in self.paths]

    @property
    def shape(self) -> tuple[int, ...]:
        """(views, N, C, h, w)."""
        views, _, *rest = self._maps[0].shape
        return (views, len(self), *rest)

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
        views, targets = self._views[chosen], self._target_tensor[chosen]
        if len(self._maps) == 1:
            return torch.from_numpy(self._maps[0][views, chosen]), targets
        files = np.searchsorted(self._ends, chosen, side="right")
        maps = np.empty((len(chosen), *self.shape[2:]), self._maps[0].dtype)
        for file in np.unique(files):
            here, part = files == file, self._maps[file]
            maps[here] = part[views[here], chosen[here] - self._ends[file] + part.shape[1]]
        return torch.from_numpy(maps), targets
