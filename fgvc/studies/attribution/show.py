"""The tables and the figure of a study of attributions."""

from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase

from fgvc.presentation.render import markdown_table, mean_and_spread
from fgvc.presentation.style import COLUMN_WIDTH, figure_style, legend_outside, method_order, new_figure
from fgvc.studies.attribution.measure import CENTRE, KINDS, RANDOM, MapSource
from fgvc.studies.attribution.methods import METHODS
from fgvc.studies.attribution.study import AttributionStudy, mean_map

_BASELINE_NAMES = {RANDOM: "random map", CENTRE: "centred Gaussian"}


def study_markdown(study: AttributionStudy) -> str:
    """What the command prints: heads, areas under the curves of the first label, differences and agreement."""
    label = study.heads["label"].iloc[0]
    parts = [heads_markdown(study.heads), f"Maps judged by {label}, mean and 95 % interval over the images:"]
    parts.append(areas_markdown(study.areas, study.extents, label))
    pairs = list(combinations(_bands(study, label), 2))
    if pairs:
        parts += ["Differences, paired by image:", differences_markdown(study.differences, pairs)]
    return "\n\n".join([*parts, "Agreement of maps:", agreement_markdown(study.agreement)])


def heads_markdown(heads: pd.DataFrame) -> str:
    """How good each head is, over the seeds: its explanation is worth no more."""
    rows = []
    for (label, band), part in _groups(heads, ["label", "band"]):
        of_seeds = [mean_and_spread(part[name]) for name in ("top1", "above", "margin")]
        of_images = [f"{part[name].mean():.3f}" for name in ("whole", "reference")]
        rows.append([_head_name(label, band), str(len(part)), *of_seeds, *of_images])
    header = ["Head", "seeds", "top-1, %", "true class above, % of the others", "its logit over theirs"]
    return markdown_table([*header, "its probability", "the same, image blurred"], rows)


def areas_markdown(areas: pd.DataFrame, extents: pd.DataFrame, label: str) -> str:
    """Areas of the maps of all heads under the curves of one whole head, and how far the maps are spread."""
    judged = areas[(areas["judge"] == label) & (areas["judge_band"] == "all")]
    boxes = bool(extents["inside"].notna().any())
    rows = []
    for row in judged.merge(extents, on=list(MapSource._fields)).to_dict("records"):
        cells = [*(_interval(row, kind) for kind in KINDS), f"{100 * row['half_area']:.0f}"]
        if boxes:
            cells.append(f"{100 * row['inside']:.0f} of {100 * row['box_area']:.0f}")
        rows.append([_method_name(row["method"]), _head_name(row["label"], row["band"]), *cells])
    header = ["Map", "of", "deletion ↓", "insertion ↑", "half of it on, % of the image"]
    return markdown_table([*header, *(["inside the box, %"] if boxes else [])], rows)


def differences_markdown(differences: pd.DataFrame, pairs: Sequence[tuple[str, str]]) -> str:
    """Areas of the maps of one band minus those of another, of the same label, method, image and seed.

    `differences` is the table of a study; pairs of bands are written as ("top8", "8:").
    """
    own = differences[differences["label"] == differences["other"]]
    rows = []
    for first, second in pairs:
        for row in own[(own["band"] == first) & (own["other_band"] == second)].to_dict("records"):
            cells = [_interval(row, kind, "+.3f") for kind in KINDS]
            count = f"{row['seeds']} x {row['images']}"
            rows.append([row["label"], f"{first} − {second}", _method_name(row["method"]), *cells, count])
    return markdown_table(["Run", "of", "Map", "deletion ↓", "insertion ↑", "seeds x images"], rows)


def _interval(row: Mapping[Hashable, Any], name: str, form: str = ".3f") -> str:
    return f"{row[name]:{form}} [{row[f'{name}_low']:{form}}, {row[f'{name}_high']:{form}}]"


def agreement_markdown(agreement: pd.DataFrame) -> str:
    """Rank correlations of two maps of an image, a column for each method: mean and interval over the images."""
    methods = list(dict.fromkeys(agreement["method"]))
    cells: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in agreement.to_dict("records"):
        other = _method_name(row["other"]) if row["between"] in ("methods", "centre") else row["other"]
        interval = f"{row['mean']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
        cells.setdefault((row["between"], _head_name(row["label"], row["band"]), other), {})[row["method"]] = interval
    rows = [[*key, *(by_method.get(method, "") for method in methods)] for key, by_method in cells.items()]
    return markdown_table(["Between", "of", "and of", *map(_method_name, methods)], rows)


