"""What a model says of image files: their names and nearest training images, as text, CSV, JSON and pictures."""

import itertools
import os
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from fgvc.errors import ConfigError, RunError, one_line
from fgvc.inference.neighbours import Neighbour, NeighbourIndex
from fgvc.inference.predict import Prediction, Predictor, map_files
from fgvc.io import kind_of, output_path, require_own, to_csv, write_output
from fgvc.presentation.style import COLUMN_WIDTH, class_name, figure_style, new_figure, short_name
from fgvc.studies.attribution import METHODS, explain
from fgvc.studies.attribution.report import overlay

SCHEMA = 1
"""Of `predictions_document`; it changes when a field is renamed, removed or changes its meaning."""

METHOD = "hirescam"
"""Default attribution: defined for every head, where Grad-CAM has no weights to speak of on a covariance."""
PREDICTIONS, OVERLAY = "predictions", "overlay"
"""Kinds of results, see `fgvc.io.output_path`."""
_FREQUENT = 10  # names in a summary


@dataclass(frozen=True)
class Named:
    """An image file with its prediction and its overlay, if one was written; `error` says why it lacks one of them."""

    path: Path
    prediction: Prediction | None
    error: str | None = None
    overlay: Path | None = None

    @property
    def text(self) -> str:
        """The file and the probable names, a line each; without a prediction the reason."""
        if self.prediction is None:
            return str(self.error)
        pairs = zip(self.prediction.probabilities, self.prediction.names, strict=True)
        lines = (f"{100 * share:8.2f} %  {class_name(name)}" for share, name in pairs)
        return "\n".join([one_line(self.path), *lines])

    def as_dict(self) -> dict[str, Any]:
        """A member of `images` in the JSON document."""
        prediction = self.prediction
        pairs = () if prediction is None else zip(prediction.names, prediction.probabilities, strict=True)
        return {
            "path": str(self.path),
            "predictions": [{"class": name, "probability": share} for name, share in pairs],
            "overlay": None if self.overlay is None else str(self.overlay),
            "error": self.error,
        }


def name_files(
    predictor: Predictor, paths: Sequence[Path], top: int = 5, overlays: Path | None = None, method: str = METHOD
) -> Iterator[Named]:
    """Predict image files in their order and, with a folder for `overlays`, draw each.

    Raises ConfigError: `top` is below 1, or as `write_overlay`.
    """

    def predict(batch: Tensor) -> list[Prediction]:
        return predictor.decide(predictor.logits(batch), top)

    results = map_files(predictor, paths, predict)
    for (path, inputs, found), name in zip(results, picture_names(paths), strict=True):
        if isinstance(found, str) or inputs is None:
            yield Named(path, None, str(found))
            continue
        overlay, error = None if overlays is None else overlays / name, None
        if overlay is not None:
            try:
                write_overlay(predictor, inputs, found, overlay, method)
            except (RunError, RuntimeError) as failed:
                overlay, error = None, f"{path}: no overlay: {failed}"
        yield Named(path, found, error, overlay)


@dataclass(frozen=True)
class TableFile:
    """A CSV file to write, and its kind: what may be written over it, see `fgvc.io.output_path`."""

    path: Path
    kind: str = PREDICTIONS


def folder_table(run: Path, sources: Sequence[Path]) -> TableFile:
    """The table of all images of `sources`, named after the first folder among them: predicted/NAME.csv in the run.

    It replaces a table of the same sources only: NAME-2.csv, NAME-3.csv, ... where others have the name.
    """
    folders = (Path(os.path.realpath(source)).name for source in sources if source.is_dir())
    name, kind = next(folders, "").lstrip(".")[:100] or PREDICTIONS, kind_of(PREDICTIONS, sources)
    for number in itertools.count(1):
        file = TableFile(run / "predicted" / f"{name}{f'-{number}' if number > 1 else ''}.csv", kind)
        try:
            require_own(file.path, file.kind)
        except FileExistsError:
            continue
        return file
    raise AssertionError  # the numbers have no end


