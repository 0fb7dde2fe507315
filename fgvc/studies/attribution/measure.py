"""Maps measured: where their mass lies, how far two agree, and how a score falls or rises as pixels go.

Deletion and insertion [Petsiuk, Das, Saenko, "RISE: Randomized input sampling for explanation of black-box models",
BMVC 2018]: deletion replaces what the map ranks highest by a reference, insertion starts from the reference and puts it
back; after each step the score is the softmax probability of a class. Ours differs from theirs in three points:

- One reference serves both, so the two ends of a curve are the same images for every map: the image blurred until
  little of it is recognised (`reference_images`). Theirs delete to a constant, whose edges are a new sight, and insert
  into a blur of sigma 5 at 224 pixels.
- Squares of pixels (`cell`) go together, in the order of the mean of the map in them. Single pixels scattered over an
  image disturb a network more than a connected part, and maps of single pixels would gain. `cell=1` is theirs.
- Several heads judge the same pictures, and the backbone computes their maps once.

One random order of the cells, drawn from a seed and the same for every image and map, breaks ties; row by row would
give a map with many equal values the order of another one.

A head is a run that sees a band of the eigenvalues. Every head explains the true class of each image, so maps of two
heads explain the same. Every head judges every map.

Shapes: B images of H x W pixels, J heads, K maps of each image, S steps, h x w cells.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import rankdata
from torch import Tensor

from fgvc.models import FineGrainedModel
from fgvc.spectral import Band
from fgvc.studies.attribution.explain import explain_bands
from fgvc.studies.attribution.perturbation import reference_images
from fgvc.studies.truncation.bands import restrict_spectrum

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


Judge = Callable[[Tensor], Tensor]
"""A backbone's maps (N, C, h, w) -> logits (N, classes)."""

Kind = Literal["deletion", "insertion"]
KINDS: tuple[Kind, ...] = ("deletion", "insertion")


@dataclass(frozen=True)
class Curves:
    """Probabilities of the explained class, step by step.

    Attributes:
        shares: (S + 1,) float64, of the cells that are replaced (deletion) or put back (insertion), from 0 to 1.
        deletion, insertion: (J, K, B, S + 1) float64.
    """

    shares: Tensor
    deletion: Tensor
    insertion: Tensor

    def auc(self, kind: Kind) -> Tensor:
        """Area under each curve by the trapezoidal rule, (J, K, B): of deletion small is good, of insertion large."""
        area: Tensor = torch.trapezoid(getattr(self, kind), self.shares)
        return area


def cell_means(maps: Tensor, cell: int) -> Tensor:
    """Means over squares of `cell` pixels, (..., H, W) -> (..., h, w); at the right and lower edge of what is left."""
    if cell < 1 or maps.ndim < 2:
        raise ValueError(f"expected cells of at least 1 pixel and maps (..., H, W), got {cell}, {tuple(maps.shape)}")
    pooled: Tensor = F.avg_pool2d(maps.reshape(-1, 1, *maps.shape[-2:]).double(), cell, ceil_mode=True)
    return pooled.reshape(*maps.shape[:-2], *pooled.shape[-2:])


def cell_ranks(maps: Tensor, cell: int, *, seed: int = 0) -> Tensor:
    """Place of each cell in the order of a map, 0 for the highest: (..., H, W) -> (..., h, w) int64.

    Args:
        maps: any finite numbers, signed ones by their sign.
        cell: pixels a side.
        seed: of the order of ties.
    """
    means = cell_means(maps, cell)
    if not means.isfinite().all():
        raise ValueError("NaN or infinity in the maps")
    flat = means.flatten(-2)
    shuffled = torch.randperm(flat.shape[-1], generator=torch.Generator().manual_seed(seed)).to(flat.device)
    order = shuffled[flat[..., shuffled].argsort(dim=-1, descending=True, stable=True)]
    return order.argsort(dim=-1).reshape(means.shape)


def step_counts(cells: int, steps: int) -> Tensor:
    """How many cells are replaced after each step, (steps + 1,) int64 from 0 to all; no more steps than cells.

    Raises:
        ValueError: no step.
    """
    if steps < 1:
        raise ValueError(f"expected at least 1 step, got {steps}")
    return torch.linspace(0, cells, min(steps, cells) + 1, dtype=torch.float64).round().long()


