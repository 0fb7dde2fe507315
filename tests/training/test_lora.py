"""Low-rank adapters: what is trained, how a run continues, and which weights it leaves."""

import importlib.util
import json
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from command_line import Train, refused, trainable
from forked_runs import train_until
from safetensors.torch import load_file

from fgvc.foreign import load_pytorch
from fgvc.inference import evaluate_run
from fgvc.inference.export import export_run
from fgvc.runs.config import BackboneConfig
from fgvc.training.run import train_run

pytestmark = pytest.mark.usefixtures("uncalibrated")

LORA = ["backbone.name=test_vit", "backbone.lora=2", "trainer.save_steps=1", "optimizer.lr=0.1", "cache.dir=cache"]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / "last.safetensors")


@pytest.mark.extras
def test_the_attention_changes_by_a_low_rank_and_its_weights_are_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    config = trainable(tmp_path, backbone=BackboneConfig("test_vit", lora=2))
    config.method.reduction, config.optimizer.lr, config.optimizer.layer_decay = 8, 0.1, 0.9
    before = trainable(tmp_path, run_dir=str(tmp_path / "before"), backbone=BackboneConfig("test_vit"))
    before.method.reduction, before.trainer.epochs = 8, 0
    run, first = train_run(config), weights(train_run(before))
    last = weights(run)
    assert last.keys() == first.keys()  # of any run of this network, so whatever reads one reads it
    for name in (name for name in last if name.startswith("backbone.")):
        change = (last[name] - first[name]).double()
        if name.endswith(("attn.qkv.weight", "attn.proj.weight")):
            values = torch.linalg.svdvals(change)
            assert values[1] > 1e-6 and values[2] < 1e-4 * values[0]
        else:
            assert not change.any(), name
    evaluated = evaluate_run(run)
    trained = pd.read_csv(run / "predictions.csv")
    assert np.allclose(evaluated.predictions["confidence"], trained["confidence"], atol=1e-4)
    assert export_run(run, to="safetensors", output=tmp_path / "out")


@pytest.mark.extras
def test_a_run_that_was_killed_continues_to_the_same_bits(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    assert train_until(tmp_path, [*LORA, "run_dir=straight"]) == 0, (tmp_path / "log").read_text()
    assert train_until(tmp_path, [*LORA, "run_dir=killed"], ("step", 5)) == -signal.SIGKILL
    state = load_pytorch(max((tmp_path / "killed" / "checkpoints").glob("state-*.pt")))
    assert any(".lora_A." in name for name in state["model"]) and not any("lora" in name for name in state["best"])
    assert train_until(tmp_path, [*LORA, "run_dir=killed"]) == 0, (tmp_path / "log").read_text()
    ours, theirs = (weights(tmp_path / name) for name in ("straight", "killed"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)
    finals = [json.loads((tmp_path / name / "summary.json").read_text())["final"] for name in ("straight", "killed")]
    assert finals[0] == finals[1]


@pytest.mark.extras
def test_a_network_without_attention_is_refused(tmp_path: Path, train_here: Train) -> None:
    pytest.importorskip("peft")
    refused(train_here(tmp_path, "backbone.lora=2"), "test_resnet has none", "backbone.lora=2")
    mobile = ["backbone.name=mobilevit_xxs", "backbone.lora=2"]  # its statistics would change with the images
    refused(train_here(tmp_path, *mobile), "the statistics of mobilevit_xxs's batch normalisation")


def test_a_missing_library_is_named_with_its_extra(
    tmp_path: Path, train_here: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *of: None if name == "peft" else find_spec(name, *of))
    refused(train_here(tmp_path, *LORA), "backbone.lora=2 needs the library peft: pip install 'fgvc[lora]'")


@pytest.mark.parametrize("settings", [["backbone.lora=0"], ["backbone.frozen=true"], ["backbone.trainable_stages=1"]])
def test_adapters_are_of_a_trained_network(tmp_path: Path, train_here: Train, settings: list[str]) -> None:
    refused(train_here(tmp_path, *LORA, *settings), "backbone.lora")
