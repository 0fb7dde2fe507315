"""Attributions from gradients by the pixels."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from captum.attr import IntegratedGradients
from torch import Tensor, nn

from fgvc.errors import ConfigError, RunError
from fgvc.studies.attribution.masks import reference_images
from fgvc.studies.attribution.question import Question, require_finite

_TOGETHER = 8  # images of a pass: on a CPU larger batches leave its cache
_RECTIFIERS = (nn.ReLU, nn.ReLU6)
_ACTIVATIONS = ("torch.nn.modules.activation", "timm.layers.activations", "timm.layers.activations_me")
"""Modules of Python that define activations."""


def integrated_gradients(question: Question, steps: int = 32, reference: str = "mean") -> Tensor:
    """Integrated gradients [Sundararajan, Taly, Yan, ICML 2017], by captum.

    (x - r) times the mean of dy / dx on the way from r to x, summed over the three channels and signed: a map sums to
    y(x) - y(r), up to the error of the integral.

    Args:
        question: each band is integrated on its own.
        steps: nodes of the Gauss-Legendre rule.
        reference: r, see `reference_images`.

    Returns:
        (K, B, H, W).

    Raises:
        ConfigError: `steps` below 1, or an unknown reference.
        RunError: a gradient that is not finite.
    """
    if steps < 1:
        raise ConfigError(f"integrated_gradients needs steps of at least 1, got {steps}")
    start = reference_images(question.images, reference)
    found = []
    for band in question.bands:
        integral = IntegratedGradients(lambda x, band=band: question.logits(question.model.backbone(x), band))
        parts = integral.attribute(
            question.images,
            start,
            target=question.classes,
            n_steps=steps,
            internal_batch_size=max(_TOGETHER, len(question.images)),
        )
        require_finite(parts, f"integrated gradients (band {band})")
        found.append(parts.sum(dim=1))
    return torch.stack(found)


def guided_backprop(question: Question) -> Tensor:
    """Guided backpropagation [Springenberg et al., ICLR 2015 workshop]: at each ReLU only positive gradients go on.

    Size of the gradient that arrives, summed over the three channels. ReLU6 counts as a ReLU that is cut off above:
    captum's rule is for nn.ReLU only and would leave it out of EfficientNet-Lite without a word.

    Returns:
        (K, B, H, W), not negative.

    Raises:
        RunError: the backbone has no such module, or other activations, for which there is no such rule.
    """
    _require_rectifiers(question.model.backbone)
    images = question.images.clone().requires_grad_()
    found = []
    with _guided(question.model):
        features = question.model.backbone(images)
        for band in question.bands:
            (gradient,) = torch.autograd.grad(question.scores(features, band).sum(), images, retain_graph=True)
            require_finite(gradient, f"gradients by the pixels (band {band})")
            found.append(gradient.abs().sum(dim=1))
    return torch.stack(found)


@contextmanager
def _guided(model: nn.Module) -> Iterator[None]:
    """Within the context gradients that reach the output of a rectifier are cut off below 0."""

    def hook(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        # by the output and not by the module's own backward hook, which an inplace activation does not allow
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient.clamp(min=0))  # type: ignore[no-untyped-call]  # torch's

    handles = [part.register_forward_hook(hook) for part in model.modules() if isinstance(part, _RECTIFIERS)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _require_rectifiers(backbone: nn.Module) -> None:
    parts = list(backbone.modules())
    others = {
        type(part).__name__
        for part in parts
        if type(part).__module__ in _ACTIVATIONS and not isinstance(part, (*_RECTIFIERS, nn.Identity))
    }
    if others or not any(isinstance(part, _RECTIFIERS) for part in parts):
        raise RunError(
            f"guided_backprop has a rule for ReLU and ReLU6 only, and this backbone has "
            f"{', '.join(sorted(others)) or 'no module of either'}; use method=integrated_gradients"
        )
