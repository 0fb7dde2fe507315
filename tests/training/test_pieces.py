"""Small pieces of training, each by the library that has it: losses, drop path, erasing, checkpointing, compilation."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_line import Train, refused, trainable
from PIL import Image
from safetensors.torch import load_file
from timm.layers.drop import DropPath

from fgvc.data import TransformSpec
from fgvc.errors import ConfigError
from fgvc.inference.restore import load_model
from fgvc.models import Backbone, create_backbone
from fgvc.runs.config import BackboneConfig, RunConfig
from fgvc.runs.folder import RunFolder
from fgvc.training.learner import Objective
from fgvc.training.run import train_run

pytestmark = pytest.mark.usefixtures("uncalibrated")


def test_binary_cross_entropy_is_the_mean_over_the_classes() -> None:
    logits, targets = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 0.0]]), torch.tensor([0, 2])
    objective = Objective(3, loss="bce", label_smoothing=0.3)
    shares = torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.1, 0.8]])
    probability = logits.sigmoid()
    expected = -(shares * probability.log() + (1 - shares) * (1 - probability).log()).mean()
    assert objective.mean(logits, targets).item() == pytest.approx(expected.item(), abs=1e-6)
    assert Objective(3, loss="bce", mixup=1.0).mean(logits, shares).item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("loss", ["cross_entropy", "bce"])
def test_the_loss_of_guessing(loss: str) -> None:
    objective, targets = Objective(5, loss=loss), torch.tensor([3])
    logits = torch.full((1, 5), math.log(0.2 / 0.8))  # a sigmoid and a softmax of 0.2
    assert objective.mean(logits, targets).item() == pytest.approx(objective.guessing, abs=1e-6)


def test_drop_path_is_an_option_of_the_backbone() -> None:
    backbone = create_backbone("test_vit", image_size=64, options={"drop_path_rate": 0.5})
    assert max(layer.drop_prob for layer in backbone.modules() if isinstance(layer, DropPath)) == 0.5
    image = torch.rand(1, 3, 64, 64)
    torch.manual_seed(0)
    assert len({float(backbone.train()(image).detach().sum()) for _ in range(8)}) > 1
    assert torch.equal(backbone.eval()(image), backbone(image))


def test_a_rectangle_of_the_mean_colour_is_erased_in_training_only() -> None:
    base = {"size": 64, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.2), "interpolation": "bilinear", "hflip": False}
    spec = TransformSpec(**base, erasing=1.0, training=True)  # type: ignore[arg-type]
    image = Image.new("RGB", (64, 64), (255, 255, 255))
    torch.manual_seed(0)
    for _ in range(5):
        erased = (spec(image) == 0).all(dim=0)
        rows, columns = erased.any(dim=1), erased.any(dim=0)
        assert 0.01 < erased.float().mean() < 0.34 and erased.sum() == rows.sum() * columns.sum()
    assert not (spec.deterministic()(image) == 0).any()
    assert not spec.repeats and spec.deterministic().repeats
    assert repr(spec.deterministic()) == repr(TransformSpec(**base, training=False))  # type: ignore[arg-type]


def losses(config: RunConfig) -> list[float]:
    metrics = RunFolder(train_run(config)).metrics_file.read_text().splitlines()
    column = metrics[0].split(",").index("train_loss")
    return [float(line.split(",")[column]) for line in metrics[1:]]


def config_of(place: Path, name: str, backbone: str = "test_vit", **settings: bool) -> RunConfig:
    config = trainable(place, run_dir=str(place / name), backbone=BackboneConfig(backbone, **settings))
    config.method.reduction = 8
    config.trainer.epochs = 2
    return config


def test_checkpointing_computes_again_and_gives_the_same_losses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = losses(config_of(tmp_path, "plain"))
    calls = []
    checkpoint = torch.utils.checkpoint.checkpoint

    def counted(*args: object, **options: object) -> object:
        calls.append(args[0])
        return checkpoint(*args, **options)

    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", counted)
    assert losses(config_of(tmp_path, "again", grad_checkpointing=True)) == pytest.approx(plain, rel=1e-6)
    assert calls
    with pytest.raises(ConfigError, match="grad_checkpointing=true: timm has none for alexnet"):
        create_backbone("alexnet", grad_checkpointing=True)


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_compiled_backbone_gives_the_same_run_and_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, real: bool
) -> None:
    plain = losses(config_of(tmp_path, "plain"))
    compiled = []
    compile_it = torch.compile

    def noted(function: Callable[..., object], **options: object) -> object:
        compiled.append(function.__self__)  # type: ignore[attr-defined]
        return compile_it(function, **options) if real else function  # type: ignore[call-overload]

    monkeypatch.setattr(torch, "compile", noted)
    config = config_of(tmp_path, "compiled")
    config.trainer.compile, config.trainer.ema_decay = True, 0.5
    assert losses(config) == pytest.approx(plain, rel=1e-4)
    assert [type(module) for module in compiled] == [Backbone]
    names = [set(load_file(tmp_path / run / "checkpoints" / "last.safetensors")) for run in ("plain", "compiled")]
    assert names[0] == names[1]
    load_model(tmp_path / "compiled")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["trainer.loss=focal"], "unknown trainer.loss 'focal'"),
        (["trainer.loss=bce", "trainer.logit_adjustment=1"], "set it to 0"),
        (["dataset.transform.erasing=2"], "dataset.transform.erasing must be from 0 to 1"),
        (["backbone.frozen=true", "dataset.transform.erasing=0.5"], "no randaugment or erasing"),
        (["backbone.frozen=true", "backbone.grad_checkpointing=true"], "backbone.grad_checkpointing=true needs"),
        (["backbone.frozen=true", "trainer.compile=true"], "trainer.compile=true compiles a trained backbone"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, train_here: Train, settings: list[str], message: str) -> None:
    refused(train_here(tmp_path, *settings, "cache.dir=cache"), message)


def test_a_compilation_without_effect_is_refused(tmp_path: Path) -> None:
    config = config_of(tmp_path, "token")
    config.trainer.compile, config.method.class_token = True, True
    with pytest.raises(ConfigError, match=r"trainer\.compile=true has no effect with method\.class_token=true"):
        train_run(config)
