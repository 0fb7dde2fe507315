"""Calibrations of several runs as a table."""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from fgvc.csv_text import to_csv
from fgvc.files import write_text_atomic
from fgvc.training.calibration import Calibration
from fgvc.training.run_folder import RunFolder

MEASURES = ("calibration_error", "loss", "brier")


def write_calibrations(file: Path, found: Mapping[Path, Calibration]) -> None:
    """Write `calibrations_table` as CSV."""
    write_text_atomic(file, to_csv(calibrations_table(found)))


def calibrations_table(found: Mapping[Path, Calibration]) -> pd.DataFrame:
    """One row a run: label, dataset, backbone, seed, checkpoint, split, images, top1, temperature, and the measures.

    Each of calibration_error (per cent), loss and brier stands there as NAME_before and NAME_after, cross-fitted.
    """
    rows = []
    for path, calibration in found.items():
        summary, record = RunFolder(path).read_summary(), calibration.record
        rows.append(
            {
                **{name: summary.get(name) for name in ("label", "dataset", "backbone", "seed")},
                "checkpoint": calibration.checkpoint,
                **{name: record[name] for name in ("split", "images", "top1", "temperature")},
                **{f"{name}_{when}": record[when][name] for name in MEASURES for when in ("before", "after")},
            }
        )
    table: pd.DataFrame = pd.DataFrame(rows)
    return table
