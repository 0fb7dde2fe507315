"""Images seen through masks: what stands in for the hidden pixels, and masks that are smooth by construction."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as pixels

from fgvc.errors import ConfigError

_BLUR = 20 / 224  # standard deviation in sides of the image: 20 pixels of 224, as in the paper of `extremal`
_COLDNESS = 20.0  # 1 / temperature of the smooth maximum


def reference_images(images: Tensor, reference: str) -> Tensor:
    """What an image (B, 3, H, W) is replaced with where a mask hides it.

    Args:
        images: normalised.
        reference: "blur", the image under a Gaussian of 0.09 of its shorter side; "mean", the normalisation's mean
            colour, which is 0.

    Raises:
        ConfigError: another one.
    """
    if reference == "mean":
        return torch.zeros_like(images)
    if reference != "blur":
        raise ConfigError(f"reference={reference!r} is unknown; choose blur or mean")
    side = min(images.shape[-2:])
    sigma = _BLUR * side
    radius = min(math.ceil(2 * sigma), side - 1)  # the border is mirrored, at most once
    blurred: Tensor = pixels.gaussian_blur(images, [2 * radius + 1] * 2, [sigma] * 2)
    return blurred.contiguous(memory_format=torch.channels_last)


def blend(images: Tensor, reference: Tensor, masks: Tensor) -> Tensor:
    """m x + (1 - m) r of images and references (B, 3, H, W) and masks (..., H, W), B of them or one for all."""
    return torch.lerp(reference, images, masks[..., None, :, :].to(images.dtype))


def smooth_masks(cells: Tensor, sigma: float) -> Tensor:
    """Masks that change slowly whatever their parameters: the smooth maximum of these under a kernel.

    m(u) = sum_v f_v exp(f_v / T) / sum_v exp(f_v / T) with f_v = k(u - v) cells(v), T = 1 / 20 and
    k(d) = exp(-2 max(0, |d| / sigma - 1 / 2)^2), over the cells v up to 2 sigma away; outside of the grid they are 0.

    Args:
        cells: parameters from 0 to 1, (N, h, w).
        sigma: width of the kernel in cells.

    Returns:
        (N, h, w), from 0 to 1.
    """
    radius = math.ceil(2 * sigma)
    steps = torch.arange(-radius, radius + 1, device=cells.device, dtype=cells.dtype)
    distance = torch.hypot(steps[:, None], steps[None, :])
    kernel = torch.exp(-2 * (distance / sigma - 0.5).clamp(min=0) ** 2).flatten()  # (n,), n = (2 radius + 1)^2
    around = F.unfold(cells[:, None], 2 * radius + 1, padding=radius) * kernel[:, None]  # (N, n, h w)
    return (around * torch.softmax(_COLDNESS * around, dim=1)).sum(dim=1).view_as(cells)


def grid_shape(height: int, width: int, cells: int) -> tuple[int, int]:
    """Rows and columns of a grid of square cells, `cells` of them along the shorter side of an image."""
    cell = min(height, width) / cells
    return max(round(height / cell), 1), max(round(width / cell), 1)


def require_share(name: str, value: float) -> None:
    """Raise ConfigError where `value`, called `name` in the message, is not between 0 and 1, both excluded."""
    if not 0 < value < 1:
        raise ConfigError(f"{name} must lie between 0 and 1 (both excluded), got {value}")
