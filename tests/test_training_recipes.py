"""What a recipe adds to the loop: mixed inputs, averaged weights, the hybrid protocol, runs of no epoch."""

import numpy as np
import pytest
import torch

from fgvc.models import PoolingHead
from fgvc.training.config import HybridConfig, MethodConfig, RunConfig, ScheduleConfig, TrainerConfig
from fgvc.training.evaluation import Accuracy
from fgvc.training.hybrid import Stages
from fgvc.training.objective import Objective
from fgvc.training.progress import Progress


def test_loss_of_plain_inputs_is_the_smoothed_cross_entropy() -> None:
    logits, targets = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 0.0]]), torch.tensor([0, 2])
    objective = Objective(TrainerConfig(label_smoothing=0.3), 3)
    inputs = torch.rand(2, 1, 2, 2)
    same, wanted = objective.mix(inputs, targets)
    assert same is inputs and wanted is targets
    shares = torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.1, 0.8]])
    expected = -(shares * logits.log_softmax(1)).sum(1).mean()
    assert objective.loss(logits, wanted).item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_mixup_mixes_inputs_and_targets_in_the_same_shares(smoothing: float) -> None:
    objective = Objective(TrainerConfig(mixup=1.0, label_smoothing=smoothing), 4)
    np.random.seed(0)
    inputs = torch.eye(4).view(4, 4, 1, 1).clone()  # input i holds nothing but its class
    mixed, shares = objective.mix(inputs, torch.arange(4))
    lam = mixed[0, 0].item()
    assert 0.02 < lam < 0.98
    torch.testing.assert_close(mixed.flatten(1), lam * torch.eye(4) + (1 - lam) * torch.eye(4).flip(0))
    torch.testing.assert_close(shares, (1 - smoothing) * mixed.flatten(1) + smoothing / 4)
    logits = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    expected = -(shares * logits.log_softmax(1)).sum(1).mean()
    assert objective.loss(logits, shares).item() == pytest.approx(expected.item(), abs=1e-6)


def test_cutmix_pastes_a_part_and_counts_its_area() -> None:
    objective = Objective(TrainerConfig(cutmix=1.0), 2)
    areas = []
    for seed in range(8):
        np.random.seed(seed)
        inputs = torch.stack([torch.zeros(1, 10, 10), torch.ones(1, 10, 10)])
        mixed, shares = objective.mix(inputs, torch.tensor([0, 1]))
        assert set(mixed.unique().tolist()) == {0.0, 1.0}
        assert shares[0, 1].item() == pytest.approx(mixed[0].mean().item(), abs=1e-6)
        areas.append(shares[0, 1].item())
    assert sum(0 < area < 1 for area in areas) >= 4


def test_a_batch_of_odd_size_stays_unmixed() -> None:
    objective = Objective(TrainerConfig(mixup=1.0, label_smoothing=0.2), 4)
    inputs = torch.rand(3, 1, 2, 2)
    mixed, shares = objective.mix(inputs.clone(), torch.tensor([1, 0, 3]))
    assert torch.equal(mixed, inputs)
    torch.testing.assert_close(shares, 0.8 * torch.eye(4)[[1, 0, 3]] + 0.05)


def a_head(method: str) -> PoolingHead:
    return PoolingHead(6, method=method, num_classes=3, reduction=None)


def test_stages_are_a_function_of_the_epoch() -> None:
    config = RunConfig(
        method=MethodConfig(name="mpn_cov"),
        hybrid=HybridConfig(method="isqrt_cov", options={"iterations": 7}),
        schedule=ScheduleConfig(milestones=[2, 4]),
        trainer=TrainerConfig(epochs=6),
    )
    head = a_head("mpn_cov")
    last = head.pooling
    stages = Stages(config, head)
    for epoch in (5, 4, 6, 1):
        stages.enter(head, epoch)
        assert stages.method(epoch) == ("isqrt_cov" if epoch <= 4 else "mpn_cov")
        assert (head.pooling is last) == (epoch > 4)
    assert getattr(head.pooling, "iterations", None) == 7


def test_one_stage_leaves_the_pooling_alone() -> None:
    config = RunConfig(method=MethodConfig(name="gap"))
    head = a_head("gap")
    pooling = head.pooling
    stages = Stages(config, head)
    stages.enter(head, 1)
    assert head.pooling is pooling and stages.method(1) == "gap" and stages.switch == 0


def test_selection_starts_anew_after_the_switch() -> None:
    progress = Progress()
    for epoch, top1, chosen in ((1, 50.0, True), (2, 60.0, True), (3, 60.0, False), (4, 40.0, True), (5, 39.0, False)):
        accuracy = Accuracy(top1, top1, top1)
        since = 4 if epoch > 3 else 0
        assert progress.select(epoch, accuracy, accuracy, "test", since=since) == chosen
    assert progress.best is not None
    assert (progress.best["epoch"], progress.best["top1"]) == (4, 40.0)
