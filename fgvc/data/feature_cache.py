"""Feature maps of a frozen backbone, computed once and kept on disk."""

import errno
import hashlib
import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from fgvc.data.dataset import ImageDataset, fingerprint
from fgvc.data.feature_set import FeatureSet
from fgvc.data.transforms import TransformSpec
from fgvc.errors import ConfigError, DatasetError
from fgvc.files import atomic_path, write_json_atomic
from fgvc.reading import read_json

logger = logging.getLogger(__name__)

Extract = Callable[[Tensor], Tensor]
_DTYPES = ("float32", "float16")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def cached_features(
    dataset: ImageDataset,
    transform: TransformSpec,
    extract: Extract,
    *,
    key_parts: Mapping[str, str],
    cache_dir: Path,
    batch_size: int = 32,
    workers: int = 0,
    device: torch.device | str = "cpu",
    dtype: str = "float32",
) -> FeatureSet:
    """Feature maps of all images, from the cache where it holds them; then `extract` is not called.

    A transform that mirrors gives two views of each image, as it is and mirrored; any other gives one. The mirrored
    view is the transformed tensor flipped left to right, which equals transforming the flipped image but for rounding
    in the resampling and in a center crop of odd margin.

    Args:
        dataset: the images; its own transform is not used.
        transform: one that repeats itself but for mirroring; random crops and RandAugment cannot be cached.
        extract: (B, 3, H, W) float32 on `device`, channels last -> (B, C, h, w), in inference mode. Puts its model in
            eval mode itself.
        key_parts: what determines `extract`, e.g. {"backbone": name, "weights": digest}. With the transform, the
            dataset's fingerprint, views and dtype it makes the key.
        cache_dir: folder of the cache files.
        batch_size: images in a call of `extract`.
        workers: processes that load images.
        device: for `extract`.
        dtype: on the disk, "float32" or "float16".

    Raises:
        ConfigError: unknown dtype, or a transform that draws anything but mirroring.
        DatasetError: an unreadable image, a feature that is not finite, or not enough room on the disk.
    """
    if dtype not in _DTYPES:
        raise ConfigError(f"feature dtype {dtype!r} is unknown; choose one of {', '.join(_DTYPES)}")
    if not transform.repeats:
        raise ConfigError(
            f"crop={transform.crop!r} with randaugment={transform.randaugment!r} is random in training and cannot be "
            "cached: use crop='center' and no randaugment, or train with backbone.frozen=false"
        )
    views = 2 if transform.mirrors else 1
    fixed = transform.deterministic()
    conditions = {"transform": repr(fixed), "dataset": fingerprint(dataset), "views": str(views), "dtype": dtype}
    parts = {**key_parts, **conditions}
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    path = cache_dir / f"features-{key[:32]}.npy"
    seconds = _recorded_seconds(path)
    from_cache = seconds is not None
    if seconds is None:
        loader = DataLoader(dataset.with_transform(fixed), batch_size=batch_size, num_workers=workers)
        batches = _extract_views(loader, extract, views, torch.device(device), np.dtype(dtype))
        seconds = _compute(path, batches, len(dataset), views, parts)
    return FeatureSet(path, dataset.targets, dataset.classes, seconds=seconds, from_cache=from_cache)


def _compute(
    path: Path, batches: Iterator[list[NDArray[np.floating]]], count: int, views: int, parts: Mapping[str, str]
) -> float:
    """Write the cache file, then the card that makes it valid; returns the seconds it took."""
    start = time.perf_counter()
    shape = _write(path, batches, count, views)
    seconds = time.perf_counter() - start
    card = {"parts": parts, "shape": shape, "seconds": seconds, "bytes": path.stat().st_size}
    write_json_atomic(_card(path), card)
    return seconds


def _card(path: Path) -> Path:
    return path.with_suffix(".json")


def _recorded_seconds(path: Path) -> float | None:
    """Seconds that a whole cache file took to compute; None where there is none or it is damaged (with a warning)."""
    if not (path.is_file() and _card(path).is_file()):
        return None
    try:
        card = read_json(_card(path))
        shape = np.lib.format.open_memmap(path, mode="r").shape
        if list(shape) != card["shape"] or path.stat().st_size != card["bytes"]:
            raise ValueError(f"{path.stat().st_size} bytes of shape {list(shape)}, recorded {card['shape']}")
        return float(card["seconds"])
    except (
        Exception
    ) as error:  # NumPy's header and the card's fields raise many types; whatever it is, it can be mended
        logger.warning("%s: damaged feature cache (%s); computing it again", path, error)
        return None


@torch.inference_mode()
def _extract_views(
    loader: DataLoader[tuple[Tensor, int]],
    extract: Extract,
    views: int,
    device: torch.device,
    dtype: np.dtype[np.floating],
) -> Iterator[list[NDArray[np.floating]]]:
    """For each batch of images, in order: one array (B, C, h, w) a view."""
    for images, _ in tqdm(loader, desc="features", unit="batch", disable=None):
        # channels last: 2.6 times faster inference on a CPU
        batch = images.to(device).contiguous(memory_format=torch.channels_last)
        maps = [extract(batch if view == 0 else batch.flip(-1)) for view in range(views)]
        yield [_to_numpy(features, dtype) for features in maps]


def _to_numpy(features: Tensor, dtype: np.dtype[np.floating]) -> NDArray[np.floating]:
    if features.dim() != 4:
        raise ValueError(f"extract must return (B, C, h, w), found shape {tuple(features.shape)}")
    with np.errstate(over="ignore"):  # an overflow shows as infinity, reported below
        array = np.ascontiguousarray(features.float().cpu().numpy(), dtype=dtype)
    if not np.isfinite(array).all():
        raise DatasetError(
            f"the backbone's features hold NaN or infinity as {dtype.name}: check its weights"
            + (", or keep them as float32" if dtype == np.float16 else "")
        )
    return array


def _write(path: Path, batches: Iterator[list[NDArray[np.floating]]], count: int, views: int) -> list[int]:
    """Write a .npy file of shape (views, count, C, h, w) batch by batch and return its shape."""
    first = next(batches)
    shape = [views, count, *first[0].shape[1:]]
    needed = math.prod(shape) * first[0].itemsize
    path.parent.mkdir(parents=True, exist_ok=True)
    if needed > shutil.disk_usage(path.parent).free:
        raise _no_room(path.parent, needed)
    try:
        # plain writes, not a memory map: on a full disk a sparse map would end the process with SIGBUS
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            _write_header(file, shape, first[0].dtype)
            _write_views(file, first, batches, count)
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        raise _no_room(path.parent, needed) from error
    return shape


def _write_header(file: BinaryIO, shape: list[int], dtype: np.dtype[np.floating]) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": tuple(shape)}
    np.lib.format.write_array_header_1_0(file, header)


def _write_views(
    file: BinaryIO, first: list[NDArray[np.floating]], batches: Iterator[list[NDArray[np.floating]]], count: int
) -> None:
    """Write the batches after the header, each view in its own block of `count` images."""
    start = file.tell()
    row = first[0][0].nbytes
    done = 0
    for arrays in (first, *batches):
        for view, array in enumerate(arrays):
            file.seek(start + (view * count + done) * row)
            file.write(cast(bytes, array.data))
        done += len(arrays[0])


def _no_room(folder: Path, needed: int) -> DatasetError:
    free = shutil.disk_usage(folder).free
    return DatasetError(
        f"{folder}: the feature cache needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; "
        "set cache.dir to a folder on a larger disk, or train with backbone.frozen=false"
    )
