"""Attributions from the scores of an image seen through masks: occlusion, RISE, extremal perturbations.

The backbone runs once for each mask and serves all bands; only extremal perturbations need a run for each band. The
masks of RISE and of extremal perturbations are smooth by construction. What the three take, return and raise is said in
`fgvc.studies.attribution.methods`; `reference` is what a mask hides the image with, see `reference_images`.
"""

import math
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as pixels

from fgvc.errors import ConfigError
from fgvc.spectral import Band
from fgvc.studies.attribution.score import TOGETHER, ExplainedScore, require_finite


def occlusion(score: ExplainedScore, window: float = 0.2, stride: float = 0.1, reference: str = "mean") -> Tensor:
    """Occlusion [Zeiler and Fergus, ECCV 2014]: how much the score falls where a square hides a pixel.

    The mean of y(x) - y(x without the square) over all squares that cover the pixel.

    Args:
        score: the score y and its images x.
        window: side of the square, in shorter sides of the image.
        stride: distance between two squares, in the same unit. The last square of a row or column ends at the border.
        reference: what fills the square.
    """
    _require_share("window", window)
    _require_share("stride", stride)
    if stride > window:
        raise ConfigError(f"stride={stride} leaves pixels uncovered by squares of window={window}; lower it")
    height, width = score.images.shape[-2:]
    edge, step = (max(round(part * min(height, width)), 1) for part in (window, stride))
    tops, lefts = (sorted({*range(0, side - edge, step), side - edge}) for side in (height, width))
    hides = score.images.new_zeros(len(tops) * len(lefts), height, width)  # 1 inside of a square
    for mask, (top, left) in zip(hides, product(tops, lefts), strict=True):
        mask[top : top + edge, left : left + edge] = 1
    whole = torch.stack([score.values(score.features, band) for band in score.bands])  # (K, B)
    falls = whole - _masked_scores(score, 1 - hides, reference)
    return torch.einsum("nkb,nhw->kbhw", falls, hides) / hides.sum(dim=0)


def rise(
    score: ExplainedScore, masks: int = 400, grid: int = 7, keep: float = 0.5, seed: int = 0, reference: str = "mean"
) -> Tensor:
    """RISE [Petsiuk, Das, Saenko, BMVC 2018]: how much better the score is where a random mask shows a pixel.

    sum_n (y_n - mean y) m_n / (N keep), y_n the score of the image seen through mask n. The paper does not subtract the
    mean: its scores are probabilities. Logits have no zero, and the mean would add the unevenness of the masks.

    Args:
        score: the score y; all images and bands see the same masks.
        masks: N. The noise of the map falls as N^(-1/2).
        grid: cells of a mask along each side. They are shown or hidden at random, upsampled and shifted at random.
        keep: probability that a cell is shown.
        seed: seed of the masks.
        reference: what is seen where a mask hides the image.
    """
    _require_share("keep", keep)
    if masks < 2 or grid < 1:
        raise ConfigError(f"rise needs masks of at least 2 and grid of at least 1, got {masks} and {grid}")
    height, width = score.images.shape[-2:]
    shown = _random_masks(masks, height, width, grid, keep, seed).to(score.images)
    scores = _masked_scores(score, shown, reference)
    return torch.einsum("nkb,nhw->kbhw", scores - scores.mean(dim=0), shown) / (masks * keep)


def _random_masks(count: int, height: int, width: int, grid: int, keep: float, seed: int) -> Tensor:
    """Masks of RISE (count, height, width) from 0 to 1; they depend on the seed alone, not on torch's generator."""
    generator = torch.Generator().manual_seed(seed)
    cells = (torch.rand(count, 1, grid + 1, grid + 1, generator=generator) < keep).float()
    rows, columns = math.ceil(height / grid), math.ceil(width / grid)
    size = ((grid + 1) * rows, (grid + 1) * columns)
    large = F.interpolate(cells, size=size, mode="bilinear", align_corners=False)[:, 0]
    tops, lefts = (torch.randint(side, (count,), generator=generator).tolist() for side in (rows, columns))
    return torch.stack([m[i : i + height, j : j + width] for m, i, j in zip(large, tops, lefts, strict=True)])


_SIGMA = 3 / 32  # width of the smooth maximum's kernel in sides of the image: 21 of 224 pixels, as in the paper
_COLDNESS = 20.0  # 1 / temperature of the smooth maximum
_RATE, _MOMENTUM = 2.0, 0.9
_FIRST_WEIGHT, _LAST_WEIGHT = 1.0, 300.0  # of the area


