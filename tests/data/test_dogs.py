"""The Stanford Dogs adapter: lists, readable names, annotations read only when asked for, and safely."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from damage import DamageTable, assert_refused, change_mat, remove, replace_text, write
from miniature import write_miniature

from fgvc.data import create_dataset

FIRST = "n02085620-Chihuahua/n02085620_1"
ANNOTATION = f"Annotation/{FIRST}"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_miniature("dogs", tmp_path / "dogs", train_per_class=2, test_per_class=1)


def test_lists_may_lie_in_a_folder_of_their_own(root: Path) -> None:
    before = create_dataset("dogs", root=root).paths
    (root / "lists").mkdir()
    for name in ("train_list.mat", "test_list.mat"):
        shutil.move(root / name, root / "lists" / name)
    assert create_dataset("dogs", root=root).paths == before


def test_annotations_are_read_only_when_asked_for(root: Path) -> None:
    shutil.rmtree(root / "Annotation")
    assert create_dataset("dogs", root=root).boxes is None


def test_the_box_goes_around_all_dogs(root: Path) -> None:
    def bndbox(*sides: int) -> str:
        tags = zip(("xmin", "ymin", "xmax", "ymax"), sides, strict=True)
        return f"<bndbox>{''.join(f'<{tag}>{side}</{tag}>' for tag, side in tags)}</bndbox>"

    dogs = "".join(f"<object>{bndbox(*sides)}</object>" for sides in ((10, 20, 30, 70), (5, 25, 35, 40)))
    (root / ANNOTATION).write_text(f"<annotation>{dogs}</annotation>")
    boxes = create_dataset("dogs", root=root, boxes=True).boxes
    assert boxes is not None
    assert boxes[0] == (5, 20, 35, 70)


def test_breeds_of_one_name_get_their_id(root: Path) -> None:
    def rename(content: dict[str, Any]) -> None:
        for row in content["file_list"]:
            row[0] = np.array([row[0].item().replace("black-and-tan_coonhound", "Chihuahua")])

    (root / "Images" / "n02085720-black-and-tan_coonhound").rename(root / "Images" / "n02085720-Chihuahua")
    for split in ("train", "test"):
        change_mat(f"{split}_list.mat", rename)(root)
    names = create_dataset("dogs", root=root).classes
    assert names == ["Chihuahua (n02085620-Chihuahua)", "Chihuahua (n02085720-Chihuahua)", "Saint Bernard"]


BOMB = b'<!DOCTYPE a [<!ENTITY b "bbbb">]><annotation><object><name>&b;</name></object></annotation>'


def set_path(name: str) -> Any:
    def change(content: dict[str, Any]) -> None:
        content["file_list"][0, 0] = np.array([name])

    return change_mat("train_list.mat", change)


DAMAGES: DamageTable = {
    "entities": (write(ANNOTATION, BOMB), [ANNOTATION, "document type declaration"]),
    "not XML": (write(ANNOTATION, b"<annotation>"), [ANNOTATION, "not a readable annotation"]),
    "no box": (write(ANNOTATION, b"<annotation/>"), [ANNOTATION, "no <bndbox>"]),
    "no side": (replace_text(ANNOTATION, "xmax", "width"), [ANNOTATION, "not a readable annotation"]),
    "path leaves": (set_path("../n02085620-Chihuahua/x.jpg"), ["'../n02085620-Chihuahua/x.jpg'", "leaves"]),
    "label of two breeds": (set_path("n9-Pug/x.jpg"), ["label 1", "'n9-Pug'", "'n02085620-Chihuahua'"]),
    "too few labels": (
        change_mat("train_list.mat", lambda content: content.update(labels=content["labels"][:-1])),
        ["train_list.mat", "6 files but 5 labels"],
    ),
    "empty list": (
        change_mat("train_list.mat", lambda c: c.update(labels=c["labels"][:0], file_list=c["file_list"][:0])),
        ["train_list.mat: no entries"],
    ),
    "no list": (remove("test_list.mat"), ["test_list.mat missing", "lists/test_list.mat", "datasets/dogs.yaml"]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(root: Path, damage: str) -> None:
    assert_refused("dogs", root, DAMAGES, damage)
