"""Pictures of attributions, and the files of a run's attribution: overlays, grids, maps as numbers, and a record."""

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from PIL import Image

from fgvc.errors import ConfigError
from fgvc.inference.predict import find_images
from fgvc.io import output_path, require_own, to_json, write_output
from fgvc.presentation.render import markdown_table
from fgvc.presentation.style import PAGE_WIDTH, class_name, figure_style, new_figure
from fgvc.presentation.style import caption as add_caption
from fgvc.provenance import source_state, versions
from fgvc.studies.attribution.explain import RunAttribution
from fgvc.studies.attribution.methods import METHODS

_STRENGTH = 0.75  # opacity of the strongest value
_FOR, _AGAINST = np.array([0.79, 0.0, 0.13]), np.array([0.02, 0.33, 0.75])  # red, blue
_CLIPPED = 0.995  # in maps of single pixels a few values are far above the others, and would hide them


def overlay(image: np.ndarray, heat: np.ndarray, *, signed: bool = False) -> np.ndarray:
    """An image in grey with a map over it in colour, stronger values more opaque: (H, W, 3) uint8.

    Args:
        image: (H, W, 3), numbers from 0 to 1.
        heat: (H, W), any numbers; its colours end at its `colour_limit`.
        signed: colour positive values red and negative values blue. Otherwise negative values count as 0, and colours
            go from dark to bright.
    """
    scaled = np.clip(_scaled(heat), -1 if signed else 0, 1)
    # one red and one blue: the white in the middle of a diverging colour map would light up dark images
    colours = np.where(scaled[..., None] > 0, _FOR, _AGAINST) if signed else mpl.colormaps["inferno"](scaled)[..., :3]
    grey = np.repeat(image.mean(axis=2, keepdims=True), 3, axis=2)
    opacity = _STRENGTH * np.abs(scaled)[..., None]
    pixels: np.ndarray = np.clip(255 * ((1 - opacity) * grey + opacity * colours) + 0.5, 0, 255).astype(np.uint8)
    return pixels


def colour_limit(heat: np.ndarray) -> float:
    """Value where the colours of a map end: 0.5 % of the absolute values exceed it; if it is 0, the largest of them."""
    sizes = np.abs(heat)
    return float(np.quantile(sizes, _CLIPPED)) or float(sizes.max())