@torch.no_grad()
def deletion_insertion(
    backbone: Callable[[Tensor], Tensor],
    judges: Sequence[Judge],
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
        backbone: images (N, 3, H, W) -> maps (N, C, h, w), in evaluation mode.
        judges: heads on them.
        images: (B, 3, H, W).
        classes: (B,) int64, whose probability is followed.
        maps: (K, B, H, W).
        reference: (B, 3, H, W), what deleted pixels become; None: the images blurred.
        steps: S.
        cell, seed: as in `cell_ranks`.
        batch_size: pictures through the backbone at once; on a CPU few are faster.

    Raises:
        ValueError: maps of other images, or that are not finite; no step.
    """
    if maps.ndim != 4 or maps.shape[1] != len(images) or maps.shape[-2:] != images.shape[-2:]:
        raise ValueError(f"expected maps (K, {len(images)}, H, W) of the images' size, got {tuple(maps.shape)}")
    reference = reference_images(images, "blur") if reference is None else reference
    ranks = cell_ranks(maps, cell, seed=seed)
    counts = step_counts(ranks[0, 0].numel(), steps)
    found = {kind: torch.empty(len(judges), *maps.shape[:2], len(counts), dtype=torch.float64) for kind in KINDS}
    for b, (image, substitute) in enumerate(zip(images, reference, strict=True)):

        def judged(pictures: Iterator[Tensor], target: int = int(classes[b])) -> Tensor:
            features = torch.cat([backbone(torch.stack(some)) for some in _batches(pictures, batch_size)])
            logits = torch.stack([judge(features) for judge in judges])
            return logits.double().softmax(dim=-1)[..., target].cpu()

        ends = judged(iter((image, substitute)))
        for k, of_map in enumerate(ranks[:, b]):
            inner = [_grown(of_map < count, cell, image) for count in counts[1:-1].to(of_map.device)]
            for kind, under, over in zip(KINDS, (image, substitute), (substitute, image), strict=True):
                curve = found[kind][:, k, b]
                curve[:, 0], curve[:, -1] = ends.T if kind == "deletion" else ends.T.flip(0)
                if inner:
                    curve[:, 1:-1] = judged(torch.where(mask, over, under) for mask in inner)
    return Curves(counts.double() / counts[-1], found["deletion"], found["insertion"])


def _grown(cells: Tensor, cell: int, image: Tensor) -> Tensor:
    """A mask of cells (h, w) as one of pixels (H, W)."""
    height, width = image.shape[-2:]
    return cells.repeat_interleave(cell, -2).repeat_interleave(cell, -1)[:height, :width]


def _batches(pictures: Iterator[Tensor], size: int) -> Iterator[list[Tensor]]:
    some: list[Tensor] = []
    for picture in pictures:
        some.append(picture)
        if len(some) == size:
            yield some
            some = []
    if some:
        yield some


_log = logging.getLogger(__name__)

_TOGETHER = 8
"""Images that are explained at once; the maps of all at full size would not fit into memory."""


@dataclass(frozen=True)
class Head:
    """A trained head that sees a band.

    Attributes:
        label, seed: of its run.
        band: as in a table: "all", "top8", "8:".
        keep: the band; None for all that it was trained on.
        model: of the run.
    """

    label: str
    seed: int
    band: str
    keep: Band | None
    model: FineGrainedModel

    def logits(self, features: Tensor) -> Tensor:
        """Of the backbone's maps (N, C, h, w), (N, classes)."""
        return self._seeing(self.model.head, features)

    def logits_of_reduced(self, reduced: Tensor) -> Tensor:
        """The same of what the pooling reads."""
        head = self.model.head
        return self._seeing(lambda x: head.classifier(head.pooling(x)), reduced)

    def _seeing(self, call: Judge, inputs: Tensor) -> Tensor:
        # no gradient is taken; some rules know no bands
        with restrict_spectrum(self.model, self.keep, gradient="exact"):
            return call(inputs)


class MapOf(NamedTuple):
    """Whose map: of a head, or "none" for one that knows no head."""

    label: str
    band: str
    method: str


RANDOM, CENTRE = MapOf("none", "none", "random"), MapOf("none", "none", "centre")
"""Maps that know nothing: smooth noise, and a Gaussian in the middle, the opponent where objects are centred."""


@dataclass(frozen=True)
class Measured:
    """Maps of heads of one seed.

    Attributes:
        heads: J judges.
        maps: K, each of a head, then `RANDOM` and `CENTRE`.
        curves: of all.
        cells: (K, B, h, w) float64, mean of each map in each cell.
        half_area: (K, B), see `half_mass_area`.
        inside: (K, B), see `share_inside`; None where no boxes were given.
        box_area: (B,) share of the image; None likewise.
    """

    heads: Sequence[Head]
    maps: Sequence[MapOf]
    curves: Curves
    cells: Tensor
    half_area: Tensor
    inside: Tensor | None
    box_area: Tensor | None

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
) -> Measured:
    """Explain images by every head and method, and measure the maps.

    Args:
        heads: of one seed and one backbone, those of a run beside each other.
        backbone: theirs, in evaluation mode; it may be another module that computes the same faster.
        images: B of (3, H, W).
        classes: (B,) true classes.
        methods: names in `METHODS`.
        boxes: (B, 4) of `fgvc.data.boxes_in_view`.
        steps, cell: of the curves; the maps are also compared cell by cell.
        seed: of random maps and of the order of ties.

    Raises:
        ConfigError, RunError: as `explain`.
    """
    names = [MapOf(head.label, head.band, method) for method in methods for head in heads] + [RANDOM, CENTRE]
    all_curves: list[Curves] = []
    cells: list[Tensor] = []
    halves: list[Tensor] = []
    insides: list[Tensor] = []
    size = (images[0].shape[-2], images[0].shape[-1])
    noise, centre = random_maps(len(images), size, seed=seed), centre_maps(_TOGETHER, size)
    judges = [head.logits for head in heads]
    started = time.monotonic()
    for start in range(0, len(images), _TOGETHER):
        chunk = torch.stack(list(images[start : start + _TOGETHER])).contiguous(memory_format=torch.channels_last)
        targets = classes[start : start + _TOGETHER]
        blank = [noise[start : start + len(chunk)], centre[: len(chunk)]]
        maps = torch.stack([*_explained(heads, chunk, targets, methods), *blank])
        curves = deletion_insertion(backbone, judges, chunk, targets, maps, steps=steps, cell=cell, seed=seed)
        all_curves.append(curves)
        cells.append(cell_means(maps, cell))
        halves.append(torch.stack([half_mass_area(of) for of in maps]))
        if boxes is not None:
            insides.append(torch.stack([share_inside(of, boxes[start : start + len(of)]) for of in maps]))
        done = start + len(chunk)
        _log.info("seed %d: %d of %d images, %.0f s", heads[0].seed, done, len(images), time.monotonic() - started)
    return Measured(
        heads,
        names,
        _joined(all_curves),
        torch.cat(cells, dim=1),
        torch.cat(halves, dim=1),
        None if boxes is None else torch.cat(insides, dim=1),
        None if boxes is None else _area(boxes, images[0]),
    )


def _explained(heads: Sequence[Head], images: Tensor, targets: Tensor, methods: Sequence[str]) -> list[Tensor]:
    """Maps (B, H, W) of each method and head, in that order; the bands of a model are explained together."""
    found = []
    for method in methods:
        by_model: dict[int, list[Head]] = {}
        for head in heads:
            by_model.setdefault(id(head.model), []).append(head)
        maps = {
            id(head): explanation.maps
            for of_model in by_model.values()
            for head, explanation in zip(
                of_model,
                explain_bands(of_model[0].model, images, [h.keep for h in of_model], method=method, classes=targets),
                strict=True,
            )
        }
        found += [maps[id(head)].cpu() for head in heads]
    return found


def _joined(curves: Sequence[Curves]) -> Curves:
    both = [torch.cat([getattr(part, kind) for part in curves], dim=2) for kind in ("deletion", "insertion")]
    return Curves(curves[0].shares, *both)


def _area(boxes: Tensor, image: Tensor) -> Tensor:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / (image.shape[-2] * image.shape[-1])
