"""The adapters of CUB-200-2011 and NABirds: what they read, and what they say about a damaged copy."""

import shutil
from pathlib import Path

import pytest
from damage import DamageTable, assert_refused, remove, replace_text, write
from miniature import write_miniature
from PIL import Image

from fgvc.data import create_dataset
from fgvc.errors import ConfigError, DatasetError

NAMES = ["001.Gull/a.png", "001.Gull/b.png", "002.Black Tern/c.png", "002.Black Tern/d.png"]
BOXES = ["1.5 2.0 2.0 2.5", "0.0 0.0 8.0 6.0", "2 1 4 4", "5.0 3.0 20.0 20.0"]


def write_table(path: Path, values: list[str]) -> None:
    path.write_text("".join(f"{number} {value}\n" for number, value in enumerate(values, start=1)), encoding="utf-8")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Four images of two classes, one of each in each split."""
    root = tmp_path / "CUB_200_2011"
    for index, name in enumerate(NAMES):
        path = root / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6), (index * 60, 0, 0)).save(path)
    write_table(root / "images.txt", NAMES)
    write_table(root / "image_class_labels.txt", ["1", "1", "2", "2"])
    write_table(root / "train_test_split.txt", ["1", "0", "0", "1"])
    write_table(root / "classes.txt", ["001.Gull", "002.Black Tern"])
    write_table(root / "bounding_boxes.txt", BOXES)
    return root


def test_splits_targets_and_order(root: Path) -> None:
    train, test = (create_dataset("cub", root=root, split=split) for split in ("train", "test"))
    assert train.classes == test.classes == ["001.Gull", "002.Black Tern"]
    assert train.relative_paths()[:2] == ["images/001.Gull/a.png", "images/002.Black Tern/d.png"]
    assert train.targets == test.targets == [0, 1]
    image, target = train[1]
    assert (image.mode, image.size, image.getpixel((0, 0)), target) == ("RGB", (8, 6), (180, 0, 0), 1)


def test_class_ids_need_not_be_consecutive(root: Path) -> None:
    (root / "classes.txt").write_text("7 b\n3 a\n")
    (root / "image_class_labels.txt").write_text("1 3\n2 3\n3 7\n4 7\n")
    dataset = create_dataset("cub", root=root)
    assert (dataset.classes, dataset.targets) == (["a", "b"], [0, 1])


def test_crop_keeps_every_pixel_the_box_touches_and_stays_in_the_image(root: Path) -> None:
    for name, (left, top) in ((NAMES[0], (1, 2)), (NAMES[3], (5, 3))):
        with Image.open(root / "images" / name) as image:
            image.putpixel((left, top), (9, 8, 7))
            image.save(root / "images" / name)
    dataset = create_dataset("cub", root=root, crop="bbox")
    images = [dataset[i][0] for i in range(2)]
    assert [image.size for image in images] == [(3, 3), (3, 3)]
    assert [image.getpixel((0, 0)) for image in images] == [(9, 8, 7)] * 2


@pytest.mark.parametrize("box", ["2 1 0 4", "2 1 4 -1", "2.5 1 0 4", "8 0 3 3", "0 -9 3 5"])
def test_an_empty_box_names_image_and_box(root: Path, box: str) -> None:
    write_table(root / "bounding_boxes.txt", [box, *BOXES[1:]])
    with pytest.raises(DatasetError, match=r"a\.png: box \(.*\) .* is empty in an image of 8 x 6 pixels"):
        create_dataset("cub", root=root, crop="bbox")[0]
    assert create_dataset("cub", root=root)[0][0].size == (8, 6)


def test_a_copy_without_boxes_refuses_only_the_crop(root: Path) -> None:
    (root / "bounding_boxes.txt").unlink()
    assert len(create_dataset("cub", root=root)) == 2
    with pytest.raises(DatasetError, match=r"bounding_boxes\.txt: missing"):
        create_dataset("cub", root=root, crop="bbox")
    with pytest.raises(ConfigError, match=r"crop='box' is unknown; choose bbox"):
        create_dataset("cub", root=root, crop="box")


LABELS, SPLIT = "image_class_labels.txt", "train_test_split.txt"
DAMAGES: DamageTable = {
    "no root": (shutil.rmtree, ["no such folder", "images.txt", "CUB_200_2011"]),
    "file missing": (remove("classes.txt"), ["classes.txt missing"]),
    "image missing": (remove(f"images/{NAMES[0]}"), ["1 of 2 images", NAMES[0], "images.txt"]),
    "id in one file only": (
        replace_text(LABELS, "3 2\n", ""),
        [f"{LABELS}: 1 image ids missing", "first 3 (in images"],
    ),
    "id not in images.txt": (replace_text("images.txt", f"2 {NAMES[1]}\n", ""), ["images.txt: 1", "first 2"]),
    "duplicate id": (replace_text("train_test_split.txt", "2 0", "1 0"), ["train_test_split.txt:2", "id 1", "second"]),
    "no value": (replace_text("images.txt", f"2 {NAMES[1]}", "2"), ["images.txt:2", "'2'"]),
    "id not a number": (replace_text("images.txt", "3 ", "x3 "), ["images.txt:3", "x3 "]),
    "split neither 0 nor 1": (replace_text(SPLIT, "2 0", "2 5"), ["split.txt", "id 2", "'5'", "0 or 1"]),
    "label not a number": (replace_text(LABELS, "3 2", "3 tern"), ["id 3", "'tern'"]),
    "class without a name": (replace_text("classes.txt", "2 002.Black Tern\n", ""), ["classes.txt", "class ids 2"]),
    "empty split": (write(SPLIT, b"1 0\n2 0\n3 0\n4 0\n"), [SPLIT, "no image", "'train'"]),
    "empty file": (write("classes.txt", b"\n"), ["classes.txt", "no entries"]),
    "not UTF-8": (write("classes.txt", b"1 a\n2 Caf\xe9\n"), ["classes.txt", "not UTF-8", "0xe9", "offset 9"]),
    "path with ..": (replace_text("images.txt", NAMES[0], "../secret.png"), ["images.txt", "../secret.png"]),
    "drive inside a path": (replace_text("images.txt", NAMES[0], "a/C:/secret.png"), ["'a/C:/secret.png'", "leaves"]),
    "absolute path": (replace_text("images.txt", NAMES[0], "/etc/secret.png"), ["/etc/secret.png"]),
    "no box": (replace_text("bounding_boxes.txt", "3 2 1 4 4\n", ""), ["bounding_boxes.txt: 1 image ids missing"]),
    "box of three": (replace_text("bounding_boxes.txt", "2 1 4 4", "2 1 4"), ["'2 1 4'; expected four"]),
    "box of words": (replace_text("bounding_boxes.txt", "2 1 4 4", "2 1 4 wide"), ["id 3 has the box '2 1 4 wide'"]),
    "box of no number": (replace_text("bounding_boxes.txt", "2 1 4 4", "2 1 4 nan"), ["id 3 has the box '2 1 4 nan'"]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(root: Path, damage: str) -> None:
    assert_refused("cub", root, DAMAGES, damage)


def test_missing_images_are_counted_and_the_first_named(root: Path) -> None:
    many = [f"001.Gull/{number}.png" for number in range(9)]
    write_table(root / "images.txt", many)
    write_table(root / "image_class_labels.txt", ["1"] * 9)
    write_table(root / "train_test_split.txt", ["1"] * 9)
    with pytest.raises(DatasetError, match=r"9 of 9 .* 001\.Gull/0\.png, .* and 4 more"):
        create_dataset("cub", root=root)


def test_subset_of_80_classes(cub80_root: Path) -> None:
    train, test = (create_dataset("cub", root=cub80_root, split=split) for split in ("train", "test"))
    assert (len(train.classes), len(train), len(test)) == (80, 2317, 2400)
    assert not set(train.paths) & set(test.paths)
    image, target = test[len(test) - 1]
    assert image.size == (227, 227)
    assert test.classes[target] == test.paths[-1].parent.name


IMAGE_ID = "00000001-21dc-4d0c-bfe1-4cae3c85c829"


@pytest.fixture
def nabirds(tmp_path: Path) -> Path:
    return write_miniature("nabirds", tmp_path / "nabirds", train_per_class=2, test_per_class=1)


def test_a_class_seen_in_one_split_only_is_in_both_lists(nabirds: Path) -> None:
    lines = (nabirds / "train_test_split.txt").read_text().splitlines()
    (nabirds / "train_test_split.txt").write_text("\n".join([*lines[:-1], lines[-1][:-1] + "1"]))
    train, test = (create_dataset("nabirds", root=nabirds, split=split) for split in ("train", "test"))
    assert len(train.classes) == len(test.classes) == 3
    assert test.targets == [0, 1]


def test_classes_of_one_name_get_their_id(nabirds: Path) -> None:
    replace_text("classes.txt", "Dark-eyed Junco (Slate-colored)", "Northern Harrier (Adult male)")(nabirds)
    names = create_dataset("nabirds", root=nabirds).classes
    assert names[:2] == ["Northern Harrier (Adult male) (295)", "Northern Harrier (Adult male) (296)"]


@pytest.mark.parametrize(
    ("name", "old", "new", "expected"),
    [
        ("classes.txt", "296 ", "b296 ", r"classes\.txt.*'b296 Dark-eyed"),
        ("classes.txt", "296 ", "9296 ", r"classes\.txt.*class ids 296"),
        ("image_class_labels.txt", f"{IMAGE_ID} 295\n", "", f"1 image ids missing.*{IMAGE_ID}"),
    ],
)
def test_damage_to_nabirds_is_named(nabirds: Path, name: str, old: str, new: str, expected: str) -> None:
    replace_text(name, old, new)(nabirds)
    with pytest.raises(DatasetError, match=expected):
        create_dataset("nabirds", root=nabirds)
