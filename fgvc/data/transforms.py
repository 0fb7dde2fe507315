"""From an RGB image to a normalised tensor: the published CUB recipe at any size, and variations of it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from fgvc.errors import ConfigError

_RESIZES = ("short", "square")
_CROPS = ("center", "random", "none")
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")


class Normalization(TypedDict):
    """What a pretrained backbone expects of its input."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str


def normalization_from_timm(config: Mapping[str, Any]) -> Normalization:
    """Pick mean, std and interpolation out of `timm.data.resolve_model_data_config(model)`, for `create_transform`."""
    return {
        "mean": tuple(config["mean"]),
        "std": tuple(config["std"]),
        "interpolation": str(config["interpolation"]),
    }


@dataclass(frozen=True, kw_only=True)
class TransformSpec:
    """The recipe of a transform, and the transform itself: call it on a PIL image.

    Fields are the arguments of `create_transform`. The `repr` holds them all and enters cache keys; `resize_size` is
    filled in, so that equal recipes have equal keys.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    training: bool
    resize: str = "short"
    resize_size: int | None = None
    crop: str = "center"
    hflip: bool = True

    def __post_init__(self) -> None:
        # frozen, so fields are completed this way; the pipeline is built once
        object.__setattr__(self, "resize_size", self.size if self.resize_size is None else self.resize_size)
        object.__setattr__(self, "mean", tuple(self.mean))
        object.__setattr__(self, "std", tuple(self.std))
        self._check()
        object.__setattr__(self, "_pipeline", v2.Compose(self._steps()))

    def _check(self) -> None:
        for name, choices in (("resize", _RESIZES), ("crop", _CROPS), ("interpolation", _INTERPOLATIONS)):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(choices)}")
        if not 1 <= self.size <= self._resized:
            raise ConfigError(f"size={self.size} must be at least 1 and at most resize_size={self._resized}")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ConfigError(f"mean={self.mean} and std={self.std} must be three numbers each, std above 0")
        if self.crop == "none" and (self.resize == "short" or self._resized != self.size):
            raise ConfigError("crop='none' needs resize='square' and resize_size=size, else images differ in size")

    def __call__(self, image: Image.Image) -> Tensor:
        """PIL image (RGB) -> (3, size, size) float32, normalised."""
        result: Tensor = self._pipeline(image)  # type: ignore[attr-defined]
        return result

    @property
    def _resized(self) -> int:
        return self.size if self.resize_size is None else self.resize_size

    def _steps(self) -> list[v2.Transform]:
        steps = [self.resize_step()]
        if self.crop != "none":
            random = self.training and self.crop == "random"
            steps.append(v2.RandomCrop(self.size) if random else v2.CenterCrop(self.size))
        if self.mirrors:
            steps.append(v2.RandomHorizontalFlip())
        return [*steps, *self.tensor_steps()]

    def resize_step(self) -> v2.Transform:
        """PIL image -> PIL image, before any crop."""
        side = [self._resized] if self.resize == "short" else [self._resized, self._resized]
        return v2.Resize(side, interpolation=InterpolationMode(self.interpolation))

    def tensor_steps(self) -> list[v2.Transform]:
        """PIL image -> normalised float32 tensor, after every crop."""
        normalize = v2.Normalize(mean=list(self.mean), std=list(self.std))
        return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor(), normalize]

    @property
    def mirrors(self) -> bool:
        """Whether an image is mirrored at random."""
        return self.training and self.hflip

    def deterministic(self) -> "TransformSpec":
        """The recipe in testing: center crop, no mirroring."""
        return replace(self, training=False, hflip=False, crop="center" if self.crop == "random" else self.crop)


def create_transform(
    *,
    size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    interpolation: str,
    training: bool,
    resize: str = "short",
    resize_size: int | None = None,
    crop: str = "center",
    hflip: bool = True,
) -> TransformSpec:
    """Resize, crop, mirror (training only), scale to [0, 1] and normalise.

    The defaults are the published CUB recipe (size 448): short side to `size`, center crop, random mirroring in
    training.
    [Li, Xie, Wang, Gao, CVPR 2018; Song, Sebe, Wang, ICCV 2021]

    Args:
        size: height and width of the result in pixels.
        mean, std: three numbers each, on the scale of [0, 1]; see `normalization_from_timm`.
        interpolation: "bilinear", "bicubic", ... (antialiased).
        training: random crop (where asked for) and mirroring; False gives the deterministic recipe.
        resize: "short" scales the short side to `resize_size`; "square" both sides, changing the proportions.
        resize_size: pixels before the crop; None means `size`.
        crop: "center"; "random" (center in testing); "none" only with "square".
        hflip: mirror half of the training images left to right.

    Raises:
        ConfigError: an unknown name, or sizes that contradict each other.
    """
    return TransformSpec(
        size=size,
        mean=mean,
        std=std,
        interpolation=interpolation,
        training=training,
        resize=resize,
        resize_size=resize_size,
        crop=crop,
        hflip=hflip,
    )
