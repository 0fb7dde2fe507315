"""What was measured after each epoch, of many runs in one table."""

from collections.abc import Sequence

import pandas as pd

from fgvc.errors import RunError
from fgvc.runs.summary import Run

MEASURES = ("test_top1", "test_loss", "train_loss")
"""Columns of metrics.csv that a curve is drawn of; top-1 in per cent."""
COLUMNS = ("run", "label", "epoch", *MEASURES)


def training_curves(runs: Sequence[Run]) -> tuple[pd.DataFrame, list[str]]:
    """The course of runs, finished or not, and notes on those without one.

    Returns:
        One row a run and epoch, `COLUMNS`; `run` is its place in `runs`. A measure that a run did not keep is NaN.
    """
    tables, notes = [], []
    for place, run in enumerate(runs):
        try:
            metrics = run.metrics()
        except RunError as error:
            notes.append(f"no curve of {run.label}, seed {run.seed}: {error}")
            continue
        numbers = {name: pd.to_numeric(metrics[name], errors="coerce") for name in metrics if name in COLUMNS}
        if len(metrics):
            tables.append(pd.DataFrame({**numbers, "run": place, "label": run.label}).reindex(columns=COLUMNS))
    table: pd.DataFrame = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=COLUMNS)
    return table, notes
