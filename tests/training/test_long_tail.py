"""Classes of unequal size: balanced draws, adjusted logits, and accuracies by the number of training images."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import Train, refused, succeeded
from run_folders import change_summary
from torch import Tensor

from fgvc.data import ImageDataset
from fgvc.data.dataset import Samples
from fgvc.errors import RunError
from fgvc.inference import evaluate_run
from fgvc.runs.config import TrainerConfig
from fgvc.runs.statistics import shot_accuracy
from fgvc.training.batches import StepBatches, sampling_weights
from fgvc.training.learner import create_objective
from fgvc.training.seeds import SeededSamples

pytestmark = pytest.mark.usefixtures("uncalibrated")

TARGETS = [0] * 160 + [1] * 30 + [2] * 10


def balanced(epoch: int, first_step: int = 0, **parts: int) -> StepBatches:
    batches = StepBatches(200, 16, seed=0, weights=sampling_weights("class_balanced", TARGETS), **parts)
    batches.start_epoch(epoch, first_step)
    return batches


def images(batches: StepBatches) -> list[int]:
    return [index for step in range(batches.steps) for index in batches.indices(step, 0)]


def test_each_class_is_drawn_as_often_and_each_of_its_images() -> None:
    drawn = np.array([index for epoch in range(1, 31) for index in images(balanced(epoch))])
    assert len(drawn) == 30 * 200
    shares = np.bincount(np.array(TARGETS)[drawn]) / len(drawn)
    assert shares == pytest.approx([1 / 3] * 3, abs=0.03)  # 5 standard deviations
    of_last = np.bincount(drawn, minlength=200)[190:]
    assert of_last.min() > 130 and of_last.max() < 270  # 200 expected


def test_draws_depend_on_seed_and_epoch_and_are_the_same_in_the_middle_of_an_epoch() -> None:
    assert images(balanced(1)) == images(balanced(1)) != images(balanced(2))
    assert list(balanced(1, first_step=5)) == list(balanced(1))[5:]
    parts = [balanced(1, process=process, processes=2) for process in range(2)]
    assert [index for step in range(13) for part in parts for index in part.indices(step, 0)] == images(balanced(1))


def test_an_image_that_is_drawn_twice_is_augmented_twice() -> None:
    samples = Samples(classes=["a", "b", "c"], paths=[Path(f"{i}.png") for i in range(200)], targets=TARGETS)

    class Numbered(ImageDataset):
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            return torch.cat([torch.tensor([float(index)]), torch.rand(1)]), self.targets[index]

    seeded = SeededSamples(Numbered(samples, Path()))
    seeded.start_epoch(1)
    found = torch.stack([seeded[index][0] for batch in balanced(1) for index in batch])
    assert found[:, 0].long().tolist() == images(balanced(1))
    assert len(found[:, 0].unique()) < 150 and len(found[:, 1].unique()) == 200


@pytest.mark.parametrize("mixup", [0.0, 1.0])
def test_adjusted_logits_that_are_equal_are_the_best_without_evidence(mixup: float) -> None:
    """At tau=1 the loss asks for the balanced error: without evidence no class is preferred."""

    def slope(tau: float, logits: Tensor) -> Tensor:
        settings = TrainerConfig(logit_adjustment=tau, mixup=mixup)
        samples = Samples(["a", "b", "c"], [Path(f"{i}.png") for i in range(200)], TARGETS)
        objective = create_objective(settings, ImageDataset(samples, Path()), torch.device("cpu"))
        logits = logits.repeat(200, 1).requires_grad_()
        _, targets = objective.mix(torch.zeros(200, 1, 1, 1), torch.tensor(TARGETS))
        objective.mean(logits, targets).backward()
        assert logits.grad is not None
        return logits.grad.sum(dim=0)

    prior = torch.tensor([0.8, 0.15, 0.05])
    assert slope(1.0, torch.zeros(3)).abs().max() < 1e-6
    assert slope(0.0, prior.log()).abs().max() < 1e-6 and slope(0.0, torch.zeros(3)).abs().max() > 0.1
    assert slope(0.5, 0.5 * prior.log()).abs().max() < 1e-6


def test_accuracies_by_the_number_of_training_images() -> None:
    target = np.array([0, 0, 0, 0, 1, 1, 2, 3, 3])
    predicted = np.array([0, 0, 0, 1, 1, 0, 2, 3, 0])
    # 101 is many, 100 and 20 are medium, 19 is few; the last class has no test image
    found = shot_accuracy(target, predicted, [101, 100, 20, 19, 500])
    assert found["many"] == {"classes": 1, "top1": 75.0}
    assert found["medium"] == {"classes": 2, "top1": 75.0}  # the mean of 50 and 100: each class counts the same
    assert found["few"] == {"classes": 1, "top1": 50.0}
    with pytest.raises(RunError, match="2 numbers of training images"):
        shot_accuracy(target, predicted, [1, 2])


@pytest.mark.parametrize("frozen", ["true", "false"])
def test_the_command_trains_and_the_evaluation_tells_kinds_of_classes(
    tmp_path: Path, train_here: Train, frozen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["trainer.sampler=class_balanced", "trainer.logit_adjustment=1", f"backbone.frozen={frozen}"]
    succeeded(train_here(tmp_path, *settings, "run_dir=run", "cache.dir=cache", "trainer.epochs=1"))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["class_sizes"] == [4, 4, 4]
    assert summary["shots"] == {"few": {"classes": 3, "top1": summary["final"]["mean_class"]}}
    change_summary(tmp_path / "run", class_sizes=[150, 30, 5])  # as if they had been so many
    monkeypatch.chdir(tmp_path)
    result = evaluate_run(tmp_path / "run", cache="cache")
    shots = result.record["shots"]
    assert np.mean([part["top1"] for part in shots.values()]) == pytest.approx(result.accuracy.mean_class, abs=1e-3)
    assert f"many (1 classes) {shots['many']['top1']:.2f} %   medium (1 classes)" in result.text


def test_unknown_samplers_are_refused(tmp_path: Path, train_here: Train) -> None:
    refused(train_here(tmp_path, "trainer.sampler=balanced"), "trainer.sampler 'balanced'", "class_balanced")
