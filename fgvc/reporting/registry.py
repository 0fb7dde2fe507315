"""The tables by name: each is one function of what it is made from."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd

from fgvc.errors import RunError, UserError
from fgvc.io import read_csv
from fgvc.presentation.render import Block, Table
from fgvc.reporting.accuracy import accuracy_table, load_published, table_blocks
from fgvc.reporting.run_tables import coarse, condition_numbers, cost, differences, hybrid
from fgvc.runs import Run, find_finished, group_runs
from fgvc.runs.settings import without_twins


@dataclass(frozen=True)
class Inputs:
    """What tables are made from.

    Attributes:
        results: Run folders, or folders of them.
        paper: Folder of the published numbers.
    """

    results: tuple[Path, ...]
    paper: Path

    @cached_property
    def finished(self) -> tuple[list[Run], list[str]]:
        """The finished runs that tables can use, and notes on the others and on several datasets. Raises RunError."""
        if not self.results:
            raise RunError("no folder of runs given; this table is made from runs, e.g. results/cub80_frozen")
        runs, unfinished = find_finished(self.results)
        runs, twins = without_twins(runs)
        notes = unfinished + twins
        datasets = list(dict.fromkeys(run.dataset for run in runs))
        if len(datasets) > 1:
            notes.append(f"runs of {len(datasets)} datasets ({', '.join(datasets)}): each has a table of its own")
        for run in runs:
            if run.test_classes is not None and run.num_classes is not None and run.test_classes < run.num_classes:
                found = f"{run.test_classes} of {run.num_classes} classes of {run.dataset}"
                notes.append(f"the mean class accuracy averages over {found}; the others have no test image")
        return runs, list(dict.fromkeys(notes))

    @cached_property
    def accuracy(self) -> pd.DataFrame:
        return accuracy_table(self.finished[0], load_published(self.paper))


def _accuracy(inputs: Inputs) -> Table:
    runs, notes = inputs.finished
    blocks, frame, more = differences(group_runs(runs))
    frames = {"accuracy": inputs.accuracy} | ({} if frame.empty else {"differences": frame})
    return Table("Accuracy", [*table_blocks(inputs.accuracy), *blocks], frames, notes + more)


Made = tuple[list[Block], pd.DataFrame, list[str]]
"""Blocks of a table, its tidy frame, and notes."""


def _from_runs(title: str, name: str, make: Callable[[list[Run], Inputs], Made]) -> Callable[[Inputs], Table]:
    """A table whose frame has its name."""

    def table(inputs: Inputs) -> Table:
        runs, notes = inputs.finished
        blocks, frame, more = make(runs, inputs)
        return Table(title, blocks, {name: frame}, notes + more)

    return table


def _condition_number(runs: list[Run], inputs: Inputs) -> Made:
    path = inputs.paper / "condition_number_iccv21.csv"
    numbers = ("epoch", "condition_number")
    published = read_csv(path, ("method", *numbers, "source"), numbers=numbers)
    return condition_numbers(runs, published)


def _approximation_error(inputs: Inputs) -> Table:
    from fgvc.studies.gradients.arithmetic import (
        approximation_error_block,
        approximation_errors,  # it imports torch, which other tables do without
    )

    frame = approximation_errors(inputs.paper / "approximation_error_iccv21.csv")
    return Table("Approximation error", [approximation_error_block(frame)], {"approximation_error": frame})


def _gradient_bounds(inputs: Inputs) -> Table:
    from fgvc.studies.gradients.arithmetic import gradient_bounds, gradient_bounds_block

    frame = gradient_bounds(inputs.paper / "gradient_bounds_iccv21.csv")
    return Table("Gradient bounds", [gradient_bounds_block(frame)], {"gradient_bounds": frame})


TABLES: dict[str, Callable[[Inputs], Table]] = {
    "accuracy": _accuracy,
    "coarse": _from_runs("Coarser levels", "coarse", lambda runs, _: coarse(runs)),
    "hybrid": _from_runs("Hybrid protocol", "hybrid", lambda runs, inputs: hybrid(group_runs(runs), inputs.accuracy)),
    "cost": _from_runs("Cost", "cost", lambda runs, _: cost(runs)),
    "condition_number": _from_runs("Condition number of the covariance", "condition_number", _condition_number),
    "approximation_error": _approximation_error,
    "gradient_bounds": _gradient_bounds,
}


def default_tables(inputs: Inputs) -> list[str]:
    """Names of the tables for these runs: accuracy, and coarse if a run has coarser labels. Raises RunError."""
    return ["accuracy", *(["coarse"] if any(run.coarse for run in inputs.finished[0]) else [])]


def make_tables(names: list[str], inputs: Inputs) -> tuple[dict[str, Table], list[str]]:
    """The tables of these names, and notes.

    Several names are made as far as they can be: a table whose input is not among the results, or damaged, is noted.

    Raises UserError: nothing could be made, or the one table that was asked for could not.
    """
    made: dict[str, Table] = {}
    notes: dict[str, None] = {}  # each once: several tables are made from the same runs
    errors = []
    for name in names:
        try:
            made[name] = TABLES[name](inputs)
        except UserError as error:
            if len(names) == 1:
                raise
            errors.append(f"no table {name}: {error}")
            continue
        notes |= dict.fromkeys(made[name].notes)
    if not made:
        raise RunError("no table could be made:\n  " + "\n  ".join(errors))
    return made, [*notes, *errors]
