"""The synthetic set: deterministic, whole or absent, and honest: no mean tells its classes, a covariance does."""

import json
import os
import signal
import threading
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import yaml
from archives import folder_bytes
from command_line import ROOT
from numpy.typing import NDArray
from PIL import Image
from sklearn.linear_model import LogisticRegression

from fgvc.data import create_dataset, synthetic
from fgvc.errors import ConfigError, DatasetError

Floats, Integers = NDArray[np.float64], NDArray[np.int64]
SMALL = {"classes": 3, "train_per_class": 2, "test_per_class": 1, "size": 64}
CLASSES, TRAIN, TEST = 6, 24, 12  # per class, in the tests of honesty


def test_same_arguments_same_bytes(tmp_path: Path) -> None:
    first = folder_bytes(synthetic.write_synthetic(tmp_path / "a", synthetic.Recipe(**SMALL)))
    assert first == folder_bytes(synthetic.write_synthetic(tmp_path / "b", synthetic.Recipe(**SMALL)))
    other = folder_bytes(synthetic.write_synthetic(tmp_path / "c", synthetic.Recipe(**{**SMALL, "seed": 1})))
    assert json.loads(first["synthetic.json"]) == {**SMALL, "agreement": 0.7, "seed": 0}
    images = [name for name in first if name.endswith(".jpg")]
    assert len(images) == 9
    assert all(first[name] != other[name] for name in images)
    assert len({first[name] for name in images}) == 9


def test_made_on_demand_and_read_like_cub(tmp_path: Path) -> None:
    root = tmp_path / "deep" / "synthetic"
    train, test = (create_dataset("synthetic", root=root, split=split, **SMALL) for split in ("train", "test"))
    assert train.classes == [f"{index + 1:03d}.{synthetic.class_name(index)}" for index in range(3)]
    assert (train.targets, test.targets) == ([0, 0, 1, 1, 2, 2], [0, 1, 2])
    assert train[0][0].size == (64, 64)
    assert create_dataset("cub", root=root).paths == train.paths
    assert [path.name for path in root.parent.iterdir()] == ["synthetic"]


