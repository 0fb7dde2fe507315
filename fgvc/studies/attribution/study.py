"""Whether the maps of large and of small eigenvalues differ, and which of them says more of what a head rests on.

Several runs on one frozen backbone (or one run) explain the same test images with every band. What is found is held in
small tables (`fgvc.studies.attribution.study_tables`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fgvc.data import ImageDataset, boxes_in_view
from fgvc.errors import ConfigError, RunError
from fgvc.inference.restore import Restored, restore_run
from fgvc.models import FineGrainedModel
from fgvc.pooling import CovariancePooling
from fgvc.runs.settings import one_setting
from fgvc.runs.spectra import median_rank
from fgvc.runs.summary import Run
from fgvc.spectral import Band
from fgvc.studies.attribution.measured import Head, Measured, measure
from fgvc.studies.attribution.methods import require_methods
from fgvc.studies.attribution.study_rows import head_rows, tables
from fgvc.studies.attribution.study_tables import AttributionStudy
from fgvc.studies.truncation.bands import ALL, parse_band
from fgvc.studies.truncation.grid import kept_band
from fgvc.training.probe import evenly_spaced
from fgvc.training.setup import fold_backbone, open_split


@dataclass(frozen=True)
class _Opened:
    """A run, its heads and what its backbone is known by."""

    run: Run
    restored: Restored
    heads: list[Head]


def study_attribution(
    runs: Sequence[Run],
    *,
    images: int = 200,
    bands: Sequence[str] = ("top8", "8:"),
    methods: Sequence[str] = ("gradcam",),
    steps: int = 16,
    cell: int = 16,
    boxes: bool = False,
    seed: int = 0,
    root: str | None = None,
    cache: str | None = None,
) -> AttributionStudy:
    """Explain test images by runs of one setting, with all eigenvalues and with bands, and measure the maps.

    Runs of one seed judge each other's maps. A run whose head sees only a part of the eigenvalues, or none, takes part
    as it is.

    Args:
        runs: finished; several need one frozen backbone, whose maps of a picture they share.
        images: how many test images, evenly spaced: test splits are sorted by class.
        bands: texts of `parse_band`; the whole spectrum comes first.
        methods: names in `METHODS`.
        steps, cell: of the curves, see `deletion_insertion`.
        boxes: measure the share of each map inside the bounding box of the dataset, too.
        seed: of random maps, ties and resampling.
        root, cache: folders of the dataset and of cached features, where they have moved since training.

    Raises:
        ConfigError: an unknown method or band, more images than there are, or `steps`, `cell` or `seed` out of range.
        RunError: runs of several settings or backbones, or as `explain`.
        DatasetError, WeightsError: as in training; no bounding boxes.
    """
    require_methods(methods)
    for name, value, least in (("steps", steps, 1), ("cell", cell, 1), ("seed", seed, 0)):
        if value < least:
            raise ConfigError(f"{name} must be at least {least}, got {value}")
    _, group = one_setting(runs)
    opened = [_open(run, bands, root, cache) for of_method in group.values() for run in of_method]
    _require_one_backbone(opened)
    first = opened[0].restored
    total = len(first.images)
    if not 1 <= images <= total:
        raise ConfigError(
            f"images={images}: the test split of {first.config.dataset.root} has {total}; ask for 1 to it"
        )
    indices = evenly_spaced(total, images)
    pictures = [first.images[index][0] for index in indices]
    classes = torch.tensor([first.images.targets[index] for index in indices])
    found_boxes = _boxes(first, indices) if boxes else None
    backbone = fold_backbone(first.config, first.backbone.eval(), first.device).to(memory_format=torch.channels_last)
    measured = [
        measure(
            [head for item in opened if item.run.seed == number for head in item.heads],
            backbone,
            pictures,
            classes,
            methods,
            boxes=found_boxes,
            steps=steps,
            cell=cell,
            seed=seed,
        )
        for number in sorted({item.run.seed for item in opened})
    ]
    return tables(measured, _heads_table(opened, measured), seed=seed)


def _open(run: Run, bands: Sequence[str], root: str | None, cache: str | None) -> _Opened:
    restored = restore_run(run.path, torch.device("cpu"), root=root, cache=cache)
    restored.trained.eval()
    model = FineGrainedModel(restored.backbone, restored.head).eval()
    keeps: dict[str, Band | None] = {"all": None}
    if isinstance(restored.head.pooling, CovariancePooling) and kept_band(run) == ALL:
        rank = median_rank(run.spectrum().before)
        keeps |= {text: parse_band(text, rank) for text in bands if text != "all"}
    heads = [Head(run.label, run.seed, text, keep, model) for text, keep in keeps.items()]
    return _Opened(run, restored, heads)


def _require_one_backbone(opened: Sequence[_Opened]) -> None:
    """Raise RunError where pictures would have to go through several backbones."""
    known: dict[str, _Opened] = {}
    for item in opened:
        known.setdefault(item.restored.weights_digest, item)
    if len(known) > 1:
        first, second = list(known.values())[:2]
        raise RunError(
            f"{first.run.path} and {second.run.path} differ in the weights of their backbones, whose maps the heads "
            "of a study share; give runs on one frozen backbone, or one run at a time"
        )


def _boxes(restored: Restored, indices: Sequence[int]) -> Tensor:
    """Of these test images, (B, 4); the dataset is read once more, with its boxes."""
    options = {**restored.config.dataset.options, "boxes": True}
    config = replace(restored.config, dataset=replace(restored.config.dataset, options=options))
    opened = open_split(config, "test")
    place = {path: index for index, path in enumerate(opened.relative_paths())}
    ready: ImageDataset = opened.with_transform(restored.images.transform)
    paths = restored.images.relative_paths()
    return boxes_in_view(ready, [place[paths[index]] for index in indices])


def _heads_table(opened: Sequence[_Opened], measured: Sequence[Measured]) -> list[dict[str, object]]:
    """A row a head: its accuracy on the whole test split, and what it makes of the images studied."""
    rows = []
    by_seed = {part.seed: part for part in measured}
    for item in opened:
        logits, targets = _test_logits(item)
        part = by_seed[item.run.seed]
        for head, of_head in zip(item.heads, logits, strict=True):
            rows.append(head_rows(head, of_head, targets, part))
    return rows


@torch.inference_mode()
def _test_logits(item: _Opened) -> tuple[list[Tensor], Tensor]:
    """Logits (N, classes) of each head on the test split, and the targets (N,)."""
    found: list[list[Tensor]] = [[] for _ in item.heads]
    targets = []
    for inputs, of_batch in DataLoader(item.restored.inputs(), batch_size=item.restored.config.trainer.eval_batch_size):
        reduced = item.restored.pooling_input(inputs)
        for of_head, head in zip(found, item.heads, strict=True):
            of_head.append(head.logits_of_reduced(reduced).cpu())
        targets.append(of_batch)
    return [torch.cat(of_head) for of_head in found], torch.cat(targets)
