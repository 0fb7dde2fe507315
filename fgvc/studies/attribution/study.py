"""Whether the maps of large and of small eigenvalues differ, and which of them says more about a head.

Several runs on one frozen backbone (or one run) explain the same test images with every band, and small tables hold the
result. Each number of an image is first averaged over the seeds. Intervals are percentile bootstraps over images, with
the same draws for every number, so that differences are paired. They hold for these heads on other such images.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from fgvc.data import boxes_in_view
from fgvc.errors import ConfigError, RunError
from fgvc.inference.restore import Restored, restore_run
from fgvc.io import read_csv, read_tables, write_tables
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
    MapMeasures,
    MapSource,
    measure,
    rank_correlation,
)
from fgvc.studies.attribution.methods import require_methods
from fgvc.studies.truncation.bands import ALL, band_logits, parse_band
from fgvc.studies.truncation.measure import kept_band
from fgvc.training.probe import evenly_spaced
from fgvc.training.setup import fold_backbone, open_split

_SOURCE = MapSource._fields
_JUDGE = ("judge", "judge_band")
_SIZE = ("seeds", "images")
_AREAS = tuple(f"{kind}{end}" for kind in KINDS for end in ("", "_low", "_high"))
COLUMNS: dict[str, tuple[str, ...]] = {
    "heads": ("label", "seed", "band", "top1", "above", "margin", "images", "whole", "reference"),
    "areas": (*_SOURCE, *_JUDGE, *_AREAS, *_SIZE),
    "differences": (*_SOURCE, "other", "other_band", "other_method", *_JUDGE, *_AREAS, *_SIZE),
    "curves": (*_SOURCE, *_JUDGE, "share", *KINDS),
    "agreement": ("between", *_SOURCE, "other", "mean", "low", "high", *_SIZE),
    "extents": (
        *(*_SOURCE, "empty", "half_area", "low", "high"),
        *("inside", "inside_low", "inside_high", "box_area", *_SIZE),
    ),
    "mean_maps": (*_SOURCE, "row"),
}
_NAMES = (*_SOURCE, "other", "other_band", "other_method", *_JUDGE, "between")
RESAMPLES = 2000


class AttributionStudy(NamedTuple):
    """The tables of a study, with the columns of `COLUMNS`. A judge is a head under which a map's curves are taken.

    Attributes:
        heads: Quality of each head. On the test split: top1 in per cent; above, the per cent of the other classes that
            score below the true one (50 where nothing is known); margin, the mean logit of the true class minus the
            mean of the others, which adds up over bands where a map takes each eigenvalue by itself. On the images of
            the study: the mean probability of the true class, of the image (whole) and of its reference.
        areas: Mean area under the curves of each map, with its interval. The judges are the heads of the map's label
            and the whole heads of the others.
        differences: Areas of one map minus those of another, paired by image: two bands of a label, two whole heads, or
            a map and one that knows nothing. The judges are the whole heads of the two labels.
        curves: Mean over images and seeds under the whole head of the map's label; `RANDOM` and `CENTRE` under the
            whole head of every label.
        agreement: Mean Spearman's correlation of two maps of an image, cell by cell: of two bands, seeds, methods or
            heads (labels), or of a map and the centre.
        extents: Share of images whose map is empty (nothing positive), `half_mass_area`, `share_inside`, and the boxes'
            share of the image.
        mean_maps: Mean over images and seeds of each map's positive values in units of their mean: 1 everywhere in an
            even map. A row for each row of cells, with columns c0, c1, ...
    """

    heads: pd.DataFrame
    areas: pd.DataFrame
    differences: pd.DataFrame
    curves: pd.DataFrame
    agreement: pd.DataFrame
    extents: pd.DataFrame
    mean_maps: pd.DataFrame


def mean_map(study: AttributionStudy, source: MapSource) -> np.ndarray:
    """One of `mean_maps` as an array (h, w). Raises KeyError where there is none."""
    table = study.mean_maps.set_index(list(_SOURCE)).loc[[tuple(source)]].sort_values("row")
    return table.drop(columns="row").to_numpy(dtype=float)


def save_attribution_study(study: AttributionStudy, folder: Path) -> list[Path]:
    """Write NAME.csv for each table; returns the paths."""
    return write_tables(folder, study._asdict(), "%.4g", mean_maps="%.3g")


def load_attribution_study(folder: Path) -> AttributionStudy:
    """Read the files of `save_attribution_study`. Raises RunError where one is missing or damaged."""
    return AttributionStudy(**read_tables(folder, COLUMNS, _NAMES))


def read_study_table(path: Path) -> pd.DataFrame:
    """The table of a study that the file is named after. Raises RunError where it is missing or damaged."""
    return read_csv(path, COLUMNS[path.stem], names=_NAMES)


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

    Runs of one seed judge each other's maps. A run whose head has no eigenvalues, or sees only a part of them, takes
    part with the one band that it has.

    Args:
        runs: finished runs; several need one frozen backbone, because they share its maps of a picture.
        images: number of test images, evenly spaced: test splits are sorted by class.
        bands: texts of `parse_band`; the whole spectrum comes first.
        methods: names in `METHODS`.
        steps, cell: as in `deletion_insertion`.
        boxes: also measure the share of each map inside the bounding box of the dataset.
        seed: seed of random maps, ties and resampling.
        root, cache: as in `restore_run`.

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
    first = opened[0].restored
    for other in opened:
        if other.restored.weights_digest != first.weights_digest:
            raise RunError(
                f"{opened[0].run.path} and {other.run.path} differ in the weights of their backbones, whose maps the "
                "heads of a study share; give runs on one frozen backbone, or one run at a time"
            )
    total = len(first.images)
    if not 1 <= images <= total:
        raise ConfigError(
            f"images={images}: the test split of {first.config.dataset.root} has {total}; ask for 1 to it"
        )
    indices = evenly_spaced(total, images)
    pictures = [first.images[index][0] for index in indices]
    classes = torch.tensor([first.images.targets[index] for index in indices])
    backbone = fold_backbone(first.config, first.backbone.eval(), first.device).to(memory_format=torch.channels_last)
    options: dict[str, Any] = {"steps": steps, "cell": cell, "seed": seed}
    options["boxes"] = _boxes(first, indices) if boxes else None
    measured = {}
    for number in sorted({item.run.seed for item in opened}):
        heads = [head for item in opened if item.run.seed == number for head in item.heads]
        measured[number] = measure(heads, backbone, pictures, classes, methods, **options)
    rows = [row for item in opened for row in _head_rows(item, measured[item.run.seed])]
    return tables(list(measured.values()), rows, seed=seed)


@dataclass(frozen=True)
class _OpenedRun:
    run: Run
    restored: Restored
    heads: list[Head]


def _open(run: Run, bands: Sequence[str], root: str | None, cache: str | None) -> _OpenedRun:
    restored = restore_run(run.path, torch.device("cpu"), root=root, cache=cache)
    model = FineGrainedModel(restored.backbone, restored.head).eval()
    keeps: dict[str, Band | None] = {"all": None}
    if isinstance(restored.head.pooling, CovariancePooling) and kept_band(run) == ALL:
        rank = median_rank(run.spectrum().before)
        keeps |= {text: parse_band(text, rank) for text in bands if text != "all"}
    return _OpenedRun(run, restored, [Head(run.label, run.seed, text, keep, model) for text, keep in keeps.items()])


def _boxes(restored: Restored, indices: Sequence[int]) -> Tensor:
    """Boxes (B, 4) of these test images; the dataset is read once more, with its boxes."""
    options = {**restored.config.dataset.options, "boxes": True}
    config = replace(restored.config, dataset=replace(restored.config.dataset, options=options))
    dataset = open_split(config, "test").with_transform(restored.images.transform)
    place = {path: index for index, path in enumerate(dataset.relative_paths())}
    paths = restored.images.relative_paths()
    return boxes_in_view(dataset, [place[paths[index]] for index in indices])


@torch.inference_mode()
def _head_rows(opened: _OpenedRun, measured: MapMeasures) -> list[dict[str, Any]]:
    """Rows of `AttributionStudy.heads`, one for each head of a run."""
    batches = [
        (torch.stack([band_logits(head.model.head, reduced, head.keep).cpu() for head in opened.heads]), targets)
        for reduced, targets in opened.restored.pooling_inputs()
    ]
    classes = torch.cat([targets for _, targets in batches])
    rows = []
    for head, logits in zip(opened.heads, torch.cat([logits for logits, _ in batches], dim=1), strict=True):
        true = logits.gather(1, classes[:, None])  # (N, 1)
        others = logits.shape[1] - 1
        deletion = measured.curves.deletion[list(measured.heads).index(head), 0]  # (B, S + 1)
        top1 = float(100 * (logits.argmax(dim=1) == classes).double().mean())
        above = float(100 * ((logits < true).sum(dim=1) / others).mean())
        margin = float((true[:, 0] - (logits.sum(dim=1) - true[:, 0]) / others).mean())
        whole = deletion[:, [0, -1]].mean(dim=0).tolist()
        row = (head.label, head.seed, head.band, top1, above, margin, len(deletion), *whole)
        rows.append(dict(zip(COLUMNS["heads"], row, strict=True)))
    return rows


Areas = dict[tuple[str, str], dict[MapSource, dict[int, np.ndarray]]]
"""Areas under the deletion and the insertion curves, (2, B), by the judge's label and band, the map, and the seed."""


