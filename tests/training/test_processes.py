"""Several processes train as one would: the same steps, the same results, one writer, and one that fails stops all."""

import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from accelerate.commands.launch import launch_command, launch_command_parser
from command_line import ROOT, SMALL, Train, fresh_process, import_for, refused, run_script, succeeded
from forked_runs import train_in_processes, train_until
from safetensors.torch import load_file
from torch import nn
from torch.distributed import run as distributed_run

from fgvc.training.batches import StepBatches
from fgvc.training.states import StateStore

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are forked"),
    pytest.mark.usefixtures("uncalibrated"),
]

# several processes on CPUs refuse to train batch normalisation
WITHOUT_NORMALISATION = ["backbone.name=test_convnext", "method.reduction=null"]
# 21 training images in steps of 8, 8 and 5, 9 test images: neither is a multiple of the number of processes
UNEVEN = [
    "dataset.root=uneven",
    "dataset.options.train_per_class=7",
    "trainer.batch_size=8",
    "trainer.eval_batch_size=2",
]
UNEVEN += ["method=isqrt_cov", *WITHOUT_NORMALISATION, "dataset.transform.crop=random_resized", "trainer.ema_decay=0.9"]
COLUMNS = ["train_loss", "test_loss", "train_top1", "test_top1", "test_mean_class"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Working folder of a run in one process, in `run1`."""
    cwd = tmp_path_factory.mktemp("processes")
    assert train_until(cwd, [*UNEVEN, "run_dir=run1"]) == 0, (cwd / "log").read_text()
    return cwd


def assert_same_curve(first: Path, second: Path, tolerance: float) -> None:
    curves = [pd.read_csv(run / "metrics.csv")[COLUMNS] for run in (first, second)]
    pd.testing.assert_frame_equal(*curves, rtol=0, atol=tolerance)
    predictions = [pd.read_csv(run / "predictions.csv") for run in (first, second)]
    assert predictions[0]["path"].tolist() == predictions[1]["path"].tolist()
    assert len(predictions[0]) == 9
    np.testing.assert_allclose(predictions[0]["confidence"], predictions[1]["confidence"], atol=10 * tolerance)


def test_processes_give_the_curve_of_one(alone: Path) -> None:
    sweep = [*UNEVEN, "seed=1,0", "run_dir=run2-${seed}", "-m"]  # the second run of the sweep has the seed of `alone`
    assert train_in_processes(alone, sweep, 2) == [0, 0], (alone / "log").read_text()
    assert_same_curve(alone / "run2-0", alone / "run1", 1e-5)
    weights = [load_file(alone / name / "checkpoints" / "last.safetensors") for name in ("run1", "run2-0")]
    assert weights[0].keys() == weights[1].keys()
    assert list((alone / "run2-0").glob("summary*")) == [alone / "run2-0" / "summary.json"]


def test_accumulation_gives_the_step_of_the_whole_batch_but_for_batch_normalisation(
    tmp_path: Path, train_here: Train
) -> None:
    """With GAP on a frozen backbone there is no batch normalisation to train."""
    settings = ["method=gap", "backbone.frozen=true", "trainer.batch_size=5", "trainer.mixup=0", "trainer.epochs=1"]
    for rounds in (1, 3):
        succeeded(train_here(tmp_path, *settings, f"trainer.accumulation={rounds}", f"run_dir=run{rounds}"))
    assert_same_curve(tmp_path / "run3", tmp_path / "run1", 1e-5)
    assert train_in_processes(tmp_path, [*settings, "trainer.accumulation=2", "run_dir=run2x2"], 2) == [0, 0]
    assert_same_curve(tmp_path / "run2x2", tmp_path / "run1", 1e-5)
    mixed = ["trainer.mixup=1", "trainer.batch_size=6", "trainer.accumulation=2"]
    refused(train_here(tmp_path, *mixed), "multiple of 4", "2 parts")
    refused(train_here(tmp_path, "trainer.accumulation=0"), "trainer.accumulation", "0")


@pytest.mark.parametrize(
    ("n", "size", "rounds", "processes"), [(21, 8, 1, 2), (21, 8, 2, 3), (5, 8, 1, 7), (16, 4, 4, 1)]
)
def test_the_parts_of_a_step_are_the_step(n: int, size: int, rounds: int, processes: int) -> None:
    whole = StepBatches(n, size, seed=3)
    parts = [
        StepBatches(n, size, seed=3, accumulation=rounds, process=process, processes=processes)
        for process in range(processes)
    ]
    for batches in (whole, *parts):
        batches.start_epoch(2)
    loaded = [list(batches) for batches in parts]
    assert {len(batches) for batches in loaded} == {len(parts[0])} == {whole.steps * rounds}
    for step, images in enumerate(whole):
        shares = [
            loaded[process][step * rounds + round_][: len(parts[process].indices(step, round_))]
            for round_ in range(rounds)
            for process in range(processes)
        ]
        assert [image for share in shares for image in share] == images
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        assert whole.step_size(step) == len(images)
    parts[0].start_epoch(2, whole.steps - 1)
    assert list(parts[0]) == loaded[0][-rounds:]


def test_a_failing_process_stops_all_and_its_traceback_comes_first(tmp_path: Path) -> None:
    def fail() -> None:
        raise ValueError("a defect in one process")

    command = [*WITHOUT_NORMALISATION, "trainer.save_steps=1", "run_dir=run"]
    statuses = train_in_processes(tmp_path, command, 2, at=("step", 2), happens=fail)
    said = (tmp_path / "log").read_text()
    assert statuses == [1, 70], said
    first = said.index("Traceback")
    assert "a defect in one process" in said[first : said.index("another process of the run has ended")], said
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "failed" and "another process" in summary["reason"]
    assert (tmp_path / "run" / "checkpoints" / "state-000001.pt").is_file()


def test_a_signal_to_one_process_stops_all_and_they_continue_together(alone: Path) -> None:
    command = [*UNEVEN, "trainer.mixup=1", "run_dir=stopped"]
    assert train_in_processes(alone, [*UNEVEN, "trainer.mixup=1", "run_dir=straight"], 2) == [0, 0]

    def ask_one_to_stop() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    statuses = train_in_processes(alone, command, 2, at=("step", 2), happens=ask_one_to_stop)
    said = (alone / "log").read_text()
    assert statuses == [143, 143], said
    assert said.count("stopped after step 3 of 3 of epoch 1") == 2
    generators = StateStore(alone / "stopped" / "checkpoints").read()["generators"]
    assert not torch.equal(generators[0]["torch"], generators[1]["torch"])  # each process draws for itself
    assert train_in_processes(alone, command, 2) == [0, 0], (alone / "log").read_text()
    weights = [load_file(alone / run / "checkpoints" / "last.safetensors") for run in ("stopped", "straight")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


def test_processes_that_read_different_states_refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a run that is still training and saves meanwhile."""
    source = [*WITHOUT_NORMALISATION, "run_dir=source", "trainer.save_steps=1"]
    assert train_until(tmp_path, source, ("step", 3)) == -signal.SIGKILL
    before = {path.name: path.read_bytes() for path in (tmp_path / "source").rglob("*") if path.is_file()}
    read = StateStore.read

    def another_in_each_process(self: StateStore) -> dict[str, Any]:
        state = read(self)
        state["progress"]["step"] += int(os.environ["RANK"])
        return state

    monkeypatch.setattr(StateStore, "read", another_in_each_process)
    command = [*WITHOUT_NORMALISATION, "run_dir=copy", "trainer.save_steps=1", "resume=source"]
    assert train_in_processes(tmp_path, command, 2) == [2, 2], (tmp_path / "log").read_text()
    assert "source is still training: its states change" in (tmp_path / "log").read_text()
    assert not list((tmp_path / "copy").rglob("*.csv"))
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "source").rglob("*") if path.is_file()}


