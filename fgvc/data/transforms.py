"""From an RGB image to a normalised tensor: the published recipes, variations, and several views of an image."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from timm.data.auto_augment import posterize, rand_augment_transform
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from fgvc.data.dataset import ImageDataset
from fgvc.data.image_file import Box, UnreadableImageError, to_pixels
from fgvc.errors import ConfigError, DatasetError
from fgvc.runs.config import LARGEST_SIDE, TransformConfig

VIEWS = {"single": 1, "mirror": 2, "ten_crop": 10}
"""Names of the ways to look at a test image, with their numbers of views V."""

_RESIZES = ("short", "square")
_CROPS = ("center", "random", "random_resized", "none")
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic")


def normalization_from_timm(config: Mapping[str, Any]) -> dict[str, Any]:
    """Mean, std and interpolation of `timm.data.resolve_model_data_config(model)`, for `TransformSpec`."""
    mean, std = tuple(config["mean"]), tuple(config["std"])
    return {"mean": mean, "std": std, "interpolation": str(config["interpolation"])}


@dataclass(kw_only=True)
class TransformSpec(TransformConfig):
    """The recipe of a transform, and the transform itself: PIL image (RGB) -> (3, size, size) float32, normalised.

    It resizes, crops, mirrors and augments (the last two in training only), scales to [0, 1] and normalises. With the
    defaults and size 448 it is the published CUB recipe: the short side scaled to `size`, a centre crop, and random
    mirroring in training. [Li, Xie, Wang, Gao, CVPR 2018; Song, Sebe, Wang, ICCV 2021]

    The steps are built once: do not set a field later, but make another recipe with `dataclasses.replace`.

    Attributes:
        mean, std: Three numbers each, on the scale of [0, 1]; see `normalization_from_timm`.
        interpolation: "bilinear" or "bicubic" (antialiased, on 8 bits), or "nearest".
        training: Whether crops are random (where `crop` asks for it) and images are mirrored and augmented.
        resize_size: As in `TransformConfig`, but `size` in place of None, so that equal recipes have equal cache keys.
        mirrors: Whether an image is mirrored at random.
        shorter_side: Number of pixels that an image needs at least, see `side` of `decode_rgb`; 0 where it needs all.
        resized: The first step in testing, on pixels (3, H, W) uint8.

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
        self.mirrors = self.training and self.hflip
        self._check(side)
        interpolation = InterpolationMode(self.interpolation)
        self.resized = v2.Resize([side] if self.resize == "short" else [side, side], interpolation=interpolation)
        cuts_parts = self.training and self.crop == "random_resized"
        self.shorter_side = 0 if cuts_parts else side
        # (x / 255 - mean) / std in one pass over the pixels
        std = torch.tensor(self.std, dtype=torch.float64)[:, None, None]
        self._scale = (1 / (255 * std)).float()
        self._shift = (-torch.tensor(self.mean, dtype=torch.float64)[:, None, None] / std).float()
        if cuts_parts:
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
        self._pipeline = v2.Compose(steps)
        # of normalised pixels, where 0 is the mean colour; one that never erases would draw a number
        self._erase = v2.RandomErasing(self.erasing) if self.training and self.erasing else v2.Identity()

    def _check(self, side: int) -> None:
        for name, choices in (("resize", _RESIZES), ("crop", _CROPS), ("interpolation", _INTERPOLATIONS)):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(choices)}")
        if not 1 <= self.size <= side:
            raise ConfigError(f"size={self.size} must be at least 1 and at most resize_size={side}")
        if side > LARGEST_SIDE:
            raise ConfigError(f"resize_size={side} must be at most {LARGEST_SIDE} pixels")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ConfigError(f"mean={self.mean} and std={self.std} must be three numbers each, std above 0")
        if not 0 < self.min_scale <= 1:
            raise ConfigError(f"min_scale={self.min_scale} must be above 0 and at most 1: it is a share of the area")
        if self.crop == "none" and (self.resize == "short" or side != self.size):
            raise ConfigError("crop='none' needs resize='square' and resize_size=size, else images differ in size")

    def __call__(self, image: Image.Image) -> Tensor:
        """PIL image (RGB) -> (3, size, size) float32, normalised."""
        erased: Tensor = self._erase(self.normalized(self._pipeline(to_pixels(image))))
        return erased

    def normalized(self, pixels: Tensor) -> Tensor:
        """The last step: pixels (3, H, W) uint8 -> float32 of the backbone's mean and std."""
        return torch.addcmul(self._shift, pixels, self._scale).contiguous()

    def box(self, box: Box, size: tuple[int, int]) -> Box:
        """The place of a box, in pixels of an image of this width and height, in the result of a test, cut to it."""
        inside = torch.tensor([box], dtype=torch.float64).clamp(torch.zeros(4), torch.tensor(size * 2))
        moved = self._geometry(tv_tensors.BoundingBoxes(inside, format="XYXY", canvas_size=(size[1], size[0])))
        left, top, right, bottom = moved[0].clamp(0, self.size).tolist()
        return left, top, right, bottom

    def picture(self, inputs: Tensor) -> Tensor:
        """The network's input as a picture: normalised (3, H, W) -> (H, W, 3), numbers from 0 to 1."""
        mean, std = (torch.tensor(channels, device=inputs.device)[:, None, None] for channels in (self.mean, self.std))
        return (inputs * std + mean).clamp(0, 1).permute(1, 2, 0)  # (3, H, W) -> (H, W, 3)

    @property
    def repeats(self) -> bool:
        """Whether an image always gives the same tensor, except for its mirroring."""
        fixed = self.crop in ("center", "none") and self.randaugment is None and not self.erasing
        return not self.training or fixed

    def deterministic(self) -> "TransformSpec":
        """The recipe in testing: center crop, no mirroring, no augmentation."""
        crop = "none" if self.crop == "none" else "center"
        # min_scale has no effect then: equal recipes must have equal cache keys
        return replace(self, training=False, hflip=False, crop=crop, min_scale=0.08, randaugment=None, erasing=0.0)


