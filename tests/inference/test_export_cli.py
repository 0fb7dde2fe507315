"""`fgvc export` on small trained runs: every format loads by its own card and computes what the run computed."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from command_line import ROOT, Train, refused, succeeded, trainable
from damage import files_limited_to
from miniature import write_miniature
from PIL import Image
from run_folders import change_summary
from safetensors import safe_open
from safetensors.torch import load_file

from fgvc.inference.calibrate import fit_calibration, keep_calibration
from fgvc.inference.export import WRITERS, crop_pct, export_run
from fgvc.inference.predict import load_run
from fgvc.inference.restore import load_model
from fgvc.models.files import write_weights
from fgvc.runs.config import DatasetConfig, HybridConfig, MethodConfig
from fgvc.training import train_run

IMAGES = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of finished runs; their dataset has been moved to `moved`."""
    folder = tmp_path_factory.mktemp("runs")
    methods = {"seb": "seb", "frozen": "seb", "isqrt_cov": "isqrt_cov", "hybrid": "svd_pade", "products": "seb"}
    for name, method in (methods | dict.fromkeys(("gap", "wide", "vit"), "gap")).items():
        config = trainable(folder, name=name, run_dir=str(folder / name), method=MethodConfig(name=method, reduction=8))
        config.trainer.batch_size = 6
        config.dataset.transform.resize_size = 93 if name == "gap" else 72
        config.backbone.frozen = name == "frozen"
        if name == "isqrt_cov":
            config.method.options, config.method.hidden = {"iterations": 2}, [5]
        if name == "products":
            config.method.gradient, config.method.solver = "exact", "products"
            config.method.reduction = 3  # fewer than locations
        if name == "wide":
            config.backbone.name, config.backbone.last_stride = "resnet10t", 1
            config.backbone.options = {"act_layer": "silu"}
        if name == "vit":
            config.backbone.name = "test_vit"  # built for one image size
        if name == "hybrid":
            config.trainer.epochs = 2
            config.hybrid = HybridConfig(method="isqrt_cov", options={"iterations": 2}, switch_epoch=1)
        train_run(config)
    # the best weights are of the first stage, as in a run that was stopped there
    stopped = Path(shutil.copytree(folder / "hybrid", folder / "stopped"))
    change_summary(stopped, best=json.loads((stopped / "summary.json").read_text())["best"] | {"epoch": 1})
    best = stopped / "checkpoints" / "best.safetensors"
    write_weights(best, load_file(best), epoch=1)
    (folder / "data").rename(folder / "moved")
    return folder


@pytest.fixture
def export(here: Train, tmp_path: Path) -> Train:
    return lambda *arguments: here("export.py", *map(str, arguments), cwd=tmp_path)


