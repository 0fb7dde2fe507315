"""What can be said of maps without a model: where their mass lies, how far two agree, and maps that know nothing.

Shapes: B images of H x W pixels.
"""

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import rankdata
from torch import Tensor

_CENTRE = 1 / 4  # standard deviation of the centred Gaussian, of the side


def share_inside(maps: Tensor, boxes: Tensor) -> Tensor:
    """Share of a map's positive values within a box; pixels that it cuts count in part.

    Args:
        maps: (B, H, W).
        boxes: (B, 4) left, top, right, bottom in pixels of the map (`fgvc.data.boxes_in_view`).

    Returns:
        (B,) float64; NaN where nothing is positive. Of a map of equal values it is the box's share of the area, which
        is what a map that knows nothing reaches.
    """
    mass = maps.double().clamp(min=0)
    height, width = maps.shape[-2:]
    left, top, right, bottom = boxes.to(mass).unbind(dim=1)
    inside = torch.einsum("bhw,bh,bw->b", mass, _covered(top, bottom, height), _covered(left, right, width))
    return _share(inside, mass.sum(dim=(1, 2)))


def _covered(start: Tensor, end: Tensor, length: int) -> Tensor:
    """Share of each of `length` pixels that lies between two places, (B,) and (B,) -> (B, length)."""
    pixel = torch.arange(length, dtype=start.dtype, device=start.device)
    return (torch.minimum(end[:, None], pixel + 1) - torch.maximum(start[:, None], pixel)).clamp(0, 1)


def half_mass_area(maps: Tensor) -> Tensor:
    """The smallest share of the pixels that holds half of a map's positive values, (B, H, W) -> (B,) float64.

    Small where a map is concentrated, 1/2 where all values are equal; NaN where nothing is positive.
    """
    mass = maps.double().clamp(min=0).flatten(1).sort(dim=1, descending=True).values
    sums = mass.cumsum(dim=1)
    needed = (sums < sums[:, -1:] / 2).sum(dim=1) + 1
    return _share(needed.double(), torch.where(sums[:, -1] > 0, mass.shape[1], 0).double())


def _share(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, part / whole.clamp(min=torch.finfo(whole.dtype).tiny), torch.nan)


def rank_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Spearman's correlation of two maps of each image, (B, h, w) and (B, h, w) -> (B,) float64; ties share a rank.

    NaN where one of them is constant.
    """
    a, b = (rankdata(maps.detach().cpu().flatten(1).numpy(), axis=1) for maps in (first, second))
    a, b = (ranks - ranks.mean(axis=1, keepdims=True) for ranks in (a, b))
    scale = np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
    products = (a * b).sum(axis=1)
    return torch.from_numpy(np.divide(products, scale, out=np.full_like(scale, np.nan), where=scale > 0))


def random_maps(count: int, size: tuple[int, int], *, grid: int = 7, seed: int = 0) -> Tensor:
    """Maps (count, H, W) of uniform noise, as smooth as those of a backbone's map: grid x grid values, bilinear."""
    noise = torch.rand(count, 1, grid, grid, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(noise, size=size, mode="bilinear", align_corners=False)[:, 0]


def centre_maps(count: int, size: tuple[int, int]) -> Tensor:
    """Maps (count, H, W) of a Gaussian in the middle, a quarter of each side wide: where photographers put a bird."""
    bells = [torch.exp(-(((torch.arange(side) + 0.5) / side - 0.5) ** 2) / (2 * _CENTRE**2)) for side in size]
    return torch.outer(*bells).expand(count, *size).clone()