def tables(measured: Sequence[MapMeasures], heads: Sequence[dict[str, Any]], *, seed: int = 0) -> AttributionStudy:
    """All tables, from the measures of each seed on the same images and the rows of the table of heads."""
    count = measured[0].curves.deletion.shape[2]
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(count, np.full(count, 1 / count), size=RESAMPLES) / count

    def interval(seeds: Sequence[np.ndarray]) -> tuple[float, float, float]:
        return _interval(np.stack(seeds), weights)

    def both(areas: dict[int, np.ndarray]) -> tuple[float, ...]:
        deletion, insertion = zip(*areas.values(), strict=True)
        return (*interval(deletion), *interval(insertion), len(areas), count)

    def extent(source: MapSource) -> tuple[object, ...]:
        own = [(part, part.sources.index(source)) for part in measured if source in part.sources]
        half, inside = [part.half_area[k].numpy() for part, k in own], [part.inside[k].numpy() for part, k in own]
        box_area, *_ = interval([part.box_area.numpy() for part, _ in own])
        return *source, np.isnan(half).mean(), *interval(half), *interval(inside), box_area, len(own), count

    areas, curves = _judged(measured)
    shares = measured[0].curves.shares.tolist()
    width = measured[0].cells.shape[-1]
    rows: dict[str, list[tuple[object, ...]]] = {
        "areas": [(*source, *judge, *both(seeds)) for judge, maps in areas.items() for source, seeds in maps.items()],
        "differences": [(*key, *both(seeds)) for key, seeds in _differences(areas)],
        "curves": _means(curves, shares),
        "agreement": [(*key, *interval(seeds), len(seeds), count) for key, seeds in _agreement(measured).items()],
        "extents": [extent(source) for source in dict.fromkeys(source for part in measured for source in part.sources)],
        "mean_maps": _means(_relative_maps(measured), range(measured[0].cells.shape[-2])),
    }
    columns = {**COLUMNS, "mean_maps": (*COLUMNS["mean_maps"], *(f"c{column}" for column in range(width)))}
    frames = {name: pd.DataFrame(found, columns=columns[name]) for name, found in rows.items()}
    return AttributionStudy(pd.DataFrame(heads, columns=COLUMNS["heads"]), **frames)


