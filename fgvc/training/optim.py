"""Optimiser groups, and the learning rate as a pure function of the position in the run."""

import math

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from fgvc.errors import ConfigError
from fgvc.runs.config import OptimizerConfig, ScheduleConfig


def create_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """Create SGD with momentum or AdamW for the trainable parameters, with a separate group for the classifier.

    A parameter belongs to a classifier if its name has the component `classifier` or `token_classifier`. With
    `reduction_gradient` "olr", the last group is the convolution of the reduction. Each group keeps its undecayed rate
    as `base_lr` for `set_learning_rate`.

    Raises:
        ConfigError: unknown optimiser, a rate that is not positive, no trainable parameter, or a `reduction_gradient`
            without a reduction.
    """
    if config.lr <= 0 or config.classifier_factor <= 0:
        raise ConfigError(
            f"optimizer.lr and optimizer.classifier_factor must be positive, got {config.lr} and "
            f"{config.classifier_factor}"
        )
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not named:
        raise ConfigError("the model has no trainable parameter")
    reduction = [name for name, _ in named if name.removeprefix("head.") == "reduction.0.weight"]
    if config.reduction_gradient is not None and not reduction:
        raise ConfigError(
            f"optimizer.reduction_gradient={config.reduction_gradient} changes the gradient of the reduction, and this "
            "head has none; set method.reduction and a method that takes one, or leave it out"
        )

    def part(name: str) -> str:
        if {"classifier", "token_classifier"} & set(name.split(".")):
            return "classifier"
        return "reduction" if config.reduction_gradient == "olr" and name in reduction else "other"

    groups = []
    for which, factor in (("other", 1.0), ("classifier", config.classifier_factor), ("reduction", 1.0)):
        parameters = [p for name, p in named if part(name) == which]
        if parameters:
            rate = config.lr * factor
            groups.append({"params": parameters, "lr": rate, "base_lr": rate})
    if config.name == "sgd":
        return SGD(groups, momentum=config.momentum, weight_decay=config.weight_decay)
    if config.name == "adamw":
        return AdamW(groups, weight_decay=config.weight_decay)
    raise ConfigError(f"unknown optimizer.name {config.name!r}; choose one of sgd, adamw")


def schedule_factor(config: ScheduleConfig, epoch: float, epochs: int) -> float:
    """Return the factor on the learning rate at a position in the run.

    Args:
        config: the schedule.
        epoch: position in epochs, with fraction: 0 at the start, `epochs` at the end.
        epochs: length of the run in epochs.

    Returns:
        A factor from 0 to 1.
    """
    if epoch < config.warmup_epochs:
        return epoch / config.warmup_epochs
    if config.name == "step":
        return float(config.gamma ** sum(epoch >= milestone for milestone in config.milestones))
    if config.name == "cosine":
        progress = (epoch - config.warmup_epochs) / max(epochs - config.warmup_epochs, 1e-12)
        return (1 + math.cos(math.pi * min(progress, 1.0))) / 2
    return 1.0


def set_learning_rate(optimizer: Optimizer, factor: float) -> float:
    """Set the rate of every group to its base rate times `factor`; return that of the first group, to report."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    return float(optimizer.param_groups[0]["lr"])


@torch.no_grad()
def change_reduction(optimizer: Optimizer, weight: nn.Parameter, how: str) -> None:
    """Change the coming step of the convolution in front of a covariance, so that its condition number stays smaller.

    Song, Sebe, Wang, ECCV 2022. "nog" sets its gradient to the nearest orthogonal matrix. "olr" lowers the rate of the
    last group to `optimal_rate` if that is positive and smaller; this reads one number from the device.

    Batch normalisation after the convolution makes its gradient orthogonal to its weights: l.w is 0 but for rounding.
    So with "olr" our reduction either takes nearly no step or, where rounding makes l.w negative, the usual one.

    Args:
        optimizer: optimiser from `create_optimizer`, after `set_learning_rate`.
        weight: weights (out, in, 1, 1) with their gradient.
        how: "nog" or "olr".
    """
    assert weight.grad is not None
    if how == "nog":
        weight.grad.copy_(nearest_orthogonal(weight.grad))
        return
    group = optimizer.param_groups[-1]
    rate = float(optimal_rate(weight, weight.grad))
    if 0 < rate < group["lr"]:
        group["lr"] = rate


def nearest_orthogonal(gradient: Tensor) -> Tensor:
    """Return U V^T of G = U S V^T, where G (out, ...) is a matrix with out rows; in the shape of `gradient`."""
    left, _, right = torch.linalg.svd(gradient.flatten(1), full_matrices=False)
    nearest: Tensor = left @ right
    return nearest.view_as(gradient)


def optimal_rate(weight: Tensor, gradient: Tensor) -> Tensor:
    """Return (w.w)(l.w) / ((w.w)(l.l) + 2 (l.w)^2), w the weights and l their gradient; NaN if l is 0."""
    w, slope = weight.flatten().double(), gradient.flatten().double()
    return (w @ w) * (slope @ w) / ((w @ w) * (slope @ slope) + 2 * (slope @ w).square())
