"""Optimiser groups, and the learning rate as a pure function of the position in the run."""

import math

import torch
from timm.optim._param_groups import param_groups_layer_decay
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from fgvc.errors import ConfigError
from fgvc.models import FineGrainedModel
from fgvc.runs.config import OptimizerConfig, ScheduleConfig


def create_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """Create SGD with momentum or AdamW for the trainable parameters, with a group for each learning rate.

    A parameter belongs to a classifier if its name has the component `classifier` or `token_classifier`. A backbone
    with a rate of its own is one group, or with `layer_decay` one for each of its layers [Bao, Dong, Piao, Wei, BEiT,
    ICLR 2022]: timm's, as in its models the last one has `layer_decay` times the rate of the head. With
    `reduction_gradient` "olr", the last group is the convolution of the reduction. Each group keeps its undecayed rate
    as `base_lr` for `set_learning_rate`.

    Raises:
        ConfigError: unknown optimiser, no trainable parameter, a `reduction_gradient` without a reduction, or a
            `layer_decay` without layers.
    """
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
        if name.startswith("backbone.") and (config.backbone_factor, config.layer_decay) != (1, 1):
            return "backbone"
        return "reduction" if config.reduction_gradient == "olr" and name in reduction else "other"

    parts: dict[str, list[nn.Parameter]] = {"other": [], "backbone": [], "classifier": [], "reduction": []}
    for name, parameter in named:
        parts[part(name)].append(parameter)
    if config.backbone_factor != 1 and not parts["backbone"]:
        raise ConfigError(
            f"optimizer.backbone_factor={config.backbone_factor} needs a backbone that is trained; set it to 1, or see "
            "backbone.frozen and backbone.trainable_stages"
        )
    layers = [(parts["backbone"], 1.0)] if config.layer_decay == 1 else _layers(model, config.layer_decay)
    scaled = [
        (parts["other"], 1.0),
        (parts["classifier"], config.classifier_factor),
        *((parameters, config.backbone_factor * factor) for parameters, factor in layers),
        (parts["reduction"], 1.0),
    ]
    groups = [
        {"params": parameters, "lr": config.lr * factor, "base_lr": config.lr * factor}
        for parameters, factor in scaled
        if parameters
    ]
    if config.name == "sgd":
        return SGD(groups, momentum=config.momentum, weight_decay=config.weight_decay)
    if config.name == "adamw":
        return AdamW(groups, weight_decay=config.weight_decay)
    raise ConfigError(f"unknown optimizer.name {config.name!r}; choose one of sgd, adamw")


def _layers(model: nn.Module, layer_decay: float) -> list[tuple[list[nn.Parameter], float]]:
    """Return the trainable parameters of each layer of a backbone, and its factor: `layer_decay` for the last layer."""
    layers = model.backbone.model if isinstance(model, FineGrainedModel) else model
    if not hasattr(layers, "group_matcher"):
        raise ConfigError(
            f"optimizer.layer_decay={layer_decay} needs a backbone that is trained and whose layers timm orders (most "
            "have a group_matcher); set it to 1, or train the backbone (backbone.frozen, backbone.trainable_stages)"
        )
    # all parameters have the optimiser's weight decay, as without layer_decay
    groups = param_groups_layer_decay(layers, weight_decay=0.0, weight_decay_exclude_1d=False, layer_decay=layer_decay)
    return [(group["params"], layer_decay * group["lr_scale"]) for group in groups]  # timm counts no head here


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
