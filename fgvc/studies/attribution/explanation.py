"""Which pixels a model's score rests on, for all of the spectrum or a part of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fgvc.errors import ConfigError
from fgvc.models import FineGrainedModel
from fgvc.spectral import Band
from fgvc.studies.attribution.methods import METHODS, require_methods
from fgvc.studies.attribution.question import BandLike, as_found, pose, require_finite


@dataclass(frozen=True)
class Attribution:
    """Maps of B images, without gradients.

    Attributes:
        maps: (B, H, W) float32, at the images' size.
        classes: (B,) whose logit is explained.
        scores: (B,) that logit, of the head that sees `band` only.
        predicted: (B,) classes that the whole head predicts.
        band: eigenvalues that the head saw; None for all.
        method: name in `METHODS`.
    """

    maps: Tensor
    classes: Tensor
    scores: Tensor
    predicted: Tensor
    band: Band | None
    method: str


def explain(
    model: FineGrainedModel,
    images: Tensor,
    *,
    method: str = "gradcam",
    band: BandLike = None,
    classes: Tensor | Sequence[int] | int | None = None,
    **options: Any,
) -> Attribution:
    """Explain the logit of a class, of the model whose head sees a band of the eigenvalues only.

    The gradient through the spectral layer is the exact one whatever rule the head was trained with: an explanation
    wants the derivative of the score, not the one that trained well. The model is left as it was found.

    Args:
        model: on any device, in any mode; it is evaluated in evaluation mode.
        images: (B, 3, H, W), normalised as the model's were, of any size that its backbone takes.
        method: name in `METHODS`.
        band: eigenvalues that the head sees: N for the N largest, a pair (start, stop), or a text of `parse_band`, for
            which the rank is the median over these images; None for all. Other eigenvalues are set to the floor.
        classes: whose logit; one for all images or one for each. None: of each image the one that the whole head
            predicts, so that bands explain the same class.
        options: of the method, see `METHODS[method].options`.

    Raises:
        ConfigError: an unknown method, option, band or class, or images that are none.
        RunError: a head without a spectrum asked for a part of it, logits or gradients that are not finite, or a model
            that the method cannot explain.
    """
    return explain_bands(model, images, [band], method=method, classes=classes, **options)[0]


def explain_bands(
    model: FineGrainedModel,
    images: Tensor,
    bands: Sequence[BandLike],
    *,
    method: str = "gradcam",
    classes: Tensor | Sequence[int] | int | None = None,
    **options: Any,
) -> list[Attribution]:
    """As `explain`, for several bands, which share what they can: most methods run the backbone once for all."""
    require_methods([method])
    known = METHODS[method].options
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ConfigError(f"unknown option {', '.join(unknown)} of {method}; it takes {', '.join(known) or 'none'}")
    with as_found(model):
        question, predicted = pose(model, images, bands, classes)
        maps = METHODS[method].maps(question, **options).detach().float()
        with torch.no_grad():
            scores = [question.scores(question.features, band) for band in question.bands]
    for found, score in zip(maps, scores, strict=True):
        require_finite(found, f"maps of {method}")
        require_finite(score, "scores")
    return [
        Attribution(found, question.classes, score, predicted, band, method)
        for found, score, band in zip(maps, scores, question.bands, strict=True)
    ]
