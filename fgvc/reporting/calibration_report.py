"""Calibrations of several runs: as tables, and as the reliability diagrams of Guo et al., ICML 2017."""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fgvc.inference.calibrate import Calibration
from fgvc.io import require_own, to_csv, write_output
from fgvc.presentation.style import (
    COLUMN_WIDTH,
    by_method,
    draw_curve,
    figure_style,
    legend_outside,
    new_figure,
    save_figure,
)
from fgvc.runs.folder import RunFolder

MEASURES = ("calibration_error", "loss", "brier")
TIMES = ("before", "after")
_FEWEST = 20  # images of a bin that is drawn: of fewer the accuracy is mostly chance


_FILES = ("calibration.csv", "reliability.csv", "reliability.png", "reliability.pdf")


def require_free(folder: Path) -> None:
    """Raise FileExistsError if a file that `write_calibrations` would write is somebody else's."""
    for name in _FILES:
        require_own(folder / name)


def write_calibrations(folder: Path, found: Mapping[Path, Calibration]) -> list[Path]:
    """Write calibration.csv, reliability.csv, and reliability.png and .pdf of runs; returns their paths."""
    table, curves = calibrations_table(found), reliability_table(found)
    files = [folder / name for name in _FILES[:2]]
    for file, content in zip(files, (table, curves), strict=True):
        write_output(file, to_csv(content))
    title = ", ".join(str(value) for name in ("dataset", "backbone") for value in dict.fromkeys(table[name]))
    return [*files, *save_figure(reliability_figure(curves, title), folder / "reliability")]


def calibrations_table(found: Mapping[Path, Calibration]) -> pd.DataFrame:
    """One row a run: label, dataset, backbone, seed, checkpoint, split, images, top1, temperature, and the measures.

    Each of calibration_error (per cent), loss and brier stands there as NAME_before and NAME_after, cross-fitted.
    """
    rows = []
    for path, calibration in found.items():
        record = calibration.record
        rows.append(
            {
                **_source(path, ("label", "dataset", "backbone", "seed")),
                "checkpoint": calibration.checkpoint,
                **{name: record[name] for name in ("split", "images", "top1", "temperature")},
                **{f"{name}_{when}": record[when][name] for name in MEASURES for when in TIMES},
            }
        )
    table: pd.DataFrame = pd.DataFrame(rows)
    return table


def reliability_table(found: Mapping[Path, Calibration]) -> pd.DataFrame:
    """One row a run, "before" or "after", and bin: label, seed, when, lower, upper, images, confidence, accuracy."""
    rows = [
        {**_source(path, ("label", "seed")), "when": when, **bin_}
        for path, calibration in found.items()
        for when in TIMES
        for bin_ in calibration.record[when]["reliability"]
    ]
    table: pd.DataFrame = pd.DataFrame(rows)
    return table


def plot_reliability(axes: Axes, curves: pd.DataFrame) -> None:
    """Draw accuracy against confidence, a line a label over the images of its runs, and where they would be equal.

    `curves` are rows of a `reliability_table`, all "before" or all "after".
    """
    axes.plot([0, 100], [0, 100], color="#999999", linewidth=0.8, zorder=0)
    for label, part in by_method(curves):
        sums = part[["confidence", "accuracy"]].mul(part["images"], axis=0).groupby(part["lower"]).sum()
        images = part.groupby("lower")["images"].sum()
        means = 100 * sums.div(images, axis=0)[images >= _FEWEST]
        looks = {"markersize": 2.5, "linewidth": 0.9, "markerfacecolor": "auto"}
        draw_curve(axes, means["confidence"], means["accuracy"], label, **looks)
    axes.set(xlim=(0, 100), ylim=(0, 100), aspect="equal", xticks=[0, 50, 100], yticks=[0, 50, 100])
    axes.grid(True)


def reliability_figure(curves: pd.DataFrame, title: str) -> Figure:
    """A figure of one column: before and after, side by side.

    `curves` is a `reliability_table`, `title` what the runs have in common.
    """
    with figure_style():
        figure = new_figure(COLUMN_WIDTH, 2.1)
        both = figure.subplots(1, 2, sharey=True)
        for axes, when in zip(both, TIMES, strict=True):
            plot_reliability(axes, curves[curves["when"] == when])
            axes.set_xlabel("confidence / %")
            axes.set_title("as trained" if when == "before" else "with temperature", fontsize=7)
        both[0].set_ylabel("accuracy / %")
        figure.suptitle(title, fontsize=7, parse_math=False)
        legend_outside(figure, "lower center", ncols=4, columnspacing=1, handletextpad=0.4)
    return figure


def _source(path: Path, names: tuple[str, ...]) -> dict[str, object]:
    summary = RunFolder(path).read_summary()
    return {name: summary.get(name) for name in names}
