"""The adapter for the Hugging Face datasets library, on tiny local datasets."""

import importlib
import io
import json
import pickle
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from fgvc.data import ImageDataset, create_dataset
from fgvc.data.verify import examine_images
from fgvc.errors import ConfigError, DatasetError

datasets = pytest.importorskip("datasets")

NAMES = ["F/A-18", "..", "", "two words"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf_cache"))


def encoded(shade: int, kind: str = "JPEG") -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (9, 7), (shade, 0, 0)).save(content, kind)
    return content.getvalue()


def table(labels: list[Any], label_type: Any = None, images: list[Any] | None = None, **columns: list[Any]) -> Any:
    """A split with an image and a label a row; the shade of red is 20 times the row."""
    label_type = label_type or datasets.ClassLabel(names=NAMES)
    kinds = ["JPEG", "PNG"] * len(labels)
    images = images or [{"bytes": encoded(20 * row, kinds[row]), "path": None} for row in range(len(labels))]
    features = {"image": datasets.Image(), "label": label_type, **{name: datasets.Value("string") for name in columns}}
    return datasets.Dataset.from_dict(
        {"image": images, "label": labels, **columns}, features=datasets.Features(features)
    )


def image_folder(folder: Path) -> None:
    for split, name in (("train", "a b"), ("train", "c"), ("test", "a b"), ("test", "c")):
        (folder / split / name).mkdir(parents=True)
        (folder / split / name / "x.png").write_bytes(encoded(40, "PNG"))


def save(folder: Path, **splits: Any) -> str:
    datasets.DatasetDict(splits).save_to_disk(str(folder))
    return str(folder)


@pytest.fixture
def saved(tmp_path: Path) -> str:
    return save(tmp_path / "saved", train=table([3, 0, 1, 2, 0]), test=table([0, 1]))


def test_images_keep_their_bytes_and_classes_their_names(saved: str, tmp_path: Path) -> None:
    root = tmp_path / "deep" / "out"
    train, test = (create_dataset("hf", root=root, split=split, path=saved) for split in ("train", "test"))
    assert train.classes == test.classes == NAMES
    assert (train.targets, test.targets) == ([0, 0, 1, 2, 3], [0, 1])
    names = ["0000_F_A-18/0000001.png", "0000_F_A-18/0000004.jpg", "0001_/0000002.jpg", "0002_/0000003.png"]
    assert train.relative_paths()[:4] == [f"train/{name}" for name in names]
    assert train.relative_paths()[4] == "train/0003_two_words/0000000.jpg"
    rows = [1, 4, 2, 3, 0]
    assert [path.read_bytes() for path in train.paths] == [encoded(20 * r, "PNG" if r % 2 else "JPEG") for r in rows]
    copy: ImageDataset = pickle.loads(pickle.dumps(train))
    assert copy[0][0].getpixel((0, 0)) == (20, 0, 0)
    assert [path.name for path in root.parent.iterdir()] == ["out"]


def test_long_names_fit_into_a_folder_name(tmp_path: Path) -> None:
    split = table([0, 1], datasets.ClassLabel(names=["x" * 300 + "a", "x" * 300 + "b"]))
    dataset = create_dataset("hf", root=tmp_path / "out", path=save(tmp_path / "saved", train=split, test=split))
    assert [name[-1] for name in dataset.classes] == ["a", "b"]
    assert all(len(path.parent.name) < 60 for path in dataset.paths)


