"""Pictures of attributions, and the tables and figure of a study of them."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from matplotlib.layout_engine import ConstrainedLayoutEngine
from PIL import Image

from fgvc.presentation.render import markdown_table
from fgvc.presentation.style import COLUMN_WIDTH, PAGE_WIDTH, figure_style, method_order, new_figure
from fgvc.studies.attribution.measure import CENTRE, KINDS, RANDOM, MapOf
from fgvc.studies.attribution.methods import METHODS
from fgvc.studies.attribution.study import AttributionStudy, mean_map

_STRENGTH = 0.75  # opacity of the strongest value
_FOR, _AGAINST = np.array([0.79, 0.0, 0.13]), np.array([0.02, 0.33, 0.75])  # red, blue
_LABELS = 1.25  # inches beside the rows of a grid
_CLIPPED = 0.995  # maps of single pixels have a few values far above the others, which alone would show


def overlay(image: np.ndarray, heat: np.ndarray, *, signed: bool = False) -> np.ndarray:
    """An image in grey with a map over it in colour, stronger values more opaque.

    Args:
        image: (H, W, 3), numbers from 0 to 1.
        heat: (H, W), any numbers; its colours end at its `colour_limit`.
        signed: red for positive and blue for negative values; else negative ones count as 0, and colours go from dark
            to bright.

    Returns:
        (H, W, 3) uint8.
    """
    scaled = np.clip(_scaled(heat), -1 if signed else 0, 1)
    # one red and one blue: the white between them, as a diverging map has it, would light up dark images
    colours = np.where(scaled[..., None] > 0, _FOR, _AGAINST) if signed else mpl.colormaps["inferno"](scaled)[..., :3]
    grey = np.repeat(image.mean(axis=2, keepdims=True), 3, axis=2)
    opacity = _STRENGTH * np.abs(scaled)[..., None]
    pixels: np.ndarray = np.clip(255 * ((1 - opacity) * grey + opacity * colours) + 0.5, 0, 255).astype(np.uint8)
    return pixels


def colour_limit(heat: np.ndarray) -> float:
    """Value that the colours of a map end at: that which 0.5 % of its absolute values exceed, or else the largest."""
    sizes = np.abs(heat)
    limit, largest = float(np.quantile(sizes, _CLIPPED)), float(sizes.max())
    return limit if limit > 0 else largest


def difference(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """What one map has more than another, each in units of its own `colour_limit`: (H, W), signed."""
    change: np.ndarray = _scaled(first) - _scaled(second)
    return change


def _scaled(heat: np.ndarray) -> np.ndarray:
    end = colour_limit(heat)
    scaled: np.ndarray = heat / end if end > 0 else np.zeros_like(heat)
    return scaled


def resized(heat: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A map (h, w) at (H, W), bilinear."""
    large = Image.fromarray(heat.astype(np.float32)).resize(shape[::-1], Image.Resampling.BILINEAR)
    return np.asarray(large)


@dataclass(frozen=True)
class Column:
    """A column of a grid.

    Attributes:
        title: above it.
        pixels: a picture a row, (H, W, 3).
        notes: below each picture; none where empty.
    """

    title: str
    pixels: Sequence[np.ndarray]
    notes: Sequence[str] = ()


def band_columns(
    pictures: np.ndarray, maps: np.ndarray, bands: Sequence[str], scores: np.ndarray, *, signed: bool
) -> list[Column]:
    """The image, its map for every band with the score, and the difference of the first two.

    Args:
        pictures: (N, H, W, 3) from 0 to 1.
        maps: (K, N, H, W).
        bands: names of the K bands.
        scores: (K, N).
        signed: of the maps, see `overlay`.
    """
    columns = [Column("image", list(pictures))]
    for band, heats, of_band in zip(bands, maps, scores, strict=True):
        pixels = [overlay(picture, heat, signed=signed) for picture, heat in zip(pictures, heats, strict=True)]
        columns.append(Column(band, pixels, [f"score {score:.2f}" for score in of_band]))
    if len(bands) > 1:
        changes = [difference(first, second) for first, second in zip(maps[0], maps[1], strict=True)]
        pixels = [overlay(picture, change, signed=True) for picture, change in zip(pictures, changes, strict=True)]
        columns.append(Column(f"{bands[0]} − {bands[1]}", pixels))
    return columns


