"""Measures of maps: where their mass lies, how far two agree, and how a score falls or rises as pixels go.

Deletion and insertion [Petsiuk, Das, Saenko, "RISE: Randomized input sampling for explanation of black-box models",
BMVC 2018]: deletion replaces what the map ranks highest by a reference, insertion starts from the reference and puts it
back; after each step the score is the softmax probability of a class. Ours differs from theirs in three points:

- One reference serves both, so that the two ends of a curve are the same images for every map: the image blurred until
  little of it is recognised (`reference_images`). Theirs delete to a constant, whose edges are a new sight, and insert
  into a blur of sigma 5 at 224 pixels.
- Squares of pixels (`cell`) go together, in the order of the mean of the map in them. Single pixels scattered over an
  image disturb a network more than a connected part, and maps of single pixels would gain. `cell=1` is theirs.
- Several heads score the same pictures, and the backbone computes their maps once.

One random order of the cells, drawn from a seed and the same for every image and map, breaks ties. Row by row, a map
with many equal values would get the order of another one.

A head is a run that sees a band of the eigenvalues. All heads explain the true class of each image, so that maps of two
heads explain the same, and every head judges every map.

Shapes: B images of H x W pixels, J heads, K maps of each image, S steps, h x w cells.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import rankdata
from torch import Tensor

from fgvc.models import FineGrainedModel
from fgvc.spectral import Band
from fgvc.studies.attribution.explain import explain_bands
from fgvc.studies.attribution.perturbation import reference_images
from fgvc.studies.attribution.score import TOGETHER
from fgvc.studies.truncation.bands import band_logits

_log = logging.getLogger(__name__)


def share_inside(maps: Tensor, boxes: Tensor) -> Tensor:
    """Share of a map's positive values inside a box; a pixel that the box cuts counts in part.

    Args:
        maps: (..., B, H, W).
        boxes: (B, 4) left, top, right, bottom in pixels of the map (`fgvc.data.boxes_in_view`).

    Returns:
        (..., B) float64; NaN where nothing is positive. A map of equal values, which knows nothing, reaches the box's
        share of the area.
    """
    mass = maps.double().clamp(min=0)
    height, width = maps.shape[-2:]
    left, top, right, bottom = boxes.to(mass).unbind(dim=1)
    inside = torch.einsum("...bhw,bh,bw->...b", mass, _covered(top, bottom, height), _covered(left, right, width))
    total = mass.sum(dim=(-2, -1))
    return torch.where(total > 0, inside / total, torch.nan)


def _covered(start: Tensor, end: Tensor, length: int) -> Tensor:
    """Share of each of `length` pixels that lies between two places, (B,) and (B,) -> (B, length)."""
    pixel = torch.arange(length, dtype=start.dtype, device=start.device)
    return (torch.minimum(end[:, None], pixel + 1) - torch.maximum(start[:, None], pixel)).clamp(0, 1)


def half_mass_area(maps: Tensor) -> Tensor:
    """The smallest share of the pixels that holds half of a map's positive values, (..., H, W) -> (...) float64.

    Small where a map is concentrated, 1/2 where all values are equal; NaN where nothing is positive.
    """
    mass = maps.double().clamp(min=0).flatten(-2).sort(dim=-1, descending=True).values
    sums = mass.cumsum(dim=-1)
    needed = (sums < sums[..., -1:] / 2).sum(dim=-1) + 1
    return torch.where(sums[..., -1] > 0, needed.double() / mass.shape[-1], torch.nan)


def rank_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Spearman's correlation of two maps of each image, (B, h, w) and (B, h, w) -> (B,) float64; ties share a rank.

    NaN where one of them is constant.
    """
    a, b = (rankdata(maps.detach().cpu().flatten(1).numpy(), axis=1) for maps in (first, second))
    a, b = (ranks - ranks.mean(axis=1, keepdims=True) for ranks in (a, b))
    scale = np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
    products = (a * b).sum(axis=1)
    return torch.from_numpy(np.divide(products, scale, out=np.full_like(scale, np.nan), where=scale > 0))


