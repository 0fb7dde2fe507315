"""Heads that read the class token too: training, resuming, prediction, export; feature maps have none."""

from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Train, refused, trainable
from PIL import Image
from safetensors.torch import load_file

import fgvc
from fgvc.errors import RunError
from fgvc.inference.evaluate import evaluate_run
from fgvc.inference.export import export_run
from fgvc.models import create_model, load_checkpoint
from fgvc.runs.config import BackboneConfig, MethodConfig, OptimizerConfig, RunConfig
from fgvc.runs.folder import RunFolder
from fgvc.studies.attribution import explain_bands
from fgvc.training.optim import create_optimizer
from fgvc.training.run import train_run


def config_of(place: Path, name: str) -> RunConfig:
    method = MethodConfig("isqrt_cov", reduction=8, class_token=True)
    config = trainable(place, run_dir=str(place / name), method=method, backbone=BackboneConfig("test_vit"))
    config.trainer.epochs, config.trainer.save_steps = 2, 2
    return config


def test_a_run_continues_predicts_and_exports(tmp_path: Path) -> None:
    def stop(number: int, *_: Any) -> None:
        if number == 5:
            raise RuntimeError("stopped")

    whole = train_run(config_of(tmp_path, "whole"))
    with pytest.raises(RuntimeError, match="stopped"):
        train_run(config_of(tmp_path, "parts"), before_step=stop)
    parts = train_run(config_of(tmp_path, "parts"))
    weights, same = (load_file(RunFolder(path).weights_file("last")) for path in (whole, parts))
    assert weights["head.token_classifier.weight"].shape == (3, 64)
    assert all(torch.equal(same[name], tensor) for name, tensor in weights.items())
    summary = RunFolder(whole).read_summary()
    assert summary["label"] == "iSQRT-COV [class_token=True]"
    assert evaluate_run(whole).accuracy.top1 == summary["final"]["top1"]

    predictor = fgvc.load_run(whole)
    logits = predictor.predict(Image.new("RGB", (64, 64), (200, 30, 30)), top=3).logits
    folder = export_run(whole, to="safetensors")
    card = (folder / "README.md").read_text()
    assert "class_token=True" in card and "linear one of the class token" in card
    options: dict[str, Any] = {"num_classes": 3, "reduction": 8, "image_size": 64, "class_token": True}
    model = create_model("test_vit", method="isqrt_cov", **options).eval()
    load_checkpoint(model, folder / "model.safetensors")
    image = predictor.prepare(Image.new("RGB", (64, 64), (200, 30, 30)))
    torch.testing.assert_close(model(image[None])[0], logits, rtol=1e-4, atol=1e-4)
    export_run(whole, to="pt2")  # compares the logits

    with pytest.raises(RunError, match="which no feature map holds"):
        explain_bands(predictor.model, image[None], ["all"], method="gradcam")
    optimizer = create_optimizer(model, OptimizerConfig(classifier_factor=5))
    assert len(optimizer.param_groups[1]["params"]) == 4  # weights and biases of both classifiers


@pytest.mark.slow
def test_a_run_exports_to_onnx(tmp_path: Path) -> None:
    """From the program that the export to pt2 keeps, by a converter that takes a quarter of a minute."""
    export_run(train_run(config_of(tmp_path, "run")), to="onnx")  # compares the logits


def test_without_a_class_token_it_is_refused(tmp_path: Path, train_here: Train) -> None:
    refused(train_here(tmp_path, "method.class_token=true"), "test_resnet has none")
    for frozen in ("backbone.frozen=true", "backbone.trainable_stages=1"):
        done = train_here(tmp_path, "backbone.name=test_vit", "method.class_token=true", frozen)
        refused(done, "method.class_token=true needs backbone.frozen=false", "hold no class token")
