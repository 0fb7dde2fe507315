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
NAMES = ["AM General Hummer SUV 2000", "Ram C/V Cargo Van Minivan 2012", "Mercedes-Benz 300-Class Convertible 1993"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_miniature("cars", tmp_path / "cars", train_per_class=2, test_per_class=1)


@pytest.fixture
def devkit(tmp_path: Path) -> Path:
    return write_miniature("cars_devkit", tmp_path / "devkit", train_per_class=2, test_per_class=1)


def test_classes_targets_and_order(root: Path) -> None:
    train, test = (create_dataset("cars", root=root, split=split) for split in ("train", "test"))
    assert train.classes == test.classes == NAMES
    assert (train.targets, test.targets) == ([0, 0, 1, 1, 2, 2], [0, 1, 2])
    assert test.relative_paths()[:3] == [f"car_ims/{number:06d}.jpg" for number in (3, 6, 9)]


def test_both_layouts_are_the_same_dataset(root: Path, devkit: Path) -> None:
    for split in ("train", "test"):
        one, other = (create_dataset("cars", root=folder, split=split, boxes=True) for folder in (root, devkit))
        assert (one.classes, one.targets, one.boxes) == (other.classes, other.targets, other.boxes)
        contents = [[path.read_bytes() for path in dataset.paths] for dataset in (one, other)]
        assert contents[0] == contents[1]


def test_corners_count_from_one_and_include_the_last_pixel(root: Path) -> None:
    content: dict[str, Any] = {}
    change_mat(ANNOTATIONS, content.update)(root)
    corners = [int(content["annotations"][0, 0][f"bbox_{side}"].item()) for side in ("x1", "y1", "x2", "y2")]
    dataset = create_dataset("cars", root=root, crop="bbox")
    assert dataset.boxes is not None
    assert dataset.boxes[0] == (corners[0] - 1, corners[1] - 1, corners[2], corners[3])
    assert dataset[0][0].size == (corners[2] - corners[0] + 1, corners[3] - corners[1] + 1)
    # all of the coloured box and nothing but the box: class 0 is red on dark noise
    pixels = np.asarray(dataset[0][0]).astype(int)
    assert pixels[..., 0].min() > 180
    whole = np.asarray(create_dataset("cars", root=root)[0][0]).astype(int)
    assert (whole[..., 0] > 150).sum() == pixels[..., 0].size


def test_parent_folder_is_accepted(devkit: Path) -> None:
    devkit.rename(devkit.parent / "stanford_cars")
    assert len(create_dataset("cars", root=devkit.parent)) == 6


def test_images_may_lie_a_folder_deeper_as_in_the_copy_of_kaggle(devkit: Path) -> None:
    before = {split: create_dataset("cars", root=devkit, split=split) for split in ("train", "test")}
    for split, dataset in before.items():
        (devkit / f"cars_{split}").rename(devkit / "images")
        (devkit / f"cars_{split}").mkdir()
        (devkit / "images").rename(devkit / f"cars_{split}" / f"cars_{split}")
        deeper = create_dataset("cars", root=devkit, split=split)
        assert [path.name for path in deeper.paths] == [path.name for path in dataset.paths]
        assert deeper.targets == dataset.targets and deeper[0][1] == dataset.targets[0]


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
