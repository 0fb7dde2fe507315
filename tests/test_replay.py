"""Steps that are kept on the disk and repeated."""

import re
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import Done, refused
from torch import nn

from fgvc.errors import ConfigError, RunError
from fgvc.models import PoolingHead
from fgvc.spectrum_measures import smallest_gap
from fgvc.training.config import (
    BackboneConfig,
    DatasetConfig,
    HybridConfig,
    MethodConfig,
    RunConfig,
    TrainerConfig,
    TransformConfig,
)
from fgvc.training.replay import LIMIT, Replay, find_replays, keep_replay, load_replay, save_replay
from fgvc.training.replay_step import replay_step
from fgvc.training.setup import build_backbone, build_head, build_model

CLASSES = 3
CPU = torch.device("cpu")
PATHS = ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]


def a_config(**changes: Any) -> RunConfig:
    parts: dict[str, Any] = {
        "dataset": DatasetConfig(name="synthetic", root="r", transform=TransformConfig(size=32)),
        "backbone": BackboneConfig(name="test_resnet", frozen=True, weights="gone.pth"),
        "method": MethodConfig(name="mpn_cov", reduction=4),
        "trainer": TrainerConfig(epochs=4),
    }
    return RunConfig(name="t", **{**parts, **changes})


def a_step(config: RunConfig | None = None, **changes: Any) -> Replay:
    """A step on feature maps that is finite."""
    config = config or a_config()
    torch.manual_seed(0)
    step = Replay(
        what="loss",
        reason="the loss is nan in epoch 3, step 7",
        config=config,
        weights=build_head(config, 6, CLASSES).state_dict(),
        inputs=torch.randn(4, 6, 5, 5),
        targets=torch.tensor([0, 1, 2, 0]),
        num_classes=CLASSES,
        paths=PATHS,
        epoch=3,
        step=7,
        learning_rate=0.1,
        random_state=torch.get_rng_state(),
    )
    return replace(step, **changes)


def an_overflow(**changes: Any) -> Replay:
    """A step in half precision whose second sample exceeds it."""
    step = a_step(a_config(trainer=TrainerConfig(epochs=4, precision="fp16")), what="eigenvalues", **changes)
    step.inputs[1] *= 1e5
    return step


def test_a_kept_step_is_read_back_as_it_was(tmp_path: Path) -> None:
    step = an_overflow(targets=torch.rand(4, CLASSES), process=2)
    file = keep_replay(tmp_path, step)
    assert file == tmp_path / "replay" / "step-000007-process2.pt" and find_replays(tmp_path) == [file]
    again = load_replay(file)
    for name in ("inputs", "targets", "random_state"):
        assert torch.equal(getattr(again, name), getattr(step, name))
    assert again.weights.keys() == step.weights.keys()
    assert all(torch.equal(again.weights[name], step.weights[name]) for name in step.weights)
    plain = {"weights": {}, "inputs": CPU, "targets": CPU, "random_state": CPU}
    assert replace(again, **plain) == replace(step, **plain)  # type: ignore[arg-type]  # stand-ins, to be compared
    assert sorted(path.name for path in (tmp_path / "replay").iterdir()) == [file.name]


def test_a_file_holds_no_more_than_the_tensors_it_shows(tmp_path: Path) -> None:
    save_replay(tmp_path / "a.pt", a_step())
    save_replay(tmp_path / "b.pt", a_step(inputs=torch.randn(4000, 6, 5, 5)[:4]))
    assert (tmp_path / "b.pt").stat().st_size < (tmp_path / "a.pt").stat().st_size + 10_000


def test_only_the_first_steps_of_a_run_are_kept(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="keeps no step"):
        find_replays(tmp_path)
    kept = [keep_replay(tmp_path, a_step(step=step)) for step in range(1, LIMIT + 3)]
    assert [file is not None for file in kept] == [True] * LIMIT + [False, False]
    assert [file.name for file in find_replays(tmp_path)] == [f"step-00000{step}.pt" for step in range(1, LIMIT + 1)]


