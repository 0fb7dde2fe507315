"""The score that an attribution explains: the logit of one class, from a head that sees a band of the eigenvalues.

Shapes in this package: B images of H x W pixels, K bands, N masks; a backbone's map is (B, C, h, w).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fgvc.errors import ConfigError, RunError
from fgvc.models import FineGrainedModel
from fgvc.runs.spectra import median_rank
from fgvc.spectral import Band, Keep, covariance_eigenvalues
from fgvc.spectral.maps import band as to_band
from fgvc.studies.truncation.bands import ALL, band_logits, parse_band
from fgvc.training.step import untouched

TOGETHER = 8
"""Images of one pass through the backbone: on a CPU larger batches leave its cache."""

BandLike = Keep | str | None
"""N for the N largest, a pair (start, stop), or a text of `parse_band`; None for all that the head sees."""


@dataclass(frozen=True)
class ExplainedScore:
    """The logit of one class for each image, as a function of the backbone's map and of the band.

    Attributes:
        model: Model in evaluation mode; its parameters have no gradients.
        images: Images (B, 3, H, W) in the model's dtype, channels last.
        features: The backbone's map of the images, (B, C, h, w), without gradients.
        classes: Index of the class whose logit is explained, (B,).
        bands: The K bands; None for all eigenvalues that the head sees.
    """

    model: FineGrainedModel
    images: Tensor
    features: Tensor
    classes: Tensor
    bands: Sequence[Band | None]

    def logits(self, features: Tensor, band: Band | None) -> Tensor:
        """Logits of all classes from the head that sees `band`: (N, C, h, w) -> (N, num_classes), as `band_logits`."""
        return band_logits(self.model.head, self.model.head.pooling_input(features), band)

    def values(self, features: Tensor, band: Band | None) -> Tensor:
        """The explained logits (N,) of the maps (N, C, h, w); N is the number of images or a multiple of it."""
        logits = self.logits(features, band)
        return logits.gather(1, self.classes.repeat(len(logits) // len(self.classes))[:, None])[:, 0]

    def upsample(self, maps: Tensor) -> Tensor:
        """Resize maps to the size of the images, bilinear: (..., h, w) -> (..., H, W)."""
        flat = maps.flatten(0, -3)[:, None].float()
        large = F.interpolate(flat, size=self.images.shape[-2:], mode="bilinear", align_corners=False)
        return large.reshape(*maps.shape[:-2], *self.images.shape[-2:])


@torch.no_grad()
def prepare_score(
    model: FineGrainedModel, images: Tensor, bands: Sequence[BandLike], classes: Tensor | Sequence[int] | int | None
) -> tuple[ExplainedScore, Tensor]:
    """The score to explain, and the classes (B,) that the whole head predicts. Without `classes` these are explained.

    Raises:
        ConfigError: bad images, an unknown band, or classes that are not one of the model's for each image.
        RunError: the logits are not finite.
    """
    images = prepare_images(model, images)
    features = model.backbone(images)
    logits = model.head(features)
    require_finite(logits, "the model's logits")
    predicted = logits.argmax(dim=1)
    count, number = logits.shape
    chosen = torch.as_tensor(predicted if classes is None else classes, dtype=torch.int64, device=logits.device)
    chosen = chosen.expand(count) if chosen.ndim == 0 else chosen
    if chosen.shape != (count,) or not ((chosen >= 0) & (chosen < number)).all():
        raise ConfigError(
            f"classes must be one index of {number} classes, or one for each of {count} images; got {classes}"
        )
    return ExplainedScore(model, images, features, chosen, resolve_bands(model, features, bands)), predicted


def prepare_images(model: FineGrainedModel, images: Tensor) -> Tensor:
    """Images on the model's device, in its dtype, and channels last, which is 2.4 times faster on a CPU.

    Raises ConfigError: `images` are not finite floating-point numbers of shape (B, 3, H, W).
    """
    if images.ndim != 4 or images.shape[1] != 3 or len(images) == 0 or not images.is_floating_point():
        raise ConfigError(
            f"images must be floating-point numbers of shape (B, 3, H, W), got {images.dtype} {tuple(images.shape)}"
        )
    broken = _not_finite(images)
    if broken:
        raise ConfigError(f"NaN or infinity in the pixels of images {broken} of the batch; check how they were read")
    like = next(model.parameters())
    # a clone: tensors made in inference mode carry no gradient
    moved = images.detach().clone().to(device=like.device, dtype=like.dtype)
    return moved.contiguous(memory_format=torch.channels_last)


def resolve_bands(model: FineGrainedModel, features: Tensor, bands: Sequence[BandLike]) -> list[Band | None]:
    """The bands that a user means; a text refers to the median rank over these maps (B, C, h, w)."""
    rank = 0
    if any(isinstance(band, str) and band != "all" for band in bands):
        rank = median_rank(covariance_eigenvalues(model.head.pooling_input(features)).cpu().numpy())
    parsed = [parse_band(band, rank) if isinstance(band, str) else band for band in bands]
    try:
        resolved = [to_band(band) for band in parsed]
    except ValueError as error:
        raise ConfigError(f"band: {error}") from error
    return [None if band == ALL else band for band in resolved]


def require_finite(values: Tensor, name: str) -> None:
    """Raise RunError where an entry of (B, ...) is NaN or infinite; the message has `name` and the images' numbers."""
    broken = _not_finite(values)
    if broken:
        raise RunError(f"{name} are not finite for images {broken} of the batch; check the run's weights")


def _not_finite(values: Tensor) -> list[int]:
    return [i for i, item in enumerate(values) if not item.isfinite().all()]


@contextmanager
def frozen_evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluate a model without gradients of its parameters; other tensors may have gradients.

    When the block ends, the model has its buffers, modes and `requires_grad` back, and torch its random numbers.
    Gradients that parameters hold are left alone.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with untouched(model), torch.inference_mode(False), torch.enable_grad():
        try:
            model.eval().requires_grad_(False)
            yield
        finally:
            for parameter, needed in flags:
                parameter.requires_grad_(needed)
