"""The NABirds adapter: CUB's format with ids of text and a hierarchy of classes."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from damage import DamageTable, assert_refused, remove, replace_text
from miniature import write_miniature

from fgvc.data import create_dataset

IMAGE_ID = "00000001-21dc-4d0c-bfe1-4cae3c85c829"
FILE = "0295/0000000121dc4d0cbfe14cae3c85c829.jpg"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_miniature("nabirds", tmp_path / "nabirds", train_per_class=2, test_per_class=1)


def test_only_classes_with_images_count(root: Path) -> None:
    train, test = (create_dataset("nabirds", root=root, split=split) for split in ("train", "test"))
    names = ["Northern Harrier (Adult male)", "Dark-eyed Junco (Slate-colored)", "Blue Grosbeak (Female/juvenile)"]
    assert train.classes == test.classes == names
    assert (train.targets, test.targets) == ([0, 0, 1, 1, 2, 2], [0, 1, 2])
    assert train.relative_paths()[0] == f"images/{FILE}"
    assert create_dataset("nabirds", root=root.parent).paths == train.paths


def test_a_class_seen_in_one_split_only_is_in_both_lists(root: Path) -> None:
    lines = (root / "train_test_split.txt").read_text().splitlines()
    (root / "train_test_split.txt").write_text("\n".join([*lines[:-1], lines[-1][:-1] + "1"]))
    train, test = (create_dataset("nabirds", root=root, split=split) for split in ("train", "test"))
    assert len(train.classes) == len(test.classes) == 3
    assert test.targets == [0, 1]


def test_classes_of_one_name_get_their_id(root: Path) -> None:
    replace_text("classes.txt", "Dark-eyed Junco (Slate-colored)", "Northern Harrier (Adult male)")(root)
    names = create_dataset("nabirds", root=root).classes
    assert names[:2] == ["Northern Harrier (Adult male) (295)", "Northern Harrier (Adult male) (296)"]


def test_boxes(root: Path) -> None:
    line = next(line for line in (root / "bounding_boxes.txt").read_text().splitlines() if line.startswith(IMAGE_ID))
    x, y, width, height = map(int, line.split()[1:])
    dataset = create_dataset("nabirds", root=root, crop="bbox")
    assert dataset.boxes is not None
    assert dataset.boxes[0] == (x, y, x + width, y + height)
    assert dataset[0][0].size == (width, height)
    assert np.asarray(dataset[0][0])[..., 0].min() > 180  # class 0 is red


DAMAGES: DamageTable = {
    "id in one file only": (
        replace_text("image_class_labels.txt", f"{IMAGE_ID} 295\n", ""),
        ["image_class_labels.txt: 1 image ids missing", IMAGE_ID],
    ),
    "class without a name": (replace_text("classes.txt", "296 ", "9296 "), ["classes.txt", "class ids 296"]),
    "class id not a number": (replace_text("classes.txt", "296 ", "b296 "), ["classes.txt", "'b296 Dark-eyed"]),
    "path leaves": (replace_text("images.txt", FILE, f"../{FILE}"), ["images.txt", f"'../{FILE}'", "leaves"]),
    "image missing": (remove(f"images/{FILE}"), ["1 of 6 images", FILE]),
    "no boxes": (remove("bounding_boxes.txt"), ["bounding_boxes.txt: missing"]),
    "no root": (shutil.rmtree, ["no such folder", "datasets/nabirds.yaml"]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(root: Path, damage: str) -> None:
    assert_refused("nabirds", root, DAMAGES, damage)
