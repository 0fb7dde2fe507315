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
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from fgvc.data.dataset import FeatureSet, ImageDataset, collate, fingerprint, open_maps
from fgvc.data.transforms import TransformSpec
from fgvc.errors import ConfigError, DatasetError
from fgvc.foreign import read_json
from fgvc.io import atomic_path, byte_bar, locked, write_json_atomic, write_text_atomic
from fgvc.provenance import float32_precision

logger = logging.getLogger(__name__)

Extract = Callable[[Tensor], Tensor]
_IMAGES = 4096  # in one file; more of a set are in several, which several processes compute
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_UNFINISHED = re.compile(r"\.features-[0-9a-f]{32}\.[0-9a-f]{8}\.tmp\.npy")
_used: weakref.WeakSet[FeatureSet] = weakref.WeakSet()  # what this process has open


@dataclass(frozen=True)
class _Found:
    """The opened maps of a file, the seconds that their computation took, and whether that was now."""

    maps: NDArray[np.floating]
    seconds: float
    computed: bool


@dataclass(frozen=True)
class _File:
    """One file of maps: of all images of a split, or of `_IMAGES` of a larger one.

    Attributes:
        path: Path of the file.
        parts: Everything that determines the maps.
        images: Its images, with a transform without randomness.
        shape: (views, images, C, h, w).
        dtype: Type of the numbers.
    """

    path: Path
    parts: Mapping[str, str]
    images: ImageDataset
    shape: tuple[int, ...]
    dtype: np.dtype[np.floating]

    @property
    def header(self) -> bytes:
        """The bytes before the numbers."""
        descr, written = np.lib.format.dtype_to_descr(self.dtype), io.BytesIO()
        np.lib.format.write_array_header_1_0(written, {"descr": descr, "fortran_order": False, "shape": self.shape})
        return written.getvalue()

    @property
    def bytes(self) -> int:
        """Size of the whole file."""
        return len(self.header) + math.prod(self.shape) * self.dtype.itemsize


def cached_features(
    splits: Sequence[ImageDataset],
    extract: Extract,
    *,
    map_shape: tuple[int, int, int],
    key_parts: Mapping[str, str],
    cache_dir: Path,
    elsewhere: str | None = None,
    batch_size: int = 32,
    workers: int = 0,
    device: torch.device | str = "cpu",
    dtype: str = "float32",
    max_gb: float | None = None,
) -> list[FeatureSet]:
    """Feature maps of all images of some splits, read from the cache, or computed by `extract` and written to it.

    A transform that mirrors gives two views of each image, plain and mirrored; any other gives one. The mirrored view
    is the transformed tensor flipped left to right. This equals the transform of the flipped image except for rounding
    in the resampling and in a center crop with an odd margin.

    Any number of processes may share a folder. One computes a file of maps; the others that need it compute other files
    of the set meanwhile, or wait. If that one is killed, another takes over.

    Args:
        splits: images with a `TransformSpec` without randomness except mirroring; random crops and RandAugment cannot
            be cached. There must be room for the maps of all before the first is computed.
        extract: (B, 3, H, W) float32 on `device`, channels last -> (B, C, h, w), called in inference mode.
            It must put its model in eval mode itself.
        map_shape: (C, h, w) of `extract`. It tells the size before an image is read.
        key_parts: everything that determines `extract`, e.g. {"backbone": name, "weights": digest}. The key consists of
            these, the transform, the split's fingerprint and content, views, dtype, the kind of device and the format
            that torch rounds the factors of float32 products to (TF32, bfloat16, that of autocast).
        cache_dir: folder of the cache files.
        elsewhere: what to log if maps have to be computed: where else they may be.
        batch_size: images in one call of `extract`.
        workers: processes that load images.
        device: device of the input of `extract`.
        dtype: type on the disk, "float32" or "float16".
        max_gb: upper limit for the size of all cached maps, in 1e9 bytes. To make room for new maps, sets that this
            process does not use are evicted, the least recently used first. Another process can go on reading them.
            None means no limit.

    Raises:
        ConfigError: unknown dtype, a transform with other randomness than mirroring, or no room below `max_gb`.
        DatasetError: an unreadable image, a feature that is not finite, or not enough room on the disk.
    """
    if dtype not in ("float32", "float16"):
        raise ConfigError(f"feature dtype {dtype!r} is unknown; choose one of float32, float16")
    device, numbers = torch.device(device), np.dtype(dtype)
    planned = [_plan(split, map_shape, key_parts, numbers, device.type, cache_dir) for split in splits]
    files = {file.path: file for of_split in planned for file in of_split}
    found = {path: maps for path in files if (maps := _find(path)) is not None}
    missing = [file for path, file in files.items() if path not in found]
    if missing:
        if elsewhere is not None:
            logger.warning(elsewhere)
        cache_dir.mkdir(parents=True, exist_ok=True)
        # https://bford.info/cachedir: backups leave such a folder out, and so does a dataset around it
        tag = cache_dir / "CACHEDIR.TAG"
        if not os.path.lexists(tag):  # nothing of someone else's is written over, nor what a link leads to
            write_text_atomic(tag, "Signature: 8a477f597d28d172789f06886806bc55\n")
        extracted = partial(_extract_views, extract, batch_size, workers, device)
        found |= _compute(missing, extracted, max_gb, keep=files.keys())
    sets = [
        FeatureSet(
            {file.path: found[file.path].maps for file in of_split},
            split.targets,
            split.classes,
            seconds=sum(found[file.path].seconds for file in of_split),
            from_cache=not any(found[file.path].computed for file in of_split),
        )
        for split, of_split in zip(splits, planned, strict=True)
    ]
    _used.update(sets)
    return sets


