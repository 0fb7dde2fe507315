"""Feature maps of a frozen backbone, computed once and kept on disk."""

import contextlib
import errno
import gc
import hashlib
import io
import json
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple, cast

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
from fgvc.io import atomic_path, is_in_place, lock_file, locked, read_json, write_json_atomic

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
    max_gb: float | None = None,
) -> FeatureSet:
    """Feature maps of all images, read from the cache, or computed by `extract` and written to it.

    A transform that mirrors gives two views of each image, plain and mirrored; any other gives one. The mirrored view
    is the transformed tensor flipped left to right. This equals the transform of the flipped image except for rounding
    in the resampling and in a center crop with an odd margin.

    Any number of processes may share a folder. If several need the same maps, one computes them and the others wait; if
    that one is killed, another takes over.

    Args:
        dataset: the images; its own transform is not used.
        transform: a recipe without randomness except mirroring; random crops and RandAugment cannot be cached.
        extract: (B, 3, H, W) float32 on `device`, channels last -> (B, C, h, w), called in inference mode.
            It must put its model in eval mode itself.
        key_parts: everything that determines `extract`, e.g. {"backbone": name, "weights": digest}. The key consists of
            these, the transform, the dataset's fingerprint, views and dtype.
        cache_dir: folder of the cache files.
        batch_size: images in one call of `extract`.
        workers: processes that load images.
        device: device of the input of `extract`.
        dtype: type on the disk, "float32" or "float16".
        max_gb: upper limit for the size of all cached maps, in 1e9 bytes. To make room for a new file, files that no
            living process uses are evicted, the least recently used first. None means no limit.

    Raises:
        ConfigError: unknown dtype, a transform with other randomness than mirroring, or no room below `max_gb`.
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
    found = _find(path, dataset)
    if found is not None:
        return found
    cache_dir.mkdir(parents=True, exist_ok=True)
    say = partial(logger.info, "waiting for %s, computed by another run", path)
    with locked(path.with_suffix(".lock"), on_wait=say):
        found = _find(path, dataset)  # another run may have written it meanwhile
        if found is not None:
            return found
        loader = DataLoader(dataset.with_transform(fixed), batch_size=batch_size, num_workers=workers)
        batches = _extract_views(loader, extract, views, torch.device(device), np.dtype(dtype))
        return _compute(path, batches, dataset, views, parts, max_gb)


def _find(path: Path, dataset: ImageDataset) -> FeatureSet | None:
    """The set, if the cache holds it; None where it is missing, or damaged (with a warning)."""
    if not (path.is_file() and _card_of(path).is_file()):
        return None
    try:
        card = read_json(_card_of(path))
        seconds = float(card["seconds"])
        found = FeatureSet(path, dataset.targets, dataset.classes, seconds=seconds, from_cache=True)
        if list(found.shape) != card["shape"] or path.stat().st_size != card["bytes"]:
            raise ValueError(f"{path.stat().st_size} bytes of shape {list(found.shape)}, recorded {card['shape']}")
    except FileNotFoundError:
        return None  # evicted meanwhile
    except Exception as error:  # NumPy's header and the card's fields raise many types
        logger.warning("%s: damaged feature cache (%s); computing it again", path, error)
        return None
    _mark_used(path)
    return found


def _compute(
    path: Path,
    batches: Iterator[list[NDArray[np.floating]]],
    dataset: ImageDataset,
    views: int,
    parts: Mapping[str, str],
    max_gb: float | None,
) -> FeatureSet:
    """Write the cache file, then the card that makes it valid."""
    start = time.perf_counter()
    with contextlib.ExitStack() as in_use:  # from its first byte on, so that no other process evicts it
        shape = _write(path, batches, len(dataset), views, max_gb, in_use)
        seconds = time.perf_counter() - start
        card = {"parts": parts, "shape": shape, "seconds": seconds, "bytes": path.stat().st_size}
        write_json_atomic(_card_of(path), card)
        return FeatureSet(path, dataset.targets, dataset.classes, seconds=seconds, from_cache=False)


@torch.inference_mode()
def _extract_views(
    loader: DataLoader[tuple[Tensor, int]],
    extract: Extract,
    views: int,
    device: torch.device,
    dtype: np.dtype[np.floating],
) -> Iterator[list[NDArray[np.floating]]]:
    """For each batch of images, in order: a list with one array (B, C, h, w) for each view."""
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


def _write(
    path: Path,
    batches: Iterator[list[NDArray[np.floating]]],
    count: int,
    views: int,
    max_gb: float | None,
    in_use: contextlib.ExitStack,
) -> list[int]:
    """Write a .npy file (views, count, C, h, w) batch by batch and return its shape; `in_use` then holds it open."""
    first = next(batches)
    shape = [views, count, *first[0].shape[1:]]
    header = _header(shape, first[0].dtype)
    needed = len(header) + math.prod(shape) * first[0].itemsize
    try:
        # plain writes: on a full disk a sparse memory map would end the process with SIGBUS
        with atomic_path(path) as temporary:
            file = in_use.enter_context(_reserved(temporary, needed, max_gb))
            if needed > shutil.disk_usage(path.parent).free:
                raise _disk_full(path.parent, needed)
            file.write(header)
            _write_views(file, first, batches, count)
            file.flush()
            if sys.platform == "win32":
                file.close()  # Windows renames no open file, and there are no locks to hold
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        raise _disk_full(path.parent, needed) from error
    return shape


def _header(shape: list[int], dtype: np.dtype[np.floating]) -> bytes:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": tuple(shape)}
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue()


def _write_views(
    file: IO[bytes], first: list[NDArray[np.floating]], batches: Iterator[list[NDArray[np.floating]]], count: int
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


def _disk_full(folder: Path, needed: int) -> DatasetError:
    free = shutil.disk_usage(folder).free
    return DatasetError(
        f"{folder}: the feature cache needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; "
        "set cache.dir to a folder on a larger disk, or train with backbone.frozen=false"
    )


class _Entry(NamedTuple):
    """A file of feature maps.

    Attributes:
        path: Path of the .npy file; its card has the same name with the ending .json.
        size: Number of bytes; for a file that is being written, of the finished file.
        used: Time of the last use, in seconds as by time.time().
    """

    path: Path
    size: int
    used: float


def _card_of(path: Path) -> Path:
    """The JSON file that makes a file of feature maps valid."""
    return path.with_suffix(".json")


def _mark_used(path: Path) -> None:
    """Set the time of a file's card to now; does nothing where the folder is read-only."""
    with contextlib.suppress(OSError):
        os.utime(_card_of(path))


