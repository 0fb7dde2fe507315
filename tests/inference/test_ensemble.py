"""Several runs as one: the mean of their probabilities against a mean by hand, and the mean of their weights."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from command_line import Train, refused, succeeded, trainable
from omegaconf import OmegaConf
from run_folders import change_summary
from safetensors.torch import load_file, save_file

import fgvc
from fgvc.errors import RunError
from fgvc.inference.ensemble import average_runs, evaluate_ensemble
from fgvc.inference.export import export_run
from fgvc.inference.restore import load_model, restore_run
from fgvc.runs.config import MethodConfig
from fgvc.runs.folder import RunFolder
from fgvc.runs.summary import read_run
from fgvc.training import train_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of runs: `gap` and `seb` held out images, `a` and `b` started from the weights of `first`."""
    folder = tmp_path_factory.mktemp("runs")
    for name, method in {"gap": "gap", "seb": "seb", "first": "seb", "a": "seb", "b": "seb"}.items():
        config = trainable(folder, name=name, run_dir=str(folder / name), method=MethodConfig(name=method, reduction=4))
        config.trainer.epochs = 1
        config.seed = 1 if name == "b" else 0
        config.trainer.val_fraction = 0.25 if name in ("gap", "seb") else 0.0
        if name in ("a", "b"):
            config.initial_weights = str(folder / "start" / "model.safetensors")
        train_run(config)
        if name == "first":
            export_run(folder / "first", to="safetensors", output=folder / "start")
    for name in ("gap", "seb"):
        fgvc.calibrate_run(folder / name)
    return folder


@pytest.fixture
def copy(runs: Path, tmp_path: Path) -> Path:
    """A copy of all runs."""
    return Path(shutil.copytree(runs, tmp_path / "copy"))


def set_temperature(run: Path, temperature: float, **changes: object) -> None:
    file = run / "calibration.json"
    content = json.loads(file.read_text())
    content["checkpoints"]["last"] |= {"temperature": temperature, **changes}
    file.write_text(json.dumps(content))


def test_the_mean_of_calibrated_probabilities(copy: Path, tmp_path: Path, here: Train) -> None:
    (copy / "gap" / "metrics.csv").write_text("epoch,train_loss,test_top1,val_top1\n1,1.0,100,20\n")
    (copy / "seb" / "metrics.csv").write_text("epoch,train_loss,test_top1,val_top1\n1,1.0,0,30\n")
    shares = []
    for name, temperature in (("gap", 0.3), ("seb", 3.0)):
        set_temperature(copy / name, temperature)
        restored = restore_run(copy / name, torch.device("cpu"))
        images = torch.stack([image for image, _ in restored.images])
        with torch.inference_mode():
            shares.append((restored.model(images) / temperature).softmax(dim=1).numpy())
    mean, targets = np.mean(shares, axis=0), np.array(restored.images.targets)
    done = succeeded(here("evaluate.py", copy / "gap", copy / "seb", "--output", "out", cwd=tmp_path))
    record = json.loads((tmp_path / "out" / "evaluation-ensemble-last.json").read_text())
    predictions = pd.read_csv(tmp_path / "out" / "predictions-ensemble-last.csv")
    np.testing.assert_allclose(predictions["confidence"], mean.max(axis=1), rtol=1e-4)
    assert predictions["predicted"].tolist() == mean.argmax(axis=1).tolist()
    top1 = [100 * np.mean(share.argmax(axis=1) == targets) for share in (*shares, mean)]
    assert [row["top1"] for row in record["runs"]] == pytest.approx(top1[:2], abs=1e-3)
    assert record["top1"] == pytest.approx(top1[2], abs=1e-3)
    # the reference is better on held-out images, and worse on test images by its own record
    assert record["reference"] == str(copy / "seb")
    difference = record["difference"]
    assert difference["difference"] == pytest.approx(top1[2] - top1[1])
    assert difference["low"] <= difference["difference"] <= difference["high"]
    assert f"ensemble minus {copy / 'seb'} (the run of the highest accuracy on held-out images)" in done.stdout
    assert f"{difference['difference']:+.2f} points (95 % interval {difference['low']:+.2f}" in done.stdout