def _plan(
    split: ImageDataset,
    map_shape: tuple[int, int, int],
    key_parts: Mapping[str, str],
    dtype: np.dtype[np.floating],
    kind: str,
    folder: Path,
) -> list[_File]:
    """The files of a split in a folder: one, or several where there are many images."""
    transform = split.transform
    assert isinstance(transform, TransformSpec)
    if not transform.repeats:
        raise ConfigError(
            f"crop={transform.crop!r} with randaugment={transform.randaugment!r} and erasing={transform.erasing} is "
            "random in training and cannot be cached: use crop='center' and no randaugment or erasing, or compute the "
            "maps in every epoch (cache.enabled=false)"
        )
    fixed, views = transform.deterministic(), 2 if transform.mirrors else 1
    conditions = {"transform": repr(fixed), "views": str(views), "dtype": dtype.name}
    if split.content is None:
        conditions["dataset"] = fingerprint(split)
    else:  # wherever the files lie, and whenever they were written
        conditions |= {"dataset": fingerprint(split, times=False), "content": split.content}
    parts = {**key_parts, **conditions, "device": kind, **float32_precision(kind)}
    images = split.with_transform(fixed)

    def file(part: ImageDataset, own: Mapping[str, str]) -> _File:
        return _File(folder / _file_name(own), own, part, (views, len(part), *map_shape), dtype)

    whole = file(images, parts)
    # earlier versions wrote one file, whatever its size
    if len(images) <= _IMAGES or whole.path.is_file():
        return [whole]
    ranges = [range(first, min(first + _IMAGES, len(images))) for first in range(0, len(images), _IMAGES)]
    return [file(images.subset(part), {**parts, "images": f"{part[0]} to {part[-1]}"}) for part in ranges]


def _compute(
    files: Sequence[_File],
    extracted: Callable[[_File], Iterator[list[NDArray[np.floating]]]],
    max_gb: float | None,
    *,
    keep: Set[Path],
) -> dict[Path, _Found]:
    """Write files that are missing and read what others write: first those that nobody computes, then the others.

    To make room, no file in `keep` is evicted.
    """
    found: dict[Path, _Found] = {}
    for wait in (False, True):
        for file in files:
            if file.path in found:
                continue
            say = partial(logger.info, "%s: waiting for features that are computed by another run", file.path)
            with locked(file.path.with_suffix(".lock"), on_wait=say if wait else None) as free:
                if free is False:
                    continue
                maps = _find(file.path)  # another run may have written it meanwhile
                if maps is None:
                    with _reserved(file, files, max_gb, keep) as opened:
                        seconds = _write(opened, file, extracted(file))
                    maps = _Found(open_maps(file.path), seconds, computed=True)
                found[file.path] = maps
    return found


def _file_name(parts: Mapping[str, str]) -> str:
    """Name of the file of the maps that `parts` determine."""
    return f"features-{hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]}.npy"


def _find(path: Path) -> _Found | None:
    """The maps, if the cache holds them; None where they are missing, or damaged (with a warning)."""
    if not (path.is_file() and _card_of(path).is_file()):
        return None
    try:
        card = read_json(_card_of(path))
        if _file_name(card["parts"]) != path.name:
            raise ValueError("its card is that of other maps")
        found = _Found(open_maps(path), float(card["seconds"]), computed=False)
        shape = list(found.maps.shape)
        if shape != card["shape"] or path.stat().st_size != card["bytes"]:
            raise ValueError(f"{path.stat().st_size} bytes of shape {shape}, recorded {card['shape']}")
        if (checksum := _checksum(path)) != card["crc32"]:
            raise ValueError(f"its crc32 is {checksum}, recorded {card['crc32']}")
    except FileNotFoundError:
        return None  # evicted meanwhile
    except Exception as error:  # NumPy's header and the card's fields raise many types
        logger.warning("%s: damaged feature cache (%s); computing it again", path, error)
        return None
    with contextlib.suppress(OSError):  # the folder may be read-only
        os.utime(_card_of(path))
    return found