def test_a_step_that_cannot_be_written_is_no_further_failure(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "replay").write_text("in the way")
    assert keep_replay(tmp_path, a_step()) is None
    assert "step 7 could not be kept" in caplog.text


def rewrite(**changes: Any) -> Callable[[Path], None]:
    """Replace fields of a file; None takes one out."""

    def damage(file: Path) -> None:
        content = torch.load(file, weights_only=True) | changes
        torch.save({key: value for key, value in content.items() if value is not None}, file)

    return damage


def flip_a_bit(file: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    content = bytearray(file.read_bytes())
    content[largest.header_offset + 300] ^= 1
    file.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, "is missing"),
    "empty": (lambda file: file.write_bytes(b""), "is damaged"),
    "cut short": (lambda file: file.write_bytes(file.read_bytes()[:-200]), "is damaged"),
    "a flipped bit": (flip_a_bit, "checksum"),
    "not a step": (lambda file: torch.save([1, 2], file), "format None"),
    "another version": (rewrite(format=2), "format 2"),
    "without inputs": (rewrite(inputs=None), "inputs missing"),
    "text for a number": (rewrite(epoch="3"), "epoch missing or of another type"),
    "foreign code": (rewrite(paths=[Path("a")]), "is damaged"),
    "unknown setting": (rewrite(config="name: t\nwings: 2"), "wings"),
    "weights of another head": (rewrite(weights={}), "do not fit"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_cannot_be_repeated_is_refused_by_name(damage: str, tmp_path: Path) -> None:
    file = tmp_path / "step.pt"
    save_replay(file, a_step())
    inflict, message = DAMAGES[damage]
    inflict(file)
    with pytest.raises(RunError, match=re.escape(message)) as caught:
        replay_step(file, CPU)
    assert str(file) in str(caught.value)


def test_an_overflow_is_reproduced_and_its_cause_named(tmp_path: Path) -> None:
    file = tmp_path / "step.pt"
    save_replay(file, an_overflow())
    replayed = replay_step(file, CPU)
    assert replayed.reproduced
    found = replayed.diagnosis
    assert (found.what, found.first_module, found.samples) == ("eigenvalues", "reduction.0", [1])
    assert replayed.spectra["path"].tolist() == ["b.jpg"] and replayed.spectra[
        ["largest", "rank", "condition"]
    ].isna().all(axis=None)
    text = replayed.text()
    assert "reproduced: not finite: the eigenvalues" in text and "it comes from b.jpg" in text
    assert "training: the loss is nan in epoch 3, step 7" in text


def test_other_settings_can_be_tried(tmp_path: Path) -> None:
    file = tmp_path / "step.pt"
    save_replay(file, an_overflow())
    replayed = replay_step(file, CPU, precision="no", gradient="exact")
    assert not replayed.reproduced and replayed.diagnosis.what == ""
    assert replayed.replay.config.method.gradient == "exact"
    text = replayed.text()
    assert "not reproduced with method.gradient=exact, trainer.precision=no: everything is finite" in text
    assert replayed.spectra["path"].tolist() == PATHS and replayed.spectra["largest"].gt(0).all()
    for options in ({"gradient": "by_feel"}, {"precision": "int8"}):
        with pytest.raises(ConfigError, match=next(iter(options.values()))):
            replay_step(file, CPU, **options)  # type: ignore[arg-type]


def test_a_gradient_that_is_nan_is_explained_by_torch() -> None:
    """Large weights after small ones: what they compute is finite, and overflows on the way back."""
    config = a_config(method=MethodConfig(name="mpn_cov", reduction=4, hidden=[5]))
    step = a_step(config, what="gradient")
    step = replace(step, inputs=step.inputs[:1], targets=step.targets[:1])
    step.weights["classifier.0.weight"] *= 1e-38
    step.weights["classifier.0.bias"][:] = 1e-38
    step.weights["classifier.2.weight"][:] = torch.tensor([[-3e38], [3e38], [3e38]])
    replayed = replay_step(step, CPU, anomaly=True)
    assert replayed.reproduced and replayed.diagnosis.loss is not None and replayed.diagnosis.parameters == []
    assert "classifier.0.weight" in " ".join(replayed.diagnosis.gradients)
    assert replayed.anomaly is not None and "returned nan values" in replayed.anomaly
    assert "anomaly detection: " in replayed.text()


def test_a_whole_model_needs_neither_its_first_weights_nor_a_dataset() -> None:
    config = a_config(backbone=BackboneConfig(name="test_resnet", pretrained=True), initial_weights="gone.pth")
    start = replace(config, backbone=BackboneConfig(name="test_resnet"), initial_weights=None)
    weights = build_model(start, build_backbone(start), CLASSES).state_dict()
    inputs = torch.randn(4, 3, 32, 32)
    inputs[2, 0, 0, 0] = torch.nan
    step = a_step(config, weights=weights, inputs=inputs, what="eigenvalues")
    replayed = replay_step(step, CPU)
    assert replayed.reproduced and replayed.diagnosis.inputs == [2]
    assert "inputs that are not finite: c.jpg" in replayed.text()
    assert step.config.backbone.pretrained  # what was given is left as it is


@pytest.mark.parametrize(("epoch", "pooling"), [(1, "isqrt_cov"), (2, "mpn_cov")])
def test_the_pooling_is_that_of_the_stage(epoch: int, pooling: str) -> None:
    hybrid = a_config(hybrid=HybridConfig(method="isqrt_cov", switch_epoch=1))
    other = a_config(method=MethodConfig(name=pooling, reduction=4))
    staged, plain = replay_step(a_step(hybrid, epoch=epoch), CPU), replay_step(a_step(other), CPU)
    assert staged.diagnosis.loss == plain.diagnosis.loss
    if epoch == 1:
        with pytest.raises(ConfigError, match="first stage"):
            replay_step(a_step(hybrid, epoch=1), CPU, gradient="exact")


def test_random_numbers_are_those_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_dropout(config: RunConfig, in_channels: int, num_classes: int) -> PoolingHead:
        head = build_head(config, in_channels, num_classes)
        head.reduction = nn.Sequential(*head.reduction.children(), nn.Dropout(0.5))
        return head

    step = a_step()
    head = with_dropout(step.config, 6, CLASSES)
    head.load_state_dict(step.weights)
    torch.set_rng_state(step.random_state)
    expected = float(nn.functional.cross_entropy(head(step.inputs), step.targets).detach())
    monkeypatch.setattr("fgvc.training.replay_step.build_head", with_dropout)
    before = torch.get_rng_state()
    assert [replay_step(step, CPU).diagnosis.loss for _ in range(2)] == [expected, expected]
    assert before.equal(torch.get_rng_state())


def test_the_command_line(tmp_path: Path, here: Callable[..., Done]) -> None:
    keep_replay(tmp_path, an_overflow())
    keep_replay(tmp_path, a_step(step=8))
    done = here("replay.py", tmp_path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.index("step-000007.pt") < done.stdout.index("step-000008.pt")
    assert "\nreproduced: not finite: the eigenvalues" in done.stdout
    assert "\nnot reproduced: everything is finite" in done.stdout
    done = here("replay.py", tmp_path / "replay" / "step-000007.pt", "--precision", "no", cwd=tmp_path)
    assert done.returncode == 0 and "not reproduced with trainer.precision=no" in done.stdout
    refused(here("replay.py", tmp_path / "nothing.pt", cwd=tmp_path), "nothing.pt is missing")


def test_the_smallest_gap_is_that_of_non_zero_eigenvalues() -> None:
    eigenvalues = np.array([[4.0, 3.0, 2.5, 1e-17], [2.0, 2.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0] * 4])
    np.testing.assert_allclose(smallest_gap(eigenvalues), [0.125, 0, np.nan, np.nan])
