"""The FGVC-Aircraft adapter: levels, official splits, the banner."""

from pathlib import Path

import numpy as np
import pytest
from damage import DamageTable, assert_refused, remove, replace_text
from miniature import write_miniature

from fgvc.data import create_dataset, fingerprint
from fgvc.errors import ConfigError

TRAINVAL = "data/images_variant_trainval.txt"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three classes: of each two images to train on, two to validate on, one to test on."""
    return write_miniature("aircraft", tmp_path / "fgvc-aircraft-2013b", test_per_class=1)


def test_every_official_split_can_be_had(root: Path) -> None:
    def names(split: str) -> set[str]:
        dataset = create_dataset(
            "aircraft", root=root, train_split=split, test_split="val" if split == "test" else "test"
        )
        return {path.name for path in dataset.paths}

    train, val, trainval, test = map(names, ("train", "val", "trainval", "test"))
    assert [len(part) for part in (train, val, trainval, test)] == [6, 6, 12, 3]
    assert trainval == train | val
    assert not train & val
    assert not trainval & test
    held_out = create_dataset("aircraft", root=root, split="test", train_split="train", test_split="val")
    assert {path.name for path in held_out.paths} == val


@pytest.mark.parametrize(
    ("level", "classes", "targets"),
    [
        ("variant", ["707-320", "F/A-18", "Cessna 560"], [0, 1, 2]),
        ("family", ["Boeing 707", "F/A-18"], [0, 0, 1]),
        ("manufacturer", ["McDonnell Douglas", "de Havilland/Boeing"], [0, 1, 0]),
    ],
)
def test_levels(root: Path, level: str, classes: list[str], targets: list[int]) -> None:
    dataset = create_dataset("aircraft", root=root, split="test", level=level)
    assert (dataset.classes, dataset.targets) == (classes, targets)


def test_the_banner_is_removed_unless_told_otherwise(root: Path) -> None:
    without, whole = (create_dataset("aircraft", root=root, remove_banner=remove) for remove in (True, False))
    assert (without[0][0].size, whole[0][0].size) == ((96, 60), (96, 80))
    assert np.asarray(whole[0][0])[-15:].min() > 240
    assert np.asarray(without[0][0])[-15:].mean() < 60
    assert fingerprint(without) != fingerprint(whole)


def test_boxes_never_reach_into_the_banner(root: Path) -> None:
    line = next(line for line in (root / "data/images_box.txt").read_text().splitlines() if line.startswith("0000001 "))
    x1, y1, x2, _ = map(int, line.split()[1:])
    replace_text("data/images_box.txt", line, f"0000001 {x1} {y1} {x2} 80")(root)
    assert create_dataset("aircraft", root=root, crop="bbox")[0][0].size == (x2 - x1 + 1, 60 - y1 + 1)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"level": "model"}, r"level='model'.*variant, family, manufacturer"),
        ({"train_split": "all"}, r"train_split='all'.*train, val, trainval, test"),
        ({"test_split": "val"}, "share images"),
        ({"train_split": "test"}, "share images"),
        ({"remove_banner": "no"}, r"remove_banner must be true or false, found 'no'"),
        ({"banner": False}, r"no option 'banner'; its options: boxes, level, remove_banner, .*crop"),
    ],
)
def test_wrong_options_list_the_choices(root: Path, options: dict[str, object], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        create_dataset("aircraft", root=root, **options)


DAMAGES: DamageTable = {
    "no list of the split": (remove(TRAINVAL), ["images_variant_trainval.txt", "unpack"]),
    "unknown class": (replace_text(TRAINVAL, "F/A-18", "F/A-19"), ["trainval.txt", "'F/A-19'", "variants.txt"]),
    "class listed twice": (replace_text("data/variants.txt", "Cessna 560", "Cessna 560\nF/A-18"), ["twice"]),
    "id leaves the folder": (replace_text(TRAINVAL, "0000001 ", "../0001 "), ["'../0001.jpg'", "leaves"]),
    "no boxes": (remove("data/images_box.txt"), ["images_box.txt"]),
    "one box missing": (
        replace_text("data/images_box.txt", "0000002 ", "9999999 "),
        ["no box for 1 images", "0000002"],
    ),
    "box not of four numbers": (replace_text("data/images_box.txt", "0000002 ", "0000002 x "), ["id 0000002", "xmin"]),
    "no list of classes": (remove("data/variants.txt"), ["data/variants.txt missing", "datasets/aircraft.yaml"]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(root: Path, damage: str) -> None:
    assert_refused("aircraft", root, DAMAGES, damage)