def require_free(paths: Sequence[Path], table: TableFile | None, overlays: Path | None) -> None:
    """Refuse to write over one of the images or a file that is someone else's, before anything is computed.

    Raises:
        ConfigError: a result would replace one of the images, or the table a drawn one.
        FileExistsError: as `require_own`.
    """
    targets = {} if overlays is None else {overlays / name: OVERLAY for name in picture_names(paths)}
    if table is not None and table.path.resolve() in {target.resolve() for target in targets}:
        raise ConfigError(f"{table.path} is the file of the table and of an overlay; give another path")
    _require_no_image(targets if table is None else {**targets, table.path: table.kind}, paths, "path")


def _require_no_image(targets: Mapping[Path, str], paths: Sequence[Path], what: str) -> None:
    """Raise ConfigError where a result, given with its kind, is one of the images; FileExistsError as `require_own`."""
    images = {os.path.realpath(path) for path in paths}  # a link may lead to itself
    for target, kind in targets.items():
        if os.path.realpath(target) in images:
            raise ConfigError(f"{target} is one of the images, which are never written over; give another {what}")
        require_own(target, kind)


def show_files(named: Iterable[Named], table: TableFile | None, *, text: bool) -> list[Named]:
    """Return all of `named`; print each as it comes, reasons on stderr, names on stdout with `text`.

    Whatever ends the loop, the table holds what was found until then.
    """
    shown: list[Named] = []
    try:
        for one in named:
            shown.append(one)
            if one.error:
                print(f"error: {one_line(one.error)}", file=sys.stderr)
            if text and one.prediction:
                print(one.text, flush=True)
    finally:
        if table is not None and shown:
            write_output(table.path, to_csv(predictions_table(shown), "%.6f"), table.kind)
    return shown


def summary(named: Sequence[Named], lowest: int = 5) -> str:
    """How many images have a name, how sure the model is of them, the least sure, and the most frequent names."""
    first = [
        (one.prediction.probabilities[0], class_name(one.prediction.name), one_line(one.path))
        for one in named
        if one.prediction
    ]
    if not first:
        return f"images: {len(named)}, named: 0"
    counted = Counter(name for _, name, _ in first)
    mean = 100 * sum(share for share, _, _ in first) / len(first)
    frequent = ", ".join(f"{name} {count}" for name, count in counted.most_common(_FREQUENT))
    more = f", and {len(counted) - _FREQUENT} more names" if len(counted) > _FREQUENT else ""
    return "\n".join(
        [
            f"images: {len(named)}, named: {len(first)}, different names: {len(counted)}",
            f"most frequent: {frequent}{more}",
            f"mean confidence {mean:.2f} %; the lowest:",
            *(f"{100 * share:8.2f} %  {name}  {path}" for share, name, path in sorted(first)[:lowest]),
        ]
    )


def predictions_table(named: Iterable[Named]) -> pd.DataFrame:
    """One row a file: path, name_1, probability_1, name_2, ..., error; path and error only where it is unreadable."""
    members = [one.as_dict() for one in named]
    count = max(len(member["predictions"]) for member in members)
    rows = []
    for member in members:
        row = {"path": member["path"]}
        for rank in range(count):
            pair = member["predictions"][rank] if member["predictions"] else {}
            row |= {f"name_{rank + 1}": pair.get("class"), f"probability_{rank + 1}": pair.get("probability")}
        rows.append(row | {"error": member["error"]})
    table: pd.DataFrame = pd.DataFrame(rows)
    return table


def predictions_document(
    predictor: Predictor, run: str | Path, checkpoint: str, named: Iterable[Named]
) -> dict[str, Any]:
    """What `fgvc predict --json` prints; its fields are in docs/prediction.md."""
    calibration = predictor.calibration
    return {
        "schema": SCHEMA,
        "run": str(run),
        "checkpoint": checkpoint,
        "calibrated": predictor.calibrated,
        "temperature": predictor.temperature,
        "calibrated_on": calibration.split if calibration is not None and predictor.calibrated else None,
        "images": [one.as_dict() for one in named],
    }


def picture_names(paths: Sequence[Path]) -> list[str]:
    """A name for each file's picture; files of the same name are told apart by a number."""
    used: set[str] = set()
    names = []
    for path in paths:
        name, number = f"{path.stem}.png", 1
        while name.lower() in used:  # many file systems know no case
            number += 1
            name = f"{path.stem}-{number}.png"
        used.add(name.lower())
        names.append(name)
    return names


_BAR = "#0072B2"
_GREY = "#555555"