def difference(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The first map minus the second, each in units of its own `colour_limit`: (H, W), signed."""
    change: np.ndarray = _scaled(first) - _scaled(second)
    return change


def _scaled(heat: np.ndarray) -> np.ndarray:
    return heat / (colour_limit(heat) or 1)


@dataclass(frozen=True)
class Column:
    """A column of a grid.

    Attributes:
        title: Text above the column.
        pixels: A picture for each row, (H, W, 3).
        notes: Text below each picture; empty for none.
    """

    title: str
    pixels: Sequence[np.ndarray]
    notes: Sequence[str] = ()


def band_columns(
    pictures: np.ndarray, maps: np.ndarray, bands: Sequence[str], scores: np.ndarray, *, signed: bool
) -> list[Column]:
    """The image, its map for every band with the score, and the difference of the first two bands.

    Pictures (N, H, W, 3) from 0 to 1, maps (K, N, H, W), K bands, scores (K, N); `signed` as in `overlay`.
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

    Pictures (N, H, W, 3) from 0 to 1; the rest as in `EigenvectorMaps`.
    """
    columns = [Column("image", list(pictures))]
    size = (pictures.shape[2], pictures.shape[1])
    for i in range(maps.shape[1]):
        small = [Image.fromarray(heat.astype(np.float32)) for heat in maps[:, i]]
        large = [np.asarray(heat.resize(size, Image.Resampling.BILINEAR)) for heat in small]
        pixels = [overlay(picture, heat) for picture, heat in zip(pictures, large, strict=True)]
        notes = [f"λ{place + 1}: {100 * share:.2g} %" for place, share in zip(places[:, i], shares[:, i], strict=True)]
        columns.append(Column("", pixels, notes))
    return columns


_LABELS = 1.25  # inches for the labels of the rows
_RESOLUTION = 200  # dots per inch: each picture has a few hundred pixels


def grid_figure(columns: Sequence[Column], labels: Sequence[str], title: str, caption: str) -> Figure:
    """Pictures in rows and columns: N in each column, with a label on the left of each row."""
    rows, width = len(labels), PAGE_WIDTH
    side = (width - _LABELS) / len(columns)
    notes = 0.16 if any(column.notes for column in columns) else 0
    with figure_style():
        figure = new_figure(width, 0.7 + rows * (side + notes))
        figure.set_layout_engine(ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0))
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
        add_caption(figure, textwrap.fill(caption, 125))
    return figure


SCHEMA = 1


def require_free(which: str, folder: Path) -> None:
    """Refuse a folder of results before the work.

    Raises:
        ConfigError: one of the images to explain (see `choose_images`) lies in it.
        FileExistsError: it holds an attribution.json of someone else.
    """
    require_own(folder / "attribution.json")
    images = find_images(Path(which)) if Path(which).exists() else []
    inside = [path for path in images if folder.resolve() in path.resolve().parents]
    if inside:
        raise ConfigError(f"{inside[0]}: lies in {folder}, where the results are written; give another --output")


def write_attribution(found: RunAttribution, folder: Path) -> list[Path]:
    """Write maps/*.png, grid_METHOD.png, eigenvectors_*.png, maps.npz and attribution.json; returns their paths.

    attribution.json comes last, and names the others relative to `folder`.
    """
    items = list(_write_overlays(found, folder))
    grids = []
    for name, figure in _figures(found).items():
        grids.append(folder / f"{name}.png")
        with figure_style(), output_path(grids[-1]) as temporary:
            figure.savefig(temporary, dpi=_RESOLUTION)
    arrays = {
        f"{method}.{band}": maps[k] for method, maps in found.maps.items() for k, band in enumerate(found.bands)
    } | {"scores": found.scores, "predicted": found.predicted, "explained": found.explained}
    for end, eigenvectors in found.eigenvectors.items():
        arrays |= {f"{end}.{name}": part.numpy() for name, part in eigenvectors._asdict().items()}
    with output_path(folder / "maps.npz") as temporary:
        np.savez(temporary, **arrays)
    record = {
        "schema": SCHEMA,
        "run": str(found.run),
        "checkpoint": found.checkpoint,
        "root": str(found.root),
        "bands": {text: list(band) for text, band in found.bands.items()},
        "seconds": {method: round(seconds, 3) for method, seconds in found.seconds.items()},
        "items": items,
        "grids": [path.name for path in grids],
        "versions": versions(),
        **source_state(),
    }
    write_output(folder / "attribution.json", to_json(record))
    return [*grids, *(folder / item["file"] for item in items), folder / "maps.npz", folder / "attribution.json"]


def _write_overlays(found: RunAttribution, folder: Path) -> Iterator[dict[str, Any]]:
    """Write an overlay for every method, band and image; yields their records."""
    images, names = found.images, found.class_names
    for method, maps in found.maps.items():
        for k, band in enumerate(found.bands):
            for i, (name, target) in enumerate(zip(images.names, images.targets, strict=True)):
                file = Path("maps") / f"{i:03}_{method}_{band.replace(':', '-')}.png"
                with output_path(folder / file) as temporary:
                    pixels = overlay(images.pictures[i], maps[k, i], signed=METHODS[method].signed)
                    Image.fromarray(pixels).save(temporary)
                yield {
                    "image": name,
                    "class": None if target is None else names[target],
                    "predicted": names[found.predicted[i]],
                    "explained": names[found.explained[i]],
                    "method": method,
                    "band": band,
                    "score": round(float(found.scores[k, i]), 6),
                    "file": file.as_posix(),
                }


_OWN_SCALE = "Each map is coloured up to its own largest values: colours compare places in one map, not maps."
_SIGNED = "Red speaks for the class, blue against it. "
_ENDS = {"largest": "largest eigenvalues", "smallest": "smallest non-zero eigenvalues"}


def _figures(found: RunAttribution) -> dict[str, Figure]:
    """A grid for each method, and one of eigenvectors for each end of the spectrum, by the names of their files."""
    pictures, labels = found.images.pictures, _labels(found)
    figures = {}
    for name, maps in found.maps.items():
        method = METHODS[name]
        columns = band_columns(pictures, maps, list(found.bands), found.scores, signed=method.signed)
        caption = (_SIGNED if method.signed else "") + _OWN_SCALE
        figures[f"grid_{name}"] = grid_figure(columns, labels, f"{method.label}, {found.run}", caption)
    for end, of_end in found.eigenvectors.items():
        columns = eigenvector_columns(pictures, of_end.maps.numpy(), of_end.places.numpy(), of_end.shares.numpy())
        caption = f"Energy along the eigenvectors of the {_ENDS[end]}; λ: share of the trace. {_OWN_SCALE}"
        figures[f"eigenvectors_{end}"] = grid_figure(columns, labels, f"Eigenvectors, {found.run}", caption)
    return figures


def _labels(found: RunAttribution) -> list[str]:
    labels = []
    for target, predicted, explained in zip(found.images.targets, found.predicted, found.explained, strict=True):
        facts: dict[int, list[str]] = {}
        for fact, index in (("true", target), ("predicted", predicted), ("explained", explained)):
            if index is not None:
                facts.setdefault(int(index), []).append(fact)
        lines = [
            line
            for index, names in facts.items()
            for line in (f"{', '.join(names)}:", class_name(found.class_names[index]))
        ]
        labels.append("\n".join(textwrap.fill(line, 27) for line in lines))
    return labels


def attribution_markdown(found: RunAttribution) -> str:
    """A row for each image: true, predicted and explained class, and the score of each band."""
    rows = []
    for i, (name, target) in enumerate(zip(found.images.names, found.images.targets, strict=True)):
        names = [class_name(found.class_names[index]) for index in (found.predicted[i], found.explained[i])]
        true = "not known" if target is None else class_name(found.class_names[target])
        rows.append([name, true, *names, *(f"{score:.2f}" for score in found.scores[:, i])])
    return markdown_table(["Image", "True", "Predicted", "Explained", *(f"score {band}" for band in found.bands)], rows)
