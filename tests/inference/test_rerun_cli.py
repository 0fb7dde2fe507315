"""`fgvc rerun` on a small run: repeated to the same bits, and every kind of difference told."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from archives import folder_bytes
from command_line import Train, refused, succeeded, trainable
from safetensors.torch import load_file, save_file

from fgvc.data.synthetic import Recipe, write_synthetic
from fgvc.errors import RunError
from fgvc.inference import rerun
from fgvc.reporting.comparison import comparison_markdown
from fgvc.runs import read_run
from fgvc.runs.compare import array_distance, column_distance, compare_runs, weights_distance
from fgvc.runs.config import MethodConfig
from fgvc.training import train_run

DATA = {"classes": 3, "train_per_class": 4, "test_per_class": 3, "size": 64}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on a frozen backbone."""
    config = trainable(tmp_path_factory.mktemp("rerun"), method=MethodConfig(name="mpn_cov", reduction=8))
    config.backbone.frozen, config.trainer.epochs = True, 2
    return train_run(config)


@pytest.fixture
def pair(finished: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The run and a copy of it to be changed."""
    return finished, Path(shutil.copytree(finished, tmp_path / "copy"))


def change_json(file: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_a_run_is_repeated_to_the_last_bit_and_left_alone(finished: Path, tmp_path: Path, here: Train) -> None:
    before = folder_bytes(finished)
    again = tmp_path / "again"
    done = succeeded(here("rerun.py", finished, "--run-dir", again, "--cache", "new", "--strict", cwd=tmp_path))
    assert done.stdout.startswith("# MPN-COV on synthetic, seed 0: bit-identical\n")
    assert "| cache.dir " in done.stdout and "Weights: bit-identical (last, best)." in done.stdout
    assert "epoch 2/2" in done.stderr
    assert (tmp_path / "new").is_dir() and "read its feature maps" not in done.stdout
    assert folder_bytes(finished) == before
    # what is there is not trained again in silence
    refused(here("rerun.py", finished, "--run-dir", again, cwd=tmp_path), str(again), "--compare")
    compared = here("rerun.py", finished, "--compare", again, "--strict", cwd=tmp_path)
    assert compared.returncode == 0 and compared.stdout == done.stdout


def test_beside_the_run_with_features_of_the_cache(pair: tuple[Path, Path], here: Train) -> None:
    copy = pair[1]
    done = succeeded(here("rerun.py", "copy", cwd=copy.parent))
    assert read_run(copy.parent / "copy-rerun").rerun_of == "copy" and read_run(copy).rerun_of is None
    assert "`copy-rerun` read its feature maps from a cache" in done.stdout


def test_equal_accuracy_is_told_from_equal_bits(pair: tuple[Path, Path], here: Train) -> None:
    first, copy = pair
    file = copy / "checkpoints" / "last.safetensors"
    weights = load_file(file)
    key = next(name for name, tensor in weights.items() if tensor.dim() > 1)
    weights[key].view(-1)[0] += 0.5
    save_file(weights, file)
    comparison = compare_runs(first, copy)
    assert comparison.verdict.startswith("equal accuracy, weights differ by at most 0.5, ")
    (last, best) = comparison.weights
    assert (last.differing, last.where, best.differing) == (1, key, 0)
    done = here("rerun.py", first, "--compare", copy, "--strict", cwd=copy.parent)
    assert done.returncode == 1 and key in done.stdout and "Bit-identical: best." in done.stdout
    assert here("rerun.py", first, "--compare", copy, cwd=copy.parent).returncode == 0


def test_other_results_and_what_they_may_come_from(pair: tuple[Path, Path]) -> None:
    first, copy = pair

    def change(summary: dict) -> None:
        summary["final"]["top1"] = summary["final"]["top1"] - 11.1111
        summary["versions"]["torch"] = "1.0"
        summary["machine"]["threads"] = 99
        summary["initial_weights_digest"] = "b" * 64
        del summary["dataset_fingerprint"]
        summary["commit"], summary["dirty"] = "a" * 40, True

    change_json(copy / "summary.json", change)
    config = yaml.safe_load((copy / "config.yaml").read_text())
    config["optimizer"]["lr"], config["run_dir"] = 0.5, "elsewhere"
    del config["trainer"]["deterministic"]
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    predictions = pd.read_csv(copy / "predictions.csv")
    right = predictions.index[predictions["predicted"] == predictions["target"]][0]
    predictions.loc[right, "predicted"] = (predictions.loc[right, "predicted"] + 1) % 3
    predictions.to_csv(copy / "predictions.csv", index=False)
    metrics = pd.read_csv(copy / "metrics.csv", dtype=str)
    metrics.loc[1, "train_loss"] = str(float(metrics.loc[1, "train_loss"]) + 0.25)
    metrics.loc[0, "seconds"] = "99"
    metrics["new"] = "1"
    metrics.to_csv(copy / "metrics.csv", index=False)
    arrays = dict(np.load(copy / "spectrum.npz"))
    arrays["before"][0, 0] *= 2
    np.savez(copy / "spectrum.npz", **arrays)

    comparison = compare_runs(first, copy)
    top1 = json.loads((first / "summary.json").read_text())["final"]["top1"]
    assert comparison.verdict.startswith(f"differs: final top1 {top1} and {top1 - 11.1111} %, 1 of 9 predictions")
    assert {"commit", "versions.torch", "machine.threads", "initial_weights_digest"} == {
        change.name for change in comparison.environment
    }
    assert [change.name for change in comparison.settings] == ["optimizer.lr"]
    assert set(comparison.unrecorded) == {"dataset_fingerprint", "trainer.deterministic", "metrics.csv: new"}
    assert comparison.predictions is not None
    assert comparison.predictions[:4] == (9, 1, 0, 1)
    (loss,) = [distance for distance in comparison.metrics if distance.differing]
    assert (loss.name, loss.differing, loss.where) == ("train_loss", 1, "2")
    assert loss.largest == pytest.approx(0.25)
    (before,) = [distance for distance in comparison.spectra if distance.differing]
    share = arrays["before"][0, 0] / 2 / np.load(first / "spectrum.npz")["before"].max()
    assert (before.name, before.differing, before.relative) == ("spectrum: before", 1, pytest.approx(share))
    text = comparison_markdown(comparison)
    for part in ("aaaaaaaaaaaa…-dirty", "1 of 9 changed (0 became right, 1 wrong)", "| train_loss", "trainer.determin"):
        assert part in text, part


def test_what_is_missing_or_of_another_kind_is_not_called_equal(pair: tuple[Path, Path]) -> None:
    first, copy = pair
    (copy / "checkpoints" / "best.safetensors").unlink()
    (copy / "spectrum_history.npz").unlink()
    weights = load_file(copy / "checkpoints" / "last.safetensors")
    weights["more"] = torch.zeros(1)
    save_file(weights, copy / "checkpoints" / "last.safetensors")
    predictions = pd.read_csv(copy / "predictions.csv").iloc[1:]
    predictions.to_csv(copy / "predictions.csv", index=False)
    comparison = compare_runs(first, copy)
    assert not comparison.identical and comparison.predictions is None
    found = "; ".join(comparison.incomparable)
    assert len(comparison.incomparable) == 4
    for part in ("8 in common", "have other tensors (1, the first more)", "best.safetensors", "spectrum_history.npz"):
        assert part in found and part in comparison_markdown(comparison), part


def test_only_finished_runs_of_this_version_are_repeated(pair: tuple[Path, Path], tmp_path: Path, here: Train) -> None:
    copy = pair[1]
    refused(here("rerun.py", tmp_path / "nothing", cwd=tmp_path), "nothing", "config.yaml")
    for inside in (copy, copy / "again"):
        refused(here("rerun.py", copy, "--run-dir", inside, cwd=tmp_path), "never changed", "--run-dir")
    change_json(copy / "summary.json", lambda summary: summary.update(status="stopped"))
    refused(here("rerun.py", copy, cwd=tmp_path), "status stopped", f"run_dir={copy}")
    refused(here("rerun.py", copy, "--compare", pair[0], cwd=tmp_path), "status stopped")
    config = copy / "config.yaml"
    config.write_text(config.read_text() + "of_old: 1\n")
    refused(here("rerun.py", copy, cwd=tmp_path), "of_old", "fgvc 0.1.0", "--compare OTHER")
    assert not (tmp_path / "copy-rerun").exists()


def test_another_dataset_is_refused_and_changes_are_told(pair: tuple[Path, Path], tmp_path: Path, here: Train) -> None:
    copy = pair[1]
    config = yaml.safe_load((copy / "config.yaml").read_text())
    config["dataset"]["adapter"], config["dataset"]["options"] = "cub", {}  # the layout the images are in
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    other = write_synthetic(tmp_path / "other", Recipe(**{**DATA, "classes": 4}))
    refused(here("rerun.py", copy, "--root", other, cwd=tmp_path), "4 classes", "trained with 3")
    assert not (tmp_path / "copy-rerun").exists()
    changed = write_synthetic(tmp_path / "changed", Recipe(**DATA, seed=1))
    assert rerun(copy, root=str(changed), cache="cache-of-others") == tmp_path / "copy-rerun"
    comparison = compare_runs(copy, tmp_path / "copy-rerun")
    assert comparison.verdict.startswith("differs: other images, ")
    names = {change.name for change in comparison.environment}
    parts = ["listed", *(f"{split}_{what}" for split in ("train", "test") for what in ("list", "content"))]
    assert names == {f"dataset_fingerprint.{part}" for part in parts}


def test_distances_by_hand() -> None:
    a = np.array([[1.0, -4.0], [np.nan, 0.0]])
    b = np.array([[1.0, -3.0], [np.nan, -0.0]])
    assert array_distance("x", a, b) == ("x", 4, 2, 1.0, 1 / 4, None)
    assert array_distance("x", a, a.copy())[1:4] == (4, 0, 0.0)
    assert array_distance("x", a, np.where(np.isnan(a), 1.0, a)).largest == math.inf
    with pytest.raises(RunError, match="x is float64"):
        array_distance("x", a, b.astype(np.float32))

    one = {"w": np.array([3.0, 4.0], np.float32), "steps": np.array(7)}
    other = {"w": np.array([3.0, 4.5], np.float32), "steps": np.array(9)}
    assert weights_distance("last", one, other) == ("last", 2, 2, 0.5, pytest.approx(0.1), "w")
    assert weights_distance("last", one, one | {"steps": other["steps"]}) == ("last", 2, 1, 2.0, 0.0, "steps")
    with pytest.raises(RunError, match=r"other tensors \(1, the first w"):
        weights_distance("last", one, {**other, "w": np.array([3.0], np.float32)})

    def column(*cells: str) -> pd.Series:
        return pd.Series(cells, index=[str(i + 1) for i in range(len(cells))], name="loss", dtype=str)

    assert column_distance(column("1.0", "", "inf"), column("1", "", "inf")) == ("loss", 3, 0, 0.0, None, None)
    assert column_distance(column("1", "2", "4"), column("1", "2.5", "3")) == ("loss", 3, 2, 1.0, None, "2")
    assert column_distance(column("1", "2"), column("1"))[2:] == (1, math.inf, None, "2")
    assert column_distance(column("gap", "seb"), column("gap", "gap"))[2:] == (1, math.inf, None, "2")
