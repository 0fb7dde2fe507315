"""Several views of a test image by the recipe of one transform."""

from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from fgvc.data.transforms import TransformSpec
from fgvc.errors import ConfigError

VIEWS = {"single": 1, "mirror": 2, "ten_crop": 10}
"""Names of the ways to look at a test image, and the number of views V of each."""


@dataclass(frozen=True)
class ViewTransform:
    """PIL image (RGB) -> (V, 3, size, size) float32, normalised.

    "single" is the centre crop of the resized image. "mirror" adds the centre crop of the mirrored image: the two views
    whose scores the released code of Li et al., CVPR 2018, and Song et al., ICCV 2021, averages. "ten_crop" is the four
    corners, the centre, and the same five of the mirrored image.

    Args:
        spec: the recipe; its own crop and mirroring are not used.
        views: one of `VIEWS`.

    Raises:
        ConfigError: unknown views, or ten crops that would all be the same.
    """

    spec: TransformSpec
    views: str = "single"

    def __post_init__(self) -> None:
        if self.views not in VIEWS:
            raise ConfigError(f"views={self.views!r} is unknown; choose one of {', '.join(VIEWS)}")
        if self.views == "ten_crop" and not self.has_room and self.spec.resize == "square":
            raise ConfigError(
                f"views=ten_crop needs dataset.transform.resize_size above dataset.transform.size={self.spec.size}, "
                f"found {self.spec.resize_size}: all crops would be the same; give --resize-size N"
            )

    @property
    def has_room(self) -> bool:
        """Whether crops of every image can differ. Else those of a resize="short" differ along the longer side only."""
        return self.spec.resize_size != self.spec.size

    def __call__(self, image: Image.Image) -> Tensor:
        return torch.stack([self.spec.normalized(crop) for crop in self._crops(self.spec.resized(image))])

    def _crops(self, image: Image.Image) -> list[Image.Image]:
        if self.views == "ten_crop":
            return list(v2.TenCrop(self.spec.size)(image))
        images = [image] if self.views == "single" else [image, functional.horizontal_flip(image)]
        return [functional.center_crop(view, [self.spec.size]) for view in images]


def resized_spec(spec: TransformSpec, resize_size: int | None) -> TransformSpec:
    """The recipe in testing, resizing to `resize_size` pixels before the crop; None leaves it.

    Raises:
        ConfigError: `resize_size` below the size of the crop.
    """
    fixed = spec.deterministic()
    if resize_size in (None, fixed.resize_size):
        return fixed
    return replace(fixed, crop="center", resize_size=resize_size)
