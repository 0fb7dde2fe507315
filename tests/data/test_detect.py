"""Which dataset lies in a folder; and iNaturalist and Kaggle's cars, which are known by their files."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from miniature import write_miniature
from test_layouts import write

from fgvc.data import create_dataset, find_layout, list_datasets, read_splits
from fgvc.errors import ConfigError, DatasetError

OFFICIAL = {
    "cub": "CUB-200-2011",
    "nabirds": "NABirds",
    "aircraft": "FGVC-Aircraft",
    "dogs": "Stanford Dogs",
    "cars": "Stanford Cars",
    "cars_devkit": "Stanford Cars",
    "cars_kaggle": "Stanford Cars",
    "imagenet": "ImageNet",
    "inaturalist": "iNaturalist",
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_datasets_are_known_by_their_files(tmp_path: Path, name: str) -> None:
    root = write_miniature(name, tmp_path / "root", train_per_class=2, test_per_class=1)
    assert find_layout(root) == (name.partition("_")[0], f"found the files of {OFFICIAL[name]}")
    nested = {"cub": "CUB_200_2011", "nabirds": "nabirds", "aircraft": "fgvc-aircraft-2013b"}.get(name)
    if nested:
        root.rename(tmp_path / nested)
        assert find_layout(tmp_path)[0] == name


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (("train/auk*2", "valid/auk*1", "test/auk*1"), "found folders with splits: train/, valid/, test/"),
        (("train/auk*2", "val/auk*1", "notes/a.jpg"), "found folders with splits: train/, val/"),
        (("train/auk*2", "train/wren*2"), "found class folders in train/ without a test split"),
        (("auk*2", "wren*2", "train*1"), "found 3 class folders without a split: auk, train, wren"),
        (("a/auk*2", "b/wren*2"), "found 2 class folders without a split: a, b"),
    ],
)
def test_folders(tmp_path: Path, names: tuple[str, ...], found: str) -> None:
    root = write(tmp_path, *names)
    (root / "README.txt").touch()
    (root / "classes.csv").write_text("class,name\n1,auk\n")
    assert find_layout(root) == ("folder", found)
    assert len(create_dataset("folder", root=root)) > 0


def test_tables(tmp_path: Path) -> None:
    root = write(tmp_path, "train/0.jpg", "test/1.jpg")
    (root / "train.csv").write_text("image,label\ntrain/0.jpg,a\n")
    (root / "sample_submission.csv").write_text("id,label\n1,a\n")
    assert find_layout(root) == ("table", "found train.csv, a table of image paths and labels")
    (root / "train.csv").write_text("image,label\ntrain/0.jpg,a\ntest/1.jpg,a\n")
    assert sum(map(len, read_splits("table", root).values())) == 2
    (root / "more.csv").write_text("path,label\ntrain/0.jpg,a\n")
    with pytest.raises(DatasetError, match=r"2 tables \(more\.csv, train\.csv\).*dataset\.options\.file=more\.csv"):
        find_layout(root)


@pytest.mark.parametrize(
    ("names", "rows", "found"),
    [
        (("auk*3", "wren*3"), "auk/0.jpg,auk\nauk/1.jpg,auk\n", r"some\.csv lists 2 images, but auk/, wren/ hold 6"),
        (("train/auk*3", "train/wren*3"), "train/auk/0.jpg,a\n", r"some\.csv lists 1 images, but auk/ hold 3"),
        (("a/auk*1", "b/wren*2", "c/x*2"), "a/auk/0.jpg,auk\nb/wren/0.jpg,wren\n", "lists 2 images, but a/, b/ hold 3"),
        (("images*2", "unlabelled*3"), "images/0.jpg,a\nimages/1.jpg,b\n", None),
        (("auk*1", "wren*1"), "auk/0.jpg,auk\nwren/0.jpg,wren\n", None),
    ],
)
def test_a_table_of_some_of_the_images_in_class_folders(
    tmp_path: Path, names: tuple[str, ...], rows: str, found: str | None
) -> None:
    root = write(tmp_path, *names)
    (root / "some.csv").write_text(f"path,label\n{rows}")
    if found is None:
        assert find_layout(root)[0] == "table"
    else:
        with pytest.raises(DatasetError, match=rf"{found}; choose one: dataset=table .*dataset=folder"):
            find_layout(root)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("a.jpg",), r"images, but no class folders; sort the images into one folder for each class"),
        (("auk/1.jpg",), r"one class folder, auk; two or more classes are needed"),
        (("images/auk*1", "images/wren*1"), r"found images/, .* Or is .*images the folder of the classes\?"),
        ((), r"no images in it; expected CLASS/IMAGE"),
    ],
)
def test_what_is_no_layout_is_explained(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        find_layout(write(tmp_path, *names))
    with pytest.raises(DatasetError, match="no such folder"):
        find_layout(tmp_path / "nowhere")


def test_what_is_found_can_be_read() -> None:
    assert set(OFFICIAL) <= {*list_datasets(), "cars_devkit", "cars_kaggle"}


def test_a_second_download_of_the_labels_gives_way_to_the_first(tmp_path: Path) -> None:
    root = write_miniature("cars_devkit", tmp_path / "cars")
    expected = create_dataset("cars", root=root, split="test").targets
    labels = next(root.rglob("cars_test_annos_withlabels.mat"))
    shutil.copy(next(root.rglob("cars_train_annos.mat")), labels.with_name("cars_test_annos_withlabels (1).mat"))
    assert create_dataset("cars", root=root, split="test").targets == expected


def test_kaggles_cars_without_a_devkit_are_explained(tmp_path: Path) -> None:
    root = write_miniature("cars_kaggle", tmp_path / "cars")
    (root / "cars_test_annos_withlabels (1).mat").unlink()
    with pytest.raises(DatasetError, match=r"cars_test_annos_withlabels\.mat missing; put it into"):
        create_dataset("cars", root=root, split="test")
    shutil.rmtree(root / "car_devkit")
    assert find_layout(root)[0] == "cars"
    with pytest.raises(DatasetError, match=r"the devkit is missing; cars_annos\.mat names images of car_ims/.*Unpack"):
        create_dataset("cars", root=root)


@pytest.fixture
def inaturalist(tmp_path: Path) -> Path:
    return write_miniature("inaturalist", tmp_path / "inat", train_per_class=2, test_per_class=1)


def change(path: Path, update: Any) -> None:
    content = json.loads(path.read_text())
    update(content)
    path.write_text(json.dumps(content))


def test_the_taxonomy_of_inaturalist(inaturalist: Path) -> None:
    dataset = create_dataset("inaturalist", root=inaturalist, split="test")
    assert dataset.coarse == {
        "genus": ["Turdus", "Turdus", "Corvus"],
        "family": ["Turdidae", "Turdidae", "Corvidae"],
    }
    (inaturalist / "train.json").rename(inaturalist / "train_mini.json")
    mini = create_dataset("inaturalist", root=inaturalist, train_split="train_mini")
    assert len(mini) == 6 and find_layout(inaturalist)[0] == "inaturalist"
    with pytest.raises(DatasetError, match=r"train\.json missing"):
        create_dataset("inaturalist", root=inaturalist)
    with pytest.raises(ConfigError, match="train_split='mini' is unknown in 2021; choose one of train, train_mini"):
        create_dataset("inaturalist", root=inaturalist, train_split="mini")


@pytest.mark.parametrize("year", [2017, 2018, 2019])
def test_earlier_years_and_names_that_were_published_later(inaturalist: Path, year: int) -> None:
    for split in ("train", "val"):
        (inaturalist / f"{split}.json").rename(inaturalist / f"{split}{year}.json")

        def hide(content: Any) -> None:
            content["categories"] = [
                {"id": row["id"], "name": str(row["id"]), "supercategory": f"S{row['id'] // 2}"}
                for row in content["categories"]
            ]

        names = json.loads((inaturalist / f"{split}{year}.json").read_text())["categories"]
        change(inaturalist / f"{split}{year}.json", hide)
    dataset = create_dataset("inaturalist", root=inaturalist)
    assert (dataset.classes, dataset.coarse) == (["0", "1", "2"], {"supercategory": ["S0", "S0", "S1"]})
    (inaturalist / "categories.json").write_text(json.dumps(names))
    dataset = create_dataset("inaturalist", root=inaturalist, year=year)
    assert dataset.classes == ["Turdus merula", "Turdus pilaris", "Corvus corax"]
    assert list(dataset.coarse) == ["genus", "family", "supercategory"]
    (inaturalist / "categories.json").write_text(json.dumps(names[:2]))
    with pytest.raises(DatasetError, match=r"categories\.json: no entry of 1 categories"):
        create_dataset("inaturalist", root=inaturalist)
    for name in ("train.json", "val.json"):
        (inaturalist / name).touch()
    with pytest.raises(DatasetError, match=rf"holds files of {year}, 2021; set dataset\.options\.year"):
        create_dataset("inaturalist", root=inaturalist)
    with pytest.raises(ConfigError, match="year=2020 is unknown"):
        create_dataset("inaturalist", root=inaturalist, year=2020)
    with pytest.raises(ConfigError, match=f"train_split='train_mini' is unknown in {year}; choose one of train"):
        create_dataset("inaturalist", root=inaturalist, year=year, train_split="train_mini")


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (lambda c: c["images"][0].update(file_name="../a.jpg"), r"'\.\./a\.jpg', a path that leaves"),
        (lambda c: c["images"][0].update(file_name="none.jpg"), r"1 of 6 images named in train\.json are missing"),
        (lambda c: c["images"][0].update(file_name="\ud800"), r"images without a file_name \(str\)"),
        (lambda c: c["images"].pop(), "annotations of 1 unknown image ids, first 1"),
        (lambda c: c["annotations"][0].update(category_id=9), "annotations of 1 unknown category ids, first 9"),
        (lambda c: c["annotations"][0].update(category_id="1"), r"annotations without a category_id \(int\)"),
        (lambda c: c["annotations"].clear(), "no annotations; the labels of the official test images are not public"),
        (lambda c: c["categories"].append(c["categories"][0]), r"categories have the id \d twice"),
        (lambda c: c["images"].append(c["images"][0] | {"file_name": "other.jpg"}), r"images have the id \d+ twice"),
        (lambda c: c["annotations"].append(c["annotations"][0]), r"annotations have the image_id \d+ twice"),
        (lambda c: c["categories"][0].update(genus="\ud800"), "is no Unicode"),
        (lambda c: c.pop("categories"), "no list 'categories' in it"),
    ],
)
def test_damage_of_inaturalist_is_named(inaturalist: Path, update: Any, message: str) -> None:
    change(inaturalist / "train.json", update)
    with pytest.raises(DatasetError, match=rf"{message}"):
        create_dataset("inaturalist", root=inaturalist)


def again(content: Any, file: str) -> None:
    content["images"].append({"id": 99, "file_name": file})
    content["annotations"].append({"image_id": 99, "category_id": 1})


@pytest.mark.parametrize(
    ("file", "update", "message"),
    [
        ("train.json", again, r"1 image files are listed twice, first (\S+) \(train\) and \1 \(train\); keep one"),
        ("val.json", again, r"1 image files are listed twice, first (\S+) \(train\) and \1 \(test\); keep one"),
        (
            "train.json",
            lambda c, _: c["annotations"].__delitem__(slice(2)),
            "no training image of 1 classes of the test",
        ),
        ("val.json", lambda c, _: c["categories"].append({"id": 9, "name": "x"}), "differ in their classes"),
    ],
)
def test_splits_of_inaturalist_that_contradict_each_other(
    inaturalist: Path, file: str, update: Any, message: str
) -> None:
    train = read_splits("inaturalist", inaturalist)["train"].relative_paths()
    change(inaturalist / file, lambda content: update(content, train[0]))
    with pytest.raises(DatasetError, match=message):
        read_splits("inaturalist", inaturalist)


def test_what_is_no_json_is_named(inaturalist: Path) -> None:
    for content in ("{", "[" * 100_000, "\xff"):
        (inaturalist / "train.json").write_text(content, encoding="latin-1")
        with pytest.raises(DatasetError, match=r"train\.json: n(ot readable as JSON|ested too deeply)"):
            create_dataset("inaturalist", root=inaturalist)
