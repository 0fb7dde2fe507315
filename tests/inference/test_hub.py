"""Models as the Hugging Face hub has them: a folder, and a repository on a server that speaks the hub's protocol."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from command_line import Train, refused, succeeded, trainable
from file_server import FileServer, serving
from PIL import Image
from safetensors.torch import load_file, save_file

import fgvc
from fgvc.errors import ConfigError, WeightsError
from fgvc.inference.calibrate import fit_calibration, keep_calibration
from fgvc.inference.export import export_run
from fgvc.models import FineGrainedModel, create_model
from fgvc.models.hub import FittedTemperature
from fgvc.runs.config import MethodConfig
from fgvc.training import train_run

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a temperature."""
    place = tmp_path_factory.mktemp("place")
    method = MethodConfig(name="isqrt_cov", reduction=8, hidden=[5], options={"iterations": 2})
    config = trainable(place, method=method)
    config.dataset.transform.resize_size = 72
    train_run(config)
    found = fit_calibration(place / "run")
    record = found.record | {"temperature": 1.5}
    keep_calibration(place / "run", replace(found, temperature=1.5, record=record))
    return place / "run"


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    return export_run(run, to="hub", output=run.parent / "exported")


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """A copy of the export, to be damaged."""
    return Path(shutil.copytree(exported, tmp_path / "folder"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """A hub without files."""
    with serving() as server:
        server.commit = COMMIT
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server


def publish(server: FileServer, folder: Path) -> None:
    """Put every file of a folder, and code, on the server: `main` and the commit are the same."""
    for file in folder.iterdir():
        for revision in ("main", COMMIT):
            server.files[f"/owner/birds/resolve/{revision}/{file.name}"] = file.read_bytes()
            server.files[f"/owner/birds/resolve/{revision}/modeling.py"] = b"raise SystemExit(3)"


def change(folder: Path, **settings: Any) -> None:
    """Replace settings in config.json; names of nested ones have two underscores."""
    config = json.loads((folder / "config.json").read_text())
    for key, value in settings.items():
        *parents, name = key.split("__")
        place = config
        for parent in parents:
            place = place[parent]
        place[name] = value
    (folder / "config.json").write_text(json.dumps(config))


def photograph(folder: Path) -> Path:
    pixels = torch.randint(0, 256, (90, 70, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    Image.fromarray(pixels.numpy()).save(folder / "bird.png")
    return folder / "bird.png"


def require_same(found: fgvc.Predictor, run: Path, image: Path) -> None:
    expected = fgvc.load_run(run)
    weights, ours = expected.model.state_dict(), found.model.state_dict()
    assert weights.keys() == ours.keys() and all(torch.equal(ours[name], weights[name]) for name in weights)
    one, other = found.predict(image), expected.predict(image)
    assert one.calibrated and (one.names, one.probabilities) == (other.names, other.probabilities)
    assert torch.equal(one.logits, other.logits) and torch.equal(found.embed(image), expected.embed(image))
    assert (found.status, found.transform) == (expected.status, expected.transform)


def test_a_folder_gives_what_the_run_gives(run: Path, exported: Path, tmp_path: Path) -> None:
    assert {file.name for file in exported.iterdir()} == {
        "config.json",
        "model.safetensors",
        "README.md",
        "export.json",
    }
    require_same(fgvc.load_run(exported), run, photograph(tmp_path))
    for file in ("config.json", "README.md", "export.json"):  # no folder of this machine
        assert str(run.parent) not in (exported / file).read_text(encoding="utf-8")


def test_a_repository_gives_what_the_run_gives_by_two_files(
    run: Path, exported: Path, hub: FileServer, tmp_path: Path
) -> None:
    publish(hub, exported)
    image = photograph(tmp_path)
    require_same(fgvc.load_run("hf://owner/birds"), run, image)
    read = {path.rpartition("/")[2] for path, _ in hub.requests if path.startswith("/owner/birds/")}
    assert read == {"config.json", "model.safetensors"}
    require_same(fgvc.load_run(f"hf://owner/birds@{COMMIT}"), run, image)


def test_predict_names_an_image_by_a_model_on_the_hub(
    run: Path, exported: Path, hub: FileServer, tmp_path: Path, here: Train
) -> None:
    publish(hub, exported)
    (tmp_path / "photographs").mkdir()
    image = photograph(tmp_path / "photographs")
    said = succeeded(here("predict.py", "hf://owner/birds", image.parent, "--json", cwd=tmp_path)).stdout
    found = json.loads(said)
    best = fgvc.load_run(run).predict(image)
    assert (found["run"], found["temperature"]) == ("hf://owner/birds", 1.5)
    assert found["images"][0]["predictions"][0] == {"class": best.name, "probability": best.probabilities[0]}
    assert (tmp_path / "predicted" / "photographs.csv").is_file()  # in the current folder


def test_a_hub_that_lacks_the_model_is_named(exported: Path, hub: FileServer, tmp_path: Path, here: Train) -> None:
    publish(hub, exported)
    for file in [path for path in hub.files if path.endswith("model.safetensors")]:
        hub.files[file.replace("model.safetensors", "pytorch_model.bin")] = hub.files.pop(file)
    image = photograph(tmp_path)
    refused(here("predict.py", "hf://owner/birds", image, cwd=tmp_path), "hf://owner/birds has no model.safetensors")
    refused(here("predict.py", "hf://owner/cats", image, cwd=tmp_path), "hf://owner/cats has no config.json")
    refused(here("predict.py", "hf://../birds", image, cwd=tmp_path), "could not be fetched")
    refused(here("predict.py", "hf://birds", image, cwd=tmp_path), "hf://birds is no address on the hub")
    assert not any("pytorch_model" in path for path, _ in hub.requests)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"auto_map": {"AutoModel": "modeling.Model"}}, "Key 'auto_map' not in 'ModelConfig'"),
        ({"backbone__weights": "/etc/passwd"}, "Key 'weights' not in 'Architecture'"),
        ({"backbone__pretrained": True}, "Key 'pretrained' not in 'Architecture'"),
        ({"backbone__name": "hf_hub:owner/other"}, "is looked up on a hub"),
        ({"backbone__name": "local-dir:/tmp"}, "is looked up on a hub"),
        ({"backbone__name": "test_vit"}, "has no layer of shape"),
        ({"backbone__name": "${oc.env:HOME}"}, "an interpolation"),
        ({"backbone__options": {"checkpoint_path": "/etc/passwd"}}, "only arguments of the architecture"),
        ({"classes": ["a", "b"]}, "has no layer of shape (2, 5), which"),
        ({"classes": []}, "has no layer of shape (0, 5), which"),
        ({"classes": "abc"}, "classes are no list of names"),
        ({"classes": [*"abcd", ""]}, "classes are no list of names"),
        ({"classes": [*"abcd", "a"]}, "two classes have one name"),
        ({"method__name": "mgcrp", "method__options": {"iterations": 10**9}}, "iterations must be below 1001"),
        ({"method__hidden": [1 << 40]}, f"has no layer of shape ({1 << 40}, "),
        ({"method__name": "nothing"}, "nothing"),
        ({"transform__size": 10**6}, "dataset.transform.size must be from 1 to 4096"),
        ({"calibration__temperature": 0.0}, "calibration.temperature must be from 0.01 to 100"),
        ({"calibration__split": "imagined"}, "imagined images, must be"),
    ],
)
def test_a_strangers_config_is_refused_by_name(folder: Path, settings: dict[str, Any], message: str) -> None:
    change(folder, **settings)
    with pytest.raises(WeightsError, match=r"config\.json") as error:
        fgvc.load_run(folder)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_setting_that_is_missing_is_not_guessed(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["transform"], config["cut_to_box"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=r"does not describe a model .*: no transform, cut_to_box; export"):
        fgvc.load_run(folder)


def test_strange_weights_are_refused_by_name(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)

    def refuses(message: str) -> None:
        with pytest.raises(WeightsError, match=message):
            fgvc.load_run(folder)

    save_file(tensors | {"head.classifier.0.bias": torch.full((5,), float("nan"))}, file)
    refuses(r"model\.safetensors holds NaN or infinity \(head\.classifier\.0\.bias\); fetch it again")
    save_file({name: tensor for name, tensor in tensors.items() if name != "head.classifier.0.bias"}, file)
    refuses(r"does not fit .*config\.json: .*Missing key.*head\.classifier\.0\.bias")
    save_file(tensors | {"head.classifier.0.bias": torch.ones(5, dtype=torch.int8)}, file)
    refuses(r"no floating numbers \(head\.classifier\.0\.bias int8\)")
    file.write_bytes(b"\x80\x04.")  # a pickle
    refuses("is damaged")
    file.rename(folder / "pytorch_model.bin")
    refuses("has no model.safetensors, the only file of weights that is read")
    file.symlink_to(folder.parent / "elsewhere")
    (folder.parent / "elsewhere").write_bytes(b"secret")
    refuses("a link out of the folder")
    (folder / "config.json").unlink()
    with pytest.raises(WeightsError, match=r"has no config\.json"):
        FineGrainedModel.from_pretrained(folder)


def test_a_bare_model_and_a_run_have_one_format(exported: Path, tmp_path: Path) -> None:
    model = create_model("test_resnet", method="seb", num_classes=4, reduction=8, image_size=64).eval()
    assert model.config is not None
    model.config.classes = ["owl", "wren", "robin"]
    with pytest.raises(ConfigError, match="3 names for 4 classes"):
        model.save_pretrained(tmp_path / "saved")
    model.config.classes.append("crow")
    model.save_pretrained(tmp_path / "saved")
    again = FineGrainedModel.from_pretrained(tmp_path / "saved")
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(again(images), model(images)) and not again.training
    predictor = fgvc.load_run(tmp_path / "saved")
    assert predictor.classes == ["owl", "wren", "robin", "crow"] and not predictor.calibrated
    with pytest.raises(ConfigError, match=r"config\.json exists and is not replaced"):
        model.save_pretrained(tmp_path / "saved")
    # both files, or none; a name is a name
    model.config.calibration = FittedTemperature(float("nan"), "test", 10)
    with pytest.raises(ConfigError, match="cannot hold the settings of this model"):
        model.save_pretrained(tmp_path / "fresh")
    model.config.calibration, model.config.classes = None, ["owl", "${price}", "robin", "crow"]
    model.save_pretrained(tmp_path / "fresh")
    assert fgvc.load_run(tmp_path / "fresh").classes == model.config.classes
    # and back: what the export has written is saved as it was
    FineGrainedModel.from_pretrained(exported).save_pretrained(tmp_path / "copy")
    assert (tmp_path / "copy" / "config.json").read_bytes() == (exported / "config.json").read_bytes()


def test_a_model_that_was_pushed_is_there(exported: Path, hub: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    def create(_: Any, name: str, **options: Any) -> None:
        made.append((name, options))

    def upload(_: Any, *, repo_id: str, folder_path: str) -> str:
        publish(hub, Path(folder_path))
        return f"{repo_id}@{COMMIT}"

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    model = FineGrainedModel.from_pretrained(exported)
    assert model.push_to_hub("owner/birds", private=True) == f"owner/birds@{COMMIT}"
    assert made == [("owner/birds", {"private": True, "exist_ok": True})]
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(FineGrainedModel.from_pretrained("owner/birds")(images), model(images))
