"""The adapters of Stanford Cars, FGVC-Aircraft, Stanford Dogs and ImageNet: what each has of its own."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from damage import DamageTable, assert_refused, change_mat, remove, replace_text, write
from miniature import write_miniature
from numpy.lib.recfunctions import repack_fields

from fgvc.data import create_dataset, fingerprint
from fgvc.errors import ConfigError, DatasetError


def small(name: str, tmp_path: Path) -> Path:
    """Three classes: of each two images to train on, for aircraft one in train and one in val, and one to test on."""
    return write_miniature(name, tmp_path / name, train_per_class=2, test_per_class=1)


def fixture_of(name: str) -> Any:
    return pytest.fixture(lambda tmp_path: small(name, tmp_path))


cars, devkit = fixture_of("cars"), fixture_of("cars_devkit")
aircraft, dogs, imagenet = fixture_of("aircraft"), fixture_of("dogs"), fixture_of("imagenet")
ANNOTATIONS = "cars_annos.mat"


def test_both_layouts_are_the_same_dataset(cars: Path, devkit: Path) -> None:
    for split in ("train", "test"):
        one, other = (create_dataset("cars", root=folder, split=split, boxes=True) for folder in (cars, devkit))
        assert (one.classes, one.targets, one.boxes) == (other.classes, other.targets, other.boxes)
        contents = [[path.read_bytes() for path in dataset.paths] for dataset in (one, other)]
        assert contents[0] == contents[1]


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


def test_numbers_may_be_doubles_as_matlab_has_them(cars: Path) -> None:
    before = create_dataset("cars", root=cars, boxes=True)
    set_field("class", 1.0)(cars)
    set_field("bbox_x1", float(before.boxes[0][0] + 1))(cars)  # type: ignore[index]
    after = create_dataset("cars", root=cars, boxes=True)
    assert (after.targets, after.boxes) == (before.targets, before.boxes)


def test_an_empty_split_of_cars_is_refused(cars: Path) -> None:
    change_mat(ANNOTATIONS, lambda content: content.update(annotations=content["annotations"][:, :2]))(cars)
    with pytest.raises(DatasetError, match="no image belongs to split 'test'"):
        create_dataset("cars", root=cars, split="test")


TRAINVAL = "data/images_variant_trainval.txt"


def test_every_official_split_of_aircraft_can_be_had(aircraft: Path) -> None:
    def names(split: str) -> set[str]:
        other = "val" if split == "test" else "test"
        return {
            path.name for path in create_dataset("aircraft", root=aircraft, train_split=split, test_split=other).paths
        }

    train, val, trainval, test = map(names, ("train", "val", "trainval", "test"))
    assert [len(part) for part in (train, val, trainval, test)] == [3, 3, 6, 3]
    assert trainval == train | val and not train & val and not trainval & test
    held_out = create_dataset("aircraft", root=aircraft, split="test", train_split="train", test_split="val")
    assert {path.name for path in held_out.paths} == val


@pytest.mark.parametrize(
    ("level", "classes", "targets"),
    [
        ("variant", ["707-320", "F/A-18", "Cessna 560"], [0, 1, 2]),
        ("family", ["Boeing 707", "F/A-18"], [0, 0, 1]),
        ("manufacturer", ["McDonnell Douglas", "de Havilland/Boeing"], [0, 1, 0]),
    ],
)
def test_levels_of_aircraft(aircraft: Path, level: str, classes: list[str], targets: list[int]) -> None:
    dataset = create_dataset("aircraft", root=aircraft, split="test", level=level)
    assert (dataset.classes, dataset.targets) == (classes, targets)


def test_the_banner_is_removed_unless_told_otherwise(aircraft: Path) -> None:
    without, whole = (create_dataset("aircraft", root=aircraft, remove_banner=remove) for remove in (True, False))
    assert (without[0][0].size, whole[0][0].size) == ((96, 60), (96, 80))
    assert np.asarray(whole[0][0])[-15:].min() > 240
    assert np.asarray(without[0][0])[-15:].mean() < 60
    assert fingerprint(without) != fingerprint(whole)


def test_boxes_never_reach_into_the_banner(aircraft: Path) -> None:
    line = (aircraft / "data/images_box.txt").read_text().splitlines()[0]
    x1, y1, x2, _ = map(int, line.split()[1:])
    replace_text("data/images_box.txt", line, f"0000001 {x1} {y1} {x2} 80")(aircraft)
    assert create_dataset("aircraft", root=aircraft, crop="bbox")[0][0].size == (x2 - x1 + 1, 60 - y1 + 1)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"level": "model"}, r"level='model'.*variant, family, manufacturer"),
        ({"train_split": "all"}, r"train_split='all'.*train, val, trainval, test"),
        ({"test_split": "val"}, "share images"),
        ({"train_split": "test"}, "share images"),
        ({"remove_banner": "no"}, r"remove_banner must be true or false, found 'no'"),
        ({"level": 3}, r"level='3'"),
        ({"banner": False}, r"no option 'banner'; its options: boxes, level, remove_banner, .*crop"),
    ],
)
def test_wrong_options_of_aircraft_list_the_choices(aircraft: Path, options: dict[str, object], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        create_dataset("aircraft", root=aircraft, **options)


FIRST = "n02085620-Chihuahua/n02085620_1"
ANNOTATION = f"Annotation/{FIRST}"


def test_lists_may_lie_in_a_folder_of_their_own(dogs: Path) -> None:
    before = create_dataset("dogs", root=dogs).paths
    (dogs / "lists").mkdir()
    for name in ("train_list.mat", "test_list.mat"):
        shutil.move(dogs / name, dogs / "lists" / name)
    assert create_dataset("dogs", root=dogs).paths == before


def test_annotations_are_read_only_when_asked_for(dogs: Path) -> None:
    shutil.rmtree(dogs / "Annotation")
    assert create_dataset("dogs", root=dogs).boxes is None


def test_the_box_goes_around_all_dogs(dogs: Path) -> None:
    def bndbox(*sides: int) -> str:
        tags = zip(("xmin", "ymin", "xmax", "ymax"), sides, strict=True)
        return f"<bndbox>{''.join(f'<{tag}>{side}</{tag}>' for tag, side in tags)}</bndbox>"

    objects = "".join(f"<object>{bndbox(*sides)}</object>" for sides in ((10, 20, 30, 70), (5, 25, 35, 40)))
    (dogs / ANNOTATION).write_text(f"<annotation>{objects}</annotation>")
    boxes = create_dataset("dogs", root=dogs, boxes=True).boxes
    assert boxes is not None
    assert boxes[0] == (5, 20, 35, 70)


def test_breeds_of_one_name_get_their_id(dogs: Path) -> None:
    def rename(content: dict[str, Any]) -> None:
        for row in content["file_list"]:
            row[0] = np.array([row[0].item().replace("black-and-tan_coonhound", "Chihuahua")])

    (dogs / "Images" / "n02085720-black-and-tan_coonhound").rename(dogs / "Images" / "n02085720-Chihuahua")
    for split in ("train", "test"):
        change_mat(f"{split}_list.mat", rename)(dogs)
    names = create_dataset("dogs", root=dogs).classes
    assert names == ["Chihuahua (n02085620-Chihuahua)", "Chihuahua (n02085720-Chihuahua)", "Saint Bernard"]


BOMB = b'<!DOCTYPE a [<!ENTITY b "bbbb">]><annotation><object><name>&b;</name></object></annotation>'


def set_path(name: str) -> Any:
    def change(content: dict[str, Any]) -> None:
        content["file_list"][0, 0] = np.array([name])

    return change_mat("train_list.mat", change)


SYNSETS = "LOC_synset_mapping.txt"


def test_without_the_list_the_ids_are_the_names(imagenet: Path) -> None:
    (imagenet / SYNSETS).unlink()
    assert create_dataset("imagenet", root=imagenet).classes == ["n01440764", "n01440765", "n01440766"]


def test_the_unlabelled_test_folder_of_the_archive_is_no_hindrance(imagenet: Path) -> None:
    (imagenet / "test").mkdir()
    assert len(create_dataset("imagenet", root=imagenet, split="test")) == 3


def test_imagenet_names_what_is_not_sorted_or_missing(imagenet: Path) -> None:
    replace_text(SYNSETS, "n01440765", "n01440777")(imagenet)
    with pytest.raises(DatasetError, match=rf"{SYNSETS}: no name for n01440765"):
        create_dataset("imagenet", root=imagenet)
    (imagenet / "val" / "ILSVRC2012_val_00000001.JPEG").touch()
    with pytest.raises(DatasetError, match=r"val_00000001.JPEG and other images are not sorted .* Move .*imagenet"):
        create_dataset("imagenet", root=imagenet)
    (imagenet / "val").rename(imagenet / "valid")
    with pytest.raises(DatasetError, match=r"val missing.*found in .*: .*train, valid.*datasets/imagenet\.yaml"):
        create_dataset("imagenet", root=imagenet)


DAMAGES: dict[str, DamageTable] = {
    "cars": {
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
    },
    "aircraft": {
        "no list of the split": (remove(TRAINVAL), ["images_variant_trainval.txt", "unpack"]),
        "unknown class": (replace_text(TRAINVAL, "F/A-18", "F/A-19"), ["trainval.txt", "'F/A-19'", "variants.txt"]),
        "class listed twice": (replace_text("data/variants.txt", "Cessna 560", "Cessna 560\nF/A-18"), ["twice"]),
        "id leaves the folder": (replace_text(TRAINVAL, "0000001 ", "../0001 "), ["'../0001.jpg'", "leaves"]),
        "no boxes": (remove("data/images_box.txt"), ["images_box.txt"]),
        "one box missing": (
            replace_text("data/images_box.txt", "0000002 ", "9999999 "),
            ["no box for 1 images", "0000002"],
        ),
        "box not of four numbers": (
            replace_text("data/images_box.txt", "0000002 ", "0000002 x "),
            ["id 0000002", "xmin"],
        ),
        "no list of classes": (remove("data/variants.txt"), ["data/variants.txt missing", "datasets/aircraft.yaml"]),
    },
    "dogs": {
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
    },
}


@pytest.mark.parametrize(("name", "damage"), [(name, damage) for name in DAMAGES for damage in DAMAGES[name]])
def test_damage_is_named(tmp_path: Path, name: str, damage: str) -> None:
    assert_refused(name, small(name, tmp_path), DAMAGES[name], damage)
