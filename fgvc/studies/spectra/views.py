"""The views of spectra by name: each is one function from runs to figures, a table to read and tables to keep."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import pandas as pd
from matplotlib.figure import Figure

from fgvc.errors import NothingToShowError, RunError
from fgvc.io import write_tables
from fgvc.presentation.render import Block, block_markdown
from fgvc.presentation.style import class_name, method_order, save_figure
from fgvc.runs import Run, group_runs
from fgvc.runs.settings import Group, Method, one_setting
from fgvc.runs.spectra import Spectrum
from fgvc.studies.spectra.measure import (
    MethodSpectrum,
    as_shares,
    condition_history,
    curve_table,
    curves_by_epoch,
    pool,
    spectra_by_class,
)
from fgvc.studies.spectra.show import (
    classes_figure,
    epochs_figure,
    history_figure,
    shares_figure,
    some_epochs,
    spectra_block,
    spectra_figure,
)

S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True)
class Options:
    """How runs are looked at.

    Attributes:
        images: Number of test images to look at again; None takes what the runs saved, where that will do.
        smallest: Number of eigenvalues that count as the small ones.
        root, cache: as in `restore_run`.
    """

    images: int | None = None
    smallest: int = 8
    root: str | None = None
    cache: str | None = None


@dataclass(frozen=True)
class View:
    """What a view shows: a tidy table, its figure, which `draw` makes under the title, and its numbers to read."""

    draw: Callable[[pd.DataFrame, str], Figure]
    title: str
    block: Block
    table: pd.DataFrame
    notes: list[str] = field(default_factory=list)

    @property
    def figure(self) -> Figure:
        return self.draw(self.table, self.title)

    @property
    def markdown(self) -> str:
        """The numbers, and under them what they are."""
        return "\n\n".join([block_markdown(self.block), *self.block.notes])

    def write(self, name: str, folder: Path) -> list[Path]:
        """Write NAME.png, NAME.pdf and NAME.csv; returns their paths."""
        return [*save_figure(self.figure, folder / name), *write_tables(folder, {name: self.table}, "%.5g")]


def _of_each_method(
    group: Group, read: Callable[[Run], S], look: Callable[[Method, Sequence[Run], Sequence[S]], T]
) -> tuple[list[T], list[str]]:
    """What `look` makes of the runs of each method and what `read` reads of them; notes on runs and methods left out.

    Raises RunError: none is left.
    """
    found, notes = [], []
    for method, runs in group.items():
        kept = []
        for run in runs:
            try:
                kept.append((run, read(run)))
            except RunError as error:
                notes.append(f"left out {run.label}, seed {run.seed}: {error}")
        if not kept:
            continue
        try:
            found.append(look(method, *map(list, zip(*kept, strict=True))))
        except RunError as error:
            notes.append(f"left out {method.label}: {error}")
    if not found:
        raise RunError("\n  ".join(["no method here has what this view shows:", *notes]))
    return found, notes


def _pooled(group: Group) -> tuple[list[MethodSpectrum], list[str]]:
    return _of_each_method(group, Run.spectrum, lambda method, runs, spectra: pool(method.label, runs, spectra))


def _methods(runs: Sequence[Run], options: Options) -> View:
    setting, group = one_setting(runs)
    spectra, notes = _pooled(group)
    spectra.sort(key=lambda spectrum: method_order(spectrum.label))
    curves = curve_table(spectra)
    block = replace(spectra_block(spectra, options.smallest), notes=["Medians over the test images of all seeds."])
    return View(spectra_figure, setting.title, block, curves, notes)


def conditions_block(history: pd.DataFrame) -> Block:
    """The measures of `condition_history` before, half-way through and after the training."""
    rows = []
    for label in dict.fromkeys(history["label"]):
        part = history[history["label"] == label]
        for row in part.iloc[sorted({0, len(part) // 2, len(part) - 1})].to_dict("records"):
            numbers = [f"{row['condition_number']:.2e}", f"{row['nonzero_condition_number']:.2e}"]
            numbers += [f"{row['effective_rank']:.2f}", f"{row['participation_ratio']:.2f}"]
            rows.append([label, str(row["epoch"]), str(row["n"]), *numbers])
    header = ["Method", "epoch", "seeds", "condition number", "of the non-zero"]
    return Block("Conditioning", [*header, "effective rank", "participation ratio"], rows)


def _conditions(runs: Sequence[Run], options: Options) -> View:  # noqa: ARG001
    setting, group = one_setting(runs)
    history, notes = condition_history(group)
    if history.empty:
        raise NothingToShowError("\n  ".join(["no run here has spectra by epoch:", *notes]))
    table = history.drop(columns="runs")
    return View(history_figure, setting.title, conditions_block(history), table, notes)


def _epochs(runs: Sequence[Run], options: Options) -> View:  # noqa: ARG001
    setting, group = one_setting(runs)
    tables, notes = _of_each_method(
        group, Run.history, lambda method, of, _: curves_by_epoch(of).assign(label=method.label)
    )
    table = some_epochs(pd.concat(tables, ignore_index=True))
    rows = []
    for (label, stage), part in table.groupby(["label", "stage"], sort=False):
        for epoch in (part["epoch"].min(), part["epoch"].max()):
            values = part[part["epoch"] == epoch].set_index("index")["median"]
            rows.append([str(label), str(stage), str(epoch), f"{values[1]:.3g}", f"{values[part['rank'].iloc[0]]:.3g}"])
    header = ["Method", "stage", "epoch", "largest", "smallest non-zero"]
    return View(epochs_figure, setting.title, Block("Spectra by epoch", header, rows), table, notes)


def classes_block(table: pd.DataFrame) -> Block:
    """The three classes of lowest and of highest effective rank of each method."""
    rows = []
    for label, part in table.groupby("label", sort=False):
        ordered = part.sort_values("effective_rank")
        for row in (*ordered.head(3).to_dict("records"), *ordered.tail(3).to_dict("records")):
            quartiles = (
                f"{row['effective_rank']:.2f} [{row['effective_rank_lower']:.2f}, {row['effective_rank_upper']:.2f}]"
            )
            condition = f"{row['nonzero_condition_number']:.2e}"
            rows.append([str(label), class_name(row["class"]), str(row["images"]), quartiles, condition])
    header = ["Method", "class", "images", "effective rank [quartiles]", "condition number of the non-zero"]
    return Block("Spectra by class", header, rows)


def _classes(runs: Sequence[Run], options: Options) -> View:
    setting, group = one_setting(runs)

    def spectrum(run: Run) -> Spectrum:
        if options.images is None:
            return run.spectrum()
        from fgvc.inference.pooling_inputs import look_again  # here, since saved spectra need no network

        return look_again(run.path, options.images, root=options.root, cache=options.cache)

    tables, notes = _of_each_method(
        group, spectrum, lambda method, of, spectra: spectra_by_class(method.label, of, spectra)
    )
    table = pd.concat(tables, ignore_index=True)
    return View(classes_figure, setting.title, classes_block(table), table, notes)


def _backbones(runs: Sequence[Run], options: Options) -> View:
    spectra, notes = [], []
    groups = group_runs(runs)
    alone = all(len(group) == 1 for group in groups.values())
    for setting, group in groups.items():
        found, left_out = _pooled(group)
        notes += left_out
        for spectrum in found:
            label = setting.backbone if alone else f"{setting.backbone}, {spectrum.label}"
            spectra.append(replace(spectrum, label=f"{label} ({setting.image_size} px)"))
    labels = [spectrum.label for spectrum in spectra]
    if len(set(labels)) < len(labels):
        raise RunError(f"several settings of one backbone, method and size: {', '.join(labels)}; give fewer folders")
    return _shares(spectra, "Covariance, by backbone", options, notes)


def _layers(runs: Sequence[Run], options: Options) -> View:
    if len(runs) != 1:
        raise RunError(f"this view shows the layers of one run, {len(runs)} were given; give the folder of one run")
    from fgvc.inference.pooling_inputs import layer_spectra

    layers = layer_spectra(runs[0], options.images or 256, root=options.root, cache=options.cache)
    spectra = [as_shares(MethodSpectrum(name, (runs[0].seed,), values, None)) for name, values in layers.items()]
    return _shares(spectra, f"Layers of {runs[0].label} on {runs[0].dataset}, seed {runs[0].seed}", options)


def _shares(spectra: Sequence[MethodSpectrum], title: str, options: Options, notes: Sequence[str] = ()) -> View:
    curves = curve_table([as_shares(spectrum) for spectrum in spectra])
    return View(shares_figure, title, spectra_block(spectra, options.smallest), curves, list(notes))


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
