"""Whether the maps of large and of small eigenvalues differ, and which of them says more of what a head rests on.

Several runs on one frozen backbone (or one run) explain the same test images with every band. Small tables hold what is
found. A number of an image is first averaged over the seeds; intervals are percentile bootstraps over images, drawn
alike for every number, so that differences are paired. They hold for these heads on other such images.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fgvc.csv_files import read_csv, to_csv
from fgvc.data import ImageDataset, boxes_in_view
from fgvc.errors import ConfigError, RunError
from fgvc.inference.restore import Restored, restore_run
from fgvc.models import FineGrainedModel
from fgvc.pooling import CovariancePooling
from fgvc.runs.settings import one_setting
from fgvc.runs.spectra import median_rank
from fgvc.runs.summary import Run
from fgvc.spectral import Band
from fgvc.studies.attribution.measure import (
    CENTRE,
    KINDS,
    RANDOM,
    Head,
    Kind,
    MapOf,
    Measured,
    measure,
    rank_correlation,
)
from fgvc.studies.attribution.methods import require_methods
from fgvc.studies.truncation.bands import ALL, parse_band
from fgvc.studies.truncation.measure import kept_band
from fgvc.training.probe import evenly_spaced
from fgvc.training.setup import fold_backbone, open_split

_MAP = ("label", "band", "method")
_JUDGE = ("judge", "judge_band")
_SIZE = ("seeds", "images")
_AREAS = tuple(f"{kind}{end}" for kind in KINDS for end in ("", "_low", "_high"))
COLUMNS: dict[str, tuple[str, ...]] = {
    "heads": ("label", "seed", "band", "top1", "above", "margin", "images", "whole", "reference"),
    "areas": (*_MAP, *_JUDGE, *_AREAS, *_SIZE),
    "differences": (*_MAP, "other", "other_band", "other_method", *_JUDGE, *_AREAS, *_SIZE),
    "curves": (*_MAP, *_JUDGE, "share", *KINDS),
    "agreement": ("between", *_MAP, "other", "mean", "low", "high", *_SIZE),
    "extents": (*_MAP, "empty", "half_area", "low", "high", "inside", "inside_low", "inside_high", "box_area", *_SIZE),
    "mean_maps": (*_MAP, "row"),
}
_NAMES = (*_MAP, "other", "other_band", "other_method", *_JUDGE, "between")


class AttributionStudy(NamedTuple):
    """The tables of a study, with the columns of `COLUMNS`.

    Attributes:
        heads: top1 on the test split in per cent; of the classes, per cent that the true one lies above on average (50
            where nothing is known); mean of its logit minus those of the others, which adds up over bands of a map that
            takes each eigenvalue by itself; its mean probability on the images studied and on their references.
        areas: mean area under the curves of each map and the ends of its interval, judged by the heads of its label and
            the whole ones of the others.
        differences: of a map's areas and another one's, paired by image: of two bands of a label, of two whole heads,
            and to the maps that know nothing; judged by the whole head of its label.
        curves: mean over images and seeds, of maps judged by the whole head of their label, of `RANDOM` and `CENTRE` by
            that of every label.
        agreement: mean Spearman's correlation of two maps of an image, cell by cell: between bands, seeds, methods,
            heads (labels), or a map and the centre.
        extents: share of images whose map is empty (nothing positive), `half_mass_area`, `share_inside` and the boxes'
            own share.
        mean_maps: mean over images and seeds, each map's positive values in units of their mean, which an even map has
            everywhere; a row a row of cells, columns c0, c1, ...
    """

    heads: pd.DataFrame
    areas: pd.DataFrame
    differences: pd.DataFrame
    curves: pd.DataFrame
    agreement: pd.DataFrame
    extents: pd.DataFrame
    mean_maps: pd.DataFrame


def mean_map(study: AttributionStudy, of: MapOf) -> np.ndarray:
    """One of `mean_maps` as an array (h, w). Raises KeyError where there is none."""
    table = study.mean_maps.set_index(list(_MAP)).loc[[tuple(of)]].sort_values("row")
    cells: np.ndarray = table.drop(columns="row").to_numpy(dtype=float)
    return cells


def save_attribution_study(study: AttributionStudy, folder: Path) -> dict[Path, str]:
    """The text of each file of a study, NAME.csv for each table."""
    digits = {name: "%.3g" if name == "mean_maps" else "%.4g" for name in COLUMNS}
    return {folder / f"{name}.csv": to_csv(table, digits[name]) for name, table in study._asdict().items()}


def load_attribution_study(folder: Path) -> AttributionStudy:
    """Read the files that `save_attribution_study` names. Raises RunError where one is missing or damaged."""
    return AttributionStudy(*(read_study_table(folder / f"{name}.csv") for name in COLUMNS))


def read_study_table(path: Path) -> pd.DataFrame:
    """One table of a study, which its file is named after. Raises RunError where it is missing or damaged."""
    return read_csv(path, COLUMNS[path.stem], names=_NAMES)


RESAMPLES = 2000

JudgeOf = tuple[str, str]
Values = dict[int, np.ndarray]
"""(B,) numbers of the images, by seed."""
Areas = dict[JudgeOf, dict[MapOf, dict[Kind, Values]]]


def head_rows(head: Head, logits: Tensor, targets: Tensor, measured: Measured) -> dict[str, object]:
    """A row of `heads`.

    Args:
        head: one of `measured.heads`.
        logits: (N, classes) of the test split.
        targets: (N,).
        measured: of its seed.
    """
    true = logits.gather(1, targets[:, None])
    others = logits.shape[1] - 1
    above = (logits < true).sum(dim=1) / others
    margin = true[:, 0] - (logits.sum(dim=1) - true[:, 0]) / others
    ends = measured.curves.deletion[list(measured.heads).index(head), 0][:, [0, -1]].mean(dim=0)
    right = (logits.argmax(dim=1) == targets).double().mean()
    of_split = (float(100 * right), float(100 * above.mean()), float(margin.mean()))
    of_images = (measured.curves.deletion.shape[2], *ends.tolist())
    row = (head.label, head.seed, head.band, *of_split, *of_images)
    return dict(zip(COLUMNS["heads"], row, strict=True))


def tables(measured: Sequence[Measured], heads: Sequence[dict[str, object]], *, seed: int = 0) -> AttributionStudy:
    """All tables.

    Args:
        measured: one a seed, of the same images.
        heads: rows of `head_rows`.
        seed: of the resampling.
    """
    count = measured[0].curves.deletion.shape[2]
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(count, np.full(count, 1 / count), size=RESAMPLES) / count

    def summary(values: Values) -> tuple[float, ...]:
        return (*_interval(np.stack(list(values.values())), weights), len(values), count)

    def both(areas: dict[Kind, Values]) -> tuple[float, ...]:
        sizes = summary(areas["deletion"])[3:]
        return (*(number for kind in KINDS for number in summary(areas[kind])[:3]), *sizes)

    areas = _areas(measured)
    rows: dict[str, list[tuple[object, ...]]] = {
        "heads": [tuple(row.values()) for row in heads],
        "areas": [(*of, *judge, *both(each)) for judge, maps in areas.items() for of, each in maps.items()],
        "differences": [(*key, *both(each)) for key, each in _differences(areas)],
        "curves": _curves(measured),
        "agreement": [(*key, *summary(values)) for key, values in _agreement(measured).items()],
        "extents": _extents(measured, summary),
    }
    frames = {name: pd.DataFrame(found, columns=COLUMNS[name]) for name, found in rows.items()}
    return AttributionStudy(**frames, mean_maps=_mean_maps(measured))


def _interval(values: np.ndarray, weights: np.ndarray) -> tuple[float, float, float]:
    """Mean and ends of the 95 % interval of (seeds, B) values, averaged over seeds; an image without one is left out.

    Args:
        values: NaN where an image has none.
        weights: (resamples, B), each summing to 1.
    """
    known = ~np.isnan(values)
    counts = known.sum(axis=0)
    there = (counts > 0).astype(float)
    of_image = np.where(known, values, 0).sum(axis=0) / np.maximum(counts, 1)
    if not there.any():
        return np.nan, np.nan, np.nan
    sums, sizes = weights @ of_image, weights @ there
    low, high = np.quantile(sums[sizes > 0] / sizes[sizes > 0], [0.025, 0.975])
    return float(of_image.sum() / there.sum()), float(low), float(high)


def _areas(measured: Sequence[Measured]) -> Areas:
    """By judge, map and kind; a head that sees a band judges the maps of its own label and those of none."""
    found: Areas = {}
    for part in measured:
        for kind in KINDS:
            values = part.curves.auc(kind).numpy()
            for j, head in enumerate(part.heads):
                for k, of in enumerate(part.maps):
                    if head.band == "all" or of.label in (head.label, RANDOM.label):
                        of_map = found.setdefault((head.label, head.band), {}).setdefault(of, {})
                        of_map.setdefault(kind, {})[part.seed] = values[j, k]
    return found


def _differences(areas: Areas) -> Iterator[tuple[tuple[str, ...], dict[Kind, Values]]]:
    for judge, maps in areas.items():
        for first, second in combinations(maps, 2):
            if judge[1] == "all" and judge[0] in (first.label, second.label) and _compared(first, second):
                seeds = sorted(maps[first]["deletion"].keys() & maps[second]["deletion"].keys())
                values = {kind: {s: maps[first][kind][s] - maps[second][kind][s] for s in seeds} for kind in KINDS}
                yield (*first, *second, *judge), values


def _compared(first: MapOf, second: MapOf) -> bool:
    """Whether the difference of these two maps stands in the table: not of every two heads."""
    if second in (RANDOM, CENTRE):
        return True
    alike = first.label == second.label or first.band == second.band == "all"
    return alike and first.method == second.method


def _curves(measured: Sequence[Measured]) -> list[tuple[object, ...]]:
    found: dict[tuple[MapOf, JudgeOf], list[Tensor]] = {}
    for part in measured:
        both = torch.stack([part.curves.deletion, part.curves.insertion], dim=-1).mean(dim=2)  # (J, K, S + 1, 2)
        for head, of_head in zip(part.heads, both, strict=True):
            for of, curve in zip(part.maps, of_head, strict=True):
                if head.band == "all" and of.label in (head.label, RANDOM.label):
                    found.setdefault((of, (head.label, head.band)), []).append(curve)
    shares = measured[0].curves.shares.tolist()
    return [
        (*of, *judge, share, *values)
        for (of, judge), several in found.items()
        for share, values in zip(shares, torch.stack(several).mean(dim=0).tolist(), strict=True)
    ]


def _agreement(measured: Sequence[Measured]) -> dict[tuple[str, ...], Values]:
    """Correlations (B,) by (between, label, band, method, other), of every seed or pair of seeds."""
    found: dict[tuple[str, ...], Values] = {}

    def add(between: str, of: MapOf, other: str, first: Tensor, second: Tensor) -> None:
        values = found.setdefault((between, *of, other), {})
        values[len(values)] = rank_correlation(first, second).numpy()

    for part in measured:
        maps = dict(zip(part.maps, part.cells, strict=True))
        for (a, first), (b, second) in combinations(maps.items(), 2):
            between = _between(a, b)
            if between is not None:
                add(*between, first, second)
    for one, other in combinations(measured, 2):
        both = dict(zip(other.maps, other.cells, strict=True))
        for of, cells in zip(one.maps, one.cells, strict=True):
            if of in both and of.label != RANDOM.label:
                add("seeds", of, "another seed", cells, both[of])
    return found


def _between(a: MapOf, b: MapOf) -> tuple[str, MapOf, str] | None:
    """What two maps of an image differ in, and the name of the second; None where it is more than one thing."""
    if b == CENTRE and a != RANDOM:
        return "centre", a, "centre"
    same = [x == y for x, y in zip(a, b, strict=True)]
    if same == [True, False, True]:
        return "bands", a, b.band
    if same == [True, True, False] and b != CENTRE:
        return "methods", a, b.method
    if same == [False, True, True] and a.band == "all":
        return "heads", a, b.label
    return None


def _extents(measured: Sequence[Measured], summary: Callable[[Values], tuple[float, ...]]) -> list[tuple[object, ...]]:
    rows: list[tuple[object, ...]] = []
    for of in dict.fromkeys(of for part in measured for of in part.maps):
        parts = [(part, list(part.maps).index(of)) for part in measured if of in part.maps]
        half = {part.seed: part.half_area[k].numpy() for part, k in parts}
        inside = {part.seed: part.inside[k].numpy() for part, k in parts if part.inside is not None}
        box = {part.seed: part.box_area.numpy() for part, _ in parts if part.box_area is not None}
        empty = float(np.isnan(np.stack(list(half.values()))).mean())
        *area, seeds, images = summary(half)
        shares = summary(inside)[:3] if inside else (np.nan,) * 3
        rows.append((*of, empty, *area, *shares, summary(box)[0] if box else np.nan, seeds, images))
    return rows


def _mean_maps(measured: Sequence[Measured]) -> pd.DataFrame:
    sums: dict[MapOf, list[Tensor]] = {}
    for part in measured:
        mass = part.cells.clamp(min=0)
        even = mass.mean(dim=(2, 3), keepdim=True)
        scaled = torch.where(even > 0, mass / even, torch.nan).nanmean(dim=1)  # an empty map is none
        for of, cells in zip(part.maps, scaled, strict=True):
            sums.setdefault(of, []).append(cells)
    rows = [
        (*of, row, *values)
        for of, several in sums.items()
        for row, values in enumerate(torch.stack(several).mean(dim=0).tolist())
    ]
    names = [f"c{column}" for column in range(measured[0].cells.shape[-1])]
    table: pd.DataFrame = pd.DataFrame(rows, columns=[*COLUMNS["mean_maps"], *names])
    return table


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