def test_several_processes_on_cpus_refuse_to_train_batch_normalisation(tmp_path: Path) -> None:
    assert train_in_processes(tmp_path, ["method=gap", "run_dir=run"], 2) == [2, 2]
    said = (tmp_path / "log").read_text()
    assert "Traceback" not in said and "2 processes on CPUs cannot train backbone." in said, said
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_parameters_without_a_gradient_do_not_stop_several_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = timm.create_model

    def with_an_unused_layer(*arguments: Any, **options: Any) -> nn.Module:
        model: nn.Module = create(*arguments, **options)
        model.unused = nn.Linear(2, 2)
        return model

    monkeypatch.setattr(timm, "create_model", with_an_unused_layer)
    command = [*WITHOUT_NORMALISATION, "run_dir=run"]
    assert train_in_processes(tmp_path, command, 2) == [0, 0], (tmp_path / "log").read_text()
    assert "2 parameters, such as model.unused.weight" in (tmp_path / "log").read_text()


def test_accelerate_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As documented, but for processes that are forked; the second stage of a hybrid run included."""

    def as_forks(arguments: Any) -> Any:
        config, _, command = parse(arguments)
        config.start_method = "fork"
        script = command.index(str(ROOT / "scripts" / "train.py"))
        return config, in_a_process, command[script + 1 :]

    def in_a_process(*overrides: str) -> None:
        log = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        fresh_process(tmp_path, log, log)
        assert run_script("train.py", overrides) == 0

    parse = distributed_run.config_from_args
    monkeypatch.setattr(distributed_run, "config_from_args", as_forks)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    import_for("train.py")
    hybrid = ["method=mpn_cov", "hybrid.method=isqrt_cov", "hybrid.switch_epoch=1"]
    settings = [*SMALL, *WITHOUT_NORMALISATION, *hybrid, "run_dir=run"]
    options = ["--multi_gpu", "--num_processes", "2"]
    launch = launch_command_parser().parse_args([*options, str(ROOT / "scripts" / "train.py"), *settings])
    launcher = multiprocessing.get_context("fork").Process(target=launch_command, args=(launch,))
    launcher.start()
    launcher.join()
    assert launcher.exitcode == 0, (tmp_path / "log").read_text()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["final"]["epoch"] == 2
    assert summary["machine"]["processes"] == 2
    assert len(pd.read_csv(tmp_path / "run" / "predictions.csv")) == 9
    history = np.load(tmp_path / "run" / "spectrum_history.npz")
    assert history["epochs"].tolist() == [0, 1, 2] and history["before"].shape == (3, 9, 64)
