"""The training images of a run that are nearest to an image, by the cosine distance of descriptors."""

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.neighbors import NearestNeighbors
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from fgvc import __version__
from fgvc.data import ImageDataset, TransformSpec, collate, fingerprint
from fgvc.errors import ConfigError, RunError
from fgvc.foreign import read_npz
from fgvc.inference.restore import Restored, restore_run
from fgvc.io import file_digests, output_path
from fgvc.runs.folder import RunFolder
from fgvc.training.batches import loader_workers
from fgvc.training.setup import build_transform, inference_batch_size

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Neighbour:
    """A training image: its index, its class, and 1 minus the cosine of the angle between the descriptors, 0 to 2."""

    index: int
    name: str
    distance: float


class NeighbourIndex:
    """The training images of a run and their descriptors; made by `load_neighbours`.

    Args:
        images: the N training images, with the transform of testing.
        descriptors: their descriptors (N, D) float32.
    """

    def __init__(self, images: ImageDataset, descriptors: Tensor) -> None:
        self.images = images
        self._search = NearestNeighbors(metric="cosine", algorithm="brute").fit(F.normalize(descriptors, dim=1).numpy())

    @property
    def transform(self) -> TransformSpec:
        """Transform of `images`."""
        assert isinstance(self.images.transform, TransformSpec)
        return self.images.transform

    def nearest(self, descriptors: Tensor, count: int = 5) -> list[list[Neighbour]]:
        """Return the `count` nearest training images of each descriptor (Q, D) float32, the nearest first.

        Raises ConfigError: `count` is below 1 or above the number of training images.
        """
        if not 1 <= count <= len(self.images):
            raise ConfigError(f"k={count}: the run has {len(self.images):,} training images; give 1 to that many")
        found = self._search.kneighbors(F.normalize(descriptors, dim=1).numpy(), count)
        return [
            [
                Neighbour(index, self.images.classes[self.images.targets[index]], max(float(distance), 0.0))
                for distance, index in zip(*row, strict=True)
            ]
            for row in zip(found[0].tolist(), found[1].tolist(), strict=True)
        ]


def load_neighbours(
    path: Path, *, checkpoint: str = "last", root: str | None = None, cache: str | None = None
) -> NeighbourIndex:
    """Read or compute the descriptors of a run's training images, without those held out for validation.

    With a frozen backbone they come from the cached feature maps, as in training. Otherwise every image goes through
    the network once, and the descriptors are kept in RUN/neighbours/descriptors-CHECKPOINT.npz. That file counts only
    for the same weights, settings and images.

    Args:
        path: the run folder.
        checkpoint, root, cache: as in `restore_run`.

    Raises:
        RunError, DatasetError, WeightsError: as `restore_run`.
    """
    restored = restore_run(path, checkpoint=checkpoint, root=root, cache=cache, split="train")
    images = restored.images.with_transform(build_transform(restored.config, restored.backbone, training=False))
    if restored.config.backbone.frozen:
        return NeighbourIndex(images, _descriptors(restored, DataLoader(restored.inputs(), batch_size=64)))
    file, key = path / "neighbours" / f"descriptors-{checkpoint}.npz", _key(path, checkpoint, images)
    descriptors = _read(file, key, (len(images), restored.head.pooling.out_features))
    if descriptors is None:
        size = inference_batch_size(restored.config, restored.device)
        workers = loader_workers(restored.config.trainer.workers)
        loader = DataLoader(images, batch_size=size, num_workers=workers, collate_fn=collate)
        descriptors = _descriptors(restored, loader)
        _keep(file, key, descriptors)
    return NeighbourIndex(images, descriptors)


@torch.inference_mode()
def _descriptors(restored: Restored, loader: "DataLoader[tuple[Tensor, int]]") -> Tensor:
    """Return descriptors (N, D) float32 on the CPU of a loader's inputs."""
    batches = tqdm(loader, desc="training images", unit="batch", leave=False, disable=None)
    found = [restored.trained.descriptor(inputs.to(restored.device)).float().cpu() for inputs, _ in batches]
    descriptors = torch.cat(found)
    if not torch.isfinite(descriptors).all():
        raise RunError("the model gives descriptors that are not finite; train the run again")
    return descriptors


def _key(path: Path, checkpoint: str, images: ImageDataset) -> str:
    """Return a digest of all that determines the descriptors."""
    folder = RunFolder(path)
    files = [file_digests(file, ["sha256"]) for file in (folder.weights_file(checkpoint), folder.config_file)]
    parts = (__version__, files, fingerprint(images), images.content, repr(images.transform))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _read(file: Path, key: str, shape: tuple[int, int]) -> Tensor | None:
    """Return the kept descriptors; None if there are none, or they are of other weights or images."""
    try:
        found = read_npz(file)
        if str(found["key"]) != key:
            return None
        descriptors = found["descriptors"]
        if descriptors.shape != shape or descriptors.dtype != np.float32 or not np.isfinite(descriptors).all():
            raise ValueError(f"{descriptors.dtype} of shape {descriptors.shape}, or not finite")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError) as error:
        _log.warning("%s cannot be used (%s); computing it again", file, error)
        return None
    return torch.from_numpy(descriptors)


def _keep(file: Path, key: str, descriptors: Tensor) -> None:
    try:
        with output_path(file, "neighbours") as temporary:
            np.savez(temporary, key=np.array(key), descriptors=descriptors.numpy())
    except OSError as error:  # the run folder may be read-only, or the file someone else's
        _log.warning("%s: the descriptors are not kept: %s", file, error.strerror)
