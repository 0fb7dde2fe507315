"""The sections that list runs: all of them with their status, what they were made with, how they are calibrated."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fgvc.errors import RunError
from fgvc.io import read_json_object
from fgvc.presentation.render import Block
from fgvc.reporting.report.collect import Collected
from fgvc.reporting.report.content import DetailsPart, Made, Part, Runs, TablePart, TextPart
from fgvc.reporting.run_tables import NOT_MEASURED
from fgvc.runs import Run
from fgvc.runs.config import flatten
from fgvc.runs.folder import RunFolder

_CALIBRATION = {
    "split": "Fitted on",
    "images": "Images",
    "temperature": "Temperature",
    "before.calibration_error": "Calibration error in % before",
    "after.calibration_error": "after",
    "before.loss": "Loss before",
    "after.loss": "after",
}
"""Fields of calibration.json, and their columns."""
_CALIBRATION_NOTE = (
    "Logits divided by the temperature. Calibration error: expected difference of confidence and accuracy; after: "
    "cross-fitted, each image with a temperature that it took no part in."
)
_RESULTS = ("final", "best", "classes")  # of summary.json: they stand in tables of their own


def run_table(collected: Collected) -> Made:
    """The runs that did not finish with the reason, and all of them."""
    parts: list[Part] = []
    unfinished = [run for run in collected.runs if not run.finished]
    note = f"Folders: below {collected.parent}."
    if unfinished:
        rows = [
            [run.label, run.status, run.reason or "not stated", str(run.seed), collected.folder(run)]
            for run in unfinished
        ]
        block = Block("Not finished", ["Method", "Status", "Reason", "Seed", "Folder"], rows)
        parts.append(TablePart(block, [collected.of([run]) for run in unfinished]))
    header = ["Method", "Status", "Seed", "Final top-1", "Best top-1", "Epochs", "Dataset", "Backbone"]
    header += ["Minutes", "Commit", "Folder"]
    block = Block("All runs", header, [_run_row(run, collected.folder(run)) for run in collected.runs], [note])
    parts.append(TablePart(block, [(place,) for place in range(len(collected.runs))]))
    return parts, collected.notes


def _run_row(run: Run, folder: str) -> list[str]:
    accuracies = [NOT_MEASURED if a is None else f"{a.top1:.2f}" for a in (run.final, run.best)]
    backbone = f"{run.backbone}, {'frozen' if run.frozen else 'fine-tuned'}"
    total = (run.seconds or {}).get("total")
    minutes = NOT_MEASURED if total is None else f"{total / 60:.1f}"
    commit = "not stated" if run.commit is None else run.commit[:12] + ("-dirty" * run.commit.endswith("-dirty"))
    row = [run.label, run.status, str(run.seed), *accuracies, str(run.epochs), run.dataset, backbone]
    return [*row, minutes, commit, folder]


def configuration(collected: Collected) -> Made:
    """What all runs have in common once, then of each run what it has to itself."""
    notes: list[str] = []
    settings = [_settings(run, notes) for run in collected.runs]
    records = [_provenance(run, notes) for run in collected.runs]
    everything = [
        {**_named("config", own), **_named("made with", record)} for own, record in zip(settings, records, strict=True)
    ]
    common = {
        key: value for key, value in everything[0].items() if all(other.get(key) == value for other in everything)
    }
    parts: list[Part] = []
    if len(everything) > 1:
        text = f"{len(common)} settings are the same in all {len(everything)} runs and stand here once; below them, "
        parts.append(TextPart([f"{text}run by run, those that differ."]))
        parts.append(DetailsPart(f"The same in all {len(everything)} runs", common))
    else:
        common = {}
    for place, (run, values) in enumerate(zip(collected.runs, everything, strict=True)):
        own = {key: value for key, value in values.items() if key not in common}
        summary = f"{run.label}, seed {run.seed}, {run.dataset}, {run.status}: {collected.folder(run)}"
        parts.append(DetailsPart(summary, own, (place,), open=len(everything) == 1))
    return parts, notes


def _settings(run: Run, notes: list[str]) -> dict[str, Any]:
    try:
        return flatten(run.settings())
    except RunError as error:
        notes.append(str(error))
        return {}


def _provenance(run: Run, notes: list[str]) -> dict[str, Any]:
    """The summary but for its results, and the checksum of the configuration."""
    try:
        summary = RunFolder(run.path).read_summary()
    except RunError as error:  # it could be read a moment ago
        notes.append(str(error))
        return {}
    flat = flatten({key: value for key, value in summary.items() if key not in _RESULTS})
    config = run.path / "config.yaml"
    digest = hashlib.sha256(config.read_bytes()).hexdigest() if config.is_file() else None
    return {**flat, "config_sha256": digest, "folder": str(run.path)}


def _named(prefix: str, values: Mapping[str, Any]) -> dict[str, str]:
    return {f"{prefix}: {key}": _text(value) for key, value in values.items()}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def calibration(collected: Collected) -> Made:
    """Temperatures and errors of calibration, as `fgvc calibrate` keeps them."""
    rows: list[list[str]] = []
    places: list[Runs | None] = []
    found, notes = collected.read_each("calibration.json", "calibration", lambda file, _: _checkpoints(file))
    for file, run, checkpoints in found:
        name = [str(file.parent), "not stated"] if run is None else [run.label, str(run.seed)]
        for checkpoint, record in sorted(checkpoints.items()):
            values = flatten(record) if isinstance(record, dict) else {}
            rows.append([*name, checkpoint, *(_cell(values.get(key)) for key in _CALIBRATION)])
            places.append(None if run is None else collected.of([run]))
    if not rows:
        return [], notes
    block = Block("Calibration", ["Method", "Seed", "Weights", *_CALIBRATION.values()], rows, [_CALIBRATION_NOTE])
    return [TablePart(block, places)], notes


def _checkpoints(file: Path) -> dict[str, Any]:
    try:
        checkpoints = read_json_object(file).get("checkpoints")
    except (OSError, ValueError) as error:
        raise RunError(f"{file}: cannot be read ({error}); calibrate the run again") from error
    if not isinstance(checkpoints, dict) or not checkpoints:
        raise RunError(f"{file}: holds no 'checkpoints'; calibrate the run again")
    return checkpoints


def _cell(value: Any) -> str:
    if value is None:
        return "not stated"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
