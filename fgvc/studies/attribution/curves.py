"""Deletion and insertion: how fast a score falls or rises as pixels go in the order of a map.

[Petsiuk, Das, Saenko, "RISE: Randomized input sampling for explanation of black-box models", BMVC 2018.] Deletion
replaces what the map ranks highest by a reference, insertion starts from the reference and puts it back; after each
step the score is the softmax probability of a class. Ours departs from theirs in three points:

- One reference serves both, so that a curve's ends are the same two images for every map: the image blurred until
  little of it is recognised (`reference_images`). Theirs delete to a constant, whose edges are a sight of their own,
  and insert into a blur of sigma 5 at 224 pixels.
- Squares of pixels go together (`cell`), by the mean of the map in them. Single pixels scattered over an image disturb
  a network more than a connected part, and maps of single pixels would be rewarded for that. `cell=1` is theirs.
- Several heads judge the same pictures, whose maps the backbone computes once.

Ties are broken by one random order of the cells, drawn from a seed, the same for every image and map: row by row, say,
would give a map with many equal values the order of another one.

Shapes: B images of H x W pixels, K maps of each, J judges, S steps, h x w cells.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fgvc.studies.attribution.masks import reference_images

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
