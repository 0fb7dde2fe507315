"""The figure of a soak: memory and open files of a long run against time."""

import numpy as np
import pandas as pd
from growth import block_means, growth, memory_column, warm_up_end
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fgvc.presentation.style import COLUMN_WIDTH, figure_style, new_figure

_MEMORY = {"rss_mb": ("resident", "#999999"), "anonymous_mb": ("anonymous", "#0072B2")}
_WARM_UP = "#EEEEEE"


def soak_figure(samples: pd.DataFrame, title: str) -> Figure:
    """A figure of one column: memory with the fitted line above, open files below; the warm-up is shaded.

    Args:
        samples: of `growth.load_samples`.
        title: of the figure.

    Raises:
        RunError: too few samples, as `growth`.
    """
    judged = memory_column(samples)
    trend, start = growth(samples, judged), warm_up_end(samples)
    ends = np.array([start, samples["seconds"].iloc[-1]])
    with figure_style():
        figure = new_figure(COLUMN_WIDTH, 3.4)
        memory, files = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
        for column, (label, color) in _MEMORY.items():
            _plot_samples(memory, samples, column, color, label)
        line = trend.level + trend.an_hour * ends / 3600
        memory.plot(ends / 60, line, color="#D55E00", linestyle=(0, (4, 1.5)), label="trend")
        _plot_samples(files, samples, "open_files", "#0072B2")
        for axes, name in ((memory, "MiB"), (files, "open files")):
            axes.axvspan(0, start / 60, color=_WARM_UP, linewidth=0)
            axes.set_ylim(bottom=0)
            axes.set_ylabel(name)
            axes.grid(True, axis="y")
        files.set_xlabel("minutes")
        handles, labels = memory.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", frameon=False, ncols=3)
        figure.supxlabel(
            f"{title}\ndots: samples, lines: means, grey: warm-up", fontsize=6.5, color="#555555", wrap=True
        )
    return figure


def _plot_samples(axes: Axes, samples: pd.DataFrame, column: str, color: str, label: str | None = None) -> None:
    """Every sample as a dot (a curve through an hour of them is a solid block), the means of blocks as a line."""
    if samples[column].isna().all():
        return
    axes.plot(samples["seconds"] / 60, samples[column], ".", color=color, alpha=0.3, markersize=2, markeredgewidth=0)
    means = block_means(samples, column)
    axes.plot(means["seconds"] / 60, means[column], color=color, label=label)
