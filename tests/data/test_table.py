"""The adapter of tables: columns, splits, labels, and what is wrong with a table."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet
import pytest
from test_layouts import flat, write

from fgvc.data import ImageDataset, create_dataset, read_splits
from fgvc.errors import ConfigError, DatasetError


def table(root: Path, rows: object, name: str = "labels.csv", **options: object) -> Path:
    """Write a table and an image for each of its paths."""
    frame = pd.DataFrame(rows)
    write(root, *(str(path) for path in frame.iloc[:, 0] if isinstance(path, str) and not path.startswith(("/", ".."))))
    frame.to_parquet(root / name) if name.endswith("parquet") else frame.to_csv(root / name, index=False, **options)
    return root


def read(root: Path, **options: object) -> dict[str, ImageDataset]:
    return read_splits("table", root, **options)


ROWS = {
    "Image Path": [f"a/{number}.jpg" for number in range(6)],
    "Species": ["wren", "auk", "wren", "auk", "wren", "auk"],
    "set": ["Train", "train", "VALID", "test", "test", "validation"],
}


@pytest.mark.parametrize(("name", "options"), [("x.csv", {}), ("x.csv", {"sep": ";"}), ("x.parquet", {})])
def test_columns_are_found_by_their_usual_names(tmp_path: Path, name: str, options: dict[str, object]) -> None:
    found = read(table(tmp_path, ROWS, name, **options))
    assert found["train"].classes == ["auk", "wren"]
    assert {split: dataset.targets for split, dataset in found.items()} == {
        "train": [1, 0],
        "val": [1, 0],
        "test": [0, 1],
    }
    assert found["val"].relative_paths() == ["a/2.jpg", "a/5.jpg"]
    assert found["val"].samples.upright and not found["test"].samples.own_split


def test_a_column_may_be_called_by_a_number(tmp_path: Path) -> None:
    root = table(tmp_path, dict(zip("012", ROWS.values(), strict=True)))
    found = read(root, image_column=0, label_column=1, split_column=2, coarse_columns=[1])
    assert found["train"].classes == ["auk", "wren"] and found["train"].coarse == {"1": ["auk", "wren"]}
    with pytest.raises(DatasetError, match="5: cannot be read"):
        read(root, file=5)


def test_without_test_the_validation_split_is_tested_on(tmp_path: Path) -> None:
    rows = ROWS | {"set": ["train", "train", "val", "val", "train", "train"]}
    assert {split: len(dataset) for split, dataset in read(table(tmp_path, rows)).items()} == {
        "train": 4,
        "val": 0,
        "test": 2,
    }


def test_without_a_split_the_images_are_divided(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = {"path": [f"{n}.jpg" for n in range(20)], "label": ["a", "b"] * 10}
    root = table(tmp_path, rows)
    found = read(root)
    assert [found[split].targets.count(0) for split in found] == [8, 0, 2] and found["test"].samples.own_split
    assert read(root, split_seed=1)["test"].paths != found["test"].paths
    folds = table(tmp_path / "folds", rows | {"fold": [n % 5 for n in range(20)]})
    assert read(folds)["test"].relative_paths() == found["test"].relative_paths()
    assert "the column 'fold' names no splits, so fgvc divides the images" in caplog.text
    with pytest.raises(DatasetError, match=r"4 rows have '0' in the column 'fold'; expected train, val or test"):
        read(folds, split_column="fold")


@pytest.mark.parametrize("name", ["labels.csv", "labels.parquet"])
def test_whole_numbers_are_sorted_as_numbers(tmp_path: Path, name: str) -> None:
    rows = {"file": [f"{n}.jpg" for n in range(6)], "target": [10, 9, 100, 10, 9, 100]}
    assert create_dataset("table", root=table(tmp_path, rows, name)).classes == ["9", "10", "100"]


def test_the_split_that_a_run_writes_is_read_as_it_is(tmp_path: Path) -> None:
    root = flat(tmp_path / "images")
    (root / "coarse.csv").write_text("class,class_name\nwren,x\nauk,y\n")
    folder = {split: create_dataset("folder", root=root, split=split) for split in ("train", "test")}
    rows = [
        {
            "path": path,
            "label": images.classes[target],
            "split": split,
            "class_name": images.coarse["class_name"][target],
        }
        for split, images in folder.items()
        for path, target in zip(images.relative_paths(), images.targets, strict=True)
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "split.csv", index=False)
    (root / "coarse.csv").unlink()
    for split, images in folder.items():
        options = {"file": str(tmp_path / "split.csv"), "coarse_columns": ["class_name"]}
        again = create_dataset("table", root=root, split=split, **options)
        assert (again.classes, again.paths, again.targets) == (images.classes, images.paths, images.targets)
        assert again.coarse == images.coarse and not again.samples.own_split


def test_coarser_labels_of_columns_and_of_a_file(tmp_path: Path) -> None:
    root = table(tmp_path, ROWS | {"family": ["W", "A", "W", "", "", "A"]})
    (root / "coarse.csv").write_text("class,order\nauk,o\n")
    assert create_dataset("table", root=root, coarse_columns=["family"]).coarse == {
        "family": ["A", "W"],
        "order": ["o", ""],
    }


@pytest.mark.parametrize("ids", [[2**53 + 1, 2**53, None, 2**53], [-1, 0, None, 0]])
def test_whole_numbers_of_a_parquet_stay_exact_next_to_an_empty_cell(tmp_path: Path, ids: list[int | None]) -> None:
    root = table(tmp_path, OWN | {"family": pd.array(ids, dtype="Int64")}, "x.parquet")
    assert create_dataset("table", root=root, coarse_columns=["family"]).coarse == {
        "family": [str(ids[0]), str(ids[1])]
    }


@pytest.mark.parametrize(
    ("header", "options"),
    [
        ("path;label;a,b,c", {}),
        ("foto;art;a,b,c", {"image_column": "foto", "label_column": "art"}),
        ("image\tclass\tx;y;z", {}),
    ],
)
def test_the_separator_is_the_one_that_shows_the_columns(tmp_path: Path, header: str, options: dict[str, str]) -> None:
    root = write(tmp_path, "0.jpg", "1.jpg")
    separator = "\t" if "\t" in header else ";"
    (root / "x.csv").write_text("\n".join([header, *(separator.join((f"{n}.jpg", "a", "0")) for n in range(2))]))
    assert create_dataset("table", root=root, **options).classes == ["a"]


def test_a_file_in_both_splits_through_a_link(tmp_path: Path) -> None:
    root = table(tmp_path, OWN)
    (root / "link").symlink_to(".")
    (root / "labels.csv").write_text((root / "labels.csv").read_text() + "link/0.jpg,a,test\n")
    with pytest.raises(DatasetError, match=r"1 image files .* first 0\.jpg \(train\) and link/0\.jpg \(test\)"):
        read(root)


OWN = {"path": ["0.jpg", "1.jpg", "2.jpg", "3.jpg"], "label": list("abab"), "split": ["train", "train", "test", "test"]}


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (
            {"path": ["0.jpg", "0.jpg", "2.jpg", "3.jpg"]},
            {},
            "1 image files are listed twice, first 0.jpg .train. and 0.jpg",
        ),
        ({"path": ["0.jpg", "../1.jpg", "2.jpg", "3.jpg"]}, {}, r"names '\.\./1\.jpg', a path that leaves"),
        ({"path": ["0.jpg", "/etc/1.jpg", "2.jpg", "3.jpg"]}, {}, "a path that leaves"),
        ({"label": ["a", "", "a", "b"]}, {}, "row 2 has nothing in the column 'label'; fill it in or remove the row"),
        ({"label": list("aaab")}, {}, "no training image of 1 classes of the test split: b"),
        ({"split": ["train", "train", "test", "hold"]}, {}, "1 rows have 'hold' in the column 'split'"),
        ({"split": ["test", "test", "test", "test"]}, {}, "no training image of 2 classes of the test split: a, b"),
        ({"family": list("xyzy")}, {"coarse_columns": ["family"]}, "row 3 has 'z' in the column 'family', another row"),
    ],
)
def test_what_is_wrong_in_a_row_is_named(
    tmp_path: Path, change: dict[str, object], options: dict, message: str
) -> None:
    root = table(tmp_path, OWN | change)
    with pytest.raises(DatasetError, match=message):
        read(root, **options)


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        (["id", "label"], {}, r"which column is the image_column\? Of the columns id, label, none .*image_column=NAME"),
        (["path", "Class", "species"], {}, r"Class, species may each be it; set dataset\.options\.label_column=NAME"),
        (["path", "name"], {"label_column": "nam"}, "no column 'nam'; its columns are path, name"),
        (["path", "label"], {"coarse_columns": ["family"]}, "no column 'family'"),
    ],
)
def test_columns_that_are_not_clear_are_asked_for(
    tmp_path: Path, columns: list[str], options: dict[str, object], message: str
) -> None:
    (tmp_path / "x.csv").write_text(",".join(columns) + "\n" + ",".join("x" for _ in columns) + "\n")
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, **options)


def test_the_table_is_found_or_asked_for(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"no table in it; expected a \.csv"):
        read(write(tmp_path, "0.jpg"))
    table(tmp_path, OWN, "a.csv")
    table(tmp_path, OWN, "b.csv")
    with pytest.raises(DatasetError, match=r"2 tables \(a\.csv, b\.csv\) in it; set dataset\.options\.file=NAME"):
        read(tmp_path)
    assert len(read(tmp_path, file="b.csv")["train"]) == 2
    (tmp_path / "2.jpg").unlink()
    with pytest.raises(DatasetError, match=r"1 of 4 images named in b\.csv are missing: 2\.jpg; paths are relative to"):
        read(tmp_path, file="b.csv")
    with pytest.raises(DatasetError, match=r"c\.csv: cannot be read as a table \(No such file"):
        read(tmp_path, file="c.csv")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"path,label\n0.jpg,a,b\n1.jpg,a,b\n", "more cells than the header"),
        (b"path,label\n0.jpg,a\n1.jpg\n", "row 2 has nothing in the column 'label'"),
        (b"path,label\n0.jpg,a\n1.jpg,a,b\n", "Expected 2 fields in line 3, saw 3"),
        (b"path,label,label\n0.jpg,a,b\n", "the column 'label' appears twice; rename or remove one"),
        (b"path,label\n\xff.jpg,a\n", "codec can't decode byte 0xff"),
        (b"path,label\n", "no rows below the header"),
        (b"", "No columns to parse"),
        (b'path,label\n"0.jpg,a\n', "EOF inside string"),
        (b'path,label\n0.jpg,a\n1.jpg,"a\n2.jpg,b\n3.jpg,"b\n', r"row 2 has a line end in the column 'label' \('a.n2"),
        (b'path,label\n0.jpg,a\n"1.jpg,a\n2.jpg",b\n', "row 2 has a line end in the column 'path'"),
        (b'path,label\n0.jpg,"a\rb"\n', "row 1 has a line end in the column 'label'"),
        (b"<html>404</html>", "a web page in place of the file"),
        (
            b"path,label," + b",".join(b"%d" % i for i in range(1000)) + b"\n0.jpg,a" + b"," * 1000 + b"\n",
            "more than 1000 columns",
        ),
    ],
)
def test_damage_of_a_csv_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(DatasetError, match=rf"x\.csv.*{message}"):
        read(tmp_path)


def test_damage_of_a_parquet_is_named(tmp_path: Path) -> None:
    table(tmp_path, OWN, "x.parquet")
    whole = (tmp_path / "x.parquet").read_bytes()
    for damaged in (
        whole[:200],
        b"PAR1" + whole[4:-8] + b"\xff\xff\xff\x7fPAR1",
        b"",
        whole[:40] + b"\0" * 60 + whole[100:],
    ):
        (tmp_path / "x.parquet").write_bytes(damaged)
        with pytest.raises(DatasetError, match=r"x\.parquet"):
            read(tmp_path)
    frame = pd.DataFrame({"path": [b"0.jpg"], "label": ["a"]})
    frame.to_parquet(tmp_path / "x.parquet")
    with pytest.raises(DatasetError, match="row 1 has bytes in the column 'path'"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("count", "length", "message"),
    [(40_000, 100_000, "path, label unpack to 8000000000 bytes"), (3_000_000, 1, "it unpacks to 3000000 rows")],
)
def test_a_small_parquet_of_many_or_long_rows_is_not_unpacked(
    tmp_path: Path, count: int, length: int, message: str
) -> None:
    same = pyarrow.DictionaryArray.from_arrays(np.zeros(count, np.int32), ["x" * length])
    rows = pyarrow.table({"path": same, "label": same})
    pyarrow.parquet.write_table(rows, tmp_path / "x.parquet", store_schema=False, compression="zstd")
    with pytest.raises(DatasetError, match=rf"x\.parquet.*{message}"):
        read(tmp_path)