def eigenvector_columns(pictures: np.ndarray, maps: np.ndarray, places: np.ndarray, shares: np.ndarray) -> list[Column]:
    """The image, and the energy along each of its eigenvectors with the eigenvalue's place and share of the trace.

    Args:
        pictures: (N, H, W, 3) from 0 to 1.
        maps: (N, n, h, w).
        places: (N, n), 0 for the largest.
        shares: (N, n).
    """
    columns = [Column("image", list(pictures))]
    for i in range(maps.shape[1]):
        pixels = [
            overlay(picture, resized(heat, picture.shape[:2]))
            for picture, heat in zip(pictures, maps[:, i], strict=True)
        ]
        notes = [f"λ{place + 1}: {100 * share:.2g} %" for place, share in zip(places[:, i], shares[:, i], strict=True)]
        columns.append(Column("", pixels, notes))
    return columns


def grid_figure(columns: Sequence[Column], labels: Sequence[str], title: str, caption: str) -> Figure:
    """Pictures in rows and columns.

    Args:
        columns: of N pictures each.
        labels: text beside each row, N of them.
        title: of the figure.
        caption: what the colours say, below it.
    """
    rows, width = len(labels), PAGE_WIDTH
    side = (width - _LABELS) / len(columns)
    notes = 0.16 if any(column.notes for column in columns) else 0
    with figure_style():
        figure = new_figure(width, 0.7 + rows * (side + notes))
        layout = figure.get_layout_engine()
        assert isinstance(layout, ConstrainedLayoutEngine)
        layout.set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
        ratios = [_LABELS, *[side] * len(columns)]
        panels = figure.subplots(rows, len(columns) + 1, squeeze=False, gridspec_kw={"width_ratios": ratios})
        for i, label in enumerate(labels):
            panels[i, 0].set_axis_off()
            panels[i, 0].text(0, 1, label, va="top", fontsize=6, transform=panels[i, 0].transAxes, parse_math=False)
            for axes, column in zip(panels[i, 1:], columns, strict=True):
                axes.imshow(column.pixels[i], interpolation="nearest")
                axes.set_axis_off()
                if i == 0:
                    axes.set_title(column.title, fontsize=7, pad=3)
                if column.notes:
                    note = column.notes[i]
                    axes.text(0.5, -0.03, note, va="top", ha="center", fontsize=6, transform=axes.transAxes)
        figure.suptitle(title, fontsize=8, parse_math=False)
        figure.supxlabel(textwrap.fill(caption, 125), fontsize=6.5, color="#555555")
    return figure


_LOOKS: tuple[dict[str, str], ...] = (
    {"color": "#000000", "ls": "-"},
    {"color": "#0072B2", "ls": "--"},
    {"color": "#D55E00", "ls": "-."},
    {"color": "#009E73", "ls": "--"},
    {"color": "#AA4499", "ls": "-."},
)
_BLANK = {RANDOM: {"color": "#999999", "ls": ":"}, CENTRE: {"color": "#666666", "ls": (0, (5, 1, 1, 1, 1, 1))}}
_BLANK_NAMES = {RANDOM: "random map", CENTRE: "centred Gaussian"}


def method_name(name: str) -> str:
    """Of a method or of a map that knows nothing, as it stands in tables."""
    blank = {of.method: text for of, text in _BLANK_NAMES.items()}
    return METHODS[name].label if name in METHODS else blank.get(name, name)


def head_name(label: str, band: str) -> str:
    """ "MPN-COV, top8"; of the whole head its label alone, of no head a dash."""
    return "–" if label == RANDOM.label else label if band == "all" else f"{label}, {band}"


def heads_markdown(heads: pd.DataFrame) -> str:
    """What each head is able to do, over the seeds: its explanation is worth no more."""
    rows = []
    for (label, band), part in _groups(heads, ["label", "band"]):
        of_seeds = [_spread(part[name]) for name in ("top1", "above", "margin")]
        of_images = [f"{part[name].mean():.3f}" for name in ("whole", "reference")]
        rows.append([head_name(label, band), str(len(part)), *of_seeds, *of_images])
    header = ["Head", "seeds", "top-1, %", "true class above, % of the others", "its logit over theirs"]
    return markdown_table([*header, "its probability", "the same, image blurred"], rows)


