"""float32 against float64 spectra: errors on the features of runs, and the accuracy of runs trained in each.

Small tables hold a study, and are all that its tables and its figure need: `errors`, `eigenvalues` and `images` of the
features, `pairs` of the trainings.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from fgvc.csv_files import read_csv, to_csv
from fgvc.errors import RunError
from fgvc.inference.pooling_inputs import load_features
from fgvc.runs.statistics import mcnemar, pair_predictions
from fgvc.runs.summary import Run
from fgvc.studies.precision.errors import (
    DECADE_COLUMNS,
    ERROR_COLUMNS,
    STUDIED,
    SUMMARY_COLUMNS,
    eigenvalue_errors,
    precision_errors,
    summarise_errors,
)

FEATURES = ("channels", "locations")
PAIR_COLUMNS = (
    "label",
    "seed",
    "float64",
    "float32",
    "difference",
    "images",
    "changed",
    "only64",
    "only32",
    "confidence",
)
DRAWN = ("iSQRT-COV", "MPN-COV", "SVD-TopN")
"""What `images` keeps, of the float32 spectra: methods without and with an eigendecomposition, and the leak."""


class PrecisionStudy(NamedTuple):
    """The tables of the features of several runs, told apart by `FEATURES`.

    Attributes:
        errors: `FEATURES` and the columns of `summarise_errors`.
        eigenvalues: `FEATURES` and the columns of `eigenvalue_errors`.
        images: `FEATURES` and the columns of `precision_errors`, of float32 spectra and the methods in `DRAWN`.
    """

    errors: pd.DataFrame
    eigenvalues: pd.DataFrame
    images: pd.DataFrame


def study_precision(
    paths: Sequence[Path],
    *,
    images: int = 64,
    methods: Sequence[str] = STUDIED,
    keep: int | None = None,
    root: str | None = None,
) -> PrecisionStudy:
    """Errors on the features that each run's pooling reads of its test images, under the gradient of its own loss.

    Args:
        paths: finished runs with a covariance pooling, of different numbers of channels or locations.
        images: how many of each, evenly spaced.
        methods, keep: as in `precision_errors`.
        root: folder of the dataset, where it has moved since training.

    Raises:
        RunError, DatasetError, WeightsError, ConfigError: as `load_features` and `precision_errors`; or two runs have
            features of one shape.
    """
    frames: list[tuple[pd.DataFrame, ...]] = []
    seen: dict[tuple[int, int], Path] = {}
    for path in paths:
        inputs = load_features(path, images, root=root)
        assert inputs.grad is not None  # a run has a loss
        shape = (inputs.features.shape[1], inputs.features[0, 0].numel())
        if shape in seen:
            raise RunError(f"{seen[shape]} and {path} both have {shape[0]} channels x {shape[1]} locations; give one")
        seen[shape] = path
        errors = precision_errors(inputs.features, inputs.grad, methods, keep=keep)
        drawn = errors[(errors["arithmetic"] == "float32 spectrum") & errors["label"].isin(DRAWN)]
        parts = (summarise_errors(errors), eigenvalue_errors(inputs.features), drawn)
        frames.append(tuple(_with_shape(part, shape) for part in parts))
    return PrecisionStudy(*(pd.concat(parts, ignore_index=True) for parts in zip(*frames, strict=True)))


def _with_shape(table: pd.DataFrame, shape: tuple[int, int]) -> pd.DataFrame:
    whole: pd.DataFrame = table.assign(**dict(zip(FEATURES, shape, strict=True)))[[*FEATURES, *table.columns]]
    return whole


def precision_pairs(runs: Sequence[Run]) -> pd.DataFrame:
    """Runs that differ in `method.spectral_dtype` alone, side by side.

    Args:
        runs: finished.

    Returns:
        One row a method and seed with both: `PAIR_COLUMNS`. Top-1 in per cent and the difference float32 - float64 in
        points; of `images`, those with another prediction and those that only one of the two gets right; and the
        largest change of a confidence.

    Raises:
        RunError: no such pair, two runs of the same configuration, or predictions that are missing or damaged.
    """
    found: dict[str, dict[str, Run]] = {}
    for run in runs:
        twins = found.setdefault(_all_but_precision(run), {})
        if run.spectral_dtype in twins:
            raise RunError(f"{twins[run.spectral_dtype].path} and {run.path} have the same configuration; give one")
        twins[run.spectral_dtype] = run
    rows = [_pair(twins["float64"], twins["float32"]) for twins in found.values() if len(twins) == 2]
    if not rows:
        raise RunError("no two runs differ in method.spectral_dtype alone; train each with float64 and with float32")
    table: pd.DataFrame = pd.DataFrame(rows, columns=PAIR_COLUMNS)
    return table


def _all_but_precision(run: Run) -> str:
    """The configuration that two runs of a pair share, as text."""
    config = run.settings()
    for key in ("run_dir", "resume"):
        config.pop(key, None)
    method = {key: value for key, value in config.get("method", {}).items() if key != "spectral_dtype"}
    return json.dumps(config | {"method": method}, sort_keys=True)


def _pair(wide: Run, narrow: Run) -> tuple[Any, ...]:
    assert wide.final is not None and narrow.final is not None  # finished
    first, second = wide.predictions(), narrow.predictions()
    test, pairs = mcnemar(first, second), pair_predictions(first, second, ["confidence"])
    changed = int((pairs["predicted_first"] != pairs["predicted_second"]).sum())
    confidence = float((pairs["confidence_first"] - pairs["confidence_second"]).abs().max())
    top1 = (wide.final.top1, narrow.final.top1, narrow.final.top1 - wide.final.top1)
    return (wide.label, wide.seed, *top1, test.images, changed, test.only_first, test.only_second, confidence)


def save_precision(study: PrecisionStudy, folder: Path) -> dict[Path, str]:
    """The text of each file of a study: errors.csv, eigenvalues.csv and images.csv."""
    return {folder / f"{name}.csv": to_csv(table, "%.3e") for name, table in study._asdict().items()}


def load_precision(folder: Path) -> PrecisionStudy:
    """Read the files that `save_precision` names. Raises RunError where one is missing or damaged."""
    columns = {"errors": SUMMARY_COLUMNS, "eigenvalues": DECADE_COLUMNS, "images": ERROR_COLUMNS}
    return PrecisionStudy(
        *(read_csv(folder / f"{name}.csv", (*FEATURES, *own)) for name, own in columns.items()),
    )
