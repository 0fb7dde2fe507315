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
import re
import shutil
import time
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import IO, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from fgvc.data.dataset import ImageDataset, collate, fingerprint
from fgvc.data.feature_set import FeatureSet
from fgvc.data.transforms import TransformSpec
from fgvc.errors import ConfigError, DatasetError
from fgvc.foreign import read_json
from fgvc.io import atomic_path, byte_bar, locked, write_json_atomic
from fgvc.provenance import float32_precision

logger = logging.getLogger(__name__)

Extract = Callable[[Tensor], Tensor]
_DTYPES = ("float32", "float16")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_UNFINISHED = re.compile(r"\.features-[0-9a-f]{32}\.[0-9a-f]{8}\.tmp\.npy")
_used: weakref.WeakSet[FeatureSet] = weakref.WeakSet()  # what this process has open


def cached_features(
    dataset: ImageDataset,
    transform: TransformSpec,
    extract: Extract,
    *,
    key_parts: Mapping[str, str],
    cache_dir: Path,
    look_in: Path | None = None,
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

    Any number of processes may share a folder. One computes a set of maps, the others that need it wait; if that one is
    killed, another takes over.

    Args:
        dataset: the images; its own transform is not used.
        transform: a recipe without randomness except mirroring; random crops and RandAugment cannot be cached.
        extract: (B, 3, H, W) float32 on `device`, channels last -> (B, C, h, w), called in inference mode.
            It must put its model in eval mode itself.
        key_parts: everything that determines `extract`, e.g. {"backbone": name, "weights": digest}. The key consists of
            these, the transform, the dataset's fingerprint and content, views, dtype, the kind of device and the format
            that torch rounds the factors of float32 products to (TF32, bfloat16, that of autocast).
        cache_dir: folder of the cache files.
        look_in: another folder that may hold the maps; nothing is written to it.
        batch_size: images in one call of `extract`.
        workers: processes that load images.
        device: device of the input of `extract`.
        dtype: type on the disk, "float32" or "float16".
        max_gb: upper limit for the size of all cached maps, in 1e9 bytes. To make room for a new file, files that this
            process does not use are evicted, the least recently used first. Another process can go on reading them.
            None means no limit.

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
    kind = torch.device(device).type
    conditions = {"transform": repr(fixed), "views": str(views), "dtype": dtype}
    if dataset.content is None:
        conditions["dataset"] = fingerprint(dataset)
    else:  # wherever the files lie, and whenever they were written
        conditions |= {"dataset": fingerprint(dataset, times=False), "content": dataset.content}
    parts = {**key_parts, **conditions, "device": kind, **float32_precision(kind)}
    path = cache_dir / _file_name(parts)
    found = _find(path, dataset)
    if found is None and look_in is not None:
        found = _find(look_in / path.name, dataset, touch=False)
    if found is not None:
        return found
    cache_dir.mkdir(parents=True, exist_ok=True)
    say = partial(logger.info, "%s: waiting for features that are computed by another run", path)
    with locked(path.with_suffix(".lock"), on_wait=say):
        found = _find(path, dataset)  # another run may have written it meanwhile
        if found is not None:
            return found
        images = dataset.with_transform(fixed)
        loader = DataLoader(images, batch_size=batch_size, num_workers=workers, collate_fn=collate)
        batches = _extract_views(loader, extract, views, torch.device(device), np.dtype(dtype))
        seconds = _write(path, batches, len(dataset), views, max_gb, parts)
        return _in_use(FeatureSet(path, dataset.targets, dataset.classes, seconds=seconds, from_cache=False))


def _file_name(parts: Mapping[str, str]) -> str:
    """Name of the file of the maps that `parts` determine."""
    return f"features-{hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]}.npy"


def _find(path: Path, dataset: ImageDataset, *, touch: bool = True) -> FeatureSet | None:
    """The set, if the cache holds it; None where it is missing, or damaged (with a warning)."""
    if not (path.is_file() and _card_of(path).is_file()):
        return None
    try:
        card = read_json(_card_of(path))
        seconds = float(card["seconds"])
        if _file_name(card["parts"]) != path.name:
            raise ValueError("its card is that of other maps")
        found = FeatureSet(path, dataset.targets, dataset.classes, seconds=seconds, from_cache=True)
        if list(found.shape) != card["shape"] or path.stat().st_size != card["bytes"]:
            raise ValueError(f"{path.stat().st_size} bytes of shape {list(found.shape)}, recorded {card['shape']}")
        if (checksum := _checksum(path)) != card["crc32"]:
            raise ValueError(f"its crc32 is {checksum}, recorded {card['crc32']}")
    except FileNotFoundError:
        return None  # evicted meanwhile
    except Exception as error:  # NumPy's header and the card's fields raise many types
        logger.warning("%s: damaged feature cache (%s); computing it again", path, error)
        return None
    if touch:
        with contextlib.suppress(OSError):  # the folder may be read-only
            os.utime(_card_of(path))
    return _in_use(found)


def _checksum(path: Path) -> str:
    """CRC-32 of a file: it finds damage, is in every Python, and 2 to 3 times as fast as SHA-256."""
    value, size = 0, path.stat().st_size
    with path.open("rb") as file, byte_bar(f"checking {path.name}", size) as bar:
        while chunk := file.read(1 << 22):
            value = zlib.crc32(chunk, value)
            bar.update(len(chunk))
    return f"{value:08x}"


def _in_use(features: FeatureSet) -> FeatureSet:
    _used.add(features)
    return features


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
    parts: Mapping[str, str],
) -> float:
    """Write a .npy file (views, count, C, h, w) batch by batch, and its card; return the seconds."""
    start = time.perf_counter()
    first = next(batches)
    shape = [views, count, *first[0].shape[1:]]
    descr = np.lib.format.dtype_to_descr(first[0].dtype)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": descr, "fortran_order": False, "shape": tuple(shape)})
    needed = len(header.getvalue()) + math.prod(shape) * first[0].itemsize
    try:
        if needed > shutil.disk_usage(path.parent).free:
            raise _disk_full(path.parent, needed)
        # plain writes: on a full disk a sparse memory map would end the process with SIGBUS
        with _reserved(path, needed, max_gb) as file:
            file.write(header.getvalue())
            _write_views(file, first, batches, count)
            file.flush()
            seconds = time.perf_counter() - start
            card = {"parts": parts, "shape": shape, "seconds": seconds, "bytes": needed}
            # the card first: a file without one could be anybody's, and would never be evicted
            write_json_atomic(_card_of(path), card | {"crc32": _checksum(Path(file.name))})
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        raise _disk_full(path.parent, needed) from error
    return seconds


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