@dataclass(frozen=True)
class ViewTransform:
    """PIL image (RGB) -> (V, 3, size, size) float32, normalised.

    "single" is the centre crop of the resized image. "mirror" adds the centre crop of the mirrored image: the two views
    whose scores are averaged in the released code of Li et al., CVPR 2018, and Song et al., ICCV 2021. "ten_crop" is
    the four corners, the centre, and the same five of the mirrored image.

    Args:
        spec: the recipe; its crop and mirroring are not used.
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
        """Whether crops of every image can differ; else, with resize="short", only those along the longer side can."""
        return self.spec.resize_size != self.spec.size

    @property
    def shorter_side(self) -> int:
        """As that of the recipe."""
        return self.spec.shorter_side

    def __call__(self, image: Image.Image) -> Tensor:
        return torch.stack([self.spec.normalized(crop) for crop in self._crops(self.spec.resized(to_pixels(image)))])

    def _crops(self, pixels: Tensor) -> list[Tensor]:
        if self.views == "ten_crop":
            return list(v2.TenCrop(self.spec.size)(pixels))
        images = [pixels] if self.views == "single" else [pixels, functional.horizontal_flip(pixels)]
        return [functional.center_crop(view, [self.spec.size]) for view in images]


def resized_spec(spec: TransformSpec, resize_size: int | None) -> TransformSpec:
    """The recipe in testing, with another `resize_size` in pixels; None keeps it.

    Raises ConfigError: `resize_size` is below the size of the crop.
    """
    fixed = spec.deterministic()
    changed = resize_size not in (None, fixed.resize_size)
    return replace(fixed, crop="center", resize_size=resize_size) if changed else fixed


def boxes_in_view(dataset: ImageDataset, indices: Sequence[int]) -> Tensor:
    """Bounding boxes after the dataset's own crop and transform.

    Args:
        dataset: a dataset with boxes, and with a `TransformSpec` of testing as its transform.
        indices: indices of the images.

    Returns:
        (len(indices), 4) float64: left, top, right, bottom in pixels of the transformed image, clipped to it. A box
        that the transform cuts off has area 0.

    Raises:
        DatasetError: the dataset has no boxes, or an image cannot be read.
    """
    spec = dataset.transform
    assert isinstance(spec, TransformSpec)
    if dataset.boxes is None:
        raise DatasetError(
            f"{dataset.root}: no bounding boxes were read; only cub, cars, aircraft, dogs and nabirds have them, read "
            "with dataset.options.boxes=true"
        )
    found = []
    for index in indices:
        try:
            size = dataset.decode(index).size
        except UnreadableImageError as error:
            raise DatasetError(f"{dataset.paths[index]}: {error}; replace it") from error
        x, y = dataset.region(index).corner
        left, top, right, bottom = dataset.boxes[index]
        found.append(spec.box((left - x, top - y, right - x, bottom - y), size))
    return torch.tensor(found, dtype=torch.float64).reshape(-1, 4)


class _RandAugment(v2.Transform):  # type: ignore[misc]  # torchvision is untyped
    """timm's RandAugment [Cubuk, Zoph, Shlens, Le, 2020] of pixels (3, H, W) uint8, in timm's notation.

    It draws from the generators of Python and NumPy, which a DataLoader seeds in its workers like torch's.
    """

    def __init__(self, notation: str, mean: tuple[float, ...], interpolation: str) -> None:
        super().__init__()
        fill = tuple(min(255, round(255 * channel)) for channel in mean)  # colour of what a shifted image uncovers
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
        (pixels,) = inputs
        return to_pixels(self._augment(functional.to_pil_image(pixels)))


def _posterize(image: Image.Image, bits: int, **unused: Any) -> Image.Image:
    """timm's function, which asks for 0 bits at its strongest: a black image before Pillow 13, an error since."""
    result: Image.Image = posterize(image, max(bits, 1), **unused)
    return result