def test_reading_again_needs_no_source_or_library(saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = create_dataset("hf", root=tmp_path / "out", path=saved)
    Path(saved).rename(tmp_path / "elsewhere")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert create_dataset("hf", root=tmp_path / "out", path=saved).paths == before.paths


@pytest.mark.parametrize("library", [None, ModuleType("datasets")])
def test_a_missing_library_is_named_with_the_command(
    saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: ModuleType | None
) -> None:
    """Also where a folder named datasets stands in for it."""
    monkeypatch.setitem(sys.modules, "datasets", library)
    with pytest.raises(ConfigError, match=r"pip install 'fgvc\[hf\]'"):
        create_dataset("hf", root=tmp_path / "out", path=saved)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    importlib.import_module("datasets")


def test_parquet_and_image_folders(tmp_path: Path) -> None:
    parquet, folder = tmp_path / "parquet", tmp_path / "folder"
    parquet.mkdir()
    table([3, 0]).to_parquet(str(parquet / "train-0.parquet"))
    table([1]).to_parquet(str(parquet / "validation-0.parquet"))
    image_folder(folder)
    for source, classes, targets in ((parquet, NAMES, ([0, 3], [1])), (folder, ["a b", "c"], ([0, 1], [0, 1]))):
        root = tmp_path / f"out_{source.name}"
        splits = [create_dataset("hf", root=root, split=split, path=str(source)) for split in ("train", "test")]
        assert splits[0].classes == classes
        assert tuple(split.targets for split in splits) == targets
        assert not examine_images(splits[0])[0]


def test_a_file_outside_of_the_source_is_not_read(tmp_path: Path) -> None:
    source, secret = tmp_path / "source", tmp_path / "secret.png"
    source.mkdir()
    Image.new("RGB", (4, 4)).save(secret)
    for split in ("train", "test"):
        rows = datasets.Dataset.from_dict(
            {"image": [{"bytes": None, "path": str(secret)}], "label": [0]},
            features=datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)}),
        )
        rows.to_parquet(str(source / f"{split}-0.parquet"), storage_options=None)
    with pytest.raises(DatasetError, match=r"secret\.png: outside of the dataset's folder"):
        create_dataset("hf", root=tmp_path / "out", path=str(source))


def test_a_configuration_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "two"
    folder.mkdir()
    configs = []
    for name, label in (("a", 0), ("b", 1)):
        for split in ("train", "test"):
            table([label]).to_parquet(str(folder / f"{name}-{split}.parquet"))
        configs.append(f"- config_name: {name}\n  data_files:\n")
        configs += [f"  - split: {split}\n    path: {name}-{split}.parquet\n" for split in ("train", "test")]
    (folder / "README.md").write_text(f"---\nconfigs:\n{''.join(configs)}---\n")
    assert create_dataset("hf", root=tmp_path / "b", path=str(folder), config_name="b").targets == [1]
    with pytest.raises(DatasetError, match=r"two: cannot be loaded .*\['a', 'b'\].*config_name"):
        create_dataset("hf", root=tmp_path / "none", path=str(folder))


@pytest.mark.parametrize(
    ("kind", "labels", "classes", "targets"),
    [("string", ["tern", "a/b", "tern"], ["a/b", "tern"], [0, 1, 1]), ("int64", [7, 10, 7], ["7", "10"], [0, 0, 1])],
)
def test_columns_of_values_are_labels_when_named(
    tmp_path: Path, kind: str, labels: list[Any], classes: list[str], targets: list[int]
) -> None:
    split = table(labels, datasets.Value(kind))
    path = save(tmp_path / "saved", train=split, test=split)
    with pytest.raises(ConfigError, match=r"0 columns are of type ClassLabel; set label_column .* image \(Image\)"):
        create_dataset("hf", root=tmp_path / "out", path=path)
    dataset = create_dataset("hf", root=tmp_path / "out", path=path, label_column="label")
    assert (dataset.classes, dataset.targets) == (classes, targets)


