"""The changed step of the convolution in front of a covariance: nearest orthogonal gradient, optimal length."""

import itertools
import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from command_line import Train, refused, succeeded, trainable
from torch import Tensor, nn

from fgvc.models import PoolingHead
from fgvc.runs.config import OptimizerConfig
from fgvc.training.learner import head_of
from fgvc.training.optim import (
    change_reduction,
    create_optimizer,
    nearest_orthogonal,
    optimal_rate,
    set_learning_rate,
)
from fgvc.training.run import train_run

PLAIN = OptimizerConfig(lr=0.01, momentum=0.0, weight_decay=0.0)


def test_the_nearest_orthogonal_matrix() -> None:
    left, right = (torch.linalg.qr(torch.randn(n, 3, generator=torch.Generator().manual_seed(n)))[0] for n in (7, 3))
    gradient = left @ torch.diag(torch.tensor([5.0, 0.3, 1e-3])) @ right.mT
    found = nearest_orthogonal(gradient[:, :, None, None])
    assert found.shape == (7, 3, 1, 1)
    torch.testing.assert_close(found.flatten(1), left @ right.mT, rtol=0, atol=1e-3)  # by the size of the smallest


def test_the_optimal_rate_by_hand() -> None:
    weight, gradient = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -1.0]])
    # w.w = 5, l.w = 1, l.l = 10: 5 / (50 + 2)
    assert float(optimal_rate(weight, gradient)) == pytest.approx(5 / 52)
    assert float(optimal_rate(weight, -gradient)) == pytest.approx(-5 / 52)
    assert optimal_rate(weight, torch.zeros(1, 2)).isnan()


@pytest.mark.parametrize(("sign", "lr", "used"), [(1, 1.0, 5 / 52), (-1, 1.0, 1.0), (1, 0.05, 0.05), (0, 1.0, 1.0)])
def test_the_optimal_rate_is_used_where_it_is_positive_and_smaller(sign: int, lr: float, used: float) -> None:
    head = PoolingHead(2, method="isqrt_cov", num_classes=3, reduction=1)
    weight = head.reduction.get_parameter("0.weight")
    nn.init.constant_(weight, 1.0)
    with torch.no_grad():
        weight.copy_(torch.tensor([1.0, 2.0]).view(1, 2, 1, 1))
    weight.grad = sign * torch.tensor([3.0, -1.0]).view(1, 2, 1, 1)
    optimizer = create_optimizer(head, OptimizerConfig(lr=1.0, reduction_gradient="olr"))
    assert set_learning_rate(optimizer, lr) == lr
    change_reduction(optimizer, weight, "olr")
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([lr, lr, used])
    assert optimizer.param_groups[-1]["params"][0] is weight


@pytest.mark.parametrize("frozen", [False, True])
def test_a_step_of_the_reduction_is_orthogonal(tmp_path: Path, frozen: bool) -> None:
    config = trainable(tmp_path, optimizer=OptimizerConfig(**{**vars(PLAIN), "reduction_gradient": "nog"}))
    config.method.reduction, config.backbone.frozen, config.trainer.epochs = 8, frozen, 2
    weights: list[Tensor] = []

    def keep(_: int, module: nn.Module, *__: object) -> None:
        weights.append(head_of(module).reduction.get_parameter("0.weight").detach().clone())  # type: ignore[arg-type]

    train_run(config, before_step=keep)
    steps = [(before - after).flatten(1) / 0.01 for before, after in itertools.pairwise(weights)]
    assert len(steps) == 5
    for step in steps:  # whatever trainer.clip_norm is
        torch.testing.assert_close(step @ step.mT, torch.eye(8), rtol=0, atol=2e-3)


@pytest.mark.parametrize("how", ["nog", "olr"])
def test_the_command_trains_with_it_and_logs_condition_numbers(tmp_path: Path, train_here: Train, how: str) -> None:
    settings = [f"optimizer.reduction_gradient={how}", "method=mpn_cov", "run_dir=run", "optimizer.lr=0.01"]
    succeeded(train_here(tmp_path, *settings))
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "finished"
    assert (pd.read_csv(tmp_path / "run" / "metrics.csv")["condition_number"] > 1).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["method=gap"], "changes the gradient of the reduction, and this head has none"),
        (["method.reduction=null"], "changes the gradient of the reduction, and this head has none"),
        (
            ["optimizer.reduction_gradient=svd"],
            "unknown optimizer.reduction_gradient 'svd'; choose one of None, nog, olr",
        ),
    ],
)
def test_a_reduction_is_needed(tmp_path: Path, train_here: Train, settings: list[str], message: str) -> None:
    refused(train_here(tmp_path, "optimizer.reduction_gradient=nog", *settings), message)
