"""Evaluation of finished runs: the command line, its files, and views against their average by hand."""

import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from command_line import SMALL, run, succeeded
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from fgvc.data import ViewTransform, resized_spec
from fgvc.errors import ConfigError, RunError
from fgvc.inference import evaluate_run
from fgvc.inference.restore import restore_run
from fgvc.io import read_csv
from fgvc.models.files import write_weights
from fgvc.pooling import create_pooling

CPU = torch.device("cpu")
Copy = Callable[..., Path]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Working folder of two finished runs: `tuned`, whose backbone was trained, and `frozen`."""
    cwd = tmp_path_factory.mktemp("runs")
    frozen = ["backbone.frozen=true", "cache.dir=cache", "trainer.epochs=1"]
    for name, overrides in {"tuned": [], "frozen": frozen}.items():
        succeeded(run("train.py", *SMALL, f"run_dir={name}", *overrides, cwd=cwd))
    return cwd


@pytest.fixture
def copy(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Copy:
    """A copy of a run with overrides of its config.yaml; the working folder is that of the runs."""
    monkeypatch.chdir(runs)

    def make(name: str, *overrides: str) -> Path:
        path = Path(shutil.copytree(runs / name, tmp_path / name))
        config = OmegaConf.merge(OmegaConf.load(path / "config.yaml"), OmegaConf.from_dotlist(list(overrides)))
        OmegaConf.save(config, path / "config.yaml")
        return path

    return make


def test_command_line_writes_what_it_says(runs: Path) -> None:
    before = {file: file.read_bytes() for file in (runs / "tuned").rglob("*") if file.is_file()}
    options = ["--views", "ten_crop", "--resize-size", "72", "--checkpoint", "best", "--output", "out"]
    done = succeeded(run("evaluate.py", "tuned", *options, cwd=runs))
    name = "best-ten_crop-resize72"
    written = done.stdout.split("written: ")[1].strip().split(", ")
    assert sorted(written) == sorted(f"out/{file.name}" for file in (runs / "out").glob("[!.]*"))
    files = {f"{kind}-{name}.csv" for kind in ("predictions", "per_class", "confusion")}
    files |= {f"confusion-{name}.png", f"confusion-{name}.pdf", f"confusions-{name}.md", f"evaluation-{name}.json"}
    assert {Path(file).name for file in written} == files
    record = json.loads((runs / "out" / f"evaluation-{name}.json").read_text())
    assert (record["views"], record["size"], record["resize_size"], record["images"]) == ("ten_crop", 64, 72, 9)
    assert (record["checkpoint"], record["root"]) == ("best", "datasets/synthetic") and record["seconds"] > 0
    assert f"top-1 {record['top1']:.2f} %" in done.stdout and "views: ten_crop" in done.stdout

    predictions = pd.read_csv(runs / "out" / f"predictions-{name}.csv")
    right = predictions["target"] == predictions["predicted"]
    assert 100 * right.mean() == pytest.approx(record["top1"], abs=1e-3) and ((predictions["rank"] == 1) == right).all()
    classes = json.loads((runs / "tuned" / "summary.json").read_text())["classes"]
    assert predictions["target_class"].tolist() == [classes[index] for index in predictions["target"]]
    assert predictions["predicted_class"].tolist() == [classes[index] for index in predictions["predicted"]]
    matrix = read_csv(runs / "out" / f"confusion-{name}.csv", ("true", *classes))
    assert matrix["true"].tolist() == classes and np.trace(matrix[classes].to_numpy()) == right.sum()
    per_class = read_csv(runs / "out" / f"per_class-{name}.csv", ("class", "recall", "recall_lower", "f1"))
    assert per_class["recall"].mean() == pytest.approx(record["mean_class"], abs=1e-3)
    assert list(record["shots"]) == ["few"] and "training images" not in done.stdout  # one kind of class
    assert {file: file.read_bytes() for file in (runs / "tuned").rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("name", ["tuned", "frozen"])
def test_a_single_view_repeats_the_training_and_mirror_does_not_overwrite_it(name: str, copy: Copy) -> None:
    path = copy(name)
    single, best, mirror = evaluate_run(path), evaluate_run(path, checkpoint="best"), evaluate_run(path, views="mirror")
    summary = json.loads((path / "summary.json").read_text())
    assert single.record["top1"] == pytest.approx(summary["final"]["top1"])
    assert best.record["top1"] == pytest.approx(summary["best"]["top1"])
    trained, repeated = pd.read_csv(path / "predictions.csv"), pd.read_csv(path / "predictions-last.csv")
    pd.testing.assert_frame_equal(trained, repeated, atol=1e-5)
    assert list(trained) == ["path", "target", "predicted", "target_class", "predicted_class", "confidence", "rank"]
    assert [file.name for file in mirror.files] == ["evaluation-last-mirror.json", "predictions-last-mirror.csv"]
    assert all(file.is_file() for file in [*single.files, *mirror.files])
    assert not np.allclose(single.predictions["confidence"], mirror.predictions["confidence"])


@pytest.mark.parametrize(("views", "resize_size"), [("mirror", None), ("ten_crop", 70), ("single", 70)])
@pytest.mark.parametrize("name", ["tuned", "frozen"])
def test_views_are_the_average_by_hand(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, views: str, resize_size: int | None
) -> None:
    monkeypatch.chdir(runs)
    found = evaluate_run(Path(name), views=views, resize_size=resize_size, output=tmp_path).predictions
    restored = restore_run(Path(name), CPU)
    transform = ViewTransform(resized_spec(restored.images.transform, resize_size), views)  # type: ignore[arg-type]
    model = torch.nn.Sequential(restored.backbone, restored.head).eval()
    with torch.inference_mode():
        images = restored.images.with_transform(transform)
        logits = torch.stack([torch.cat([model(view[None]) for view in image]).mean(dim=0) for image, _ in images])
    confidence, predicted = logits.softmax(dim=1).max(dim=1)
    assert found["predicted"].tolist() == predicted.tolist()
    np.testing.assert_allclose(found["confidence"], confidence, rtol=1e-4)


def test_the_size_of_a_batch_changes_nothing_and_a_repetition_not_a_bit(copy: Copy) -> None:
    path = copy("tuned", "trainer.eval_batch_size=5")  # two images of two views, the last batch is smaller
    first = evaluate_run(path, views="mirror").predictions
    pd.testing.assert_frame_equal(evaluate_run(path, views="mirror").predictions, first)
    shutil.rmtree(path)
    pd.testing.assert_frame_equal(evaluate_run(copy("tuned"), views="mirror").predictions, first, atol=1e-5)


def test_only_what_is_needed_is_read_and_cached(
    copy: Copy, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, cache = copy("frozen", f"cache.dir={tmp_path / 'fresh'}"), tmp_path / "results" / "cache"
    root = str(runs / "datasets" / "synthetic")
    monkeypatch.chdir(tmp_path)
    evaluate_run(path, views="mirror", root=root)
    assert [file.name.split("-")[0] for file in cache.iterdir()] == ["readable"]
    evaluate_run(path, root=root)
    names = sorted(file.name.split("-")[0] + file.suffix for file in cache.glob("*-*"))
    assert names == ["features.json", "features.npy", "readable.json"]
    (features,) = cache.glob("*.npy")
    assert not (tmp_path / "fresh").exists()
    assert np.load(features).shape[:2] == (1, 9)  # the test split alone


def test_feature_maps_that_came_with_a_run_do_not_stand_for_the_images(copy: Copy, runs: Path, tmp_path: Path) -> None:
    path, root = copy("frozen", f"cache.dir={tmp_path / 'frozen' / 'cache'}"), runs / "datasets" / "synthetic"
    (tmp_path / "mine").mkdir()
    arguments = ("evaluate.py", path, "--root", root, "--output")
    done = succeeded(run(*arguments, "a", "--cache", path / "cache", cwd=tmp_path / "mine"))
    assert not done.stderr and not (tmp_path / "mine" / "results").exists()
    (features,) = (path / "cache").glob("*.npy")
    np.save(features, np.load(features)[:, ::-1].copy())  # the maps of other images
    card = json.loads(features.with_suffix(".json").read_text())
    forged = card | {"crc32": f"{zlib.crc32(features.read_bytes()):08x}"}
    features.with_suffix(".json").write_text(json.dumps(forged))
    succeeded(run(*arguments, "b", "--cache", path / "cache", cwd=tmp_path / "mine"))
    done = succeeded(run(*arguments, "c", cwd=tmp_path / "mine"))
    assert f"the run kept its own in {path / 'cache'}, see --cache" in done.stderr
    read, forged, computed = (pd.read_csv(tmp_path / "mine" / x / "predictions-last.csv") for x in "abc")
    pd.testing.assert_frame_equal(computed, read)
    assert not forged["confidence"].equals(read["confidence"])
    kept = {file.name.split("-")[0] for file in (tmp_path / "mine" / "results" / "cache").iterdir()}
    assert {"features", "readable"} < kept
    assert not succeeded(run(*arguments, "c", cwd=tmp_path / "mine")).stderr  # nothing is computed


def test_a_hybrid_run_is_evaluated_with_the_pooling_of_its_epoch(copy: Copy) -> None:
    changes = ("method.gradient=exact", "method.solver=products")  # those of the last stage alone
    path = copy("frozen", "hybrid.method=isqrt_cov", "hybrid.switch_epoch=1", *changes)
    first = type(create_pooling("isqrt_cov", channels=8))
    file, weights = path / "summary.json", path / "checkpoints" / "best.safetensors"
    summary = json.loads(file.read_text())
    for stated, saved in ((1, 2), (2, 1)):  # the summary of a run that was killed is older than its weights
        file.write_text(json.dumps(summary | {"best": summary["best"] | {"epoch": stated}}))
        write_weights(weights, load_file(weights), epoch=saved)
        pooling = restore_run(path, CPU, checkpoint="best").head.pooling
        assert (type(pooling) is first) == (saved == 1)
    save_file(load_file(weights), weights)  # as an earlier version did, without the epoch
    assert type(restore_run(path, CPU, checkpoint="best").head.pooling) is not first
    file.write_text(json.dumps(summary | {"best": summary["best"] | {"epoch": None}}))
    with pytest.raises(RunError, match="does not name the epoch of the best weights"):
        restore_run(path, CPU, checkpoint="best")


def test_a_file_in_the_way_is_named_before_the_work(copy: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fgvc.inference.evaluate.evaluate", None)
    for name in ("evaluation-last.json", "predictions-last.csv", "confusions-last.md"):
        (copied := copy("tuned")).joinpath(name).write_text("of an earlier version")
        with pytest.raises(FileExistsError, match=name):
            evaluate_run(copied)
        shutil.rmtree(copied)


def test_the_evaluation_of_another_run_is_not_replaced(copy: Copy, tmp_path: Path) -> None:
    tuned, frozen = copy("tuned"), copy("frozen")
    for _ in range(2):
        record = evaluate_run(tuned, output=tmp_path / "out").record
    assert record["run"] == str(tuned)
    with pytest.raises(RunError, match=f"out holds the evaluation of {tuned}; give another --output"):
        evaluate_run(frozen, output=tmp_path / "out")


def test_other_test_images_are_noted(runs: Path, copy: Copy, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, root = copy("tuned"), tmp_path / "moved"
    shutil.copytree(runs / "datasets" / "synthetic", root)
    evaluate_run(path, root=str(root))
    assert "not those that the run had" not in caplog.text
    shutil.rmtree(path)
    file = next(root.rglob("test_*.jpg"))
    file.write_bytes(file.read_bytes() + bytes(8))
    path = copy("tuned")
    evaluate_run(path, root=str(root))
    assert f"{root}: the test images are not those that the run had" in caplog.text
    caplog.clear()
    shutil.rmtree(path)
    path = copy("tuned")
    summary = json.loads((path / "summary.json").read_text())
    images = summary["dataset_fingerprint"]
    summary["dataset_fingerprint"] = {"test_list": images["test_list"]}  # as an earlier version wrote it
    (path / "summary.json").write_text(json.dumps(summary))
    evaluate_run(path, root=str(root))
    assert "the test images are not those" in caplog.text


def test_weights_that_give_no_numbers_are_refused(copy: Copy) -> None:
    path = copy("frozen")
    file = path / "checkpoints" / "last.safetensors"
    weights = load_file(file)
    save_file({**weights, "classifier.bias": weights["classifier.bias"] * torch.nan}, file)
    with pytest.raises(RunError, match=r"holds NaN or infinity \(classifier\.bias\)"):
        evaluate_run(path)
    assert not list(path.glob("*-last*"))


def test_ten_crop_without_room(copy: Copy, caplog: pytest.LogCaptureFixture) -> None:
    square = copy("frozen", "dataset.transform.resize=square")
    with pytest.raises(ConfigError, match=r"resize_size.*--resize-size N"):
        evaluate_run(square, views="ten_crop")
    shutil.rmtree(square)
    evaluate_run(copy("frozen"), views="ten_crop")
    assert "square images give ten equal crops" in caplog.text
