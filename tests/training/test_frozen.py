"""Frozen features without a cache, and networks whose last stages are trained on cached maps of the first ones."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Train, refused, trainable
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import fgvc
from fgvc.data import ImageDataset
from fgvc.inference import evaluate_run
from fgvc.inference.export import export_run
from fgvc.inference.rerun import rerun
from fgvc.inference.restore import restore_run
from fgvc.runs.config import BackboneConfig, CacheConfig, RunConfig
from fgvc.runs.folder import RunFolder
from fgvc.training.run import train_run


def config_of(place: Path, name: str, stages: int | None = 1, *, cached: bool = True, **changes: Any) -> RunConfig:
    """A run whose transform is deterministic unless `changes` say otherwise; runs in one place share images."""
    config = trainable(place, run_dir=str(place / name), **changes)
    config.backbone = BackboneConfig("test_resnet", frozen=True, trainable_stages=stages)
    config.cache = CacheConfig(
        enabled=cached, dir=str(place / "cache"), dtype="float32"
    )  # no rounding between two ways
    config.dataset.transform.hflip = False
    config.trainer.epochs = 2
    return config


def results(path: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    return RunFolder(path).read_summary()["final"], load_file(RunFolder(path).weights_file("last"))


@pytest.mark.parametrize("stages", [None, 2])
def test_without_a_cache_the_result_is_the_same(tmp_path: Path, stages: int | None) -> None:
    cached = train_run(config_of(tmp_path, "cached", stages))
    kept = sorted((tmp_path / "cache").glob("features-*"))
    computed = train_run(config_of(tmp_path, "computed", stages, cached=False))
    assert len(kept) == 4 and sorted((tmp_path / "cache").glob("features-*")) == kept
    (accuracy, weights), (again, same) = results(cached), results(computed)
    assert accuracy == again
    for name, tensor in weights.items():
        torch.testing.assert_close(same[name], tensor, rtol=1e-4, atol=1e-5)
    picture = Image.new("RGB", (64, 64), (200, 30, 30))
    expected = fgvc.load_run(cached).predict(picture).probabilities
    assert fgvc.load_run(computed).predict(picture).probabilities == pytest.approx(expected, abs=1e-4)
    assert evaluate_run(computed).accuracy.top1 == pytest.approx(accuracy["top1"])


def test_without_a_cache_images_may_be_cropped_and_are_read_once_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path, "run", None, cached=False)
    config.dataset.transform.crop, config.dataset.transform.resize_size = "random", 80
    config.trainer.epochs = 3
    reads: list[Path] = []
    decode = ImageDataset.decode

    def counted(images: ImageDataset, index: int, *options: Any, **named: Any) -> Image.Image:
        reads.append(images.paths[index])
        return decode(images, index, *options, **named)

    monkeypatch.setattr(ImageDataset, "decode", counted)
    path = train_run(config)
    restored = restore_run(path, split="train", cache=config.cache.dir)
    counts = {reads.count(image) for image in restored.images.paths}
    assert counts == {4}  # once to see that it is readable, and once an epoch
    inputs = restored.inputs()
    plain = inputs[0][0]
    assert torch.equal(inputs[0][0], plain)
    inputs.start_epoch(1)  # type: ignore[union-attr]
    assert not torch.equal(inputs[0][0], plain)


def test_only_the_last_stages_are_trained_and_saved(tmp_path: Path) -> None:
    config = config_of(tmp_path, "run")
    seen: list[set[str]] = []

    def look(_: int, module: nn.Module, inputs: torch.Tensor, *__: Any) -> None:
        assert inputs.shape[1:] == (192, 4, 4)  # what layer4 reads
        seen.append({name for name, parameter in module.named_parameters() if parameter.requires_grad})

    path = train_run(config, before_step=look)
    assert len(seen) == 6 and all(name.startswith(("backbone.model.layer4.", "head.")) for name in seen[0])
    assert {name.split(".")[2] for name in seen[0] if name.startswith("backbone.")} == {"layer4"}
    final, weights = results(path)
    assert {".".join(name.split(".")[:3]) for name in weights if name.startswith("backbone.")} == {
        "backbone.model.layer4"
    }
    before = restore_run(
        train_run(replace(config, run_dir=str(tmp_path / "none"), trainer=replace(config.trainer, epochs=0)))
    )
    after = restore_run(path)
    old, new = before.backbone.state_dict(), after.backbone.state_dict()
    changed = {name.split(".")[1] for name in old if not torch.equal(old[name], new[name])}
    assert changed == {"layer4"} and RunFolder(path).read_summary()["frozen"] is False
    # the whole network, as prediction and export use it, agrees with the trained part on cached maps
    images = torch.stack([after.images[index][0] for index in range(9)])
    maps = torch.stack([after.inputs()[index][0] for index in range(9)])
    with torch.no_grad():
        expected = after.trained.eval()(maps)
        torch.testing.assert_close(after.model.eval()(images), expected, rtol=1e-4, atol=1e-4)
        exported = export_run(path, to="safetensors", output=tmp_path / "export")
        model = fgvc.load_run(path).model
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
    assert "except the last 1 stages" in (exported / "README.md").read_text()
    assert evaluate_run(path).accuracy.top1 == pytest.approx(final["top1"])
    again = rerun(path, run_dir=tmp_path / "again")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in results(again)[1].items())


def test_a_partly_trained_network_continues_to_the_same_bits(tmp_path: Path) -> None:
    def stop(number: int, *_: object) -> None:
        if number == 5:
            raise RuntimeError("stopped")

    whole = train_run(config_of(tmp_path, "whole", 2))
    config = config_of(tmp_path, "parts", 2)
    config.trainer.save_steps = 2
    with pytest.raises(RuntimeError, match="stopped"):
        train_run(config, before_step=stop)
    train_run(config)
    (accuracy, weights), (again, same) = results(whole), results(tmp_path / "parts")
    assert accuracy == again and all(torch.equal(same[name], tensor) for name, tensor in weights.items())


def test_zero_trainable_stages_are_a_frozen_backbone(tmp_path: Path, train_here: Train) -> None:
    settings = ["backbone.trainable_stages=0", "cache.dir=cache", "trainer.epochs=1", "run_dir=run"]
    assert train_here(tmp_path, *settings).returncode == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["frozen"] is True
    refused(train_here(tmp_path, "backbone.trainable_stages=7"), "choose 1 (all after layer3), 2 (all after layer2)")
