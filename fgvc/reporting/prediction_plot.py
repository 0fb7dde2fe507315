"""Picture of a prediction: the image as the model saw it, where the answer comes from, and the probable names."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fgvc.analysis.attribution import METHODS, explain
from fgvc.inference.predict import FilePrediction, Prediction, Predictor
from fgvc.io import atomic_path
from fgvc.reporting.attribution_plot import overlay
from fgvc.reporting.style import COLUMN_WIDTH, figure_style, new_figure, short_name

METHOD = "hirescam"
"""Default attribution: defined for every head, where Grad-CAM has no weights to speak of on a covariance."""

_BAR = "#0072B2"
_GREY = "#555555"


def write_overlay(predictor: Predictor, found: FilePrediction, file: Path, method: str = METHOD) -> None:
    """Write the picture of one prediction as PNG.

    Args:
        predictor: that made it.
        found: a file that could be read.
        file: ends in .png.
        method: of `fgvc.analysis.attribution.METHODS`; the predicted class is explained.

    Raises:
        ConfigError, RunError: as `explain`.
    """
    assert found.inputs is not None and found.prediction is not None
    explained = explain(predictor.model, found.inputs[None], method=method)
    image = predictor.transform.picture(found.inputs).cpu().numpy()
    heat = explained.maps[0].cpu().numpy()
    figure = prediction_figure(image, heat, found.prediction, method)
    with figure_style(), atomic_path(file) as temporary:
        figure.savefig(temporary)


def prediction_figure(image: np.ndarray, heat: np.ndarray, prediction: Prediction, method: str = METHOD) -> Figure:
    """The image, the image under the map of its first name, and bars of the probabilities.

    Args:
        image: (H, W, 3), numbers from 0 to 1.
        heat: (H, W), of `method`.
        prediction: of it.
        method: of `fgvc.analysis.attribution.METHODS`.
    """
    count = len(prediction.names)
    with figure_style():
        figure = new_figure(COLUMN_WIDTH, 1.75 + 0.32 + 0.2 * count)
        grid = figure.add_gridspec(2, 2, height_ratios=[1.75, 0.32 + 0.2 * count])
        _show(figure.add_subplot(grid[0, 0]), image, "as the model saw it")
        signed = METHODS[method].signed
        axes = figure.add_subplot(grid[0, 1])
        _show(axes, overlay(image, heat, signed=signed), f"{METHODS[method].label} of the first name")
        colours = "red speaks for it, blue against" if signed else "bright speaks for it"
        axes.text(0.5, -0.03, colours, va="top", ha="center", fontsize=6, color=_GREY, transform=axes.transAxes)
        _draw_bars(figure.add_subplot(grid[1, :]), prediction)
    return figure


def _show(axes: Axes, pixels: np.ndarray, title: str) -> None:
    axes.imshow(pixels, interpolation="nearest")
    axes.set_axis_off()
    axes.set_title(title, fontsize=7, color=_GREY, pad=3)


def _draw_bars(axes: Axes, prediction: Prediction) -> None:
    """Probabilities in per cent, the largest on top, names inside the axes, where long ones have room."""
    places = range(len(prediction.names))
    shares = [100 * share for share in prediction.probabilities]
    axes.barh(places, shares, height=0.85, color=_BAR, alpha=0.35)
    for place, name, share in zip(places, prediction.names, shares, strict=True):
        axes.text(1, place, short_name(name, 42), va="center", fontsize=7, parse_math=False)
        percent = f"{share:.1f} %" if share >= 0.05 else "< 0.1 %"
        axes.text(101, place, percent, va="center", fontsize=7, clip_on=False)
    axes.set_xlim(0, 100)
    axes.set_ylim(len(places) - 0.5, -0.5)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(f"probability, {'calibrated' if prediction.calibrated else 'not calibrated'} / %")
