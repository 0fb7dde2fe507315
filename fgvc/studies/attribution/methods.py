"""Attributions by name, and those from gradients: of the pixels, and of the backbone's map (class activation maps).

A class activation map runs the backbone once; each band costs one pass forward and back through the head.

Every method takes the score y of an `ExplainedScore` and returns maps (K, B, H, W). It raises ConfigError where an
option is out of its range, and RunError where a gradient is not finite.
"""

import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from captum.attr import IntegratedGradients
from torch import Tensor, nn

from fgvc.errors import ConfigError, RunError
from fgvc.pooling import CovariancePooling
from fgvc.studies.attribution.eigenvectors import decomposition
from fgvc.studies.attribution.perturbation import extremal, occlusion, reference_images, rise
from fgvc.studies.attribution.score import TOGETHER, ExplainedScore, require_finite

_ROUNDING = 1e-6  # up to this part of its mean size the mean of a gradient over the locations counts as zero


def gradcam(score: ExplainedScore) -> Tensor:
    """Grad-CAM [Selvaraju et al., ICCV 2017] at the backbone's map A: max(0, sum_c w_c A_c), w_c = mean of dy / dA_c.

    A covariance does not change when a constant is added to a channel. So the gradient by what it reads has mean zero
    over the locations, and Grad-CAM gets its weights only from the ReLU of the reduction, which takes out some
    locations. Where it takes out none or all of them, the map is zero.

    Raises:
        RunError: a covariance head has no reduction, so that every map would be rounding noise.
    """
    head = score.model.head
    if isinstance(head.pooling, CovariancePooling) and isinstance(head.reduction, nn.Identity):
        raise RunError(
            "gradcam weighs channels by their mean gradient over the locations, and that of a covariance is zero "
            "without a reduction in front of it; use method=hirescam"
        )

    def combine(gradient: Tensor, features: Tensor) -> Tensor:
        weights = gradient.mean(dim=(2, 3), keepdim=True)
        rounding = weights.abs() <= _ROUNDING * gradient.abs().mean(dim=(1, 2, 3), keepdim=True)
        return (weights.masked_fill(rounding, 0) * features).sum(dim=1).clamp(min=0)

    return _activation_maps(score, combine)


def hirescam(score: ExplainedScore) -> Tensor:
    """HiResCAM [Draelos and Carin, 2020] at the backbone's map A: sum_c A_c dy / dA_c at each location, signed."""
    return _activation_maps(score, lambda gradient, features: (gradient * features).sum(dim=1))


def _activation_maps(score: ExplainedScore, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Maps (K, B, H, W); `combine` makes (B, h, w) of the gradient and the backbone's map, (B, C, h, w) each."""
    maps = []
    for band in score.bands:
        features = score.features.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(score.values(features, band).sum(), features)
        require_finite(gradient, f"gradients by the backbone's map (band {band})")
        maps.append(combine(gradient, features.detach()))
    return score.upsample(torch.stack(maps))


def integrated_gradients(score: ExplainedScore, steps: int = 32, reference: str = "mean") -> Tensor:
    """Integrated gradients [Sundararajan, Taly, Yan, ICML 2017], by captum.

    (x - r) times the mean of dy / dx on the way from r to x, summed over the three channels and signed. A map sums to
    y(x) - y(r), up to the error of the integral.

    Args:
        score: the score y; each band is integrated on its own.
        steps: nodes of the Gauss-Legendre rule.
        reference: r, see `reference_images`.
    """
    if steps < 1:
        raise ConfigError(f"integrated_gradients needs steps of at least 1, got {steps}")
    options = {"target": score.classes, "n_steps": steps, "internal_batch_size": max(TOGETHER, len(score.images))}
    start, maps = reference_images(score.images, reference), []
    for band in score.bands:
        integral = IntegratedGradients(lambda x, band=band: score.logits(score.model.backbone(x), band))
        parts = integral.attribute(score.images, start, **options)
        require_finite(parts, f"integrated gradients (band {band})")
        maps.append(parts.sum(dim=1))
    return torch.stack(maps)


_RECTIFIERS = (nn.ReLU, nn.ReLU6)
_ACTIVATION_MODULES = ("torch.nn.modules.activation", "timm.layers.activations", "timm.layers.activations_me")


def guided_backprop(score: ExplainedScore) -> Tensor:
    """Guided backpropagation [Springenberg et al., ICLR 2015 workshop]: each ReLU passes only positive gradients back.

    The map is the size of the gradient that arrives, summed over the three channels. ReLU6 counts as a ReLU that is cut
    off above: captum's rule is for nn.ReLU only and would silently skip those of EfficientNet-Lite.

    Raises:
        RunError: the backbone has no ReLU or ReLU6, or other activations, for which there is no such rule.
    """
    parts = list(score.model.backbone.modules())
    activations = [part for part in parts if type(part).__module__ in _ACTIVATION_MODULES]
    others = {type(part).__name__ for part in activations if not isinstance(part, (*_RECTIFIERS, nn.Identity))}
    if others or not any(isinstance(part, _RECTIFIERS) for part in parts):
        raise RunError(
            f"guided_backprop has a rule for ReLU and ReLU6 only, and this backbone has "
            f"{', '.join(sorted(others)) or 'no module of either'}; use method=integrated_gradients"
        )

    def hook(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        # on the output: an inplace activation does not allow a backward hook on the module
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient.clamp(min=0))  # type: ignore[no-untyped-call]  # torch's

    images, maps = score.images.clone().requires_grad_(), []
    with ExitStack() as hooks:
        for part in score.model.modules():
            if isinstance(part, _RECTIFIERS):
                hooks.enter_context(part.register_forward_hook(hook))
        features = score.model.backbone(images)
        for band in score.bands:
            (gradient,) = torch.autograd.grad(score.values(features, band).sum(), images, retain_graph=True)
            require_finite(gradient, f"gradients by the pixels (band {band})")
            maps.append(gradient.abs().sum(dim=1))
    return torch.stack(maps)


@dataclass(frozen=True)
class Method:
    """An attribution.

    Attributes:
        maps: Function of an `ExplainedScore` and options that returns maps (K, B, H, W).
        label: Name in figures.
        signed: Whether maps have negative values, for evidence against the class.
    """

    maps: Callable[..., Tensor]
    label: str
    signed: bool = False

    @property
    def options(self) -> dict[str, object]:
        """Names of the options and their defaults."""
        _, *options = inspect.signature(self.maps).parameters.values()
        return {option.name: option.default for option in options}


METHODS: dict[str, Method] = {
    "gradcam": Method(gradcam, "Grad-CAM"),
    "hirescam": Method(hirescam, "HiResCAM", signed=True),
    "integrated_gradients": Method(integrated_gradients, "Integrated gradients", signed=True),
    "guided_backprop": Method(guided_backprop, "Guided backpropagation"),
    "extremal": Method(extremal, "Extremal perturbation"),
    "rise": Method(rise, "RISE", signed=True),
    "occlusion": Method(occlusion, "Occlusion", signed=True),
    "decomposition": Method(decomposition, "Parts of the logit", signed=True),
}
"""Attributions by the name that `explain` takes."""


def require_methods(names: Sequence[str]) -> None:
    """Raise ConfigError where there is no name, or one that is not in `METHODS`."""
    unknown = [name for name in names if name not in METHODS]
    if unknown or not names:
        raise ConfigError(f"unknown attribution {', '.join(unknown) or 'none'}; choose from {', '.join(METHODS)}")
