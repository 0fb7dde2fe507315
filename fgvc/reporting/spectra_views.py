"""The views of spectra by name: each is one function from runs to figures, a table to read and tables to keep."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from fgvc.analysis import MethodSpectrum, Run, curve_table, group_runs, pool_spectra
from fgvc.analysis.class_spectra import as_shares, layer_spectra, look_again, spectra_by_class
from fgvc.analysis.history import condition_history, curves_by_epoch
from fgvc.analysis.settings import Group
from fgvc.errors import RunError
from fgvc.files import write_text_atomic
from fgvc.reporting.history_plot import classes_figure, epochs_figure, history_figure, shares_figure
from fgvc.reporting.render import markdown_table
from fgvc.reporting.spectra_plot import spectra_figure, spectra_markdown
from fgvc.reporting.style import save_figure


@dataclass(frozen=True)
class Options:
    """How runs are looked at.

    Attributes:
        images: test images that are looked at again; None takes what the runs saved, where that will do.
        smallest: how many eigenvalues count as the small ones.
        root, cache: folders of the dataset and of cached features, where they have moved since training.
    """

    images: int | None = None
    smallest: int = 8
    root: str | None = None
    cache: str | None = None


@dataclass(frozen=True)
class View:
    """What a view shows: one figure, its numbers as Markdown, and the tidy table that the figure is drawn from."""

    figure: Figure
    markdown: str
    table: pd.DataFrame
    notes: list[str] = field(default_factory=list)

    def write(self, name: str, folder: Path) -> list[Path]:
        """Write NAME.png, NAME.pdf and NAME.csv; returns their paths."""
        written = save_figure(self.figure, folder / name)
        written.append(folder / f"{name}.csv")
        write_text_atomic(written[-1], self.table.to_csv(index=False, float_format="%.7g"))
        return written


def _one_setting(runs: Sequence[Run]) -> tuple[str, Group]:
    groups = group_runs(runs)
    if len(groups) > 1:
        titles = "".join(f"\n  {setting.title}" for setting in groups)
        raise RunError(f"these runs belong to {len(groups)} settings, this view shows one; give fewer folders:{titles}")
    ((setting, group),) = groups.items()
    return setting.title, group


def _methods(runs: Sequence[Run], options: Options) -> View:
    spectra = pool_spectra(runs)
    title, _ = _one_setting(runs)
    curves = curve_table(spectra)
    text = f"{spectra_markdown(spectra, options.smallest)}\n\nMedians over the test images of all seeds."
    return View(spectra_figure(curves, title), text, curves)


def _conditions(runs: Sequence[Run], options: Options) -> View:  # noqa: ARG001
    title, group = _one_setting(runs)
    history, notes = condition_history(group)
    if history.empty:
        raise RunError("no run here kept its spectra by epoch (trainer.probe_images=0, or an earlier version)")
    rows = []
    for label in dict.fromkeys(history["label"]):
        part = history[history["label"] == label]
        for row in part.iloc[[0, len(part) // 2, -1]].to_dict("records"):
            numbers = [f"{row['condition_number']:.2e}", f"{row['nonzero_condition_number']:.2e}"]
            numbers += [f"{row['effective_rank']:.2f}", f"{row['participation_ratio']:.2f}"]
            rows.append([label, str(row["epoch"]), str(row["n"]), *numbers])
    header = [
        "Method",
        "epoch",
        "seeds",
        "condition number",
        "of the non-zero",
        "effective rank",
        "participation ratio",
    ]
    return View(history_figure(history, title), markdown_table(header, rows), history.drop(columns="runs"), notes)


def _epochs(runs: Sequence[Run], options: Options) -> View:  # noqa: ARG001
    title, group = _one_setting(runs)
    tables, notes = [], []
    for method, of_method in group.items():
        try:
            curves = curves_by_epoch(of_method)
        except RunError as error:
            notes.append(f"left out {method.label}: {error}")
            continue
        rank = pool_spectra(of_method)[0].rank
        tables.append(curves.assign(label=method.label, rank=rank))
    if not tables:
        raise RunError("no run here kept its spectra by epoch:\n  " + "\n  ".join(notes))
    table = pd.concat(tables, ignore_index=True)
    rows = []
    for (label, stage), part in table.groupby(["label", "stage"], sort=False):
        ends = [part[part["epoch"] == epoch].set_index("index")["median"] for epoch in (0, part["epoch"].max())]
        rank = int(part["rank"].iloc[0])
        rows.append([str(label), str(stage), *(f"{end[i]:.3g}" for end in ends for i in (1, rank) if i in end)])
    header = [
        "Method",
        "stage",
        "largest before training",
        "smallest non-zero",
        "largest after it",
        "smallest non-zero",
    ]
    return View(epochs_figure(table, title), markdown_table(header, rows), table, notes)


def _classes(runs: Sequence[Run], options: Options) -> View:
    title, group = _one_setting(runs)
    tables = []
    for method, of_method in group.items():
        spectra = [
            run.spectrum()
            if options.images is None
            else look_again(run, options.images, root=options.root, cache=options.cache)
            for run in of_method
        ]
        tables.append(spectra_by_class(method.label, of_method, spectra))
    table = pd.concat(tables, ignore_index=True)
    rows = []
    for label, part in table.groupby("label", sort=False):
        ordered = part.sort_values("effective_rank")
        for row in (*ordered.head(3).to_dict("records"), *ordered.tail(3).to_dict("records")):
            quartiles = (
                f"{row['effective_rank']:.2f} [{row['effective_rank_lower']:.2f}, {row['effective_rank_upper']:.2f}]"
            )
            condition = f"{row['nonzero_condition_number']:.2e}"
            rows.append([str(label), row["class"], str(row["images"]), quartiles, condition])
    header = ["Method", "class", "images", "effective rank [quartiles]", "condition number of the non-zero"]
    return View(classes_figure(table, title), markdown_table(header, rows), table)


def _backbones(runs: Sequence[Run], options: Options) -> View:
    spectra = []
    groups = group_runs(runs)
    alone = all(len(group) == 1 for group in groups.values())
    for setting, group in groups.items():
        for method, of_method in group.items():
            label = setting.backbone if alone else f"{setting.backbone}, {method.label}"
            spectra.append(replace(pool_spectra(of_method)[0], label=f"{label} ({setting.image_size} px)"))
    labels = [spectrum.label for spectrum in spectra]
    if len(set(labels)) < len(labels):
        raise RunError(f"several settings of one backbone, method and size: {', '.join(labels)}; give fewer folders")
    return _shares(spectra, "Covariance, by backbone", options)


def _layers(runs: Sequence[Run], options: Options) -> View:
    if len(runs) != 1:
        raise RunError(f"this view shows the layers of one run, {len(runs)} were given; give the folder of one run")
    spectra = layer_spectra(runs[0], options.images or 256, root=options.root, cache=options.cache)
    return _shares(spectra, f"Layers of {runs[0].label} on {runs[0].dataset}, seed {runs[0].seed}", options)


def _shares(spectra: Sequence[MethodSpectrum], title: str, options: Options) -> View:
    curves = curve_table([as_shares(spectrum) for spectrum in spectra])
    return View(shares_figure(curves, title), spectra_markdown(spectra, options.smallest), curves)


VIEWS: dict[str, Callable[[Sequence[Run], Options], View]] = {
    "methods": _methods,
    "epochs": _epochs,
    "conditions": _conditions,
    "classes": _classes,
    "backbones": _backbones,
    "layers": _layers,
}
FILES = {"methods": "spectra"}
"""Views whose files do not have their name."""
