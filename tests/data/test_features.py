"""Cached feature maps: equal to computing them, computed once, safe against damage and full disks."""

import json
import logging
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from counted_backbone import COUNT, Backbone, images_in
from PIL import Image
from torch.utils.data import DataLoader

from fgvc.data import FeatureSet, ImageDataset, Samples, TransformSpec, cached_features, require_readable
from fgvc.errors import ConfigError, DatasetError


@pytest.fixture
def dataset(tmp_path: Path) -> ImageDataset:
    return images_in(tmp_path)


def transform(training: bool = True, **options: Any) -> TransformSpec:
    recipe = {"size": 16, "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bilinear", **options}
    return TransformSpec(training=training, **recipe)


def features_of(dataset: ImageDataset, extract: Any, spec: TransformSpec | None = None, **options: Any) -> FeatureSet:
    spec = spec or transform()
    options = {"key_parts": {"weights": "w"}, "cache_dir": dataset.root / "cache", "batch_size": 3, **options}
    options = {"map_shape": (3, spec.size // 4, spec.size // 4), **options}
    return cached_features([dataset.with_transform(spec)], extract, **options)[0]


def cache_files(dataset: ImageDataset) -> list[str]:
    return sorted(path.suffix for path in (dataset.root / "cache").iterdir() if path.name != "CACHEDIR.TAG")


def test_both_views_equal_direct_computation(dataset: ImageDataset) -> None:
    features = features_of(dataset, Backbone())
    assert features.shape == (2, COUNT, 3, 4, 4)
    stored = np.load(features.paths[0])
    images = torch.stack([image for image, _ in dataset.with_transform(transform(training=False))])  # type: ignore[misc]
    for view, batch in enumerate((images, images.flip(-1))):
        np.testing.assert_allclose(stored[view], torch.nn.functional.avg_pool2d(batch, 4).numpy(), atol=1e-6)


def test_views_of_an_epoch_follow_its_seed_alone(dataset: ImageDataset) -> None:
    features = features_of(dataset, Backbone())
    stored = torch.from_numpy(np.load(features.paths[0]))

    def views(seed: int) -> list[int]:
        features.start_epoch(seed)
        torch.rand(seed)  # the global state must not matter
        maps, _ = features.batch(list(range(COUNT)))
        assert torch.equal(maps[2], features[2][0])  # nor how it is read
        return [next(view for view in (0, 1) if torch.equal(maps[i], stored[view, i])) for i in range(COUNT)]

    shown = [views(seed) for seed in (*range(20), *range(20))]
    assert shown[:20] == shown[20:] and any(shown[seed] != shown[0] for seed in range(1, 20))
    assert {view for epoch in shown for view in epoch} == {0, 1}


def test_testing_has_one_view(dataset: ImageDataset) -> None:
    features = features_of(dataset, Backbone(), transform(training=False))
    assert features.shape == (1, COUNT, 3, 4, 4)
    assert torch.equal(features[4][0], features[4][0])
    assert features_of(dataset, Backbone(), transform(hflip=False)).paths == features.paths


def test_batches_and_loaders_agree_with_single_items(dataset: ImageDataset) -> None:
    features = features_of(dataset, Backbone(), transform(training=False))
    maps, targets = features.batch([5, 0, 3])
    assert (maps.dtype, targets.dtype) == (torch.float32, torch.int64)
    assert torch.equal(maps, torch.stack([features[index][0] for index in (5, 0, 3)]))
    assert targets.tolist() == [1, 0, 1]
    for workers in (0, 1):
        batches = list(DataLoader(features, batch_size=4, num_workers=workers))
        assert torch.equal(torch.cat([maps for maps, _ in batches]), features.batch(range(COUNT))[0])
        assert torch.cat([targets for _, targets in batches]).tolist() == dataset.targets


def test_a_hit_computes_nothing(dataset: ImageDataset) -> None:
    first = features_of(dataset, Backbone())
    backbone = Backbone()
    second = features_of(dataset, backbone)
    assert (backbone.calls, first.from_cache, second.from_cache) == (0, False, True)
    assert (second.paths, second.seconds) == (first.paths, first.seconds)
    card = json.loads(first.paths[0].with_suffix(".json").read_text())
    assert (card["shape"], card["parts"]["weights"]) == ([2, COUNT, 3, 4, 4], "w")
    assert cache_files(dataset) == [".json", ".npy"]


def test_everything_that_matters_is_in_the_key(dataset: ImageDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = [{}, {"key_parts": {"weights": "other"}}, {"dtype": "float16"}]
    changes += [{"spec": transform(size=12)}, {"spec": transform(training=False)}]
    paths = {features_of(dataset, Backbone(), **change).paths[0] for change in changes}
    paths.add(features_of(dataset.subset([0, 1]), Backbone()).paths[0])
    paths.add(features_of(dataset, lambda images: torch.zeros(len(images), 3, 4, 4), device="meta").paths[0])
    with monkeypatch.context() as changed:
        changed.setenv("DNNL_DEFAULT_FPMATH_MODE", "BF16")
        paths.add(features_of(dataset, Backbone()).paths[0])
    with torch.autocast("cpu"):
        paths.add(features_of(dataset, Backbone()).paths[0])
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")  # bfloat16 on a CPU, TF32 on a GPU
    try:
        paths.add(features_of(dataset, Backbone()).paths[0])
    finally:
        torch.set_float32_matmul_precision(before)
    Image.new("RGB", (20, 20)).save(dataset.paths[0])
    assert len({*paths, features_of(dataset, Backbone()).paths[0]}) == 11


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_maps_computed_with_tf32_are_not_those_of_float32(
    dataset: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounded = features_of(dataset, Backbone(), device="cuda").paths[0]
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", not torch.backends.cudnn.allow_tf32)
    assert features_of(dataset, Backbone(), device="cuda").paths[0] != rounded


def bitmaps(root: Path, shade: int, time: int) -> ImageDataset:
    """Files of one size, all written at a time."""
    paths = [root / f"{number}.bmp" for number in range(COUNT)]
    root.mkdir()
    for path in paths:
        Image.new("RGB", (16, 16), (shade, 0, 0)).save(path)
        os.utime(path, ns=(0, time))
    return ImageDataset(Samples(["a", "b"], paths, [0, 1, 0, 1, 0, 1, 1]), root)


def test_maps_go_with_the_content_of_files_not_with_place_and_time(tmp_path: Path) -> None:
    def computed(dataset: ImageDataset) -> int:
        backbone = Backbone()
        checked = require_readable(dataset, stamp_dir=tmp_path)
        features_of(checked, backbone, transform(training=False), cache_dir=tmp_path)
        return backbone.calls

    dataset = bitmaps(tmp_path / "a", 10, 0)
    assert [computed(dataset), computed(dataset)] == [3, 0]
    assert computed(bitmaps(tmp_path / "moved", 10, 1)) == 0
    assert computed(bitmaps(tmp_path / "other", 20, 0)) == 3
    shutil.rmtree(dataset.root)
    assert computed(bitmaps(dataset.root, 30, 0)) == 3


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "short": lambda content: content[:-8],
    "long": lambda content: content + b"x",
    "zeros in its middle": lambda content: content[:400] + bytes(100) + content[500:],
    "half a card": lambda _: b'{"shape": ',
    "empty card": lambda _: b"{}",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_computed_again(dataset: ImageDataset, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    good = features_of(dataset, Backbone(), transform(training=False)).batch(range(COUNT))[0]
    (path,) = (dataset.root / "cache").glob("*.json" if "card" in damage else "*.npy")
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    backbone = Backbone()
    with caplog.at_level(logging.WARNING):
        again = features_of(dataset, backbone, transform(training=False))
    assert (backbone.calls, again.from_cache) == (3, False)
    assert "damaged feature cache" in caplog.text
    assert torch.equal(again.batch(range(COUNT))[0], good)


def test_half_precision_on_disk_gives_float32(dataset: ImageDataset) -> None:
    full = features_of(dataset, Backbone(), transform(training=False))
    half = features_of(dataset, Backbone(), transform(training=False), dtype="float16")
    assert half.batch(range(COUNT))[0].dtype == torch.float16
    maps = torch.stack([half[index][0] for index in range(COUNT)])
    assert maps.dtype == torch.float32
    assert half.paths[0].stat().st_size < 0.6 * full.paths[0].stat().st_size
    torch.testing.assert_close(maps, full.batch(range(COUNT))[0], atol=1e-3, rtol=1e-3)


def test_a_pickled_set_is_small_and_equal(dataset: ImageDataset) -> None:
    features = features_of(
        dataset, lambda images: images.repeat(1, 20, 1, 1), transform(training=False), map_shape=(60, 16, 16)
    )
    data = pickle.dumps(features)
    assert len(data) < 5000 < features.paths[0].stat().st_size
    assert torch.equal(pickle.loads(data)[1][0], features[1][0])


def test_too_little_room_is_seen_before_writing(dataset: ImageDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(dataset.root)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    backbone = Backbone()
    with pytest.raises(
        DatasetError, match=r"cache: .* needs 0\.00 GB, 0\.00 GB are free; set cache.dir.*float16.*enabled"
    ):
        features_of(dataset, backbone)
    assert backbone.calls == 0  # nor is an image read
    assert cache_files(dataset) == []


def test_there_must_be_room_for_all_splits(dataset: ImageDataset) -> None:
    backbone, size = Backbone(), 128 + COUNT * 3 * 4 * 4 * 4
    splits = [
        dataset.with_transform(transform(hflip=False, size=16)),
        dataset.subset([0, 1]).with_transform(transform()),
    ]
    with pytest.raises(ConfigError, match=r"Raise cache\.max_gb to"):
        cached_features(
            splits,
            backbone,
            map_shape=(3, 4, 4),
            key_parts={},
            cache_dir=dataset.root / "cache",
            max_gb=(size + 100) / 1e9,
        )
    assert backbone.calls == 0 and cache_files(dataset) == []


def test_an_interrupted_computation_leaves_nothing_behind(dataset: ImageDataset) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        features_of(dataset, Backbone(interrupt, at=4))
    assert cache_files(dataset) == []


def test_refusals(dataset: ImageDataset) -> None:
    with pytest.raises(ConfigError, match=r"'int8'.*float32, float16"):
        features_of(dataset, Backbone(), dtype="int8")
    with pytest.raises(ConfigError, match=r"random.*cache\.enabled=false"):
        features_of(dataset, Backbone(), transform(crop="random", resize_size=20))
    with pytest.raises(DatasetError, match=r"NaN or infinity as float32: check its weights$"):
        features_of(dataset, lambda images: images / 0, map_shape=(3, 16, 16))
    with pytest.raises(DatasetError, match="keep them as float32"):
        features_of(dataset, lambda images: images * 1e6, dtype="float16", map_shape=(3, 16, 16))
    dataset.paths[5].write_bytes(b"")
    with pytest.raises(DatasetError, match=r"5\.png: empty file"):
        features_of(dataset, Backbone())
    assert cache_files(dataset) == []