def _interval(values: np.ndarray, weights: np.ndarray) -> tuple[float, float, float]:
    """Mean and ends of the 95 % interval of (seeds, B) values, averaged over seeds; NaN stands for no value.

    Weights (resamples, B), each row summing to 1.
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


def _means(seeds: Mapping[tuple[str, ...], Sequence[Tensor]], index: Iterable[float]) -> list[tuple[object, ...]]:
    """A row for each key and each number of the index: means over the seeds of (len(index), columns)."""
    means = {key: torch.stack(list(of_key)).mean(dim=0).tolist() for key, of_key in seeds.items()}
    return [(*key, i, *row) for key, rows in means.items() for i, row in zip(index, rows, strict=True)]


def _judged(measured: Sequence[MapMeasures]) -> tuple[Areas, dict[tuple[str, ...], list[Tensor]]]:
    """Areas; and of the maps that a whole head judges of its own label or of no label, mean curves (S + 1, 2).

    A head that sees a band judges only the maps of its own label and of no label.
    """
    areas: Areas = defaultdict(lambda: defaultdict(dict))
    curves: dict[tuple[str, ...], list[Tensor]] = defaultdict(list)
    for part in measured:
        both = torch.stack([part.curves.auc(kind) for kind in KINDS], dim=2).numpy()  # (J, K, 2, B)
        means = torch.stack([part.curves.deletion, part.curves.insertion], dim=-1).mean(dim=2)  # (J, K, S + 1, 2)
        for head, of_head, of_means in zip(part.heads, both, means, strict=True):
            for source, values, curve in zip(part.sources, of_head, of_means, strict=True):
                own, whole = source.label in (head.label, RANDOM.label), head.band == "all"
                if own or whole:
                    areas[head.label, head.band][source][part.seed] = values
                if own and whole:
                    where = (*source, head.label, head.band)
                    curves[where].append(curve)
    return areas, curves


def _differences(areas: Areas) -> Iterator[tuple[tuple[str, ...], dict[int, np.ndarray]]]:
    for judge, maps in areas.items():
        for first, second in combinations(maps, 2):
            compared = _difference(first, second)[0] in ("bands", "heads", CENTRE.method, RANDOM.method)
            if judge[1] == "all" and judge[0] in (first.label, second.label) and compared:
                seeds = sorted(maps[first].keys() & maps[second].keys())
                yield (*first, *second, *judge), {seed: maps[first][seed] - maps[second][seed] for seed in seeds}


def _agreement(measured: Sequence[MapMeasures]) -> dict[tuple[str, ...], list[np.ndarray]]:
    """Correlations (B,) for every seed or pair of seeds, by (between, label, band, method, other)."""
    found: dict[tuple[str, ...], list[np.ndarray]] = defaultdict(list)
    for part in measured:
        maps = zip(part.sources, part.cells, strict=True)
        for (a, first), (b, second) in combinations(maps, 2):
            between, other = _difference(a, b)
            if between not in ("", RANDOM.method) and a != RANDOM:
                key = (between, *a, other)
                found[key].append(rank_correlation(first, second).numpy())
    for one, another in combinations(measured, 2):
        others = dict(zip(another.sources, another.cells, strict=True))
        for source, cells in zip(one.sources, one.cells, strict=True):
            if source in others and source.label != RANDOM.label:
                key = ("seeds", *source, "another seed")
                found[key].append(rank_correlation(cells, others[source]).numpy())
    return found


def _difference(a: MapSource, b: MapSource) -> tuple[str, str]:
    """What two sources of one seed differ in, and the value of the second; empty for more than one thing."""
    if b in (RANDOM, CENTRE):
        return b.method, b.method
    same = [x == y for x, y in zip(a, b, strict=True)]
    if same == [True, False, True]:
        return "bands", b.band
    if same == [True, True, False]:
        return "methods", b.method
    if same == [False, True, True] and a.band == "all":
        return "heads", b.label
    return "", ""


def _relative_maps(measured: Sequence[MapMeasures]) -> dict[tuple[str, ...], list[Tensor]]:
    """Of each seed the positive values (h, w) of a map in units of their mean, averaged over the maps not empty."""
    maps: dict[tuple[str, ...], list[Tensor]] = defaultdict(list)
    for part in measured:
        mass = part.cells.clamp(min=0)
        even = mass.mean(dim=(2, 3), keepdim=True)
        scaled = torch.where(even > 0, mass / even, torch.nan).nanmean(dim=1)
        for source, cells in zip(part.sources, scaled, strict=True):
            maps[tuple(source)].append(cells)
    return maps
