"""Folders as people have them: with and without splits, in two levels, with coarser labels."""

import logging
from pathlib import Path

import pytest
from PIL import Image

from fgvc.data import ImageDataset, create_dataset, read_splits
from fgvc.errors import ConfigError, DatasetError


def write(root: Path, *names: str) -> Path:
    """Small images at these paths; "name*3" is three of them in the folder `name`."""
    for name in names:
        place, star, count = name.partition("*")
        for path in [f"{place}/{number}.jpg" for number in range(int(count))] if star else [place]:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 12)).save(root / path)
    return root


def splits(root: Path, **options: object) -> dict[str, ImageDataset]:
    return read_splits("folder", root, **options)


def sizes(root: Path, **options: object) -> dict[str, int]:
    return {split: len(dataset) for split, dataset in splits(root, **options).items()}


def flat(root: Path) -> Path:
    return write(root, "wren*10", "auk*5", "kiwi*2", "emu*1")


@pytest.mark.parametrize("name", ["val", "valid", "Validation"])
def test_three_splits(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    write(tmp_path, "train/auk*3", "train/wren*3", f"{name}/auk*2", "test/auk*1", "test/wren*1")
    found = splits(tmp_path)
    assert {split: dataset.targets for split, dataset in found.items()} == {
        "train": [0, 0, 0, 1, 1, 1],
        "val": [0, 0],
        "test": [0, 1],
    }
    assert all(dataset.classes == ["auk", "wren"] for dataset in found.values())
    assert f"found train/, {name}/ (selects the best epoch) and test/ (only reported)" in caplog.text
    assert f"{tmp_path}: no val images of 1 classes, which means over classes leave out: wren" in caplog.text


def test_two_splits_have_no_validation(tmp_path: Path) -> None:
    for name in ("val", "test"):
        root = write(tmp_path / name, "train/auk*3", "train/wren*3", f"{name}/auk*1", f"{name}/wren*1", "notes/a.jpg")
        found = splits(root)
        assert (len(found["train"]), len(found["test"]), len(found["val"])) == (6, 2, 0)
        assert found["val"].classes == ["auk", "wren"]
        assert not found["test"].samples.own_split


@pytest.mark.parametrize("place", ["", "train"])
def test_class_folders_are_divided(tmp_path: Path, place: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    flat(tmp_path / place)
    found = splits(tmp_path)
    counts = {split: [dataset.targets.count(t) for t in range(4)] for split, dataset in found.items()}
    assert found["test"].classes == ["auk", "emu", "kiwi", "wren"]
    assert counts == {"train": [4, 1, 1, 8], "val": [0] * 4, "test": [1, 0, 1, 2]}
    assert not set(found["train"].paths) & set(found["test"].paths)
    assert found["test"].samples.own_split
    what = "train/ without a test split" if place else "class folders without a split"
    assert f"found {what}: 80 % / 20 % of each class, 14 training and 4 test images (split_seed=0)" in caplog.text
    assert "1 classes have one image, kept for training: emu" in caplog.text


def test_a_division_follows_its_options_and_little_else(tmp_path: Path) -> None:
    root = flat(tmp_path / "a")
    test = set(splits(root)["test"].relative_paths())
    assert set(splits(flat(tmp_path / "b"))["test"].relative_paths()) == test  # another root
    assert any(set(splits(root, split_seed=seed)["test"].relative_paths()) != test for seed in (1, 2, 3))
    assert sizes(root, test_fraction=0.5) == {"train": 10, "val": 0, "test": 8}
    for number in range(5):
        write(root, f"auk/-{number}.jpg")  # the first of all images
        after = set(splits(root)["test"].relative_paths())
        assert len(test - after) <= 1 and len(after) - len(test) <= 1
        assert {path for path in after if "auk" not in path} == {path for path in test if "auk" not in path}
        test = after


def test_train_is_a_class_among_others_and_a_split_with_test(tmp_path: Path) -> None:
    vehicles = write(tmp_path / "vehicles", "train*2", "bus*2", "car*2")
    assert create_dataset("folder", root=vehicles).classes == ["bus", "car", "train"]
    sets = write(tmp_path / "sets", "train/bus*2", "test/bus*1", "holiday*2")
    assert create_dataset("folder", root=sets).classes == ["bus"]


def test_two_levels(tmp_path: Path) -> None:
    names = ("birds/wren*2", "birds/jay*2", "planes/jay*2", "planes/jet*2")
    root = write(tmp_path / "flat", *names)
    dataset = create_dataset("folder", root=root, levels=2)
    assert dataset.classes == ["jay (birds)", "jay (planes)", "jet", "wren"]
    assert dataset.coarse == {"supercategory": ["birds", "planes", "planes", "birds"]}
    assert sizes(root, levels=2) == {"train": 4, "val": 0, "test": 4}
    split = write(tmp_path / "split", *(f"{part}/{name}" for part in ("train", "val", "test") for name in names))
    found = splits(split, levels=2)
    assert found["val"].classes == dataset.classes and found["val"].targets == [0, 0, 1, 1, 2, 2, 3, 3]
    with pytest.raises(ConfigError, match="levels=3 is unknown"):
        create_dataset("folder", root=root, levels=3)


def test_two_levels_are_hinted_at(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write(tmp_path, "birds/wren*2", "planes/jet*2")
    assert create_dataset("folder", root=root).classes == ["birds", "planes"]
    assert "set dataset.options.levels=2" in caplog.text
    write(root, "birds/loose.jpg")
    create_dataset("folder", root=root, levels=2)
    assert "birds: left out 1 images that are in no class folder" in caplog.text


def test_coarser_labels_of_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write(tmp_path, "auk*2", "wren*2", "kiwi, brown*2")
    (root / "coarse.csv").write_text('class,family,order\nwren,Troglodytidae,A\n"kiwi, brown",Apterygidae,B\nelf,x,y\n')
    dataset = create_dataset("folder", root=root, split="test")
    assert dataset.classes == ["auk", "kiwi, brown", "wren"]
    assert dataset.coarse == {"family": ["", "Apterygidae", "Troglodytidae"], "order": ["", "B", "A"]}
    assert dataset.subset([0]).coarse == dataset.coarse
    assert "no coarser label for the classes auk; rows of other classes: elf" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("class,family\nElf,x\nWren,y\n", "no row names a class .* names Elf, Wren, the classes are auk, "),
        ("class\nwren\n", "expected class, and a column for each coarser level"),
        ("name,family\nwren,x\n", "columns name, family; expected class"),
        ("class,family\nwren,x\nwren,y\n", "the class 'wren' appears twice"),
        ("class,family\nwren,x,y\n", "row 1 has 3 cells"),
        ("class,family,family\nwren,x,y\n", "the column 'family' appears twice"),
        ("", "it is empty"),
        ('class,family\n"wren,x\n', "not a table"),
        ('class,family\nwren,"x\nelf,y"\n', r"row 1 has a line end in a cell \(\['wren', 'x.nelf,y'\]\)"),
    ],
)
def test_a_wrong_file_of_coarser_labels_is_named(tmp_path: Path, content: str, message: str) -> None:
    root = flat(tmp_path)
    (root / "coarse.csv").write_text(content)
    with pytest.raises(DatasetError, match=rf"coarse\.csv.*{message}"):
        create_dataset("folder", root=root)


@pytest.mark.parametrize("level", ["path", "label", "split"])
def test_a_level_is_not_called_as_a_column_of_the_split(tmp_path: Path, level: str) -> None:
    root = flat(tmp_path)
    (root / "coarse.csv").write_text(f"class,{level}\nwren,x\n")
    with pytest.raises(DatasetError, match=f"coarser labels is called '{level}'.*rename it"):
        read_splits("folder", root)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("a.jpg", "b.jpg"), r"images, but no class folders.*<class>/<image>.*dataset=table"),
        (("a/x*1", "b/x*1"), "no class has two images"),
        (("images/auk*2", "images/wren*2"), r"a single class folder, images/; .* set root to .*images"),
        (("test/auk*2",), r"train: no such folder, but test\."),
    ],
)
def test_what_is_no_dataset_is_explained(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        create_dataset("folder", root=write(tmp_path, *names))


@pytest.mark.parametrize(
    ("link", "target", "found"),
    [
        ("test", "train", r"4 .* first train/auk/0\.jpg \(train\) and test/auk/0\.jpg \(test\)"),
        ("test/auk", "../train/auk", r"2 .* first train/auk/0\.jpg \(train\) and test/auk/0\.jpg \(test\)"),
        ("test/auk/x.jpg", "../../train/auk/1.jpg", r"1 .* train/auk/1\.jpg \(train\) and test/auk/x\.jpg \(test\)"),
        ("train/kiwi", "auk", r"2 .* first train/auk/0\.jpg \(train\) and train/kiwi/0\.jpg \(train\)"),
    ],
)
def test_a_file_that_links_list_twice(tmp_path: Path, link: str, target: str, found: str) -> None:
    root = write(tmp_path, "train/auk*2", "train/wren*2", *(() if link == "test" else ("test/wren*1",)))
    (root / link).parent.mkdir(exist_ok=True)
    (root / link).symlink_to(target)
    with pytest.raises(DatasetError, match=found.replace(".*", "image files are listed twice,.*", 1)):
        splits(root)


@pytest.mark.parametrize(
    ("option", "value"),
    [("test_fraction", 1), ("test_fraction", 0), ("test_fraction", "20%"), ("split_seed", 0.5), ("levels", "two")],
)
def test_options_out_of_range(tmp_path: Path, option: str, value: object) -> None:
    with pytest.raises(ConfigError, match=option):
        create_dataset("folder", root=flat(tmp_path), **{option: value})
