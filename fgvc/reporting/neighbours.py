"""The nearest training images of image files: as text, and as a contact sheet."""

import os
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from fgvc.errors import ConfigError, one_line
from fgvc.inference.neighbours import Neighbour, NeighbourIndex
from fgvc.inference.predict import Predictor, map_files
from fgvc.io import output_path, require_own
from fgvc.presentation.style import class_name, figure_style, new_figure, short_name
from fgvc.reporting.predictions import picture_names

ON_SHEET = 10
"""Largest number of neighbours on a contact sheet."""
_SHEET = "neighbours"  # kind of file, see `fgvc.io.output_path`


@dataclass(frozen=True)
class Near:
    """An image file with its nearest training images, the nearest first, or the reason why there are none."""

    path: Path
    neighbours: Sequence[Neighbour]
    error: str | None
    sheet: Path | None = None

    def text(self, index: NeighbourIndex) -> str:
        """The file, then a line for each neighbour: distance, class, path below the dataset's root."""
        paths = index.images.relative_paths()
        lines = (
            f"{near.distance:9.4f}  {one_line(class_name(near.name))}  {one_line(paths[near.index])}"
            for near in self.neighbours
        )
        return "\n".join([one_line(self.path), *lines])


def sheet_files(folder: Path, paths: Sequence[Path]) -> list[Path]:
    """Return the contact sheet of each image file in `folder`.

    Raises:
        ConfigError: one of them is one of the images.
        FileExistsError: one of them is someone else's, see `fgvc.io.require_own`.
    """
    sheets = [folder / name for name in picture_names(paths)]
    images = {os.path.realpath(path) for path in paths}  # a link may lead to itself
    for sheet in sheets:
        if os.path.realpath(sheet) in images:
            raise ConfigError(f"{sheet} is one of the images, which are never written over; give another folder")
        require_own(sheet, _SHEET)
    return sheets


def find_neighbours(
    predictor: Predictor, index: NeighbourIndex, paths: Sequence[Path], count: int, sheets: Sequence[Path] | None
) -> Iterator[Near]:
    """Yield the `count` nearest training images of each file, in order; with `sheets`, draw a contact sheet of each.

    Raises:
        ConfigError: as `NeighbourIndex.nearest`.
    """

    def nearest(batch: Tensor) -> list[list[Neighbour]]:
        return index.nearest(predictor.descriptors(batch), count)

    for number, (path, inputs, found) in enumerate(map_files(predictor, paths, nearest)):
        if isinstance(found, str) or inputs is None:
            yield Near(path, (), str(found))
            continue
        sheet = None if sheets is None else sheets[number]
        if sheet is not None:
            query = predictor.transform.picture(inputs).cpu().numpy()
            figure = contact_sheet(query, path.name, index, found[:ON_SHEET])
            with figure_style(), output_path(sheet, _SHEET) as temporary:
                figure.savefig(temporary, dpi=200)
        yield Near(path, found, None, sheet)


def picture(index: NeighbourIndex, neighbour: Neighbour) -> np.ndarray:
    """A training image as the model sees it in testing, (H, W, 3), numbers from 0 to 1."""
    inputs: Tensor = index.images[neighbour.index][0]
    return index.transform.picture(inputs).numpy()


def contact_sheet(query: np.ndarray, name: str, index: NeighbourIndex, neighbours: Sequence[Neighbour]) -> Figure:
    """The query on the left, then its nearest training images with class and distance.

    Args:
        query: (H, W, 3), numbers from 0 to 1.
        name: of the query.
        index: training images.
        neighbours: of the query, the nearest first.
    """
    with figure_style():
        figure = new_figure(1.2 * (1 + len(neighbours)), 1.75)
        panels = figure.subplots(1, 1 + len(neighbours), squeeze=False)[0]
        _show(panels[0], query, short_name(name, 24), "the image")
        for axes, near in zip(panels[1:], neighbours, strict=True):
            _show(
                axes,
                picture(index, near),
                textwrap.fill(class_name(near.name, 44), 24),
                f"distance {near.distance:.3f}",
            )
    return figure


def _show(axes: Axes, pixels: np.ndarray, name: str, note: str) -> None:
    axes.imshow(pixels, interpolation="nearest")
    axes.set_axis_off()
    axes.set_title(name, fontsize=6.5, pad=3, parse_math=False)
    axes.text(0.5, -0.03, note, va="top", ha="center", fontsize=6, color="#555555", transform=axes.transAxes)
