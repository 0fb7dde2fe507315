"""From an RGB image to a normalised tensor: the published recipes at any size, and variations of them."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypedDict

import torch
from PIL import Image
from timm.data.auto_augment import posterize, rand_augment_transform
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

from fgvc.data.image_file import Box
from fgvc.errors import ConfigError
from fgvc.runs.config import TransformConfig

_RESIZES = ("short", "square")
_CROPS = ("center", "random", "random_resized", "none")
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")


class Normalization(TypedDict):
    """What a pretrained backbone expects of its input."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str


def normalization_from_timm(config: Mapping[str, Any]) -> Normalization:
    """Pick mean, std and interpolation out of `timm.data.resolve_model_data_config(model)`, for `TransformSpec`."""
    return {
        "mean": tuple(config["mean"]),
        "std": tuple(config["std"]),
        "interpolation": str(config["interpolation"]),
    }


@dataclass(kw_only=True, repr=False)
class TransformSpec(TransformConfig):
    """The recipe of a transform, and the transform itself: PIL image (RGB) -> (3, size, size) float32, normalised.

    It resizes, crops, mirrors and augments (the last two in training only), scales to [0, 1] and normalises. With the
    defaults and size 448 it is the published CUB recipe: the short side scaled to `size`, a centre crop, and random
    mirroring in training. [Li, Xie, Wang, Gao, CVPR 2018; Song, Sebe, Wang, ICCV 2021]

    Attributes:
        mean, std: Three numbers each, on the scale of [0, 1]; see `normalization_from_timm`.
        interpolation: "bilinear", "bicubic", ... (antialiased).
        training: Whether crops are random (where `crop` asks for it) and images are mirrored and augmented.
        resize_size: As in `TransformConfig`, but `size` in place of None, so that equal recipes have equal cache keys.
        resized: The first step in testing, PIL image -> PIL image.
        normalized: The steps after every crop, PIL image -> normalised float32 tensor.

    Raises:
        ConfigError: an unknown name, or sizes that contradict each other.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    training: bool

    def __post_init__(self) -> None:
        side = self.size if self.resize_size is None else self.resize_size
        self.resize_size, self.mean, self.std = side, tuple(self.mean), tuple(self.std)
        self._check(side)
        interpolation = InterpolationMode(self.interpolation)
        self.resized = v2.Resize([side] if self.resize == "short" else [side, side], interpolation=interpolation)
        to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()]
        self.normalized = v2.Compose([*to_tensor, v2.Normalize(mean=list(self.mean), std=list(self.std))])
        if self.training and self.crop == "random_resized":
            scale = (self.min_scale, 1.0)
            steps = [v2.RandomResizedCrop(self.size, scale=scale, interpolation=interpolation)]
        elif self.crop == "none":
            steps = [self.resized]
        else:
            random = self.training and self.crop == "random"
            steps = [self.resized, v2.RandomCrop(self.size) if random else v2.CenterCrop(self.size)]
        self._geometry = v2.Compose(steps)
        if self.mirrors:
            steps = [*steps, v2.RandomHorizontalFlip()]
        if self.training and self.randaugment is not None:
            steps = [*steps, _RandAugment(self.randaugment, self.mean, self.interpolation)]
        self._pipeline = v2.Compose([*steps, self.normalized])

    def _check(self, side: int) -> None:
        for name, choices in (("resize", _RESIZES), ("crop", _CROPS), ("interpolation", _INTERPOLATIONS)):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(choices)}")
        if not 1 <= self.size <= side:
            raise ConfigError(f"size={self.size} must be at least 1 and at most resize_size={side}")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ConfigError(f"mean={self.mean} and std={self.std} must be three numbers each, std above 0")
        if not 0 < self.min_scale <= 1:
            raise ConfigError(f"min_scale={self.min_scale} must be above 0 and at most 1: it is a share of the area")
        if self.crop == "none" and (self.resize == "short" or side != self.size):
            raise ConfigError("crop='none' needs resize='square' and resize_size=size, else images differ in size")

    def __repr__(self) -> str:
        # part of the keys of feature caches on users' disks, so the order of the fields stays that of earlier versions
        size, *others = (f"{field.name}={getattr(self, field.name)!r}" for field in fields(self))
        return f"TransformSpec({', '.join([size, *others[-4:], *others[:-4]])})"

    def __call__(self, image: Image.Image) -> Tensor:
        """PIL image (RGB) -> (3, size, size) float32, normalised."""
        result: Tensor = self._pipeline(image)
        return result

    def box(self, box: Box, size: tuple[int, int]) -> Box:
        """Where a box of an image lies in the result, clipped to it.

        Args:
            box: in pixels of the image.
            size: its width and height.

        Raises:
            ValueError: the result is not the same each time, as in training.
        """
        if self.training:
            raise ValueError("in training an image is cut and mirrored at random; use deterministic()")
        inside = torch.tensor([box], dtype=torch.float64).clamp(torch.zeros(4), torch.tensor(size * 2))
        moved = self._geometry(tv_tensors.BoundingBoxes(inside, format="XYXY", canvas_size=(size[1], size[0])))
        left, top, right, bottom = moved[0].clamp(0, self.size).tolist()
        return left, top, right, bottom

    def picture(self, inputs: Tensor) -> Tensor:
        """What the network sees, to be looked at: normalised (3, H, W) -> (H, W, 3), numbers from 0 to 1."""
        mean, std = (torch.tensor(channels, device=inputs.device)[:, None, None] for channels in (self.mean, self.std))
        return (inputs * std + mean).clamp(0, 1).permute(1, 2, 0)  # (3, H, W) -> (H, W, 3)

    @property
    def mirrors(self) -> bool:
        """Whether an image is mirrored at random."""
        return self.training and self.hflip

    @property
    def repeats(self) -> bool:
        """Whether an image always gives the same tensor, but for its mirroring."""
        return not self.training or (self.crop in ("center", "none") and self.randaugment is None)

    def deterministic(self) -> "TransformSpec":
        """The recipe in testing: center crop, no mirroring, no augmentation."""
        crop = "none" if self.crop == "none" else "center"
        # min_scale has no effect any more: equal recipes have equal keys
        return replace(self, training=False, hflip=False, crop=crop, min_scale=0.08, randaugment=None)


class _RandAugment(v2.Transform):  # type: ignore[misc]  # torchvision is untyped
    """timm's RandAugment [Cubuk, Zoph, Shlens, Le, 2020] on a PIL image, by timm's own notation.

    Draws from Python's and NumPy's generators, which a DataLoader seeds in its workers as it does torch's.
    """

    def __init__(self, notation: str, mean: tuple[float, ...], interpolation: str) -> None:
        super().__init__()
        fill = tuple(min(255, round(255 * channel)) for channel in mean)  # what an image moved aside leaves open
        kinds = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
        hparams = {"img_mean": fill, "interpolation": kinds.get(interpolation, Image.Resampling.BILINEAR)}
        try:
            self._augment = rand_augment_transform(notation, hparams)
        except (AssertionError, ValueError, KeyError, IndexError) as error:
            raise ConfigError(
                f"randaugment={notation!r} is not in timm's notation; give for example rand-m9-mstd0.5-inc1"
            ) from error
        for operation in self._augment.ops:
            if operation.aug_fn is posterize:
                operation.aug_fn = _posterize

    def forward(self, *inputs: Any) -> Any:
        (image,) = inputs
        return self._augment(image)


def _posterize(image: Image.Image, bits: int, **unused: Any) -> Image.Image:
    """timm's, which at its strongest asks for no bit at all: a black image to Pillow before 13, an error since."""
    result: Image.Image = posterize(image, max(bits, 1), **unused)
    return result