def extremal(
    score: ExplainedScore, area: float = 0.2, steps: int = 100, cells: int = 32, reference: str = "blur"
) -> Tensor:
    """Extremal perturbation, preservation game [Fong, Patrick, Vedaldi, ICCV 2019].

    The mask m of the given area that maximises y(m x + (1 - m) r) / |y(x) - y(r)| - w_t R(m), r the image blurred, m a
    smooth maximum of parameters on a grid (`smooth_masks`), and R(m) the mean square of sort(m) - v with v = 1 for the
    share `area` of the mask's values and 0 for the others. Gradient ascent with momentum, the parameters cut to [0, 1];
    w_t grows geometrically from 1 to 300. As in the released code R counts a margin around the image, so that a spot at
    the border is no cheaper than one inside.

    Ours differs from the paper's in four points. The reward is divided by what the image scores over the blurred one,
    so that one w_t serves heads and bands whose logits differ in size. There is one blurred image, not a pyramid of
    them. The mask is made on the grid and upsampled bilinearly. There are fewer steps (100 for 800), without mirroring.

    Args:
        score: the score y; each band has a search of its own.
        area: share of the image that is kept, in (0, 1).
        steps: steps of ascent, each one pass forward and back through the whole model.
        cells: cells of the parameters' grid along the shorter side.
        reference: r.
    """
    _require_share("area", area)
    if steps < 1 or cells < 2:
        raise ConfigError(f"extremal needs steps of at least 1 and cells of at least 2, got {steps} and {cells}")
    hidden = reference_images(score.images, reference)
    masks = [_best_masks(score, hidden, band, area, steps, cells) for band in score.bands]
    return score.upsample(torch.stack(masks))


def _best_masks(
    score: ExplainedScore, hidden: Tensor, band: Band | None, area: float, steps: int, cells: int
) -> Tensor:
    """The masks of one band on their grid, (B, rows, columns)."""
    images, backbone = score.images, score.model.backbone
    cell = min(images.shape[-2:]) / cells
    rows, columns = (max(round(side / cell), 1) for side in images.shape[-2:])
    margin = max(round(_SIGMA * cells), 1)
    parameters = images.new_full((len(images), rows, columns), 0.5).requires_grad_()
    kept = images.new_zeros((rows + 2 * margin) * (columns + 2 * margin))
    kept[: round(area * rows * columns)] = 1
    with torch.no_grad():
        unit = score.values(score.features, band) - score.values(backbone(hidden), band)
        unit = unit.abs().clamp(min=torch.finfo(unit.dtype).tiny)
    ascent = torch.optim.SGD([parameters], lr=_RATE, momentum=_MOMENTUM, dampening=_MOMENTUM, maximize=True)
    for step in range(steps):
        weight = _FIRST_WEIGHT * (_LAST_WEIGHT / _FIRST_WEIGHT) ** (step / max(steps - 1, 1))
        with_margin = smooth_masks(F.pad(parameters, [margin] * 4), _SIGMA * cells)
        masks = with_margin[:, margin:-margin, margin:-margin]
        seen = blend(images, hidden, score.upsample(masks))
        reward = score.values(backbone(seen), band) / unit
        miss = with_margin.flatten(1).sort(dim=1, descending=True).values - kept
        objective = reward - weight * miss.square().mean(dim=1)
        (parameters.grad,) = torch.autograd.grad(objective.sum(), parameters)
        require_finite(parameters.grad, f"gradients by the mask (band {band}, step {step + 1})")
        ascent.step()
        parameters.data.clamp_(0, 1)
    return masks.detach()


def smooth_masks(cells: Tensor, sigma: float) -> Tensor:
    """The smooth maximum of the parameters under a kernel: masks that change slowly whatever the parameters.

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


@torch.no_grad()
def _masked_scores(score: ExplainedScore, masks: Tensor, reference: str) -> Tensor:
    """Scores of every image through every mask (N, H, W), for each band: (N, K, B)."""
    hidden = reference_images(score.images, reference)
    count = len(score.images)
    scores = []
    for part in torch.split(masks, max(TOGETHER // count, 1)):
        seen = blend(score.images, hidden, part[:, None]).flatten(0, 1)  # (n B, 3, H, W), mask by mask
        features = score.model.backbone(seen.contiguous(memory_format=torch.channels_last))
        by_band = [score.values(features, band).view(len(part), count) for band in score.bands]
        scores.append(torch.stack(by_band, dim=1))
    return torch.cat(scores)


def blend(images: Tensor, reference: Tensor, masks: Tensor) -> Tensor:
    """m x + (1 - m) r of images x and references r, (B, 3, H, W), and masks m (..., H, W), B of them or one for all."""
    return torch.lerp(reference, images, masks[..., None, :, :].to(images.dtype))


_BLUR = 20 / 224  # standard deviation in sides of the image: 20 pixels of 224, as in the paper of `extremal`


def reference_images(images: Tensor, reference: str) -> Tensor:
    """What is seen where a mask hides a normalised image (B, 3, H, W).

    "blur": the image under a Gaussian of 0.09 of its shorter side. "mean": the normalisation's mean colour, which is 0.
    Raises ConfigError for another `reference`.
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


def _require_share(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise ConfigError(f"{name} must lie between 0 and 1 (both excluded), got {value}")
