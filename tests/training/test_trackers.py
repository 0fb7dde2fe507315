"""Trackers of metrics that need packages of their own, without a network."""

import json
from pathlib import Path

import pytest
from command_line import SMALL, run, succeeded

pytestmark = pytest.mark.extras


def test_wandb_keeps_the_run_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    succeeded(run("train.py", *SMALL, "method=gap", "trainer.tracker=wandb", "run_dir=run", cwd=tmp_path))
    assert list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert (tmp_path / "run" / "calibration.json").is_file()  # nothing in the run folder is in the way


def test_mlflow_keeps_metrics_of_every_epoch_and_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    address = f"sqlite:///{tmp_path / 'runs.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    succeeded(run("train.py", *SMALL, "method=gap", "trainer.tracker=mlflow", "run_dir=a/run", cwd=tmp_path))
    client = mlflow.MlflowClient(address)
    experiment = client.get_experiment_by_name("synthetic")
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.run_name, found.data.params["optimizer.lr"]) == ("a-run", "0.003")
    history = client.get_metric_history(found.info.run_id, "test_top1")
    final = json.loads((tmp_path / "a" / "run" / "summary.json").read_text())["final"]["top1"]
    assert [point.step for point in history] == [1, 2] and history[-1].value == pytest.approx(final)
