"""A feature cache that processes share: one computes and the others wait, what is used stays, a limit holds."""

import errno
import gc
import hashlib
import logging
import multiprocessing
import os
import pickle
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import Train, refused, succeeded
from counted_backbone import COUNT, Backbone, images_in

from fgvc.data import FeatureSet, ImageDataset, TransformSpec, cached_features, feature_cache
from fgvc.errors import ConfigError

SIZE = 128 + COUNT * 3 * 4 * 4 * 4  # header and maps of one entry in bytes
# forked children have torch imported already, which takes seconds
context = multiprocessing.get_context("fork")


@pytest.fixture
def dataset(tmp_path: Path) -> ImageDataset:
    return images_in(tmp_path)


def features_of(dataset: ImageDataset, extract: Backbone, name: str = "a", entries: float | None = None) -> FeatureSet:
    """Maps of a backbone called `name`, in a cache limited to so many entries."""
    spec = TransformSpec(training=False, size=16, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear")
    limit = None if entries is None else entries * SIZE / 1e9
    options = {"cache_dir": dataset.root / "cache", "batch_size": 3, "max_gb": limit}
    split = dataset.with_transform(spec)
    return cached_features([split], extract, map_shape=(3, 4, 4), key_parts={"weights": name}, **options)[0]


def kinds(dataset: ImageDataset) -> list[str]:
    """Suffixes of the files in the cache, without the mark of such a folder."""
    files = (path for path in (dataset.root / "cache").iterdir() if path.name != "CACHEDIR.TAG")
    return sorted("".join(path.suffixes) for path in files)


@contextmanager
def process(function: Callable[..., object], *arguments: object) -> Iterator[Any]:
    child = context.Process(target=function, args=arguments, daemon=True)
    child.start()
    try:
        yield child
    finally:
        child.kill()
        child.join(20)


@contextmanager
def on_message(part: str, action: Callable[[], object]) -> Iterator[None]:
    """Call `action` when a message of the cache that holds `part` is logged."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if part in record.getMessage():
                action()

    logger, handler = logging.getLogger("fgvc.data.feature_cache"), Handler()
    logger.addHandler(handler)
    level, logger.level = logger.level, logging.INFO
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def compute_and_hang(dataset: ImageDataset, name: str, started: Any, goes_on: Any) -> None:
    """Compute an entry; after the first batch is written, say so and wait."""

    def hang() -> None:
        started.set()
        assert goes_on.wait(30)

    features_of(dataset, Backbone(hang), name)


def hold(dataset: ImageDataset, name: str, opened: Any, release: Any, read: Any) -> None:
    """Use an entry until told to end, then read all of it."""
    features = features_of(dataset, Backbone(), name)
    opened.set()
    assert release.wait(30)
    read.put(features.batch(range(COUNT))[0].numpy())


def test_the_second_of_two_runs_waits_and_computes_nothing(dataset: ImageDataset) -> None:
    started, goes_on, backbone = context.Event(), context.Event(), Backbone()
    with process(compute_and_hang, dataset, "a", started, goes_on) as first:
        assert started.wait(30)
        with on_message("computed by another run", goes_on.set):
            features = features_of(dataset, backbone)
        first.join(30)
        assert first.exitcode == 0
    assert (backbone.calls, features.from_cache) == (0, True)
    alone = features_of(dataset, Backbone(), "b")
    assert features.paths[0].read_bytes() == alone.paths[0].read_bytes()
    assert kinds(dataset) == [".json", ".json", ".npy", ".npy"]


def at_once(children: list[Any], results: Any) -> list[Any]:
    """What the processes put into the queue."""
    for child in children:
        child.daemon = True
        child.start()
    found = [results.get(timeout=30) for _ in children]
    for child in children:
        child.join(30)
    return found


def test_of_many_runs_at_once_one_computes(dataset: ImageDataset) -> None:
    barrier, results = context.Barrier(5), context.Queue()

    def run() -> None:
        backbone = Backbone(lambda: time.sleep(0.2))
        barrier.wait(30)
        features = features_of(dataset, backbone)
        maps = features.batch(range(COUNT))[0].numpy()
        results.put((backbone.calls, hashlib.sha256(maps.tobytes()).hexdigest()))

    calls, digests = zip(*at_once([context.Process(target=run) for _ in range(5)], results), strict=True)
    assert sorted(calls) == [0, 0, 0, 0, 3]
    assert len(set(digests)) == 1
    assert kinds(dataset) == [".json", ".npy"]


def test_when_the_computing_run_is_killed_the_waiting_one_takes_over(dataset: ImageDataset) -> None:
    started, backbone = context.Event(), Backbone()
    with process(compute_and_hang, dataset, "a", started, context.Event()) as first:
        assert started.wait(30)
        assert len(list((dataset.root / "cache").glob(".features-*.tmp.npy"))) == 1
        with on_message("computed by another run", first.kill):
            features = features_of(dataset, backbone)
    assert (backbone.calls, features.from_cache) == (3, False)
    assert kinds(dataset) == [".json", ".npy"]


@pytest.mark.skipif(os.name == "nt", reason="no open file is deleted here")
def test_what_another_process_reads_stays_readable_when_it_is_evicted(dataset: ImageDataset) -> None:
    opened, release, read = context.Event(), context.Event(), context.Queue()
    with process(hold, dataset, "a", opened, release, read) as reader:
        assert opened.wait(30)
        (path,) = (dataset.root / "cache").glob("features-*.npy")
        before = path.read_bytes()
        assert not features_of(dataset, Backbone(), "b", entries=1.5).from_cache
        assert not path.exists()
        release.set()
        np.testing.assert_array_equal(read.get(timeout=30), np.frombuffer(before[128:], "f4").reshape(COUNT, 3, 4, 4))
        reader.join(30)


def test_runs_that_need_other_maps_do_not_wait(dataset: ImageDataset) -> None:
    started, goes_on = context.Event(), context.Event()
    with process(compute_and_hang, dataset, "a", started, goes_on) as first:
        assert started.wait(30)
        assert not features_of(dataset, Backbone(), "b", entries=2).from_cache
        with pytest.raises(ConfigError, match="those in use 1"):  # what is being written counts whole
            features_of(dataset, Backbone(), "c", entries=1.5)
        assert first.is_alive() and len(list((dataset.root / "cache").glob(".features-*.tmp.npy"))) == 1
        goes_on.set()
        first.join(30)
        assert first.exitcode == 0
    assert features_of(dataset, Backbone(), "a").from_cache


def test_runs_at_once_stay_below_the_limit_together(dataset: ImageDataset) -> None:
    """A third one is refused while two are written, and takes the place of one that is finished."""
    barrier, results = context.Barrier(3), context.Queue()

    def run(name: str) -> None:
        barrier.wait(30)
        try:
            features = features_of(dataset, Backbone(lambda: time.sleep(0.2)), name, entries=2)
        except ConfigError:
            results.put("refused")
        else:
            results.put(features.batch(range(COUNT))[0].shape)

    found = at_once([context.Process(target=run, args=(name,)) for name in "abc"], results)
    assert found.count((COUNT, 3, 4, 4)) + found.count("refused") == 3 and found.count("refused") <= 1
    assert kinds(dataset) == [".json"] * 2 + [".npy"] * 2


def test_an_entry_evicted_on_opening_is_computed_again(dataset: ImageDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    path = features_of(dataset, Backbone()).paths[0]
    open_maps, calls = feature_cache.open_maps, []

    def too_late(asked: Path) -> Any:
        calls.append(asked)
        if len(calls) == 1:
            features_of(dataset, Backbone(), "b", entries=1)
            assert not path.exists()
        return open_maps(asked)

    monkeypatch.setattr(feature_cache, "open_maps", too_late)
    assert not features_of(dataset, Backbone()).from_cache
    assert path.is_file()


def test_several_processes_compute_the_files_of_a_large_set(
    dataset: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = features_of(dataset, Backbone(), "b").batch(range(COUNT))[0]
    monkeypatch.setattr(feature_cache, "_IMAGES", 2)
    barrier, results = context.Barrier(2), context.Queue()

    def run() -> None:
        backbone = Backbone(lambda: time.sleep(0.3), at=1)
        barrier.wait(30)
        maps = features_of(dataset, backbone).batch(range(COUNT))[0].numpy()
        results.put((backbone.calls, maps))

    found = at_once([context.Process(target=run) for _ in range(2)], results)
    assert sorted(calls for calls, _ in found) in ([1, 3], [2, 2])  # of four files, each once
    assert all(np.array_equal(maps, whole) for _, maps in found)
    features, order = features_of(dataset, Backbone()), [6, 0, 3, 3, 1]
    assert features.from_cache and features.shape == (1, COUNT, 3, 4, 4) and len(features.paths) == 4
    assert torch.equal(features.batch(order)[0], whole[order])
    assert torch.equal(pickle.loads(pickle.dumps(features)).batch(order)[0], whole[order])
    features.paths[2].unlink()
    backbone = Backbone()
    again = features_of(dataset, backbone)
    assert backbone.calls == 1 and torch.equal(again.batch(range(COUNT))[0], whole)


def test_a_large_set_is_evicted_as_a_whole(dataset: ImageDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_cache, "_IMAGES", 2)
    use(dataset, "a", 3)
    use(dataset, "b", 3)
    assert len(kinds(dataset)) == 16
    use(dataset, "c", 2.6)
    assert len(kinds(dataset)) == 16 and use(dataset, "b", None) and not use(dataset, "a", None)
    with pytest.raises(ConfigError, match=r"need 1\.86e-06 GB"):  # of all its files, before the first is computed
        features_of(dataset, Backbone(lambda: pytest.fail("an image was read"), at=1), "d", 0.9)


def use(dataset: ImageDataset, name: str, entries: float | None) -> bool:
    """Have an entry for a moment; whether it was in the cache."""
    time.sleep(0.02)  # the clock of a file system ticks in milliseconds
    return features_of(dataset, Backbone(), name, entries).from_cache


def test_the_least_recently_used_go_first(dataset: ImageDataset, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    found = [use(dataset, name, 3) for name in "abcadbacde"]
    #            a      b      c     a      d      b      a     c      d      e
    assert found == [False, False, False, True, False, False, True, False, False, False]
    assert kinds(dataset) == [".json"] * 3 + [".npy"] * 3
    assert [use(dataset, name, 3) for name in "cde"] == [True] * 3
    evicted = [record.getMessage() for record in caplog.records if "evicted" in record.getMessage()]
    assert len(evicted) == 5 and f"{dataset.root / 'cache' / 'features-'}" in evicted[0]
    assert f"1.47e-06 GB, last used {time.strftime('%Y-')}" in evicted[0]


def test_no_limit_evicts_nothing_and_a_lower_one_only_when_something_is_added(dataset: ImageDataset) -> None:
    for name in "abcd":
        use(dataset, name, None)
    assert use(dataset, "d", 1) and len(kinds(dataset)) == 8
    use(dataset, "e", 2)
    assert kinds(dataset) == [".json"] * 2 + [".npy"] * 2
    assert use(dataset, "d", 2)


def test_an_entry_larger_than_the_limit_evicts_nothing(dataset: ImageDataset) -> None:
    use(dataset, "a", None)
    with pytest.raises(ConfigError, match=r"those in use 0 GB.*Raise cache\.max_gb to 1\.4[78]e-06"):
        features_of(dataset, Backbone(), "b", entries=0.9)
    assert kinds(dataset) == [".json", ".npy"]


def test_files_of_others_in_the_folder_stay(dataset: ImageDataset) -> None:
    """Even with names like ours: a file is one of the cache if its card has its name."""
    use(dataset, "a", None)
    folder, other = dataset.root / "cache", "0123456789abcdef" * 2
    card = next(folder.glob("*.json")).read_text()
    theirs = {"features-mine.npy": "x", f"features-{other}.npy": "x", f"features-{other}.json": card}
    theirs |= {".features-mine.tmp.npy": "x", ".features-0.0.tmp.npy": "x", f".features-{other}.mine.tmp.npy": "x"}
    for name, content in theirs.items():
        (folder / name).write_text(content)
    killed = folder / f".features-{other}.0123abcd.tmp.npy"
    killed.touch()
    thesis = dataset.root / "thesis.txt"
    thesis.write_text("mine")
    (folder / "CACHEDIR.TAG").unlink()
    (folder / "CACHEDIR.TAG").symlink_to(thesis)
    use(dataset, "b", 1)
    assert {path.name for path in folder.iterdir()} > set(theirs) and not killed.exists()
    assert thesis.read_text() == "mine"
    assert len(kinds(dataset)) == len(theirs) + 2


def test_maps_under_the_name_of_others_are_not_used(dataset: ImageDataset, caplog: pytest.LogCaptureFixture) -> None:
    first, second = (features_of(dataset, Backbone(), name).paths[0] for name in "ab")
    for suffix in (".npy", ".json"):
        first.with_suffix(suffix).rename(first.with_suffix(f"{suffix}.old"))
        second.with_suffix(suffix).rename(first.with_suffix(suffix))
    assert not features_of(dataset, Backbone(), "a").from_cache and "that of other maps" in caplog.text


def test_this_process_keeps_what_it_uses_itself(dataset: ImageDataset) -> None:
    train = features_of(dataset, Backbone(), "train", entries=2)
    other = features_of(dataset, Backbone(), "other", entries=2)
    with pytest.raises(ConfigError, match=r"those in use 2\.94e-06 GB") as caught:
        features_of(dataset, Backbone(), "new", entries=2)
    enough = re.search("Raise cache.max_gb to (.*?),", str(caught.value))
    assert enough is not None and 3 * SIZE <= float(enough[1]) * 1e9 < 3.1 * SIZE
    cycle: list[Any] = [other]
    cycle.append(cycle)
    del other, cycle  # garbage, but not yet collected
    features_of(dataset, Backbone(), "new", entries=2)
    assert train.paths[0].is_file()


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no list of open files here")
def test_a_set_holds_one_file_open_and_lets_go_of_it(dataset: ImageDataset) -> None:
    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))  # noqa: PTH208

    gc.collect()
    before = open_files()
    sets = [features_of(dataset, Backbone(), name) for name in "aab"]
    assert open_files() == before + len(sets)
    for _ in range(5):
        features_of(dataset, Backbone(), "c", entries=3)
        (dataset.root / "cache" / "features-x.npy").write_bytes(bytes(SIZE))
        with pytest.raises(ConfigError):
            features_of(dataset, Backbone(), "d", entries=2)
    del sets
    assert open_files() == before


def test_a_full_disk_leaves_the_other_entries(dataset: ImageDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    use(dataset, "a", 2)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("fgvc.data.feature_cache._write_views", full)
        with pytest.raises(Exception, match=r"set cache\.dir to a folder on a larger disk"):
            features_of(dataset, Backbone(), "b", entries=2)
    assert kinds(dataset) == [".json", ".npy"]
    assert use(dataset, "a", 2)


def test_a_cache_that_may_only_be_read_is_used(unprivileged: Path) -> None:
    read_only, backbone = images_in(unprivileged), Backbone()
    features_of(read_only, Backbone())
    (unprivileged / "cache").chmod(0o555)
    assert features_of(read_only, backbone, entries=0.5).from_cache
    assert backbone.calls == 0
    with pytest.raises(PermissionError, match="cache"):
        features_of(read_only, backbone, "b")
    assert backbone.calls == 0  # nothing is computed in vain
    assert kinds(read_only) == [".json", ".npy"]


def test_without_locks_all_works_but_no_cleaning_up(dataset: ImageDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", none)
    leftover = dataset.root / "cache" / f".features-{32 * '0'}.{8 * '0'}.tmp.npy"
    leftover.parent.mkdir()
    leftover.touch()
    assert [use(dataset, name, 2) for name in "aabbc"] == [False, True, False, True, False]
    assert leftover.exists() and use(dataset, "b", 2) and not use(dataset, "a", 2)


def test_a_limit_on_the_command_line(tmp_path: Path, train_here: Train) -> None:
    frozen = ["backbone.frozen=true", "cache.dir=cache", "cache.dtype=float32", "trainer.epochs=1"]
    for number in ("0", "-1"):
        refused(train_here(tmp_path, *frozen, f"cache.max_gb={number}"), "cache.max_gb must be positive, or null")
    refused(train_here(tmp_path, *frozen, "cache.max_gb=1e-6"), "cache.max_gb=1e-06", "Raise cache.max_gb")
    assert train_here(tmp_path, *frozen, "run_dir=a").returncode == 0
    before = set((tmp_path / "cache").glob("features-*"))
    limit = f"cache.max_gb={1.2e-9 * sum(path.stat().st_size for path in before)}"
    # the weights of this backbone are drawn with the seed: other maps
    done = succeeded(train_here(tmp_path, *frozen, "run_dir=b", "seed=1", limit))
    assert done.stderr.count("evicted from the feature cache") == 2
    after = set((tmp_path / "cache").glob("features-*"))
    assert len(after) == len(before) == 4 and not after & before
