"""A folder of the library transformers as a backbone: its own weights and maps, and a run that needs it no more."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from command_line import Train, refused, succeeded

from fgvc.errors import ConfigError
from fgvc.models.backbone import create_backbone
from fgvc.models.transformers_backbone import without_folder
from fgvc.runs.config import BackboneConfig

TINY = {"model_type": "dinov2", "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
TINY |= {"image_size": 56, "patch_size": 14}
LOOKS = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.25] * 3, "resample": 2}


def a_folder(path: Path, config: object = TINY, looks: object = LOOKS) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    (path / "preprocessor_config.json").write_text(json.dumps(looks))
    return path


def test_a_folder_is_described_by_what_it_holds(tmp_path: Path) -> None:
    folder = a_folder(tmp_path / "tiny", TINY | {"id2label": {"0": "a"}, "auto_map": {"AutoBackbone": "code.py"}})
    given = BackboneConfig(f"transformers:{folder}", options={"num_hidden_layers": 2})
    found = without_folder(given)
    assert found.name == "transformers:dinov2" and found.weights is None
    assert found.options["config"]["num_hidden_layers"] == 2 and "auto_map" not in found.options["config"]
    assert (found.options["mean"], found.options["interpolation"]) == ([0.5, 0.4, 0.3], "bilinear")
    assert without_folder(found) == found
    kernel = without_folder(
        BackboneConfig(f"transformers:{a_folder(tmp_path / 'k', TINY | {'attn_implementation': 'a/b'})}")
    )
    assert "attn_implementation" not in kernel.options["config"]


@pytest.mark.parametrize(
    ("config", "looks", "message"),
    [
        ({"hidden_size": 32}, LOOKS, "model_type"),
        ([1], LOOKS, "not an object"),
        (TINY, {"resample": 77}, "77"),
        (TINY, {"image_mean": 0.5}, "image_mean is 0.5, not three numbers"),
        (TINY, {"do_normalize": False}, "do_normalize is False"),
        (TINY, {"rescale_factor": 1 / 127.5}, "rescale_factor is 0.0078"),
        (TINY | {"hidden_act": "${oc.env:HOME}"}, LOOKS, "interpolation"),
    ],
)
def test_a_folder_that_describes_no_model_is_refused(
    tmp_path: Path, config: object, looks: object, message: str
) -> None:
    name = f"transformers:{a_folder(tmp_path / 'odd', config, looks)}"
    with pytest.raises(
        ConfigError, match=rf"(?s)no folder of a model of transformers.*{message}|{message}.*hf download"
    ):
        without_folder(BackboneConfig(name))


def test_missing_weights_folders_and_libraries_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"transformers:{a_folder(tmp_path / 'tiny')}"
    with pytest.raises(ConfigError, match=r"model\.safetensors is missing"):
        without_folder(BackboneConfig(name, pretrained=True))
    with pytest.raises(ConfigError, match="nowhere is no folder of a model of transformers"):
        without_folder(BackboneConfig("transformers:nowhere"))
    monkeypatch.setitem(sys.modules, "transformers", None)
    described = without_folder(BackboneConfig(name))
    with pytest.raises(ConfigError, match=r"pip install 'fgvc\[transformers\]'"):
        create_backbone(described.name, options=described.options)


@pytest.fixture
def dinov2(tmp_path: Path) -> Path:
    """A tiny network with a classifier, as its library saves it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    settings = {key: value for key, value in TINY.items() if key != "model_type"}
    model = transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**settings))
    folder = tmp_path / "tiny"
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(LOOKS))
    return folder


@pytest.mark.extras
def test_the_maps_are_those_of_the_library(dinov2: Path) -> None:
    from transformers import Dinov2Backbone

    found = without_folder(BackboneConfig(f"transformers:{dinov2}", pretrained=True))
    backbone = create_backbone(found.name, weights=found.weights, options=found.options, image_size=70, maps=2).eval()
    assert backbone.map_channels == (32, 32) and backbone.data_config["mean"] == [0.5, 0.4, 0.3]
    images = torch.rand(2, 3, 70, 70)
    theirs = Dinov2Backbone.from_pretrained(str(dinov2), out_features=["stage2", "stage3"]).eval()
    with torch.no_grad():
        torch.testing.assert_close(backbone(images), torch.cat(theirs(images).feature_maps, dim=1))


@pytest.mark.extras
def test_a_run_needs_the_folder_no_more(dinov2: Path, here: Train, tmp_path: Path) -> None:
    small = ["experiment=demo", "backbone=timm", "dataset.root=images", "dataset.options.train_per_class=4"]
    small += [
        "dataset.transform.size=56",
        "method=isqrt_cov",
        "method.reduction=8",
        "trainer.epochs=1",
        "trainer.workers=0",
    ]
    name = f"backbone.name=transformers:{dinov2}"
    for run, frozen in (("whole", "false"), ("head", "true")):
        succeeded(here("train.py", *small, name, f"backbone.frozen={frozen}", f"run_dir={run}", cwd=tmp_path))
    shutil.move(dinov2, tmp_path / "elsewhere")
    succeeded(here("evaluate.py", "whole", cwd=tmp_path))
    for form in ("pt2", "onnx", "hub"):
        succeeded(here("export.py", "whole", "--to", form, "--output", form, cwd=tmp_path))
    refused(here("export.py", "whole", "--to", "timm", "--output", "no", cwd=tmp_path), "timm")
    refused(here("evaluate.py", "head", cwd=tmp_path), "tiny")
