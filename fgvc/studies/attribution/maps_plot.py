"""Pictures of attributions: a map over its image, and grids of them. Arrays in, pixels and figures out."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from PIL import Image

from fgvc.presentation.style import PAGE_WIDTH, figure_style, new_figure

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
