"""The maps of several heads measured on the same images: by every head, and without one.

A head is a run that sees a band of the eigenvalues. Every head explains the true class of each image, so that the maps
of any two explain the same, and every head judges every map by deletion and insertion.

Shapes: B images of H x W pixels, J heads, K maps of each image, S steps.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fgvc.models import FineGrainedModel
from fgvc.spectral import Band
from fgvc.studies.attribution.curves import Curves, Judge, cell_means, deletion_insertion
from fgvc.studies.attribution.explanation import explain_bands
from fgvc.studies.attribution.measures import centre_maps, half_mass_area, random_maps, share_inside
from fgvc.studies.truncation.bands import restrict_spectrum

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