def write_overlay(predictor: Predictor, inputs: Tensor, prediction: Prediction, file: Path, method: str) -> None:
    """Write the picture of one prediction as PNG; a method of `METHODS` explains the predicted class.

    Raises ConfigError, RunError as `explain`. `inputs` is the model's input, (3, size, size).
    """
    explained = explain(predictor.model, inputs[None], method=method)
    image, heat = predictor.transform.picture(inputs).cpu().numpy(), explained.maps[0].cpu().numpy()
    figure = prediction_figure(image, heat, prediction, method)
    with figure_style(), output_path(file, OVERLAY) as temporary:
        figure.savefig(temporary)


def prediction_figure(image: np.ndarray, heat: np.ndarray, prediction: Prediction, method: str) -> Figure:
    """The image, the image under the map of its first name, and bars of the probabilities.

    `image` is (H, W, 3), numbers from 0 to 1; `heat` is (H, W), of a method in `fgvc.studies.attribution.METHODS`.
    """
    count = len(prediction.names)
    with figure_style():
        figure = new_figure(COLUMN_WIDTH, 1.75 + 0.32 + 0.2 * count)
        grid = figure.add_gridspec(2, 2, height_ratios=[1.75, 0.32 + 0.2 * count])
        looks: dict[str, Any] = {"fontsize": 7, "color": _GREY}
        _show(figure.add_subplot(grid[0, 0]), image, "as the model saw it", **looks)
        label, signed = METHODS[method].label, METHODS[method].signed
        colours = "red speaks for it, blue against" if signed else "bright speaks for it"
        heated = overlay(image, heat, signed=signed)
        _show(figure.add_subplot(grid[0, 1]), heated, f"{label} of the first name", colours, **looks)
        _draw_bars(figure.add_subplot(grid[1, :]), prediction)
    return figure


def _show(axes: Axes, pixels: np.ndarray, title: str, note: str = "", **looks: Any) -> None:
    """Draw a picture between its title and a note; `looks` are those of the title."""
    axes.imshow(pixels, interpolation="nearest")
    axes.set_axis_off()
    axes.set_title(title, pad=3, parse_math=False, **looks)
    axes.text(0.5, -0.03, note, va="top", ha="center", fontsize=6, color=_GREY, transform=axes.transAxes)


def _draw_bars(axes: Axes, prediction: Prediction) -> None:
    """Probabilities in per cent, the largest on top, names inside the axes, where long ones have room."""
    places = range(len(prediction.names))
    shares = [100 * share for share in prediction.probabilities]
    axes.barh(places, shares, height=0.85, color=_BAR, alpha=0.35)
    for place, name, share in zip(places, prediction.names, shares, strict=True):
        axes.text(1, place, class_name(name, 42), va="center", fontsize=7, parse_math=False)
        percent = f"{share:.1f} %" if share >= 0.05 else "< 0.1 %"
        axes.text(101, place, percent, va="center", fontsize=7, clip_on=False)
    axes.set(xlim=(0, 100), ylim=(len(places) - 0.5, -0.5), yticks=[])
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(f"probability, {'calibrated' if prediction.calibrated else 'not calibrated'} / %")


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
    _require_no_image(dict.fromkeys(sheets, _SHEET), paths, "folder")
    return sheets


def find_neighbours(
    predictor: Predictor, index: NeighbourIndex, paths: Sequence[Path], count: int, sheets: Sequence[Path] | None
) -> Iterator[Near]:
    """Yield the `count` nearest training images of each file, in order; with `sheets`, draw a contact sheet of each.

    Raises ConfigError as `NeighbourIndex.nearest`.
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

    Pictures are (H, W, 3), numbers from 0 to 1; the nearest neighbour comes first.
    """
    with figure_style():
        figure = new_figure(1.2 * (1 + len(neighbours)), 1.75)
        panels = figure.subplots(1, 1 + len(neighbours), squeeze=False)[0]
        _show(panels[0], query, short_name(name, 24), "the image", fontsize=6.5)
        for axes, near in zip(panels[1:], neighbours, strict=True):
            title, note = textwrap.fill(class_name(near.name, 44), 24), f"distance {near.distance:.3f}"
            _show(axes, picture(index, near), title, note, fontsize=6.5)
    return figure