def _checksum(path: Path) -> str:
    """CRC-32 of a file: it finds damage, is in every Python, and 2 to 3 times as fast as SHA-256."""
    value, size = 0, path.stat().st_size
    with path.open("rb") as file, byte_bar(f"checking {path.name}", size) as bar:
        while chunk := file.read(1 << 22):
            value = zlib.crc32(chunk, value)
            bar.update(len(chunk))
    return f"{value:08x}"


@torch.inference_mode()
def _extract_views(
    extract: Extract, batch_size: int, workers: int, device: torch.device, file: _File
) -> Iterator[list[NDArray[np.floating]]]:
    """For each batch of the images of a file, in order: a list with one array (B, C, h, w) for each view.

    On a GPU a batch is copied to the host while the next one is computed.
    """
    views, _, *shape = file.shape
    options: dict[str, Any] = {"num_workers": workers, "collate_fn": collate, "pin_memory": device.type == "cuda"}
    loader = DataLoader(file.images, batch_size=batch_size, **options)
    copies: deque[Callable[[], list[NDArray[np.floating]]]] = deque()
    for inputs, _ in tqdm(loader, desc="features", unit="batch", disable=None):
        # channels last: 2.6 times faster inference on a CPU
        batch = inputs.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)
        maps = [extract(batch if view == 0 else batch.flip(-1)) for view in range(views)]
        for features in maps:
            if list(features.shape[1:]) != shape:
                raise ValueError(f"extract must return (B, {shape}), found shape {tuple(features.shape)}")
        copies.append(_start_copy(maps, file.dtype))
        if len(copies) > (device.type == "cuda"):
            yield copies.popleft()()
    yield from (end_copy() for end_copy in copies)


def _start_copy(maps: list[Tensor], dtype: np.dtype[np.floating]) -> Callable[[], list[NDArray[np.floating]]]:
    """Convert maps where they are and start their way to the host; the result waits for its end and returns arrays."""
    converted = [features.to(getattr(torch, dtype.name)).contiguous() for features in maps]
    if converted[0].device.type != "cuda":
        return lambda: [_finite(features) for features in converted]
    stream = torch.cuda.Stream(converted[0].device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(converted[0].device))
    with torch.cuda.stream(stream):
        pinned = [torch.empty(features.shape, dtype=features.dtype, pin_memory=True) for features in converted]
        for target, features in zip(pinned, converted, strict=True):
            target.copy_(features, non_blocking=True)
            features.record_stream(stream)

    def end_copy() -> list[NDArray[np.floating]]:
        stream.synchronize()
        return [_finite(features) for features in pinned]

    return end_copy


def _finite(features: Tensor) -> NDArray[np.floating]:
    array: NDArray[np.floating] = features.cpu().numpy()
    if not np.isfinite(array).all():
        raise DatasetError(
            f"the backbone's features hold NaN or infinity as {array.dtype.name}: check its weights"
            + (", or keep them as float32 (cache.dtype=float32)" if array.dtype == np.float16 else "")
        )
    return array


def _write(opened: IO[bytes], file: _File, batches: Iterator[list[NDArray[np.floating]]]) -> float:
    """Write a file batch by batch, and its card; return the seconds."""
    start = time.perf_counter()
    opened.write(file.header)
    _write_views(opened, batches, file)
    opened.flush()
    seconds = time.perf_counter() - start
    card = {"parts": file.parts, "shape": file.shape, "seconds": seconds, "bytes": file.bytes}
    # the card first: a file without one could be anybody's, and would never be evicted
    write_json_atomic(_card_of(file.path), card | {"crc32": _checksum(Path(opened.name))})
    return seconds


def _write_views(opened: IO[bytes], batches: Iterator[list[NDArray[np.floating]]], file: _File) -> None:
    """Write the batches after the header, each view in its own block."""
    start, count, done = opened.tell(), file.shape[1], 0
    for arrays in batches:
        for view, array in enumerate(arrays):
            opened.seek(start + (view * count + done) * array[0].nbytes)
            opened.write(cast(bytes, array.data))
        done += len(arrays[0])


_WAYS_OUT = (
    "set cache.dir to {}, cache.dtype=float16 for half the size of float32, or cache.enabled=false to "
    "compute the features in every epoch"
)


def _disk_full(folder: Path, needed: int) -> DatasetError:
    free = shutil.disk_usage(folder).free
    return DatasetError(
        f"{folder}: the feature cache needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; "
        + _WAYS_OUT.format("a folder on a larger disk")
    )


def _card_of(path: Path) -> Path:
    """The JSON file that makes a file of feature maps valid; its time is that of the last use."""
    return path.with_suffix(".json")


