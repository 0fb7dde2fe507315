"""The Stanford Cars adapter: two layouts, one dataset."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from damage import DamageTable, assert_refused, change_mat, remove, write
from miniature import write_miniature
from numpy.lib.recfunctions import repack_fields

from fgvc.data import create_dataset
from fgvc.errors import DatasetError

ANNOTATIONS = "cars_annos.mat"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_miniature("cars", tmp_path / "cars", train_per_class=2, test_per_class=1)


@pytest.fixture
def devkit(tmp_path: Path) -> Path:
    return write_miniature("cars_devkit", tmp_path / "devkit", train_per_class=2, test_per_class=1)


def test_both_layouts_are_the_same_dataset(root: Path, devkit: Path) -> None:
    for split in ("train", "test"):
        one, other = (create_dataset("cars", root=folder, split=split, boxes=True) for folder in (root, devkit))
        assert (one.classes, one.targets, one.boxes) == (other.classes, other.targets, other.boxes)
        contents = [[path.read_bytes() for path in dataset.paths] for dataset in (one, other)]
        assert contents[0] == contents[1]


def test_test_labels_may_lie_in_either_place_and_are_asked_for(devkit: Path) -> None:
    labels = devkit / "cars_test_annos_withlabels.mat"
    before = create_dataset("cars", root=devkit, split="test").targets
    shutil.move(labels, devkit / "devkit" / labels.name)
    assert create_dataset("cars", root=devkit, split="test").targets == before
    (devkit / "devkit" / labels.name).unlink()
    assert len(create_dataset("cars", root=devkit)) == 6
    with pytest.raises(DatasetError, match=rf"{labels.name} missing; put it into .*devkit.*holds no classes"):
        create_dataset("cars", root=devkit, split="test")


def set_field(name: str, value: object) -> Any:
    def change(content: dict[str, Any]) -> None:
        content["annotations"][0, 0][name] = np.array([value])

    return change_mat(ANNOTATIONS, change)


def drop_field(name: str) -> Any:
    def change(content: dict[str, Any]) -> None:
        found = content["annotations"]
        content["annotations"] = repack_fields(found[[other for other in found.dtype.names if other != name]])

    return change_mat(ANNOTATIONS, change)


def test_numbers_may_be_doubles_as_matlab_has_them(root: Path) -> None:
    before = create_dataset("cars", root=root, boxes=True)
    set_field("class", 1.0)(root)
    set_field("bbox_x1", float(before.boxes[0][0] + 1))(root)  # type: ignore[index]
    after = create_dataset("cars", root=root, boxes=True)
    assert (after.targets, after.boxes) == (before.targets, before.boxes)


DAMAGES: DamageTable = {
    "not a mat file": (write(ANNOTATIONS, b"<html>404</html>" * 20), [ANNOTATIONS, "not a readable MATLAB file"]),
    "version 7.3": (
        write(ANNOTATIONS, b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + b"\x89HDF\r\n\x1a\n" * 20),
        [ANNOTATIONS, "7.3 (HDF5)", "-v7"],
    ),
    "no class names": (change_mat(ANNOTATIONS, lambda content: content.pop("class_names")), ["'class_names'"]),
    "no field": (drop_field("bbox_x2"), ["'bbox_x2'", "relative_im_path"]),
    "class out of range": (set_field("class", 4), ["class id 4 has no name, there are 3"]),
    "class zero": (set_field("class", 0), ["class id 0"]),
    "class is no whole number": (set_field("class", 1.5), ["expected a whole number", "1.5"]),
    "path is a number": (set_field("relative_im_path", 3), ["expected a line of text"]),
    "path leaves": (set_field("relative_im_path", "../secret.jpg"), ["'../secret.jpg'", "leaves", ANNOTATIONS]),
    "neither layout": (
        remove(ANNOTATIONS),
        [f"{ANNOTATIONS} missing", "devkit, cars_train, cars_test", "found in", "car_ims", "datasets/cars.yaml"],
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(root: Path, damage: str) -> None:
    assert_refused("cars", root, DAMAGES, damage)


def test_an_empty_split_is_refused(root: Path) -> None:
    change_mat(ANNOTATIONS, lambda content: content.update(annotations=content["annotations"][:, :2]))(root)
    with pytest.raises(DatasetError, match="no image belongs to split 'test'"):
        create_dataset("cars", root=root, split="test")
