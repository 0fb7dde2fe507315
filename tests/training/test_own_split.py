"""Runs on data with a validation split, and on data that the run divides itself; what later commands see of them."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from command_line import Train, succeeded, trainable
from PIL import Image

from fgvc.data import create_dataset
from fgvc.errors import ConfigError, DatasetError, RunError
from fgvc.inference import evaluate_run, rerun
from fgvc.inference.calibrate import calibrate_run, fit_calibration
from fgvc.inference.restore import restore_run
from fgvc.runs import read_run
from fgvc.runs.config import DatasetConfig, MethodConfig, RunConfig, TrainerConfig, TransformConfig
from fgvc.training import train_run
from fgvc.training.setup import hold_out, open_split


def config(tmp_path: Path, **trainer: object) -> RunConfig:
    data = DatasetConfig("mine", "folder", str(tmp_path / "data"), transform=TransformConfig(size=64))
    parts = {"dataset": data, "method": MethodConfig("gap")}
    settings = TrainerConfig(batch_size=4, workers=0, probe_images=2, **trainer)  # type: ignore[arg-type]
    return trainable(tmp_path, **parts, trainer=settings)


def write(root: Path, split: str, counts: dict[str, int]) -> None:
    rng = np.random.default_rng(0)
    for name, count in counts.items():
        place = root / split / name
        place.mkdir(parents=True)
        for number in range(count):
            Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(place / f"{number}.png")


def test_copies_among_training_and_test_images_are_noted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for split in ("train", "test"):
        write(tmp_path / "data", split, {"a": 4, "b": 4})  # the same pictures
    for number in range(3):
        Image.new("RGB", (64, 64), (number, 0, 0)).save(tmp_path / "data" / "test" / "b" / f"{number}.png")
    train_run(config(tmp_path, epochs=0))
    assert "training and test images share pictures, byte for byte (5, e.g. " in caplog.text


def test_training_images_that_move_to_val_do_not_calibrate(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write(tmp_path / "data", split, {"a": 4, "b": 4})
    path = train_run(config(tmp_path))
    for name in "ab":
        (tmp_path / "data" / "val" / name).mkdir(parents=True)
        (tmp_path / "data" / "train" / name / "0.png").rename(tmp_path / "data" / "val" / name / "0.png")
    calibration = fit_calibration(path)
    assert (calibration.split, calibration.images) == ("test", 8)


def test_a_validation_split_selects_the_epoch_and_calibrates(tmp_path: Path, here: Train) -> None:
    for split, counts in {"train": [4, 4, 4], "val": [2, 3, 0], "test": [3, 2, 2]}.items():
        write(tmp_path / "data", split, {name: n for name, n in zip("abc", counts, strict=True) if n})
    (tmp_path / "data" / "coarse.csv").write_text("class,family,order\na,x,p\nb,x,p\nc,y,\n")
    with pytest.raises(ConfigError, match=r"val_fraction=0\.5 .* has a validation split of 5 images.*=0"):
        train_run(config(tmp_path, val_fraction=0.5))
    path = train_run(config(tmp_path, epochs=2))
    found = read_run(path)
    assert (found.selected_on, found.train_images, found.test_images) == ("validation", 12, 7)
    assert found.coarse == {"family": ["x", "x", "y"], "order": ["p", "p", ""]}
    metrics = found.metrics()
    assert metrics["val_top1"].notna().all() and found.best is not None
    best = metrics.loc[metrics["val_top1"].idxmax()]
    assert (found.best_epoch, found.best.top1) == (best["epoch"], pytest.approx(best["test_top1"]))
    digests = json.loads((path / "summary.json").read_text())["dataset_fingerprint"]
    assert digests["validation_list"] and not (path / "split.csv").exists()
    held_out = restore_run(path, split="validation").images
    assert [name.split("/")[0] for name in held_out.relative_paths()] == ["val"] * 5
    assert len(restore_run(path, split="train").images) == 12
    calibration = fit_calibration(path)
    assert (calibration.split, calibration.images) == ("validation", 5)

    done = succeeded(here("evaluate.py", path, cwd=tmp_path))
    record = json.loads((path / "evaluation-last.json").read_text())
    family, predictions = record["coarse"]["family"], found.predictions()
    inside = (predictions["target"] < 2) == (predictions["predicted"] < 2)
    wrong = predictions["target"] != predictions["predicted"]
    assert family["accuracy"] == pytest.approx(100 * inside.mean(), abs=1e-3)
    assert (family["groups"], family["images"], family["mistakes"]) == (2, 7, wrong.sum())
    assert f"family (2) {family['accuracy']:.2f} %" in done.stdout
    assert "% of the 5 of 7 images with a label" in done.stdout
    table = succeeded(here("make_tables.py", path, cwd=tmp_path)).stdout
    assert "| family (2) | Mistakes inside family |" in table
    assert f"| GAP | 1 | {family['accuracy']:.2f} | {family['inside']:.2f} |" in " ".join(table.split())
    assert "order: 5 of 7 test images" in table


def test_the_split_of_a_run_is_written_and_repeats(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    write(tmp_path / "data", ".", {"a": 10, "b": 5})
    path = train_run(config(tmp_path, val_fraction=0.25))
    assert f"the split is written to {path / 'split.csv'}" in caplog.text
    split = pd.read_csv(path / "split.csv")
    assert split.groupby("split")["label"].value_counts().to_dict() == {
        ("test", "a"): 2,
        ("test", "b"): 1,
        ("train", "a"): 6,
        ("train", "b"): 3,
        ("val", "a"): 2,
        ("val", "b"): 1,
    }
    summary = read_run(path)
    assert (summary.train_images, summary.test_images, summary.selected_on) == (9, 3, "validation")
    # another seed of the run divides the training images in another way, but tests on the same ones
    other = read_run(train_run(replace(config(tmp_path, val_fraction=0.25), seed=1, run_dir=str(tmp_path / "b"))))
    assert other.images["test_list"] == summary.images["test_list"]
    assert sorted(summary.predictions()["path"]) == sorted(split.loc[split["split"] == "test", "path"])
    assert evaluate_run(path).record["images"] == 3
    again = rerun(path)
    assert (again / "split.csv").read_bytes() == (path / "split.csv").read_bytes()
    dataset = create_dataset("folder", root=tmp_path / "data", split="test")
    assert sorted(dataset.relative_paths()) == sorted(summary.predictions()["path"])


@pytest.mark.parametrize("place", [".", "train"])
def test_images_that_come_later_change_no_side_of_a_finished_run(
    tmp_path: Path, place: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "data", place, {"a": 10, "b": 9})
    if place == "train":
        write(tmp_path / "data", "test", {"a": 2, "b": 2})
    path = train_run(config(tmp_path, val_fraction=0.25))
    split = pd.read_csv(path / "split.csv")
    listed = {side: sorted(rows["path"]) for side, rows in split.groupby("split")}
    for name in "ab":
        for number in range(8):
            folder = tmp_path / "data" / place
            shutil.copy(folder / "b" / "0.png", folder / name / f"new{number}.png")
    drawn_again = hold_out(config(tmp_path, val_fraction=0.25), open_split(config(tmp_path), "train"))[1]
    assert drawn_again is not None and set(drawn_again.relative_paths()) & set(listed["train"])
    with pytest.raises(RunError, match=r"other images \(2 classes, .* which would be divided otherwise.*--root"):
        rerun(path)
    assert not path.with_name("run-rerun").exists()
    for side, kept in {"train": "train", "validation": "val", "test": "test"}.items():
        assert sorted(restore_run(path, split=side).images.relative_paths()) == listed[kept]
    assert f"left out 16 images that {path / 'split.csv'} does not list" in caplog.text
    assert "are not those that the run had" not in caplog.text
    monkeypatch.setattr("fgvc.io._MAX_CELLS", 12)  # split.csv lists training images too, and so may be larger
    calibrate_run(path)
    monkeypatch.undo()
    assert "left out 16 images" in json.loads((path / "calibration.json").read_text())["checkpoints"]["last"]["note"]
    evaluated = evaluate_run(path)
    assert evaluated.predictions["path"].tolist() == read_run(path).predictions()["path"].tolist()
    assert ("left out 16 images" in str(evaluated.record["note"])) == (place == ".")
    (tmp_path / "data" / listed["test"][0]).unlink()
    assert "the test images are not those that the run had" in evaluate_run(path).record["note"]
    assert evaluate_run(path).record["images"] == len(listed["test"]) - 1
    for name in listed["test"][1:]:
        (tmp_path / "data" / name).unlink()
    with pytest.raises((RunError, DatasetError)):  # the new ones are no test images
        evaluate_run(path)
