"""The sections of plots: what the analysis computed, as charts and as the figures of the house."""

from collections.abc import Callable
from dataclasses import replace

import pandas as pd

from fgvc.errors import RunError
from fgvc.presentation.render import Block
from fgvc.presentation.style import method_order
from fgvc.reporting.curves import MEASURE_NAMES, training_curves, training_figure
from fgvc.reporting.report.collect import Collected, run_name
from fgvc.reporting.report.content import Curve, Curves, GroupPart, Made, Part, PlotPart, TablePart
from fgvc.runs import Run, Setting
from fgvc.runs.settings import Group
from fgvc.studies.spectra.show import MEASURES
from fgvc.studies.spectra.views import VIEWS, Options, View


def training(collected: Collected) -> Made:
    """Curves of all runs, those that did not finish too."""
    table, notes = training_curves(collected.runs)
    if table.empty:
        raise RunError("\n".join(["no run has a row in metrics.csv", *notes]))
    charts = []
    for measure, name in MEASURE_NAMES.items():
        curves = []
        for _, part in table.groupby("run", sort=False):
            place = int(part["run"].iloc[0])
            run = collected.runs[place]
            curves.append(Curve(run.label, run_name(run), list(part["epoch"]), list(part[measure]), runs=(place,)))
        charts.append(Curves(name, "epoch", name, curves))
    last = table.groupby("run").tail(1)
    text = (
        f"{MEASURE_NAMES['test_top1']}, test loss and training loss of {last.shape[0]} runs after each epoch, a line a "
        f"run; after the last epoch of each, the test top-1 lies between {last['test_top1'].min():.2f} and "
        f"{last['test_top1'].max():.2f} %."
    )
    rows = [_last_row(collected.runs[row["run"]], row) for row in last.to_dict("records")]
    header = ["Method", "Seed", "Last epoch", "Test top-1 in %", "Test loss", "Training loss"]
    block = Block("After the last epoch", header, rows)
    places = [(int(place),) for place in last["run"]]
    numbers = GroupPart("Numbers of each run after its last epoch", [TablePart(block, places)])
    return [PlotPart("Course of training", text, training_figure(table), charts), numbers], notes


def _last_row(run: Run, row: dict[object, float]) -> list[str]:
    numbers = [
        "not measured" if pd.isna(row[m]) else f"{row[m]:.{2 if m == 'test_top1' else 4}f}" for m in MEASURE_NAMES
    ]
    return [run.label, str(run.seed), str(row["epoch"]), *numbers]


def _views(name: str, file: str, collected: Collected, part: Callable[[Setting, Group, View], PlotPart]) -> Made:
    """A plot and its table for every setting that a view shows, and notes on the others."""
    parts: list[Part] = []
    notes: list[str] = []
    for setting, group in collected.groups.items():
        kept, more = collected.kept(group, file)
        notes += [f"{setting.title}: {note}" for note in more]
        if not kept:
            continue
        try:
            view = VIEWS[name]([run for runs in kept.values() for run in runs], Options())
        except RunError as error:
            notes.append(f"{setting.title}: {error}")
            continue
        block = replace(view.block, title=f"{view.block.title}: {setting.title}")
        parts += [
            part(setting, kept, view),
            TablePart(block, [collected.behind(block.title, r[0]) for r in block.rows]),
        ]
        notes += view.notes
    if not parts:
        raise RunError("\n".join(notes))
    return parts, notes


def spectra(collected: Collected) -> Made:
    """Sorted eigenvalues before and after normalisation, a plot a setting."""

    def part(setting: Setting, group: Group, view: View) -> PlotPart:
        charts = []
        for stage, title in (("before", "Covariance"), ("after", "After normalisation")):
            table = view.table[(view.table["stage"] == stage) & (view.table["index"] <= view.table["rank"])]
            curves = _banded(collected, group, table, "index", ("lower", "median", "upper"))
            if curves:
                charts.append(Curves(title, "index of the eigenvalue (1: largest)", "eigenvalue", curves, log=True))
        text = (
            "Eigenvalues in descending order up to the numerical rank of the covariance, on a log scale: median over "
            "test images of all seeds as a line, quartiles as a band."
        )
        return PlotPart(setting.title, text, view.figure, charts, _all(collected, group))

    return _views("methods", "spectrum.npz", collected, part)


def conditions(collected: Collected) -> Made:
    """Conditioning by epoch, a plot a setting."""

    def part(setting: Setting, group: Group, view: View) -> PlotPart:
        charts = []
        for measure, name in MEASURES.items():
            columns = (f"{measure}_lowest", measure, f"{measure}_highest")
            curves = _banded(collected, group, view.table, "epoch", columns)
            title = " ".join(name.split())
            charts.append(Curves(title, "epoch (0: before training)", title, curves, log="condition" in measure))
        text = (
            "Measures of the covariance by epoch on the same test images: median over seeds as a line, lowest and "
            "highest seed as a band."
        )
        return PlotPart(setting.title, text, view.figure, charts, _all(collected, group))

    return _views("conditions", "spectrum_history.npz", collected, part)


def _banded(
    collected: Collected, group: Group, table: pd.DataFrame, x: str, columns: tuple[str, str, str]
) -> list[Curve]:
    """A curve a method, with its band between the first and the last of the columns."""
    runs = {method.label: collected.of(of) for method, of in group.items()}
    curves = []
    for label in sorted(dict.fromkeys(table["label"]), key=method_order):
        part = table[table["label"] == label].sort_values(x)
        lower, middle, upper = (list(part[column]) for column in columns)
        curves.append(Curve(label, label, list(part[x]), middle, lower, upper, runs[label]))
    return curves


def _all(collected: Collected, group: Group) -> tuple[int, ...]:
    return tuple(place for runs in group.values() for place in collected.of(runs))