def test_a_temperature_of_test_images_is_not_used_and_the_first_run_is_the_reference(
    copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    set_temperature(copy / "seb", 3.0, split="test")
    found = evaluate_ensemble([copy / "a", copy / "seb"])
    assert [row["temperature"] for row in found.members] == [None, None] and found.reference == 0
    assert "fitted on test images and is not used" in caplog.text
    assert f"ensemble minus {copy / 'a'} (the first run)" in found.text
    twice = evaluate_ensemble([copy / "a", shutil.copytree(copy / "a", copy / "again")])
    single = restore_run(copy / "a", torch.device("cpu"))
    assert twice.difference["difference"] == twice.difference["low"] == twice.difference["high"] == 0
    assert len(twice.predictions) == len(single.images)


def test_a_configuration_of_another_head_is_refused(copy: Path, tmp_path: Path, here: Train) -> None:
    config = OmegaConf.load(copy / "a" / "config.yaml")
    OmegaConf.save(OmegaConf.merge(config, {"method": {"name": "mpn_cov"}}), copy / "a" / "config.yaml")
    refused(here("evaluate.py", copy / "a", cwd=tmp_path), "summary.json is of seb and", "config.yaml of mpn_cov")


@pytest.mark.parametrize("cell", ["abc", "nan", "120"])
def test_a_held_out_accuracy_that_is_none_is_named(copy: Path, tmp_path: Path, here: Train, cell: str) -> None:
    (copy / "gap" / "metrics.csv").write_text(f"epoch,train_loss,test_top1,val_top1\n1,1.0,100,{cell}\n")
    refused(here("evaluate.py", copy / "seb", copy / "gap", cwd=tmp_path), f"val_top1 is {cell}", "gap")


def test_other_classes_or_test_images_are_refused(copy: Path, tmp_path: Path, here: Train) -> None:
    for key, value, message in (
        ("classes", 2, "has 2 classes"),
        ("test_per_class", 2, "has 6 test images"),
    ):
        other = trainable(tmp_path / key, method=MethodConfig(name="gap"))
        other.dataset.options[key] = value
        other.trainer.epochs = 1
        path = train_run(other)
        refused(here("evaluate.py", copy / "a", path, cwd=tmp_path), message, str(path))
    refused(here("evaluate.py", copy / "a", copy / "b", "--retrieval", cwd=tmp_path), "give one run")
    for script in ("evaluate.py", "soup.py"):
        twice = [script, copy / "a", copy / "b" / ".." / "a", "--output", "twice"]
        refused(here(*twice, cwd=tmp_path), "is given twice")


def test_the_result_of_other_runs_is_not_written_over(copy: Path, tmp_path: Path, here: Train) -> None:
    succeeded(here("evaluate.py", copy / "a", copy / "b", "--output", "out", cwd=tmp_path))
    before = (tmp_path / "out" / "evaluation-ensemble-last.json").read_bytes()
    refused(here("evaluate.py", copy / "a", copy / "seb", "--output", "out", cwd=tmp_path), "did not make it")
    assert (tmp_path / "out" / "evaluation-ensemble-last.json").read_bytes() == before
    succeeded(here("evaluate.py", copy / "b", copy / "a", "--output", "out", cwd=tmp_path))


def test_a_soup_has_the_mean_weights_and_is_read_like_a_run(runs: Path, tmp_path: Path, here: Train) -> None:
    soup = tmp_path / "soup"
    succeeded(here("soup.py", runs / "a", runs / "b", "--output", soup, cwd=tmp_path))
    states = [load_model(path).state_dict() for path in (runs / "a", runs / "b", soup)]
    assert not torch.equal(states[0]["head.classifier.weight"], states[1]["head.classifier.weight"])
    for name, tensor in states[2].items():  # running means and variances too
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, (states[0][name] + states[1][name]) / 2)
    run = read_run(soup)
    assert (run.status, run.final, run.finished) == ("averaged", None, False)
    assert run.reason == f"mean of the weights of {runs / 'a'}, {runs / 'b'}" and run.label.endswith("(mean of 2 runs)")
    image = next((runs / "data").rglob("test_*.jpg"))
    assert fgvc.load_run(soup).predict(image).name in (run.classes or [])
    assert "top-1" in succeeded(here("evaluate.py", soup, cwd=tmp_path)).stdout
    assert evaluate_ensemble([soup, runs / "a"]).reference == 0
    refused(here("soup.py", runs / "a", runs / "b", "--output", soup, cwd=tmp_path), "soup")  # nothing is replaced
    with pytest.raises(RunError, match="holds a mean of weights of fgvc soup"):
        train_run(replace(RunFolder(runs / "a").read_config(), run_dir=str(soup)))
    assert read_run(soup).status == "averaged"


def test_runs_without_a_common_start_have_no_soup(copy: Path, tmp_path: Path) -> None:
    def attempt(*names: str, match: str) -> None:
        with pytest.raises(RunError, match=match):
            average_runs([copy / name for name in names], tmp_path / "soup")
        assert not (tmp_path / "soup").exists()

    attempt("a", match="at least two runs")
    attempt("first", "a", match="did not start from the same backbone and head.*initial_weights=FILE")
    summary = json.loads((copy / "b" / "summary.json").read_text())
    for changes, match in (
        ({"head_digest": "0" * 64}, "did not start from the same"),
        ({"weights_digest": "0" * 64}, "did not start from the same"),
        ({"classes": summary["classes"][::-1]}, "other classes"),
        ({"dataset_fingerprint": {"test_content": "0"}}, "other images"),
        ({"status": "stopped"}, "not finished"),
    ):
        change_summary(copy / "b", **summary | changes)
        attempt("a", "b", match=match)
    change_summary(copy / "b", **summary)
    file = copy / "b" / "checkpoints" / "last.safetensors"
    weights = load_file(file)
    save_file({name: tensor for name, tensor in weights.items() if name != "head.classifier.bias"}, file)
    attempt("a", "b", match="other names or shapes")
    config = OmegaConf.load(copy / "b" / "config.yaml")
    OmegaConf.save(OmegaConf.merge(config, {"optimizer": {"lr": 0.5}}), copy / "b" / "config.yaml")
    attempt("a", "b", match=r"differ in optimizer.lr \(0.5, ")