def _spread(values: "pd.Series[float]") -> str:
    return f"{values.mean():.2f}" + (f" ± {values.std(ddof=1):.2f}" if len(values) > 1 else "")


def areas_markdown(areas: pd.DataFrame, extents: pd.DataFrame, label: str, band: str = "all") -> str:
    """Areas of the maps of all heads under the curves of one head, and how far they are spread.

    Args:
        areas, extents: of a study.
        label, band: of the head that judges.
    """
    keys = ["method", "label", "band"]
    judged = areas[(areas["judge"] == label) & (areas["judge_band"] == band)]
    of_map = extents.set_index(keys)
    boxes = bool(extents["inside"].notna().any())
    rows = []
    for _, row in judged.iterrows():
        extent = of_map.loc[tuple(row[keys])]
        cells = [*(_interval(row, kind) for kind in KINDS), f"{100 * extent['half_area']:.0f}"]
        if boxes:
            cells.append(f"{100 * extent['inside']:.0f} of {100 * extent['box_area']:.0f}")
        rows.append([method_name(row["method"]), head_name(row["label"], row["band"]), *cells])
    header = ["Map", "of", "deletion ↓", "insertion ↑", "half of it on, % of the image"]
    return markdown_table([*header, *(["inside the box, %"] if boxes else [])], rows)


def _interval(row: "pd.Series[float]", name: str, form: str = ".3f") -> str:
    return f"{row[name]:{form}} [{row[f'{name}_low']:{form}}, {row[f'{name}_high']:{form}}]"


def differences_markdown(differences: pd.DataFrame, pairs: Sequence[tuple[str, str]]) -> str:
    """Areas of the maps of one band minus those of another, of the same label, method, image and seed.

    Args:
        differences: of a study.
        pairs: of bands, as ("top8", "8:").
    """
    own = differences[differences["label"] == differences["other"]]
    rows = []
    for first, second in pairs:
        chosen = own[(own["band"] == first) & (own["other_band"] == second)]
        for _, row in chosen.iterrows():
            cells = [_interval(row, kind, "+.3f") for kind in KINDS]
            count = f"{row['seeds']} x {row['images']}"
            rows.append([row["label"], f"{first} − {second}", method_name(row["method"]), *cells, count])
    return markdown_table(["Run", "of", "Map", "deletion ↓", "insertion ↑", "seeds x images"], rows)


def cross_markdown(areas: pd.DataFrame, method: str, kind: str) -> str:
    """Areas of every head's maps (rows) under every head's curves (columns), of one method; – where not judged."""
    chosen = areas[areas["method"].isin([method, RANDOM.method, CENTRE.method])]
    judges = list(dict.fromkeys(chosen[["judge", "judge_band"]].itertuples(index=False, name=None)))
    rows = []
    for (name, label, band), part in _groups(chosen, ["method", "label", "band"]):
        by_judge = part.set_index(["judge", "judge_band"])[kind]
        title = head_name(label, band) if label != RANDOM.label else method_name(name)
        rows.append([title, *(f"{by_judge[judge]:.3f}" if judge in by_judge.index else "–" for judge in judges)])
    return markdown_table(["Map of", *(head_name(*judge) for judge in judges)], rows)


def agreement_markdown(agreement: pd.DataFrame) -> str:
    """Rank correlations of two maps of an image, a column a method: mean and interval over the images."""
    methods = list(dict.fromkeys(agreement["method"]))
    cells: dict[tuple[str, str, str], dict[str, str]] = {}
    for _, row in agreement.iterrows():
        other = method_name(row["other"]) if row["between"] in ("methods", "centre") else row["other"]
        interval = f"{row['mean']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
        cells.setdefault((row["between"], head_name(row["label"], row["band"]), other), {})[row["method"]] = interval
    rows = [[*key, *(of.get(method, "") for method in methods)] for key, of in cells.items()]
    return markdown_table(["Between", "of", "and of", *map(method_name, methods)], rows)


def _groups(table: pd.DataFrame, keys: Sequence[str]) -> list[tuple[tuple[str, ...], pd.DataFrame]]:
    """In the order of appearance, labels in theirs."""
    groups = [(tuple(map(str, key)), part) for key, part in table.groupby(list(keys), sort=False)]
    place = list(keys).index("label")
    return sorted(groups, key=lambda item: (item[0][place] == RANDOM.label, method_order(item[0][place])))


