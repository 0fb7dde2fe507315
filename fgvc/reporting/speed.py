"""The result of the spectral benchmark: its record as it is saved, and its tables, one a shape of features."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fgvc.errors import ConfigError
from fgvc.io import read_json, to_json, write_output
from fgvc.presentation.render import Block

SCHEMA = 1


@dataclass(frozen=True)
class CaseRecord:
    """One candidate at one shape.

    Attributes:
        name, label: Names as in `cases.Case`.
        forward_ms, backward_ms: Times of each round, rounds in the same order for all candidates of a shape; no
            backward times for a candidate that has no backward pass.
        peak_bytes: Most bytes that a forward and backward pass held at once, beyond its input and incoming gradient.
        gradient_norm: Norm of the features' gradient; None where it is not finite, 0 without a backward pass.
    """

    name: str
    label: str
    forward_ms: list[float]
    backward_ms: list[float]
    peak_bytes: int
    gradient_norm: float | None


@dataclass(frozen=True)
class ShapeRecord:
    """All candidates at one shape (B, C, H, W); the first is the reference of the ratios."""

    shape: list[int]
    cases: list[CaseRecord]


@dataclass(frozen=True)
class Record:
    """A whole run; `machine` and `arguments` are what `spectral.py` knew at its start."""

    schema: int
    started: str
    commit: str | None
    machine: dict[str, Any]
    arguments: dict[str, Any]
    features: str
    shapes: list[ShapeRecord]


def save_record(path: Path, record: Record) -> None:
    write_output(path, to_json(asdict(record)))


def is_record(path: Path) -> bool:
    """Whether a file is a result of the benchmark, of any version."""
    try:
        saved = read_json(path)
    except (OSError, ValueError):
        return False
    return isinstance(saved, dict) and {"schema", "shapes"} <= saved.keys()


def load_record(path: Path) -> Record:
    """Read what `save_record` wrote.

    Raises:
        ConfigError: no such file, no JSON, another schema, or fields missing or unknown.
    """
    try:
        saved = read_json(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON ({error})") from error
    schema = saved.get("schema") if isinstance(saved, dict) else None
    if schema != SCHEMA:
        raise ConfigError(f"{path}: schema {schema!r}, this script reads {SCHEMA}; measure again or use its own commit")
    try:
        shapes = [
            ShapeRecord(shape["shape"], [CaseRecord(**case) for case in shape["cases"]]) for shape in saved["shapes"]
        ]
        record = Record(**{**saved, "shapes": shapes})
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{path}: not a result of this benchmark ({error})") from error
    _check_counts(path, record)
    return record


def _check_counts(path: Path, record: Record) -> None:
    """Raise ConfigError where a candidate has another number of times than there were rounds."""
    rounds = record.arguments.get("repetitions")
    for shape in record.shapes:
        for case in shape.cases:
            if len(case.forward_ms) != rounds or len(case.backward_ms) not in (0, rounds):
                raise ConfigError(f"{path}: {case.name} at {shape.shape} does not have {rounds} times")


_HEADER = ["Method", "Forward ms", "Backward ms", "Total ms", "Ratio to eigh", "Peak memory"]

SPEED_NOTE = (
    "Times: median [quartiles] over the rounds; the total is that of forward and backward in the same round. Ratio: of "
    "the total to torch.linalg.eigh alone in the same round. Peak memory: most that was allocated at once beyond the "
    "input and the incoming gradient, in float64 C x C matrices per image."
)
"""What the columns are, in short; benchmarks/README.md says more."""


def speed_block(record: ShapeRecord) -> Block:
    """All candidates at one shape."""
    batch, channels, height, width = record.shape
    reference = np.array(record.cases[0].forward_ms)
    rows = [_row(case, reference, memory_unit(record)) for case in record.cases]
    title = f"Batch {batch}, {channels} channels, {height} x {width} locations"
    return Block(title, _HEADER, rows, [f"Unit of memory: {memory_unit(record) / 2**20:.2f} MiB."])


def memory_unit(record: ShapeRecord) -> int:
    """Bytes of one float64 C x C matrix for each image of the batch."""
    batch, channels = record.shape[:2]
    return batch * channels * channels * 8


def speed_frame(record: Record) -> pd.DataFrame:
    """One row a shape and candidate: medians of forward, backward, total (ms) and ratio, and the peak in units."""
    rows = []
    for shape in record.shapes:
        reference = np.array(shape.cases[0].forward_ms)
        for case in shape.cases:
            total = _total(case)
            row: dict[str, object] = {
                "shape": "x".join(map(str, shape.shape)),
                "method": case.name,
                "label": case.label,
            }
            row |= {"forward_ms": np.median(case.forward_ms), "total_ms": np.median(total)}
            row |= {"backward_ms": np.median(case.backward_ms) if case.backward_ms else np.nan}
            row |= {"ratio_to_eigh": np.median(total / reference), "peak_units": case.peak_bytes / memory_unit(shape)}
            rows.append(row | {"gradient_finite": case.gradient_norm is not None, "commits": record.commit})
    table: pd.DataFrame = pd.DataFrame(rows)
    return table


def _total(case: CaseRecord) -> np.ndarray:
    total: np.ndarray = np.array(case.forward_ms) + np.array(case.backward_ms or 0)
    return total


def _row(case: CaseRecord, reference: np.ndarray, unit: int) -> list[str]:
    total = _total(case)
    label = case.label if case.gradient_norm is not None else f"{case.label} (gradient not finite)"
    backward = _quartiles(case.backward_ms) if case.backward_ms else "none"
    times = [_quartiles(case.forward_ms), backward, _quartiles(total.tolist())]
    return [label, *times, _quartiles((total / reference).tolist()), f"{case.peak_bytes / unit:.2f}"]


def _quartiles(values: Sequence[float]) -> str:
    low, middle, high = (_number(value) for value in np.percentile(values, [25, 50, 75]))
    return f"{middle} [{low}, {high}]"


def _number(value: float) -> str:
    """Three digits, or two and a zero below 0.1; the whole number from 100."""
    digits = sum(value < limit for limit in (99.95, 9.995, 0.0995))
    return f"{value:.{digits}f}"