@pytest.mark.parametrize(
    ("run", "to"),
    [
        *((run, "safetensors") for run in ("seb", "frozen", "isqrt_cov", "hybrid", "stopped", "wide")),
        *(("isqrt_cov", "onnx"), ("seb", "pt2"), ("gap", "timm"), ("frozen", "hub"), ("stopped", "hub")),
        pytest.param("products", "onnx", marks=pytest.mark.slow),
    ],
)
def test_the_cards_snippet_gives_the_logits_of_the_run(
    runs: Path, run: str, to: str, tmp_path: Path, export: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "export"
    succeeded(export(runs / run, "--to", to, "--checkpoint", "best", "--output", output))
    card = (output / "README.md").read_text(encoding="utf-8")
    (tmp_path / "new").touch()
    assert {file.stat().st_mode for file in output.iterdir()} == {(tmp_path / "new").stat().st_mode}
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(output)
    names: dict[str, Any] = {}
    exec(snippet, names)
    assert names["logits"].shape == (1, 3)
    if to == "onnx":
        assert names["classes"] == json.loads((runs / run / "summary.json").read_text())["classes"]
        logits = torch.from_numpy(names["session"].run(None, {"images": IMAGES.numpy()})[0])
    else:
        logits = names["predictor"].logits(IMAGES) if to == "hub" else names["model"](IMAGES)
    with torch.no_grad():
        torch.testing.assert_close(logits, load_model(runs / run, "best")(IMAGES), rtol=1e-4, atol=1e-5)


def test_the_card_says_what_the_model_is(runs: Path, tmp_path: Path, export: Train) -> None:
    succeeded(export(runs / "isqrt_cov", "--to", "safetensors", "--output", tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    summary = json.loads((runs / "isqrt_cov" / "summary.json").read_text())
    for part in (
        *("# iSQRT-COV [iterations=2] on test_resnet, synthetic", "`isqrt_cov`, iterations=2", "hidden layers of 5"),
        *(f"| final | 1 | {summary['final']['top1']:.2f} |", "selected on the test images"),
        "the shorter side resized to 72 pixels (bilinear), the centre of 64 x 64 pixels",
        *(f"torch {version('torch')}", "random weights", "synthetic: Synthetic matchings"),
        *("| licence of the images | Apache-2.0 |", "one of these 3 classes"),
    ):
        assert part in card, part
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        facts = json.loads(file.metadata()["fgvc"])
    assert facts["classes"] == summary["classes"]
    assert (facts["method"], facts["options"], facts["gradient"]) == ("isqrt_cov", {"iterations": 2}, None)
    assert facts["preprocessing"]["size"] == 64 and facts["exported_with"]["fgvc"]
    written = json.loads((tmp_path / "out" / "export.json").read_text())
    assert written.pop("files").keys() == {"README.md", "model.safetensors"}
    assert written.pop("digest") and written.pop("compared") and written == facts


def test_the_card_names_the_temperature_of_the_probabilities(runs: Path, tmp_path: Path, export: Train) -> None:
    run = Path(shutil.copytree(runs / "gap", tmp_path / "run"))
    card = tmp_path / "out" / "README.md"
    succeeded(export(run, "--to", "safetensors", "--output", tmp_path / "out"))
    assert "| probabilities | the softmax of the logits, not calibrated |" in card.read_text(encoding="utf-8")
    calibration = fit_calibration(run, root=str(runs / "moved"))
    keep_calibration(run, replace(calibration, temperature=2.5, record=calibration.record | {"temperature": 2.5}))
    succeeded(export(run, "--to", "safetensors", "--output", tmp_path / "out"))
    assert "| calibrated: the softmax of the logits divided by 2.5 |" in card.read_text(encoding="utf-8")
    assert json.loads((tmp_path / "out" / "export.json").read_text())["temperature"] == 2.5


def test_no_name_becomes_markup_in_the_card(runs: Path, tmp_path: Path, export: Train) -> None:
    markdown = pytest.importorskip("markdown", reason="of the documentation")
    run = Path(shutil.copytree(runs / "gap", tmp_path / "run"))
    evil = "x](https://example.org) <img src=x onerror=alert(1)>\n\n# Title | `b` **c** _d_\x1b[2J\u202e"
    summary = json.loads((run / "summary.json").read_text())
    changes = {"label": evil, "commit": evil, "versions": {"torch": evil, evil: "1"}}
    changes["best"] = summary["best"] | {"selected_on": evil}
    (run / "summary.json").write_text(json.dumps(summary | changes))
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["dataset"] |= {"name": evil, "adapter": "synthetic"}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    succeeded(export(run, "--to", "safetensors", "--output", tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert card.count("\n# ") == 1 and card.count("alert(1)") >= 5
    page = markdown.markdown(card, extensions=["tables", "fenced_code"])
    for tag in ("<img", "<a ", "<em", "<strong", "\x1b", "\u202e"):
        assert tag not in page, tag


@pytest.mark.parametrize(
    ("options", "cut"),
    [
        ({}, "RGB, without the 20 rows of the banner at the bottom, the shorter"),
        ({"remove_banner": False}, "RGB, the shorter"),
        ({"crop": "bbox"}, "RGB, without the 20 rows of the banner at the bottom, cut to the object's bounding box"),
    ],
)
def test_the_card_says_how_images_are_cut(options: dict[str, Any], cut: str, tmp_path: Path, export: Train) -> None:
    write_miniature("aircraft", tmp_path / "data", classes=2)
    planes = DatasetConfig("planes", adapter="aircraft", root=str(tmp_path / "data"), options=options)
    config = trainable(tmp_path, dataset=planes, method=MethodConfig(name="gap"))
    config.dataset.transform.size = 32
    train_run(config)
    succeeded(export(tmp_path / "run", "--to", "safetensors", "--output", tmp_path / "out"))
    assert cut in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    read = json.loads((tmp_path / "out" / "export.json").read_text())["dataset_options"]
    defaults = {"boxes": False, "level": "variant", "remove_banner": True, "crop": None}
    assert read == {**defaults, "train_split": "trainval", "test_split": "test", **options}


@pytest.mark.parametrize(
    ("run", "method", "options"), [("hybrid", "svd_pade", {}), ("stopped", "isqrt_cov", {"iterations": 2})]
)
def test_a_hybrid_run_is_described_by_the_stage_of_its_weights(
    runs: Path, run: str, method: str, options: dict[str, Any], tmp_path: Path, export: Train
) -> None:
    succeeded(export(runs / run, "--to", "safetensors", "--checkpoint", "best", "--output", tmp_path / "out"))
    facts = json.loads((tmp_path / "out" / "export.json").read_text())
    assert (facts["method"], facts["options"], facts["gradient"]) == (method, options, None)
    assert facts["hybrid"] == {"first": "isqrt_cov", "switch_epoch": 1, "then": "svd_pade"}
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"| pooling | `{method}`" in card and "`isqrt_cov` until epoch 1, then `svd_pade`" in card


@pytest.mark.parametrize("run", ["seb", "gap", "wide", "vit"])
def test_timm_loads_the_backbone(runs: Path, run: str, tmp_path: Path, export: Train) -> None:
    succeeded(export(runs / run, "--to", "timm", "--output", tmp_path / "out"))
    network = timm.create_model(f"local-dir:{tmp_path / 'out'}", num_classes=0, pretrained=True).eval()
    model = load_model(runs / run)
    state = model.backbone.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
    config = timm.data.resolve_model_data_config(network)
    resize_size = 93 if run == "gap" else 72  # 64 / (64 / 93) is below 93
    assert (config["input_size"], config["crop_pct"]) == ((3, 64, 64), pytest.approx(64 / resize_size))
    assert timm.data.create_transform(**config).transforms[0].size == resize_size
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    with torch.no_grad():
        maps = network.forward_intermediates(IMAGES, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True)[
            -1
        ]
        same = maps.shape == model.backbone(IMAGES).shape and torch.allclose(maps, model.backbone(IMAGES), atol=1e-5)
    assert ("keeps the stride of its last stage" in card) == (not same) == (run == "wide")
    assert ("Only the backbone" in card) == (run != "gap")


def test_timm_resizes_to_the_size_of_the_run() -> None:
    pairs = [(size, resize_size) for size in range(1, 600) for resize_size in range(size, 600)]
    assert [pair for pair in pairs if math.floor(pair[0] / crop_pct(*pair)) != pair[1]] == []


def test_refusals_name_what_works(runs: Path, tmp_path: Path, export: Train) -> None:
    refused(export(runs / "seb", "--to", "onnx"), "seb", "eigendecomposition", "pt2", "isqrt_cov")
    refused(export(runs / "seb", "--to", "coreml"), "coreml", "safetensors, hub, onnx, timm, pt2")
    refused(export(runs, "--to", "pt2"), "config.yaml")
    broken = tmp_path / "broken"
    shutil.copytree(runs / "seb", broken)
    (broken / "checkpoints" / "best.safetensors").unlink()
    refused(export(broken, "--to", "pt2", "--checkpoint", "best"), "best.safetensors", "missing")
    config = (broken / "config.yaml").read_text()
    (broken / "config.yaml").write_text(config.replace("test_resnet", "test_efficientnet"))
    refused(export(broken, "--to", "pt2"), "last.safetensors", "another architecture")
    frozen = tmp_path / "frozen"
    shutil.copytree(runs / "frozen", frozen)
    (frozen / "config.yaml").write_text((frozen / "config.yaml").read_text().replace("\nseed: 0\n", "\nseed: 1\n"))
    refused(export(frozen, "--to", "pt2"), "weights_digest")
    assert not list(tmp_path.rglob("exports/*"))


def test_nothing_else_is_overwritten(runs: Path, tmp_path: Path, export: Train) -> None:
    output = tmp_path / "out"
    output.mkdir()  # empty: nothing to lose
    for _ in range(2):  # an export of the same run is replaced
        succeeded(export(runs / "seb", "--to", "safetensors", "--output", output))
    refused(export(runs / "gap", "--to", "safetensors", "--output", output), "another run", "--overwrite")
    succeeded(export(runs / "gap", "--to", "safetensors", "--output", output, "--overwrite"))
    assert json.loads((output / "export.json").read_text())["method"] == "gap"
    (output / "README.md").write_text("my own words")
    refused(export(runs / "gap", "--to", "safetensors", "--output", output), "README.md was changed", "--overwrite")
    assert (output / "README.md").read_text() == "my own words"
    succeeded(export(runs / "gap", "--to", "safetensors", "--output", output, "--overwrite"))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").touch()
    for root in (".", "/"):
        refused(export(runs / "gap", "--to", "safetensors", "--output", root), "exists")
    for arguments in ((), ("--overwrite",)):
        done = export(runs / "gap", "--to", "safetensors", "--output", tmp_path / "photos", *arguments)
        refused(done, "photos", "no export")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "photos"]


def a_config_of_the_user(output: Path) -> Path:
    (output / "config.json").write_text("mine")
    return output / "config.json"


def a_folder_of_the_user(output: Path) -> Path:
    (output / "model.onnx.data").mkdir()
    (output / "model.onnx.data" / "mine").write_text("mine")
    return output / "model.onnx.data" / "mine"


def a_link_of_the_user(output: Path) -> Path:
    shutil.move(output / "README.md", output.with_name("mine.md"))
    (output / "README.md").symlink_to(output.with_name("mine.md"))
    return output / "README.md"


def of_an_earlier_version(output: Path) -> Path:
    facts = json.loads((output / "export.json").read_text())
    del facts["files"], facts["digest"]
    (output / "export.json").write_text(json.dumps(facts))
    return output / "export.json"


@pytest.mark.parametrize("add", [a_config_of_the_user, a_folder_of_the_user, a_link_of_the_user, of_an_earlier_version])
def test_what_a_user_put_into_an_export_is_never_replaced(
    runs: Path, tmp_path: Path, export: Train, add: Callable[[Path], Path]
) -> None:
    arguments = (runs / "gap", "--to", "safetensors", "--output", tmp_path / "out")
    succeeded(export(*arguments))
    mine = add(tmp_path / "out")
    before = mine.read_text()
    for more in ((), ("--overwrite",)):
        refused(export(*arguments, *more), "out exists", "give another --output, or delete it")
        assert mine.read_text() == before


def test_an_edited_list_of_facts_is_not_replaced(runs: Path, tmp_path: Path, export: Train) -> None:
    arguments = (runs / "gap", "--to", "safetensors", "--output", tmp_path / "out")
    succeeded(export(*arguments))
    facts = json.loads((tmp_path / "out" / "export.json").read_text())
    (tmp_path / "out" / "export.json").write_text(json.dumps(facts | {"notes": "mine"}))
    refused(export(*arguments), "export.json was changed", "--overwrite")
    succeeded(export(*arguments, "--overwrite"))


@pytest.mark.parametrize(
    "to", ["safetensors", *(pytest.param(to, marks=pytest.mark.slow) for to in ("pt2", "timm", "onnx"))]
)
def test_an_export_without_room_on_the_disk(runs: Path, to: str, tmp_path: Path, export: Train) -> None:
    run = runs / ("isqrt_cov" if to == "onnx" else "gap")
    with files_limited_to(10_000):
        done = export(run, "--to", to, "--output", tmp_path / "out")
    refused(done, f"error: {tmp_path / 'out'}: File too large; raise the limit")
    assert list(tmp_path.iterdir()) == []


def test_an_accuracy_that_was_not_measured(runs: Path, tmp_path: Path, export: Train) -> None:
    run = Path(shutil.copytree(runs / "gap", tmp_path / "run"))
    final = json.loads((run / "summary.json").read_text())["final"] | {"top5": None}
    del final["epoch"]
    change_summary(run, final=final)
    succeeded(export(run, "--to", "safetensors", "--output", tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"| final | not recorded | {final['top1']:.2f} | not measured | {final['mean_class']:.2f} |" in card


def test_what_appears_while_the_export_is_made_stays(
    runs: Path, tmp_path: Path, export: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, arguments = tmp_path / "out", (runs / "gap", "--to", "safetensors", "--output", tmp_path / "out")
    write = WRITERS["safetensors"]

    def slow(model: Any, facts: Any, folder: Path) -> Any:
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir()
        (output / "photograph.jpg").write_bytes(b"mine")
        return write(model, facts, folder)

    succeeded(export(*arguments))
    with monkeypatch.context() as patched:
        patched.setitem(WRITERS, "safetensors", slow)
        refused(export(*arguments), "out exists and is no export")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "photograph.jpg"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the export is killed in a fork")
@pytest.mark.parametrize("rename", [1, 2])
def test_an_export_that_was_killed_between_its_renames_is_found_by_the_next(
    runs: Path, tmp_path: Path, export: Train, rename: int
) -> None:
    output = tmp_path / "out"
    succeeded(export(runs / "gap", "--to", "safetensors", "--output", output))
    child = os.fork()
    if not child:
        calls, real = [], Path.rename

        def kill(self: Path, target: Path) -> Path:
            calls.append(target)
            if len(calls) == rename:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(self, target)

        Path.rename = kill  # type: ignore[method-assign, assignment]
        export_run(runs / "gap", to="safetensors", output=output)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert output.exists() == (rename == 1)
    # another run's export is refused, and finds the first one all the same
    refused(export(runs / "seb", "--to", "safetensors", "--output", output), "another run")
    assert json.loads((output / "export.json").read_text())["method"] == "gap"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_exported_models_are_compared_with_the_run(runs: Path, export: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = torch.export.load

    def other(file: Path) -> Any:
        program = trained(file)
        with torch.no_grad():
            program.state_dict["head.classifier.bias"] += 1
        return program

    monkeypatch.setattr(torch.export, "load", other)
    refused(export(runs / "seb", "--to", "pt2"), "differs from the run's model")
    assert not (runs / "seb" / "exports" / "pt2-last").exists()


@pytest.mark.parametrize(("run", "to"), [("seb", "safetensors"), ("wide", "timm")])
def test_saved_weights_are_compared_with_the_run(
    runs: Path, run: str, to: str, export: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(file: Path) -> dict[str, torch.Tensor]:
        tensors = load_file(file)
        name = min(name for name, tensor in tensors.items() if tensor.is_floating_point())
        return tensors | {name: tensors[name] + 1e-3}

    monkeypatch.setattr("fgvc.inference.export.load_file", other)
    refused(export(runs / run, "--to", to), "model.safetensors does not hold the weights of the run")
    assert not (runs / run / "exports" / f"{to}-last").exists()


def test_a_backbone_that_timm_changes_is_refused(runs: Path, export: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model

    def other(*arguments: Any, **options: Any) -> Any:
        network = create(*arguments, **options)
        if options.get("num_classes") == 0:  # the one to be exported
            network.bn1.eps = 0.5
        return network

    monkeypatch.setattr(timm, "create_model", other)
    refused(export(runs / "seb", "--to", "timm"), "differs from the run's model")
    assert not (runs / "seb" / "exports" / "timm-last").exists()


def photographs(folder: Path) -> list[Path]:
    """A JPEG large enough to be decoded smaller, turned by its EXIF orientation; a PNG with transparent parts."""
    rng = np.random.default_rng(0)
    colours = Image.fromarray(rng.integers(0, 256, (9, 13, 4), dtype=np.uint8), "RGBA").resize((643, 421))
    turned = Image.Exif()
    turned[0x0112] = 6
    colours.convert("RGB").save(folder / "large.jpg", exif=turned)
    colours.resize((97, 131)).save(folder / "clear.png")
    return [folder / "large.jpg", folder / "clear.png"]


def test_the_example_serves_the_probabilities_of_the_run_without_torch(runs: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs / "vit", tmp_path / "run"))  # the one of bicubic interpolation
    calibration = fit_calibration(run, root=str(runs / "moved"))
    keep_calibration(run, replace(calibration, temperature=1.5, record=calibration.record | {"temperature": 1.5}))
    export_run(run, to="onnx", output=tmp_path / "out")
    paths = photographs(tmp_path)
    code = f"import runpy, sys; runpy.run_path({str(ROOT / 'examples' / 'serve_onnx.py')!r})"
    code += "; assert not {'torch', 'torchvision', 'fgvc'} & set(sys.modules)"
    command = [sys.executable, "-c", code, tmp_path / "out" / "model.onnx", *paths]
    lines = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout.splitlines()
    assert len(lines) == len(paths)
    for path, line in zip(paths, lines, strict=True):
        expected = load_run(run).predict(path)
        served = json.loads(line)["probabilities"]
        assert tuple(served) == expected.names and expected.calibrated
        assert list(served.values()) == pytest.approx(expected.probabilities, abs=1e-4, rel=0)
        assert max(served.values()) - min(served.values()) > 5e-3  # else a wrong input would not show
