"""Coarser labels of the official datasets, and the accuracy at them."""

from pathlib import Path

import pandas as pd
import pytest
from damage import replace_text
from miniature import write_miniature
from run_folders import change_summary, write_config, write_run

from fgvc.data import create_dataset
from fgvc.errors import DatasetError, NothingToShowError, RunError
from fgvc.reporting.registry import Inputs, default_tables, make_tables
from fgvc.runs import read_run
from fgvc.runs.statistics import coarse_accuracy


def test_aircraft_has_two_levels_above_variants_and_one_above_families(tmp_path: Path) -> None:
    root = write_miniature("aircraft", tmp_path / "aircraft")
    coarse = create_dataset("aircraft", root=root, split="test").coarse
    assert coarse == {
        "family": ["Boeing 707", "Boeing 707", "F/A-18"],
        "manufacturer": ["McDonnell Douglas", "de Havilland/Boeing", "McDonnell Douglas"],
    }
    # the miniature's first family has variants of two manufacturers
    families = create_dataset("aircraft", root=root, level="family")
    assert families.coarse == {"manufacturer": ["", "McDonnell Douglas"]}
    assert create_dataset("aircraft", root=root, level="manufacturer").coarse == {}
    for path in (root / "data").glob("images_family_*.txt"):
        path.unlink()
    assert list(create_dataset("aircraft", root=root).coarse) == ["manufacturer"]


def test_the_tree_of_nabirds(tmp_path: Path) -> None:
    root = write_miniature("nabirds", tmp_path / "nabirds")
    (root / "hierarchy.txt").write_text("1 0\n22 1\n295 22\n296 1\n297 0\n")
    dataset = create_dataset("nabirds", root=root)
    assert dataset.coarse == {
        "parent": [dataset.classes[0], "Ducks, Geese, and Swans", dataset.classes[2]],
        "group": ["Ducks, Geese, and Swans", "Ducks, Geese, and Swans", dataset.classes[2]],
    }
    (root / "hierarchy.txt").write_text("0 0\n1 0\n22 1\n295 22\n296 1\n297 0\n")
    assert create_dataset("nabirds", root=root).coarse == dataset.coarse
    replace_text("hierarchy.txt", "296 1", "77 0\n296 77")(root)
    with pytest.raises(DatasetError, match=r"classes\.txt: no name for nodes 77 of hierarchy\.txt"):
        create_dataset("nabirds", root=root)
    (root / "hierarchy.txt").unlink()
    assert create_dataset("nabirds", root=root).coarse == {}


PREDICTIONS = pd.DataFrame({"target": [0, 0, 1, 2, 3, 3], "predicted": [0, 1, 2, 2, 0, 3]})


def test_accuracy_at_coarser_labels_and_the_mistakes_inside_them() -> None:
    coarse = {"family": ["x", "x", "y", ""], "order": ["o"] * 4, "unknown": [""] * 4}
    family, order = coarse_accuracy(PREDICTIONS, coarse).to_dict("records")
    # four images of known families: right, inside, outside, right
    assert family == {"level": "family", "groups": 2, "images": 4, "accuracy": 75, "mistakes": 2, "inside": 50}
    assert order == {"level": "order", "groups": 1, "images": 6, "accuracy": 100, "mistakes": 3, "inside": 100}
    right = coarse_accuracy(PREDICTIONS.assign(predicted=PREDICTIONS["target"]), coarse)
    assert right["accuracy"].tolist() == [100, 100] and right["inside"].isna().all()
    with pytest.raises(RunError, match="3 coarser labels of the level 'family' for 4 classes"):
        coarse_accuracy(PREDICTIONS, {"family": ["x", "x", "y"]})


def test_the_table_of_coarser_levels(tmp_path: Path) -> None:
    classes, coarse = list("abcd"), {"family": ["x", "x", "y", ""]}
    for method, seeds in (("gap", (0, 1)), ("seb", (0,))):
        for seed in seeds:
            changes = {"seed": seed, "classes": classes, "coarse": coarse, "test_images": 6}
            path = write_run(tmp_path / "r" / method / str(seed), method, **changes)
            write_config(path, method={"name": method})
            swapped = PREDICTIONS if seed == 0 else PREDICTIONS.assign(predicted=[0, 2, 2, 2, 0, 3])
            swapped.assign(path=list("uvwxyz"), confidence=0.5).to_csv(path / "predictions.csv", index=False)
    inputs = Inputs((tmp_path / "r",), Path("results/paper"))
    assert default_tables(inputs) == ["accuracy", "coarse"]
    tables, notes = make_tables(["coarse"], inputs)
    (block,) = tables["coarse"].blocks
    assert block.header == ["Method", "n", "family (2)", "Mistakes inside family"]
    assert block.rows == [["GAP", "2", "62.50 ± 17.68", "25.00 ± 35.36"], ["SEB", "1", "75.00", "50.00"]]
    assert not notes

    # a run with other labels, or none, or with a part of its predictions, is not averaged with the others
    third = tmp_path / "r" / "gap" / "1"
    for other in ({"family": ["x", "y", "y", ""]}, None):
        change_summary(third, coarse=other)
        tables, notes = make_tables(["coarse"], Inputs((tmp_path / "r",), Path()))
        assert tables["coarse"].blocks[0].rows[0][:3] == ["GAP", "1", "75.00"]
        assert [f"{third} has other labels than" in note for note in notes] == [True]
    change_summary(third, coarse=coarse)
    lines = (third / "predictions.csv").read_text().splitlines(keepends=True)
    (third / "predictions.csv").write_text("".join([*lines[:-1], lines[-1].replace(",3,", ",x,")]))
    _, (note,) = make_tables(["coarse"], Inputs((tmp_path / "r",), Path()))
    assert "predictions.csv, row 6: predicted is 'x', not a number" in note or "target is 'x'" in note
    (third / "predictions.csv").write_text("".join(lines[:-2]))
    tables, (note,) = make_tables(["coarse"], Inputs((tmp_path / "r",), Path()))
    assert tables["coarse"].blocks[0].rows[0][1] == "1" and "predictions.csv has 4 rows for 6 test images" in note

    # a run of an earlier version has no entry; damaged ones are named
    old = write_run(tmp_path / "old", "gap")
    assert read_run(old).coarse is None
    assert default_tables(Inputs((old,), Path())) == ["accuracy"]
    with pytest.raises(NothingToShowError, match="no run has coarser labels"):
        make_tables(["coarse"], Inputs((old,), Path()))
    with pytest.raises(RunError, match="'x'"):
        read_run(write_run(tmp_path / "bad", "gap", coarse={"family": "x"}))
