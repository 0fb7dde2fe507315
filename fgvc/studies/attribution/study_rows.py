"""From what `measure` found to the tables of a study of attributions.

A number of an image is first averaged over the seeds; intervals are percentile bootstraps over images, drawn alike for
every number, so that differences are paired. They speak of these heads on other such images.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from fgvc.studies.attribution.curves import KINDS, Kind
from fgvc.studies.attribution.measured import CENTRE, RANDOM, Head, MapOf, Measured
from fgvc.studies.attribution.measures import rank_correlation
from fgvc.studies.attribution.study_tables import COLUMNS, AttributionStudy

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