def _method_name(name: str) -> str:
    """The name in tables of a method or of a map that knows nothing."""
    baselines = {source.method: text for source, text in _BASELINE_NAMES.items()}
    return METHODS[name].label if name in METHODS else baselines.get(name, name)


def _head_name(label: str, band: str) -> str:
    """ "MPN-COV, top8"; for a whole head its label alone, for no head a dash."""
    return "–" if label == RANDOM.label else label if band == "all" else f"{label}, {band}"


def _groups(table: pd.DataFrame, keys: list[str]) -> list[tuple[tuple[str, ...], pd.DataFrame]]:
    """Groups with labels in the order of methods, otherwise in the order of appearance."""
    groups = [(tuple(map(str, key)), part) for key, part in table.groupby(keys, sort=False)]
    place = keys.index("label")
    return sorted(groups, key=lambda item: (item[0][place] == RANDOM.label, method_order(item[0][place])))


def _bands(study: AttributionStudy, label: str) -> list[str]:
    return list(dict.fromkeys(study.heads.loc[study.heads["label"] == label, "band"]))


_DASHES = {"#000000": "-", "#0072B2": "--", "#D55E00": "-.", "#009E73": "--", "#AA4499": "-."}
_LOOKS = [{"color": colour, "ls": dash} for colour, dash in _DASHES.items()]
_BASELINE_LOOKS = {RANDOM: {"color": "#999999", "ls": ":"}, CENTRE: {"color": "#666666", "ls": (0, (5, 1, 1, 1, 1, 1))}}


def attribution_figure(study: AttributionStudy, method: str | None = None, label: str | None = None) -> Figure:
    """A figure of one column: curves of the bands of one label, and where their maps lie on average.

    Args:
        study: the study. The mean maps need two bands of the label besides the whole spectrum; the last two are shown.
        method: the method; None takes the last one.
        label: the label; None takes the first one.
    """
    label = study.heads["label"].iloc[0] if label is None else label
    method = [m for m in study.areas["method"].unique() if m in METHODS][-1] if method is None else method
    sources = [MapSource(label, band, method) for band in _bands(study, label)]
    pictured = sources[-2:] if len(sources) > 2 else []
    with figure_style():
        figure = new_figure(COLUMN_WIDTH, 3.9 if pictured else 2.5)
        heights = [1.5, 1] if pictured else [1]
        top, *rest = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
        panels = top.subplots(1, 2, sharey=True)
        for axes, kind in zip(panels, KINDS, strict=True):
            _plot_curves(axes, study.curves[study.curves["judge"] == label], sources, kind)
        panels[0].set_ylabel("probability of its class")
        size = f"{study.areas['images'].iloc[0]} images"
        top.suptitle(f"{METHODS[method].label}, {label}, {size}", fontsize=7)
        look = {"ncols": 4, "handlelength": 2.2, "columnspacing": 1.0, "handletextpad": 0.4}
        legend_outside(top, "lower center", fontsize=6.5, **look)
        for lower in rest:
            _draw_mean_maps(lower, study, pictured)
    return figure


def _plot_curves(axes: Axes, curves: pd.DataFrame, sources: Sequence[MapSource], kind: str) -> None:
    """Mean probability by the share of the cells that are blurred (deletion) or shown (insertion)."""
    for source, look in [*zip(sources, _LOOKS, strict=False), *_BASELINE_LOOKS.items()]:
        part = curves[(curves[list(MapSource._fields)] == list(source)).all(axis=1)]
        name = _BASELINE_NAMES.get(source, source.band)
        axes.plot(100 * part["share"], part[kind], label=name, **look)  # type: ignore[arg-type]
    axes.set_xlim(0, 100)
    axes.set_ylim(bottom=0)
    axes.set(title=kind, xlabel="cells blurred, %" if kind == "deletion" else "cells shown, %")
    axes.grid(visible=True)


def _draw_mean_maps(figure: FigureBase, study: AttributionStudy, pair: Sequence[MapSource]) -> None:
    first, second = (mean_map(study, source) for source in pair)
    strongest = max(float(first.max()), float(second.max()))
    panels = figure.subplots(1, 3)
    for axes, source, values in zip(panels, pair, (first, second), strict=False):
        image = axes.imshow(values, cmap="inferno", vmin=0, vmax=strongest)
        axes.set_title(source.band)
    figure.colorbar(image, ax=panels[:2], orientation="horizontal", label="part of the map, 1 = even", shrink=0.8)
    difference = first - second
    largest = float(np.abs(difference).max()) or 1.0
    image = panels[2].imshow(difference, cmap="RdBu_r", vmin=-largest, vmax=largest)
    panels[2].set_title("difference")
    figure.colorbar(image, ax=panels[2], orientation="horizontal", shrink=0.9)
    for axes in panels:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(True)