def _card_of(path: Path) -> Path:
    """The JSON file that makes a file of feature maps valid; its time is that of the last use."""
    return path.with_suffix(".json")


@contextlib.contextmanager
def _reserved(path: Path, needed: int, max_gb: float | None) -> Iterator[IO[bytes]]:
    """Open a temporary file that has its full size from the start and becomes `path` when the block ends.

    Only one run at a time makes room, so that no two take the same.
    """
    folder = path.parent
    with contextlib.ExitStack() as stack:
        with locked(folder / "cache.lock", on_wait=lambda: None) as held:
            if held:  # without locks, another run may be writing
                _remove_leftovers(path)
            if max_gb is not None:
                _make_room(folder, needed, max_gb)
            file = stack.enter_context(stack.enter_context(atomic_path(path)).open("xb"))
            file.truncate(needed)
        yield file


def _remove_leftovers(own: Path) -> None:
    """Delete the temporary files of killed runs: those whose lock is free, and those of `own`, whose lock is ours."""
    for path in _unfinished(own.parent):
        name = path.name[1:].partition(".")[0]
        with locked(own.with_name(f"{name}.lock")) as free:
            if free or name == own.stem:
                logger.info("%s: left over by a killed run, deleted", path)
                path.unlink(missing_ok=True)


def _unfinished(folder: Path) -> list[Path]:
    """Temporary files of maps, as `atomic_path` names them."""
    return [path for path in folder.glob(".features-*.tmp.npy") if _UNFINISHED.fullmatch(path.name)]


def _is_own(path: Path) -> bool:
    """Whether a file is one of maps that this cache wrote: its card has its name."""
    try:
        return _file_name(read_json(_card_of(path))["parts"]) == path.name
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _make_room(folder: Path, needed: int, max_gb: float) -> None:
    """Evict files of maps until there is room for `needed` bytes, the least recently used first.

    Raises:
        ConfigError: with what this process uses there is no room below `max_gb`; then nothing is evicted. Or the system
            deletes no file that is open.
    """
    gc.collect()  # maps of an earlier run of this process may be kept by reference cycles only
    own = {features.path for features in _used}
    sizes = {path: path.stat().st_size for path in folder.glob("features-*.npy") if path in own or _is_own(path)}
    written = sum(path.stat().st_size for path in _unfinished(folder))  # by other runs, now
    _require_room(folder, needed, written + sum(size for path, size in sizes.items() if path in own), max_gb)
    taken = written + sum(sizes.values())
    for used, path in sorted((_card_of(path).stat().st_mtime, path) for path in sizes.keys() - own):
        if taken + needed <= max_gb * 1e9:
            return
        with locked(path.with_suffix(".lock")) as free:
            if free is False:  # about to be read, or written again
                continue
            try:
                path.unlink()
            except PermissionError:  # Windows deletes no open file
                continue
            _card_of(path).unlink(missing_ok=True)
        taken -= sizes[path]
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(used))
        logger.info("evicted from the feature cache: %s, %.3g GB, last used %s", path, sizes[path] / 1e9, when)
    _require_room(folder, needed, taken, max_gb)


def _require_room(folder: Path, needed: int, used: int, max_gb: float) -> None:
    if needed + used > max_gb * 1e9:
        enough = 1.005 * (needed + used) / 1e9  # three digits of it are never too few
        raise ConfigError(
            f"{folder}: the new features need {needed / 1e9:.3g} GB, those in use {used / 1e9:.3g} GB, which is more "
            f"than cache.max_gb={max_gb:g}. Raise cache.max_gb to {enough:.3g}, set cache.dir to another folder, or "
            "train with backbone.frozen=false"
        )
