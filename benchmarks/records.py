"""The result of the spectral benchmark as it is saved."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fgvc.errors import ConfigError
from fgvc.foreign import read_json
from fgvc.io import to_json, write_output

SCHEMA = 1
KIND = "spectral benchmark"


@dataclass(frozen=True)
class CaseRecord:
    """One candidate at one shape.

    Attributes:
        name, label: Names as in `cases.Case`.
        forward_ms, backward_ms: Times of each round, rounds in the same order for all candidates of a shape; no
            backward times for a candidate that has no backward pass.
        peak_bytes: Most bytes that a forward and backward pass held at once, beyond its input and incoming gradient.
        gradient_norm: Norm of the features' gradient; None where it is not finite, 0 without a backward pass.
        forward_error, gradient_error: Distances of the descriptor and of the features' gradient from those of the exact
            layer, all in float64, in units of the norm of the exact ones. None without an exact layer, and in results
            of before these were measured; for a gradient also where it is not finite.
    """

    name: str
    label: str
    forward_ms: list[float]
    backward_ms: list[float]
    peak_bytes: int
    gradient_norm: float | None
    forward_error: float | None = None
    gradient_error: float | None = None


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
    """Write a record; raise FileExistsError if something else lies at `path`, see `output_path`."""
    write_output(path, to_json(asdict(record)), KIND)


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