def test_splits_and_columns_by_name(tmp_path: Path) -> None:
    path = save(tmp_path / "saved", fit=table([0, 1], note=["x", "y"]), held=table([2], note=["z"]))
    with pytest.raises(ConfigError, match=r"no split 'train' but fit, held; set train_split"):
        create_dataset("hf", root=tmp_path / "out", path=path)
    options = {"path": path, "train_split": "fit", "test_split": "held"}
    for option, column in (("image_column", "note"), ("label_column", "image"), ("label_column", "nothing")):
        with pytest.raises(ConfigError, match=rf"'{column}' is missing or not of .*; set {option}.*label \(ClassL"):
            create_dataset("hf", root=tmp_path / "out", **options, **{option: column})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="both 'fit'; they must differ"):
        create_dataset("hf", root=tmp_path / "out", path=path, train_split="fit", test_split="fit")
    both = save(tmp_path / "both", train=table([0]), test=table([0]))
    with pytest.raises(ConfigError, match="both 'test'; they must differ"):
        create_dataset("hf", root=tmp_path / "out", path=both, train_split="test")
    with pytest.raises(ConfigError, match=r"'hf' needs the option 'path'"):
        create_dataset("hf", root=tmp_path / "out")
    assert create_dataset("hf", root=tmp_path / "out", split="test", **options).targets == [2]  # type: ignore[arg-type]


def test_a_folder_of_another_source_is_refused(saved: str, tmp_path: Path) -> None:
    root = tmp_path / "out"
    create_dataset("hf", root=root, path=saved)
    with pytest.raises(DatasetError, match=r"hf\.json: made with .*'revision': None.*'revision': 'v2'.*delete"):
        create_dataset("hf", root=root, path=saved, revision="v2")
    (root / "classes.json").write_text(json.dumps([{"name": "x"}]))
    with pytest.raises(DatasetError, match=r"out: damaged .*delete it"):
        create_dataset("hf", root=root, path=saved)
    (root / "classes.json").write_text(json.dumps([{"name": "x", "folder": "../.."}]))
    with pytest.raises(DatasetError, match=r"classes\.json: names '\.\./\.\.', a path that leaves"):
        create_dataset("hf", root=root, path=saved)
    (root / "hf.json").unlink()
    with pytest.raises(DatasetError, match=r"not empty and without hf\.json"):
        create_dataset("hf", root=root, path=saved)


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        (lambda: table([0, -1]), r"split 'train': row 1 has the label -1"),
        (lambda: table([0, None]), r"split 'train': row 1 has the label None"),
        (lambda: table([0], images=[None]), "row 0 has no image"),
        (lambda: table([0], datasets.ClassLabel(names=["a"])), "differ in their columns or classes"),
    ],
)
def test_unusable_rows_are_named_and_nothing_is_left(tmp_path: Path, train: Any, expected: str) -> None:
    path = save(tmp_path / "saved", train=train(), test=table([0]))
    with pytest.raises(DatasetError, match=expected):
        create_dataset("hf", root=tmp_path / "out", path=path)
    assert [entry.name for entry in tmp_path.iterdir() if "out" in entry.name] == []


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image_folder(tmp_path / "folder")

    def refuse(path: Path, _limit: int) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("fgvc.data.hf.open_foreign", refuse)
    with pytest.raises(DatasetError, match=r"split 'train': .*x\.png: Permission denied"):
        create_dataset("hf", root=tmp_path / "out", path=str(tmp_path / "folder"))


def test_sources_that_cannot_be_loaded(tmp_path: Path) -> None:
    table([0]).save_to_disk(str(tmp_path / "single"))
    (tmp_path / "empty").mkdir()
    for name, expected in (("single", "a single split"), ("empty", "cannot be loaded"), ("absent", "cannot be loaded")):
        with pytest.raises(DatasetError, match=rf"{name}: {expected}"):
            create_dataset("hf", root=tmp_path / "out", path=str(tmp_path / name))


def test_an_image_that_is_none_is_left_to_the_check(tmp_path: Path) -> None:
    path = save(tmp_path / "saved", train=table([0], images=[{"bytes": b"<html>", "path": None}]), test=table([0]))
    bad = examine_images(create_dataset("hf", root=tmp_path / "out", path=path))[0]
    assert [image.path.name for image in bad] == ["0000000.bin"]
