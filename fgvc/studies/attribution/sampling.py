"""Attributions from the scores of an image seen through many masks; the backbone runs once a mask for all bands."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fgvc.errors import ConfigError
from fgvc.studies.attribution.masks import blend, reference_images, require_share
from fgvc.studies.attribution.question import Question

_TOGETHER = 8  # images of a forward pass: on a CPU larger batches leave its cache


def rise(
    question: Question, masks: int = 400, grid: int = 7, keep: float = 0.5, seed: int = 0, reference: str = "mean"
) -> Tensor:
    """RISE [Petsiuk, Das, Saenko, BMVC 2018]: how much better the score is where a random mask shows a pixel.

    sum_n (y_n - mean y) m_n / (N keep), y_n the score of the image seen through mask n. The paper leaves the mean in:
    its scores are probabilities; of logits, which have no zero, it would be the masks' own unevenness.

    Args:
        question: all images and bands see the same masks.
        masks: N. The noise of the map falls as N^(-1/2).
        grid: cells of a mask along each side, shown or hidden at random, upsampled bilinearly and shifted at random.
        keep: probability that a cell is shown.
        seed: of the masks.
        reference: see `reference_images`.

    Returns:
        (K, B, H, W), signed.

    Raises:
        ConfigError: an option out of its range.
    """
    require_share("keep", keep)
    if masks < 2 or grid < 1:
        raise ConfigError(f"rise needs masks of at least 2 and grid of at least 1, got {masks} and {grid}")
    height, width = question.images.shape[-2:]
    shown = random_masks(masks, height, width, grid, keep, seed).to(question.images)
    scores = masked_scores(question, shown, reference)
    return torch.einsum("nkb,nhw->kbhw", scores - scores.mean(dim=0), shown) / (masks * keep)


def occlusion(question: Question, window: float = 0.2, stride: float = 0.1, reference: str = "mean") -> Tensor:
    """Occlusion [Zeiler and Fergus, ECCV 2014]: how much the score falls where a square hides a pixel.

    The mean over all squares that cover a pixel of y(x) - y(x without the square).

    Args:
        question: whose images are covered.
        window: side of the square, in shorter sides of the image.
        stride: between two squares, in the same unit.
        reference: see `reference_images`.

    Returns:
        (K, B, H, W), signed.

    Raises:
        ConfigError: an option out of its range.
    """
    require_share("window", window)
    require_share("stride", stride)
    if stride > window:
        raise ConfigError(f"stride={stride} leaves pixels uncovered by squares of window={window}; lower it")
    height, width = question.images.shape[-2:]
    hides = _squares(height, width, window, stride).to(question.images)
    whole = torch.stack([question.scores(question.features, band) for band in question.bands])  # (K, B)
    falls = whole - masked_scores(question, 1 - hides, reference)
    return torch.einsum("nkb,nhw->kbhw", falls, hides) / hides.sum(dim=0)


@torch.no_grad()
def masked_scores(question: Question, masks: Tensor, reference: str) -> Tensor:
    """Scores of every image through every mask (N, H, W), for each band: (N, K, B)."""
    hidden = reference_images(question.images, reference)
    count = len(question.images)
    found = []
    for part in torch.split(masks, max(_TOGETHER // count, 1)):
        seen = blend(question.images, hidden, part[:, None]).flatten(0, 1)  # (n B, 3, H, W), image by image
        features = question.model.backbone(seen.contiguous(memory_format=torch.channels_last))
        by_band = [question.scores(features, band).view(len(part), count) for band in question.bands]
        found.append(torch.stack(by_band, dim=1))
    return torch.cat(found)


def random_masks(count: int, height: int, width: int, grid: int, keep: float, seed: int) -> Tensor:
    """Masks of RISE (count, height, width) from 0 to 1; they depend on the seed alone, not on torch's generator."""
    generator = torch.Generator().manual_seed(seed)
    cells = (torch.rand(count, 1, grid + 1, grid + 1, generator=generator) < keep).float()
    rows, columns = math.ceil(height / grid), math.ceil(width / grid)
    size = ((grid + 1) * rows, (grid + 1) * columns)
    large = F.interpolate(cells, size=size, mode="bilinear", align_corners=False)[:, 0]
    tops = torch.randint(rows, (count,), generator=generator).tolist()
    lefts = torch.randint(columns, (count,), generator=generator).tolist()
    shifted = [mask[i : i + height, j : j + width] for mask, i, j in zip(large, tops, lefts, strict=True)]
    return torch.stack(shifted)


def _squares(height: int, width: int, window: float, stride: float) -> Tensor:
    """One mask a square, 1 inside, (N, height, width); the last of a row or column ends at the border."""
    side = min(height, width)
    edge, step = max(round(window * side), 1), max(round(stride * side), 1)
    tops = sorted({*range(0, height - edge, step), height - edge})
    lefts = sorted({*range(0, width - edge, step), width - edge})
    masks = torch.zeros(len(tops) * len(lefts), height, width)
    for mask, (i, j) in zip(masks, ((i, j) for i in tops for j in lefts), strict=True):
        mask[i : i + edge, j : j + edge] = 1
    return masks
