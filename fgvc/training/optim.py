"""Optimiser groups, and the learning rate as a pure function of the position in the run."""

import math

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from fgvc.errors import ConfigError
from fgvc.runs.config import OptimizerConfig, ScheduleConfig


def create_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """Create SGD with momentum or AdamW for the trainable parameters, with a separate group for the classifier.

    A parameter belongs to the classifier if its name has the component `classifier`. Each group keeps its undecayed
    rate as `base_lr` for `set_learning_rate`.

    Raises:
        ConfigError: unknown optimiser, a rate that is not positive, or no trainable parameter.
    """
    if config.lr <= 0 or config.classifier_factor <= 0:
        raise ConfigError(
            f"optimizer.lr and optimizer.classifier_factor must be positive, got {config.lr} and "
            f"{config.classifier_factor}"
        )
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not named:
        raise ConfigError("the model has no trainable parameter")
    groups = []
    for in_classifier, factor in ((False, 1.0), (True, config.classifier_factor)):
        parameters = [p for name, p in named if ("classifier" in name.split(".")) == in_classifier]
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