@contextlib.contextmanager
def _reserved(file: _File, files: Sequence[_File], max_gb: float | None, keep: Set[Path]) -> Iterator[IO[bytes]]:
    """Open a temporary file that has its full size from the start and becomes `file.path` when the block ends.

    There must be room for all of `files` that nobody has begun. Only one run at a time makes room, so that no two
    take the same.

    Raises ConfigError, DatasetError: no room, or the disk fills up in the block.
    """
    folder, needed = file.path.parent, file.bytes
    try:
        with contextlib.ExitStack() as stack:
            with locked(folder / "cache.lock", on_wait=lambda: None) as held:
                if held:  # without locks, another run may be writing
                    _remove_leftovers(file.path)
                begun = {file.path.stem, *map(_name_of, _unfinished(folder))}
                needed += sum(part.bytes for part in files if part.path.stem not in begun and not part.path.is_file())
                if needed > shutil.disk_usage(folder).free:
                    raise _disk_full(folder, needed)
                if max_gb is not None:
                    _make_room(folder, needed, max_gb, keep)
                # plain writes: on a full disk a sparse memory map would end the process with SIGBUS
                opened = stack.enter_context(stack.enter_context(atomic_path(file.path)).open("xb"))
                opened.truncate(file.bytes)
            yield opened
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        raise _disk_full(folder, needed) from error


def _remove_leftovers(own: Path) -> None:
    """Delete the temporary files of killed runs: those whose lock is free, and those of `own`, whose lock is ours."""
    for path in _unfinished(own.parent):
        name = _name_of(path)
        with locked(own.with_name(f"{name}.lock")) as free:
            if free or name == own.stem:
                logger.info("%s: left over by a killed run, deleted", path)
                path.unlink(missing_ok=True)


def _unfinished(folder: Path) -> list[Path]:
    """Temporary files of maps, as `atomic_path` names them."""
    return [path for path in folder.glob(".features-*.tmp.npy") if _UNFINISHED.fullmatch(path.name)]


def _name_of(unfinished: Path) -> str:
    """Name of the file, without suffix, that a temporary one becomes."""
    return unfinished.name[1:].partition(".")[0]


def _set_of(path: Path) -> str | None:
    """What the files of a set have in common; None for a file that is not one of maps that this cache wrote."""
    try:
        parts = dict(read_json(_card_of(path))["parts"])
        own = _file_name(parts) == path.name
    except (OSError, ValueError, KeyError, TypeError):
        return None
    parts.pop("images", None)
    return _file_name(parts) if own else None


def _make_room(folder: Path, needed: int, max_gb: float, keep: Set[Path]) -> None:
    """Evict sets of maps until there is room for `needed` bytes, the least recently used first.

    Raises ConfigError: with `keep` and what this process uses there is no room below `max_gb`; then nothing is evicted.
    Or the system deletes no file that is open.
    """
    gc.collect()  # maps of an earlier run of this process may be kept by reference cycles only
    own = {path for features in _used for path in features.paths} | keep
    sets: dict[str, list[Path]] = {}
    for path in folder.glob("features-*.npy"):
        name = path.name if path in own else _set_of(path)
        if name is not None:
            sets.setdefault(name, []).append(path)
    sizes = {path: path.stat().st_size for paths in sets.values() for path in paths}
    written = sum(path.stat().st_size for path in _unfinished(folder))  # by other runs, now
    _require_room(folder, needed, written + sum(size for path, size in sizes.items() if path in own), max_gb)
    taken = written + sum(sizes.values())
    others = [paths for paths in sets.values() if not own.intersection(paths)]
    for used, paths in sorted((max(_card_of(path).stat().st_mtime for path in paths), paths) for paths in others):
        if taken + needed <= max_gb * 1e9:
            return
        for path in paths:
            if _evict(path, used, sizes[path]):
                taken -= sizes[path]
    _require_room(folder, needed, taken, max_gb)


def _evict(path: Path, used: float, size: int) -> bool:
    """Delete a file of maps and its card; False where another run or the system keeps it."""
    with locked(path.with_suffix(".lock")) as free:
        if free is False:  # about to be read, or written again
            return False
        try:
            path.unlink()
        except PermissionError:  # Windows deletes no open file
            return False
        _card_of(path).unlink(missing_ok=True)
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(used))
    logger.info("evicted from the feature cache: %s, %.3g GB, last used %s", path, size / 1e9, when)
    return True


def _require_room(folder: Path, needed: int, used: int, max_gb: float) -> None:
    if needed + used > max_gb * 1e9:
        enough = 1.005 * (needed + used) / 1e9  # three digits of it are never too few
        raise ConfigError(
            f"{folder}: the new features need {needed / 1e9:.3g} GB, those in use {used / 1e9:.3g} GB, which is more "
            f"than cache.max_gb={max_gb:g}. Raise cache.max_gb to {enough:.3g}, " + _WAYS_OUT.format("another folder")
        )
