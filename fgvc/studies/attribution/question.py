"""What an attribution explains: the logit of a class, of a model whose head sees a band of the eigenvalues.

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
from fgvc.studies.truncation.bands import ALL, parse_band, restrict_spectrum
from fgvc.training.step import untouched

BandLike = Keep | str | None
"""N for the N largest, a pair (start, stop), a text of `parse_band`; None for all that the head sees."""


@dataclass(frozen=True)
class Question:
    """The scores to explain.

    Attributes:
        model: in evaluation mode, its parameters without gradients.
        images: (B, 3, H, W), in the model's dtype, channels last.
        features: (B, C, h, w), the backbone's map of them, without gradients.
        classes: (B,) index of the class whose logit is explained.
        bands: K of them; None for all that the head sees.
    """

    model: FineGrainedModel
    images: Tensor
    features: Tensor
    classes: Tensor
    bands: Sequence[Band | None]

    def logits(self, features: Tensor, band: Band | None) -> Tensor:
        """Of a backbone's maps (N, C, h, w), by the head that sees `band`: (N, num_classes).

        The gradient through the spectral layer is the exact one whatever rule the head was trained with.
        """
        with restrict_spectrum(self.model, band, gradient="exact"):
            found: Tensor = self.model.head(features)
        return found

    def scores(self, features: Tensor, band: Band | None) -> Tensor:
        """As `logits`, of each image's class, for maps of the images' number or a multiple of it: (N,)."""
        logits = self.logits(features, band)
        return logits.gather(1, self.classes.repeat(len(logits) // len(self.classes))[:, None])[:, 0]

    def upsample(self, maps: Tensor) -> Tensor:
        """(..., h, w) -> (..., H, W), bilinear."""
        flat = maps.flatten(0, -3)[:, None].float()
        large = F.interpolate(flat, size=self.images.shape[-2:], mode="bilinear", align_corners=False)
        return large.reshape(*maps.shape[:-2], *self.images.shape[-2:])


@contextmanager
def as_found(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, parameters without gradients, gradients of other tensors on; afterwards all is as it was.

    Buffers, modes, `requires_grad`, random numbers; a gradient that a parameter has is left alone.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with untouched(model), torch.inference_mode(False), torch.enable_grad():
        try:
            model.eval().requires_grad_(False)
            yield
        finally:
            for parameter, needed in flags:
                parameter.requires_grad_(needed)


def prepare_images(model: FineGrainedModel, images: Tensor) -> Tensor:
    """Images as the model takes them: on its device, in its dtype, channels last (2.4 times faster on a CPU).

    Raises:
        ConfigError: no images (B, 3, H, W) of finite floating-point numbers.
    """
    if images.ndim != 4 or images.shape[1] != 3 or len(images) == 0 or not images.is_floating_point():
        raise ConfigError(
            f"images must be floating-point numbers of shape (B, 3, H, W), got {images.dtype} {tuple(images.shape)}"
        )
    broken = [i for i, image in enumerate(images) if not image.isfinite().all()]
    if broken:
        raise ConfigError(f"NaN or infinity in the pixels of images {broken} of the batch; check how they were read")
    like = next(model.parameters())
    # a clone: tensors made in inference mode carry no gradient
    moved = images.detach().clone().to(device=like.device, dtype=like.dtype)
    return moved.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def pose(
    model: FineGrainedModel, images: Tensor, bands: Sequence[BandLike], classes: Tensor | Sequence[int] | int | None
) -> tuple[Question, Tensor]:
    """The question and the classes (B,) that the whole head predicts, which are explained where no others are given.

    Raises:
        ConfigError: images that are none, an unknown band, classes that are not one of the model's for each image.
        RunError: logits that are not finite.
    """
    images = prepare_images(model, images)
    features = model.backbone(images)
    logits = model.head(features)
    require_finite(logits, "the model's logits")
    predicted = logits.argmax(dim=1)
    chosen = predicted if classes is None else _as_classes(classes, logits)
    return Question(model, images, features, chosen, resolve_bands(model, features, bands)), predicted


def resolve_bands(model: FineGrainedModel, features: Tensor, bands: Sequence[BandLike]) -> list[Band | None]:
    """Bands from what a user gives; the rank that a text needs is the median over these maps (B, C, h, w)."""
    rank = 0
    if any(isinstance(text, str) and text != "all" for text in bands):
        rank = median_rank(covariance_eigenvalues(model.head.pooling_input(features)).cpu().numpy())
    found = [parse_band(given, rank) if isinstance(given, str) else _as_band(given) for given in bands]
    return [None if band == ALL else band for band in found]


def _as_band(keep: Keep | None) -> Band | None:
    try:
        return to_band(keep)
    except ValueError as error:
        raise ConfigError(f"band: {error}") from error


def _as_classes(classes: Tensor | Sequence[int] | int, logits: Tensor) -> Tensor:
    """(B,) int64 on the device of the logits (B, num_classes)."""
    count, number = logits.shape
    chosen = torch.as_tensor(classes, dtype=torch.int64, device=logits.device)
    chosen = chosen.expand(count) if chosen.ndim == 0 else chosen
    if chosen.shape != (count,) or not ((chosen >= 0) & (chosen < number)).all():
        raise ConfigError(
            f"classes must be one index of {number} classes, or one for each of {count} images; got {classes}"
        )
    return chosen


def require_finite(values: Tensor, what: str) -> None:
    """Raise RunError where an entry of (B, ...) is NaN or infinite; the message names `what` and the images."""
    broken = [i for i, item in enumerate(values) if not item.isfinite().all()]
    if broken:
        raise RunError(f"{what} are not finite for images {broken} of the batch; check the run's weights")