def random_maps(count: int, size: tuple[int, int], *, seed: int = 0) -> Tensor:
    """Maps (count, H, W) of uniform noise, as smooth as those of a backbone's map: 7 x 7 values, bilinear."""
    noise = torch.rand(count, 1, 7, 7, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(noise, size=size, mode="bilinear", align_corners=False)[:, 0]


def centre_maps(count: int, size: tuple[int, int]) -> Tensor:
    """Maps (count, H, W) of a Gaussian in the middle, where photographers put a bird; sigma is a quarter of a side."""
    bells = [torch.exp(-(((torch.arange(side) + 0.5) / side - 0.5) ** 2) / (2 * (1 / 4) ** 2)) for side in size]
    return torch.outer(*bells).expand(count, *size).clone()


KINDS = ("deletion", "insertion")


@dataclass(frozen=True)
class Curves:
    """Probabilities of the explained class, step by step.

    Attributes:
        shares: Shares (S + 1,) of the cells that are replaced (deletion) or put back (insertion), from 0 to 1, float64.
        deletion, insertion: Probabilities (J, K, B, S + 1), float64.
    """

    shares: Tensor
    deletion: Tensor
    insertion: Tensor

    def auc(self, kind: str) -> Tensor:
        """Area under each curve by the trapezoidal rule, (J, K, B). Small deletion and large insertion are good."""
        return torch.trapezoid(getattr(self, kind), self.shares)


@torch.no_grad()
def deletion_insertion(
    backbone: Callable[[Tensor], Tensor],
    heads: Sequence[Callable[[Tensor], Tensor]],
    images: Tensor,
    classes: Tensor,
    maps: Tensor,
    *,
    reference: Tensor | None = None,
    steps: int = 16,
    cell: int = 16,
    seed: int = 0,
    batch_size: int = 4,
) -> Curves:
    """The curves of several maps of each image under several heads.

    Args:
        backbone: function of images (N, 3, H, W) that returns maps (N, C, h, w), in evaluation mode.
        heads: functions of these maps that return logits (N, classes).
        images: (B, 3, H, W).
        classes: (B,) int64, the classes whose probability is followed.
        maps: (K, B, H, W).
        reference: (B, 3, H, W), what deleted pixels become; None: the images blurred.
        steps: S.
        cell, seed: as in `cell_ranks`.
        batch_size: pictures through the backbone at once; on a CPU few are faster.
    """
    reference = reference_images(images, "blur") if reference is None else reference
    height, width = images.shape[-2:]
    ranks = cell_ranks(maps, cell, seed=seed)
    counts = step_counts(ranks[0, 0].numel(), steps)
    curves = torch.empty(2, len(heads), *maps.shape[:2], len(counts), dtype=torch.float64)

    def probabilities(pictures: Tensor, target: int) -> Tensor:
        """(J, N) of pictures (N, 3, H, W)."""
        ready = pictures.contiguous(memory_format=torch.channels_last)
        features = torch.cat([backbone(batch) for batch in torch.split(ready, batch_size)])
        logits = torch.stack([head(features) for head in heads])
        return logits.double().softmax(dim=-1)[..., target].cpu()

    for b, (image, substitute) in enumerate(zip(images, reference, strict=True)):
        target = int(classes[b])
        ends = probabilities(torch.stack([image, substitute]), target)
        deletion, insertion = curves[:, :, :, b]
        deletion[..., 0] = insertion[..., -1] = ends[:, :1]
        deletion[..., -1] = insertion[..., 0] = ends[:, 1:]
        for k, places in enumerate(ranks[:, b]):
            cells = places < counts[1:-1, None, None].to(places.device)  # (S - 1, h, w), those that are replaced
            masks = cells.repeat_interleave(cell, -2).repeat_interleave(cell, -1)[:, None, :height, :width]
            if len(masks):
                deletion[:, k, 1:-1] = probabilities(torch.where(masks, substitute, image), target)
                insertion[:, k, 1:-1] = probabilities(torch.where(masks, image, substitute), target)
    return Curves(counts.double() / counts[-1], *curves)


def cell_ranks(maps: Tensor, cell: int, *, seed: int = 0) -> Tensor:
    """Place of each cell in the order of a map, 0 for the highest: (..., H, W) -> (..., h, w) int64.

    Args:
        maps: finite numbers; negative ones rank below positive ones.
        cell: side of a cell in pixels.
        seed: seed of the order of ties.
    """
    means = cell_means(maps, cell)
    flat = means.flatten(-2)
    shuffled = torch.randperm(flat.shape[-1], generator=torch.Generator().manual_seed(seed)).to(flat.device)
    order = shuffled[flat[..., shuffled].argsort(dim=-1, descending=True, stable=True)]
    return order.argsort(dim=-1).reshape(means.shape)


def cell_means(maps: Tensor, cell: int) -> Tensor:
    """Means over squares of `cell` pixels, cut at the right and lower edge: (..., H, W) -> (..., h, w) float64."""
    pooled: Tensor = F.avg_pool2d(maps.reshape(-1, 1, *maps.shape[-2:]).double(), cell, ceil_mode=True)
    return pooled.reshape(*maps.shape[:-2], *pooled.shape[-2:])


def step_counts(cells: int, steps: int) -> Tensor:
    """Number of replaced cells after each step, (steps + 1,) int64 from 0 to all; no more steps than cells."""
    return torch.linspace(0, cells, min(steps, cells) + 1, dtype=torch.float64).round().long()


@dataclass(frozen=True)
class Head:
    """A trained head that sees a band.

    Attributes:
        label, seed, model: Label, seed and model of its run.
        band: The band as tables write it: "all", "top8", "8:".
        keep: The band; None for all that the head was trained on.
    """

    label: str
    seed: int
    band: str
    keep: Band | None
    model: FineGrainedModel

    def logits(self, features: Tensor) -> Tensor:
        """Logits (N, classes) of the backbone's maps (N, C, h, w)."""
        return band_logits(self.model.head, self.model.head.pooling_input(features), self.keep)


class MapSource(NamedTuple):
    """The head and the method that made a map; "none" where there is no head."""

    label: str
    band: str
    method: str


RANDOM, CENTRE = MapSource("none", "none", "random"), MapSource("none", "none", "centre")
"""Maps that know nothing: smooth noise, and a Gaussian in the middle, hard to beat where objects are centred."""


@dataclass(frozen=True)
class MapMeasures:
    """Measures of the maps of all heads of one seed.

    Attributes:
        heads: The J heads.
        sources: Sources of the K maps: each head and method, then `RANDOM` and `CENTRE`.
        curves: Deletion and insertion of all maps under all heads.
        cells: Mean of each map in each cell, (K, B, h, w) float64.
        half_area: `half_mass_area`, (K, B).
        inside: `share_inside`, (K, B); NaN where no boxes were given.
        box_area: Share of the image, (B,); NaN likewise.
    """

    heads: Sequence[Head]
    sources: Sequence[MapSource]
    curves: Curves
    cells: Tensor
    half_area: Tensor
    inside: Tensor
    box_area: Tensor

    @property
    def seed(self) -> int:
        return self.heads[0].seed


def measure(
    heads: Sequence[Head],
    backbone: Callable[[Tensor], Tensor],
    images: Sequence[Tensor],
    classes: Tensor,
    methods: Sequence[str],
    *,
    boxes: Tensor | None = None,
    steps: int = 16,
    cell: int = 16,
    seed: int = 0,
) -> MapMeasures:
    """Explain images by every head and method, and measure the maps.

    Args:
        heads: heads of one seed and one backbone; those of a run stand next to each other.
        backbone: their backbone in evaluation mode, or another module that computes the same faster.
        images: B of (3, H, W).
        classes: (B,) true classes.
        methods: names in `METHODS`.
        boxes: (B, 4) of `fgvc.data.boxes_in_view`.
        steps, cell: as in `deletion_insertion`; the maps are also compared cell by cell.
        seed: seed of random maps and of the order of ties.

    Raises:
        ConfigError, RunError: as `explain`.
    """
    height, width = images[0].shape[-2:]
    if boxes is None:
        boxes = torch.full((len(images), 4), torch.nan)
    noise, centre = random_maps(len(images), (height, width), seed=seed), centre_maps(TOGETHER, (height, width))
    logits = [head.logits for head in heads]
    parts = []
    started = time.monotonic()
    for start in range(0, len(images), TOGETHER):  # the maps of all images at full size would not fit into memory
        part = slice(start, start + TOGETHER)
        chunk = torch.stack(list(images[part])).contiguous(memory_format=torch.channels_last)
        maps = torch.stack([*_explained(heads, chunk, classes[part], methods), noise[part], centre[: len(chunk)]])
        curves = deletion_insertion(backbone, logits, chunk, classes[part], maps, steps=steps, cell=cell, seed=seed)
        extents = (half_mass_area(maps), share_inside(maps, boxes[part]))
        parts.append((curves.deletion, curves.insertion, cell_means(maps, cell), *extents))
        done, seconds = start + len(chunk), time.monotonic() - started
        _log.info("seed %d: %d of %d images, %.0f s", heads[0].seed, done, len(images), seconds)
    deletion, insertion, cells, half_area, inside = zip(*parts, strict=True)
    return MapMeasures(
        heads,
        [*(MapSource(head.label, head.band, method) for method in methods for head in heads), RANDOM, CENTRE],
        Curves(curves.shares, torch.cat(deletion, dim=2), torch.cat(insertion, dim=2)),
        torch.cat(cells, dim=1),
        torch.cat(half_area, dim=1),
        torch.cat(inside, dim=1),
        (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / (height * width),
    )


def _explained(heads: Sequence[Head], images: Tensor, classes: Tensor, methods: Sequence[str]) -> list[Tensor]:
    """Maps (B, H, W) of each method and head, in that order; the bands of a model are explained together."""
    by_model = [list(same) for _, same in groupby(heads, key=lambda head: id(head.model))]
    found = [
        explain_bands(same[0].model, images, [head.keep for head in same], method=method, classes=classes)
        for method in methods
        for same in by_model
    ]
    return [attribution.maps.cpu() for of_model in found for attribution in of_model]
