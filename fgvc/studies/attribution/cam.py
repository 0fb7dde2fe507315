"""Class activation maps: gradient and value of the backbone's map, location by location.

The backbone runs once; each band costs one pass forward and back through the head.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fgvc.errors import RunError
from fgvc.pooling import CovariancePooling
from fgvc.studies.attribution.question import Question, require_finite

_ROUNDING = 1e-6
"""Up to this part of its mean size the mean of a gradient over the locations counts as zero."""


def gradcam(question: Question) -> Tensor:
    """Grad-CAM [Selvaraju et al., ICCV 2017] at the backbone's map A: max(0, sum_c w_c A_c), w_c = mean of dy / dA_c.

    A covariance does not change when a constant is added to a channel, so that dy / dX of what it reads has mean zero
    over the locations: of a covariance head Grad-CAM owes its weights to the ReLU of the reduction in between, which
    takes out some locations. Where it takes out none or all of them the map is zero.

    Raises:
        RunError: there is no reduction, so that every map would be rounding noise.
    """
    head = question.model.head
    if isinstance(head.pooling, CovariancePooling) and isinstance(head.reduction, nn.Identity):
        raise RunError(
            "gradcam weighs channels by their mean gradient over the locations, and that of a covariance is zero "
            "without a reduction in front of it; use method=hirescam"
        )

    def combine(gradient: Tensor, features: Tensor) -> Tensor:
        weights = gradient.mean(dim=(2, 3), keepdim=True)
        rounding = weights.abs() <= _ROUNDING * gradient.abs().mean(dim=(1, 2, 3), keepdim=True)
        return (weights.masked_fill(rounding, 0) * features).sum(dim=1).clamp(min=0)

    return _activation_maps(question, combine)


def hirescam(question: Question) -> Tensor:
    """HiResCAM [Draelos and Carin, 2020] at the backbone's map A: sum_c A_c dy / dA_c at each location, signed."""
    return _activation_maps(question, lambda gradient, features: (gradient * features).sum(dim=1))


def _activation_maps(question: Question, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Maps (K, B, H, W); `combine` makes (B, h, w) of the gradient and the map, (B, C, h, w) each."""
    found = []
    for band in question.bands:
        features = question.features.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(question.scores(features, band).sum(), features)
        require_finite(gradient, f"gradients by the backbone's map (band {band})")
        found.append(combine(gradient, features.detach()))
    return question.upsample(torch.stack(found))