def test_defaults_agree_with_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also that `Recipe` and the adapter have the same defaults: another recipe would be refused."""
    monkeypatch.setattr("fgvc.data.synthetic.draw_image", lambda *_: Image.new("RGB", (8, 8)))  # for speed
    card = yaml.safe_load((ROOT / "datasets" / "synthetic.yaml").read_text("utf-8"))
    synthetic.write_synthetic(tmp_path / "set", synthetic.Recipe())
    train, test = (create_dataset("synthetic", root=tmp_path / "set", split=split) for split in ("train", "test"))
    assert (len(train.classes), len(train), len(test)) == (card["classes"], *card["splits"].values())


def test_who_comes_second_waits_and_takes_the_folder_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, written = synthetic._write, []

    def slow_write(root: Path, recipe: object) -> None:
        written.append(root)
        second.start()
        write(root, recipe)  # type: ignore[arg-type]

    monkeypatch.setattr(synthetic, "_write", slow_write)
    recipe = synthetic.Recipe(**SMALL)
    second = threading.Thread(target=synthetic.write_synthetic, args=(tmp_path / "set", recipe), daemon=True)
    synthetic.write_synthetic(tmp_path / "set", synthetic.Recipe(**SMALL))
    second.join(60)
    assert not second.is_alive() and len(written) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_what_a_killed_writer_leaves_is_deleted_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (mine := tmp_path / ".set.tmp").mkdir()
    child = os.fork()
    if not child:
        try:
            monkeypatch.setattr("fgvc.data.layout.write_json_atomic", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            synthetic.write_synthetic(tmp_path / "set", synthetic.Recipe(**SMALL))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert len(list(tmp_path.rglob("*.jpg"))) == 9 and not (tmp_path / "set").exists()
    synthetic.write_synthetic(tmp_path / "set", synthetic.Recipe(**SMALL))
    assert sorted(path.name for path in tmp_path.iterdir()) == [mine.name, "set"]


def test_an_interrupted_writer_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fgvc.data.layout.write_json_atomic", stop)
    with pytest.raises(KeyboardInterrupt):
        synthetic.write_synthetic(tmp_path / "set", synthetic.Recipe(**SMALL))
    assert not list(tmp_path.iterdir())


def test_other_content_is_never_taken_or_overwritten(tmp_path: Path) -> None:
    root = synthetic.write_synthetic(tmp_path / "set", synthetic.Recipe(**SMALL))
    before = folder_bytes(root)
    with pytest.raises(DatasetError, match=r"synthetic\.json.*'seed': 0.*'seed': 5.*delete"):
        create_dataset("synthetic", root=root, **SMALL, seed=5)
    assert folder_bytes(root) == before
    (root / "synthetic.json").write_text("{")
    with pytest.raises(DatasetError, match="not valid JSON"):
        synthetic.write_synthetic(root, synthetic.Recipe(**SMALL))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").touch()
    with pytest.raises(DatasetError, match=r"other: not empty and without synthetic\.json"):
        synthetic.write_synthetic(tmp_path / "other", synthetic.Recipe(**SMALL))


@pytest.mark.parametrize(
    "wrong", [{"classes": 21}, {"classes": 1}, {"size": 8}, {"agreement": 1.5}, {"seed": -1}, {"test_per_class": 0}]
)
def test_arguments_out_of_range(tmp_path: Path, wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))}.*{next(iter(wrong.values()))}|at least 1"):
        synthetic.write_synthetic(tmp_path / "set", synthetic.Recipe(**wrong))  # type: ignore[arg-type]


def test_matchings_are_permutations_that_agree_at_most_once() -> None:
    matchings = [synthetic.class_matching(index) for index in range(synthetic.MAX_CLASSES)]
    assert all(sorted(matching) == list(range(len(synthetic.COLOURS))) for matching in matchings)
    for one, other in combinations(matchings, 2):
        assert sum(a == b for a, b in zip(one, other, strict=True)) <= 1
    assert len({synthetic.class_name(index) for index in range(synthetic.MAX_CLASSES)}) == synthetic.MAX_CLASSES


@pytest.mark.parametrize("agreement", [0.0, 0.7, 1.0])
def test_every_image_holds_each_colour_and_shape_equally_often(agreement: float) -> None:
    for class_index in range(synthetic.MAX_CLASSES):
        layout = synthetic.draw_layout(np.random.default_rng(class_index), class_index, agreement)
        assert np.bincount(layout.colours).tolist() == [5] * len(synthetic.COLOURS)
        assert np.bincount(layout.shapes).tolist() == [5] * len(synthetic.SHAPES)


def test_agreement_is_the_share_that_follows_the_matching() -> None:
    for agreement in (0.0, 0.6, 1.0):
        shares = []
        for seed in range(200):
            layout = synthetic.draw_layout(np.random.default_rng(seed), 7, agreement)
            shares.append(np.mean(np.asarray(synthetic.class_matching(7))[layout.shapes] == layout.colours))
        # those who do not follow it meet their colour by chance, 1 in 5 (a little more often: few are shuffled)
        assert np.mean(shares) == pytest.approx(agreement + (1 - agreement) / 5, abs=0.03)


def test_shapes_have_equal_areas() -> None:
    """Unequal areas would let the mean colour tell which colour has the large shape."""
    areas = []
    for shape in range(len(synthetic.SHAPES)):
        brightness = []
        for seed in range(6):
            layout = synthetic.Layout(np.full(25, 2), np.full(25, shape))
            pixels = np.asarray(synthetic.draw_image(np.random.default_rng(seed), layout, 200)).astype(int)
            brightness.append(((pixels[..., 1] - pixels[..., [0, 2]].max(axis=-1)) > 40).mean())  # green pixels
        areas.append(np.mean(brightness))
    assert np.ptp(areas) / np.mean(areas) < 0.06


def layouts(split: int, count: int) -> tuple[list[synthetic.Layout], Integers]:
    found = [
        synthetic.draw_layout(np.random.default_rng([split, target, number]), target, 0.7)
        for target in range(CLASSES)
        for number in range(count)
    ]
    return found, np.repeat(np.arange(CLASSES), count)


def moments(descriptors: Floats) -> tuple[Floats, Floats]:
    """Mean (d,) and upper triangle of the covariance of local descriptors (locations, d)."""
    covariance = np.cov(descriptors.T, bias=True)
    return descriptors.mean(axis=0), covariance[np.triu_indices(len(covariance))]


def accuracy(train: Floats, y: Integers, test: Floats, z: Integers) -> float:
    """Top-1 of a linear classifier on standardised features."""
    centre, scale = train.mean(axis=0), train.std(axis=0) + 1e-9
    model = LogisticRegression(C=0.1, max_iter=500).fit((train - centre) / scale, y)
    return float(model.score((test - centre) / scale, z))


def pixel_descriptors(image: Image.Image) -> Floats:
    """Per element: five colour channels and three measures of shape, (25, 8), found from the pixels alone."""
    size = image.width
    hue, saturation, _ = np.moveaxis(np.asarray(image.convert("HSV")).astype(float), -1, 0)
    cell = size // 5
    rows = []
    for row, column in np.ndindex(5, 5):
        window = (slice(row * cell, (row + 1) * cell), slice(column * cell, (column + 1) * cell))
        mask = saturation[window] > 130
        y, x = np.nonzero(mask)
        angle = hue[window][mask] / 255 * 2 * np.pi
        centred = np.stack([x - x.mean(), y - y.mean()]) / cell
        radius = np.hypot(*centred)
        middle = mask[cell // 2 - 3 : cell // 2 + 4, cell // 2 - 3 : cell // 2 + 4].mean()
        colour = [f(k * angle).mean() for k in (1, 2) for f in (np.cos, np.sin)]
        rows.append([*colour, middle, radius.mean(), radius.std(), (centred[1] ** 3).mean() * 100])
    return np.array(rows)


def test_pixels_have_equal_means_and_telling_covariances() -> None:
    """Of hand-made descriptors of the drawn images, nuisance and all."""
    sets = []
    for split, count in ((0, TRAIN), (1, TEST)):
        found, targets = layouts(split, count)
        rng = np.random.default_rng(split)
        pairs = [moments(pixel_descriptors(synthetic.draw_image(rng, one, 160))) for one in found]
        sets.append((*(np.stack(part) for part in zip(*pairs, strict=True)), targets))
    (mean, covariance, y), (test_mean, test_covariance, z) = sets
    by_mean, by_covariance = accuracy(mean, y, test_mean, z), accuracy(covariance, y, test_covariance, z)
    print(f"\nlinear classifier on the mean {by_mean:.3f}, on the covariance {by_covariance:.3f}")
    assert by_mean < 2 / CLASSES
    assert by_covariance > 0.8