@contextlib.contextmanager
def _reserved(temporary: Path, size: int, max_gb: float | None) -> Iterator[IO[bytes]]:
    """A new file that takes its full `size` from the start, and is in use until it is closed.

    Deletes leftover files of killed runs. Where `max_gb` would be exceeded, it also deletes entries that nobody uses,
    the least recently used first.

    Raises:
        ConfigError: the files in use leave too little room below `max_gb`; then nothing is evicted.
        OSError: the file cannot be written.
    """
    with contextlib.ExitStack() as held:
        # one process at a time: two would find the same room
        with locked(temporary.parent / "cache.lock", on_wait=lambda: None):
            _remove_leftovers(temporary.parent)
            if max_gb is not None:
                _make_room(temporary.parent, size, max_gb)
            file = held.enter_context(temporary.open("xb"))
            lock_file(file, shared=True)
            file.truncate(size)
        yield file


def _remove_leftovers(folder: Path) -> None:
    """Delete temporary files that no living process writes."""
    for path in folder.glob(".features-*.tmp.npy"):
        with contextlib.ExitStack() as held:
            if _unused(path, held):
                logger.info("%s: left over by a killed run, deleted", path)
                path.unlink(missing_ok=True)


def _make_room(folder: Path, needed: int, max_gb: float) -> None:
    """Evict until there is room for `needed` bytes. If that is impossible, evict nothing and raise ConfigError."""
    entries = _entries(folder)
    excess = sum(entry.size for entry in entries) + needed - int(max_gb * 1e9)
    if excess <= 0:
        return
    gc.collect()  # maps of an earlier run of this process may be kept by reference cycles only
    with contextlib.ExitStack() as held:
        going: list[_Entry] = []
        while entries and sum(entry.size for entry in going) < excess:
            if _unused(entries[0].path, held):
                going.append(entries[0])
            entries.pop(0)
        if sum(entry.size for entry in going) < excess:
            raise _limit_exceeded(folder, needed, max_gb, [entry for entry in _entries(folder) if entry not in going])
        for entry in going:
            _evict(entry)


def _entries(folder: Path) -> list[_Entry]:
    """All files of feature maps, including those being written, the least recently used first."""
    found = []
    for path in [*folder.glob("features-*.npy"), *folder.glob(".features-*.tmp.npy")]:
        with contextlib.suppress(FileNotFoundError):
            card = _card_of(path)
            used = (card if card.exists() else path).stat().st_mtime
            found.append(_Entry(path, path.stat().st_size, used))
    return sorted(found, key=lambda entry: entry.used)


def _unused(path: Path, held: contextlib.ExitStack) -> bool:
    """Whether nobody uses a file; if so, it is locked until `held` is closed.

    False where this cannot be known, because there are no locks or no permission.
    """
    try:
        file = held.enter_context(path.open("r+b"))
    except OSError:
        return False
    return lock_file(file) is True and is_in_place(file, path)


def _evict(entry: _Entry) -> None:
    _card_of(entry.path).unlink(missing_ok=True)  # first: a file without its card is ignored
    entry.path.unlink(missing_ok=True)
    used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
    logger.info("evicted from the feature cache: %s, %.3g GB, last used %s", entry.path, entry.size / 1e9, used)


def _limit_exceeded(folder: Path, needed: int, max_gb: float, staying: list[_Entry]) -> ConfigError:
    listed = ", ".join(f"{entry.path.name} ({entry.size / 1e9:.3g})" for entry in staying) or "nothing else"
    return ConfigError(
        f"{folder}: the new features need {needed / 1e9:.3g} GB of cache.max_gb={max_gb:g}, and these files are in use "
        f"by running jobs, or cannot be locked (in GB): {listed}. Raise cache.max_gb, wait for the other jobs, set "
        "cache.dir to another folder, or train with backbone.frozen=false"
    )
