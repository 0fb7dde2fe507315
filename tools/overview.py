"""The picture at the top of README.md: why covariances, and what they gain on photographs."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure

from fgvc.data.synthetic import COLOURS, HUES, SHAPES, Layout, draw_image, draw_layout
from fgvc.presentation.style import PAGE_WIDTH, figure_style, method_style, new_figure
from fgvc.reporting.accuracy import load_accuracy

_CLASSES = (0, 7)
_HEAD = "MPN-COV"


def overview_figure(birds: Path, cars: Path) -> Figure:
    """Four panels across the page: two images, what either pooling keeps of them, accuracies on photographs.

    Args:
        birds: CSV of the accuracy table of 80 bird species.
        cars: CSV of the accuracy table of 98 car models.
    """
    rng = np.random.default_rng(0)
    layouts = [draw_layout(rng, label, 1.0) for label in _CLASSES]
    with figure_style():
        figure = new_figure(PAGE_WIDTH, 2.5)
        panels = figure.subplots(2, 4, width_ratios=(0.75, 1.1, 1.0, 1.45))
        for row, layout in enumerate(layouts):
            image, means, pairs = panels[row, :3]
            image.imshow(np.asarray(draw_image(rng, layout, 200)))
            image.axis("off")
            image.set_title(f"an image of class {'AB'[row]}", fontsize=7)
            _draw_means(means, layout, names=row == 1)
            _draw_pairs(pairs, layout, names=row == 1)
        panels[0, 1].set_title("average pooling keeps\nhow much of each ...", fontsize=7)
        panels[0, 2].set_title("... covariance pooling\nalso what goes together", fontsize=7)
        grid = panels[0, 3].get_gridspec()
        for axes in panels[:, 3]:
            axes.remove()
        _plot_accuracies(figure.add_subplot(grid[:, 3]), {"80 bird species": birds, "98 car models": cars})
    return figure


def _draw_means(axes: Axes, layout: Layout, *, names: bool) -> None:
    """Share of each colour and each shape."""
    counts = np.concatenate([np.bincount(layout.colours, minlength=5), np.bincount(layout.shapes, minlength=5)])
    colours = [*(tuple(hsv_to_rgb((hue, 0.85, 0.9))) for hue in HUES), *[(0.55, 0.55, 0.55)] * len(SHAPES)]
    axes.bar(range(10), counts / counts.sum() * 2, color=colours)
    axes.set_ylim(0, 0.4)
    axes.set_yticks([])
    axes.set_xticks(range(10), [*COLOURS, *SHAPES] if names else [], rotation=90, fontsize=5.5)
    axes.tick_params(length=0)


def _draw_pairs(axes: Axes, layout: Layout, *, names: bool) -> None:
    """Share of each pair of colour and shape."""
    pairs = np.zeros((len(COLOURS), len(SHAPES)))
    np.add.at(pairs, (layout.colours, layout.shapes), 1)
    axes.imshow(pairs, cmap="Greys", aspect="auto", vmax=pairs.max() * 1.2)
    axes.set_yticks(range(len(COLOURS)), COLOURS, fontsize=5.5)
    axes.set_xticks(range(len(SHAPES)), SHAPES if names else [], rotation=90, fontsize=5.5)
    axes.tick_params(length=0)


def _plot_accuracies(axes: Axes, paths: Mapping[str, Path]) -> None:
    """Final top-1 of average pooling and of a covariance head, a pair of bars for each dataset."""
    for place, path in enumerate(paths.values()):
        table = load_accuracy(path)
        rows = table[(table["origin"] == "measured") & (table["epoch"] == "final")].set_index("label")
        for offset, (label, color) in enumerate((("GAP", "#9a9a9a"), (_HEAD, method_style("SEB").color))):
            value, spread = float(rows.loc[label, "top1_mean"]), rows.loc[label, "top1_std"]
            height = place + 0.36 * offset
            axes.barh(height, value, 0.32, color=color, xerr=None if np.isnan(spread) else spread)
            axes.text(1.5, height, ("average", "covariance")[offset], va="center", color="white", fontsize=6)
            axes.text(value + 2.5, height, f"{value:.1f} %", va="center", fontsize=7)
    axes.set_yticks([place + 0.18 for place in range(len(paths))], [name.replace(" ", "\n", 1) for name in paths])
    axes.set_xlim(0, 118)
    axes.set_xticks([0, 50, 100])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.set_title("right answers on test photographs\n(mean and deviation of three seeds)", fontsize=7)