def attribution_markdown(study: AttributionStudy) -> str:
    """All that a reader of the command line wants to see: heads, areas under the first label's curves, agreement."""
    label = study.heads["label"].iloc[0]
    bands = list(dict.fromkeys(study.heads.loc[study.heads["label"] == label, "band"]))
    parts = [heads_markdown(study.heads), f"Maps judged by {label}, mean and 95 % interval over the images:"]
    parts.append(areas_markdown(study.areas, study.extents, label))
    pairs = list(combinations(bands, 2))
    if pairs:
        parts += ["Differences, paired by image:", differences_markdown(study.differences, pairs)]
    return "\n\n".join([*parts, "Agreement of maps:", agreement_markdown(study.agreement)])


def plot_curves(axes: Axes, study: AttributionStudy, maps: Sequence[MapOf], judge: str, kind: str) -> None:
    """Mean probability by the share of the cells that are gone (deletion) or there (insertion), under a whole head.

    Args:
        axes: to draw on.
        study: its curves.
        maps: of heads; random and centred ones are drawn with them.
        judge: label of the head.
        kind: "deletion" or "insertion".
    """
    curves = study.curves[study.curves["judge"] == judge]
    looks = [*zip(maps, _LOOKS, strict=False), *_BLANK.items()]
    for of, look in looks:
        part = curves[(curves[["label", "band", "method"]] == list(of)).all(axis=1)]
        name = _BLANK_NAMES.get(of, of.band)
        axes.plot(100 * part["share"], part[kind], label=name, **look)  # type: ignore[arg-type]
    axes.set_xlim(0, 100)
    axes.set_ylim(bottom=0)
    axes.set_title(kind)
    axes.set_xlabel("cells blurred, %" if kind == "deletion" else "cells shown, %")
    axes.grid(visible=True)


def attribution_figure(study: AttributionStudy, method: str | None = None, label: str | None = None) -> Figure:
    """A figure of one column: curves of the bands of one label, and where their maps lie on average.

    Args:
        study: with at least two bands of that label besides the whole spectrum, of which the last two are pictured.
        method: None takes the last one.
        label: None takes the first one.
    """
    label = study.heads["label"].iloc[0] if label is None else label
    method = [m for m in study.areas["method"].unique() if m in METHODS][-1] if method is None else method
    bands = list(dict.fromkeys(study.heads.loc[study.heads["label"] == label, "band"]))
    maps = [MapOf(label, band, method) for band in bands]
    pictured = maps[-2:] if len(maps) > 2 else []
    with figure_style():
        figure = new_figure(COLUMN_WIDTH, 3.9 if pictured else 2.5)
        heights = [1.5, 1] if pictured else [1]
        top, *rest = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
        panels = top.subplots(1, 2, sharey=True)
        for axes, kind in zip(panels, KINDS, strict=True):
            plot_curves(axes, study, maps, label, kind)
        panels[0].set_ylabel("probability of its class")
        size = f"{study.areas['images'].iloc[0]} images"
        top.suptitle(f"{METHODS[method].label}, {label}, {size}", fontsize=7)
        handles, names = panels[0].get_legend_handles_labels()
        look = {"ncols": 4, "handlelength": 2.2, "columnspacing": 1.0, "handletextpad": 0.4}
        top.legend(handles, names, loc="outside lower center", frameon=False, fontsize=6.5, **look)
        for lower in rest:
            _draw_mean_maps(lower, study, pictured)
    return figure


def _draw_mean_maps(figure: FigureBase, study: AttributionStudy, pair: Sequence[MapOf]) -> None:
    first, second = (mean_map(study, of) for of in pair)
    strongest = max(float(first.max()), float(second.max()))
    panels = figure.subplots(1, 3)
    for axes, of, values in zip(panels, pair, (first, second), strict=False):
        image = axes.imshow(values, cmap="inferno", vmin=0, vmax=strongest)
        axes.set_title(of.band)
    figure.colorbar(image, ax=panels[:2], orientation="horizontal", label="part of the map, 1 = even", shrink=0.8)
    difference = first - second
    largest = float(np.abs(difference).max()) or 1.0
    image = panels[2].imshow(difference, cmap="RdBu_r", vmin=-largest, vmax=largest)
    panels[2].set_title("difference")
    figure.colorbar(image, ax=panels[2], orientation="horizontal", shrink=0.9)
    for axes in panels:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(True)
