"""Two runs side by side as Markdown: first their settings and environment, then their results."""

import re
from collections.abc import Sequence
from typing import Any

from fgvc.presentation.render import markdown_table
from fgvc.runs.compare import Change, Distance, RunComparison

_DIGEST = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{8,}\b")


def comparison_markdown(comparison: RunComparison) -> str:
    """The verdict, the differences in environment and settings, and how far the results are apart."""
    first, second = comparison.first, comparison.second
    parts = [
        f"# {first.label} on {first.dataset}, seed {first.seed}: {comparison.verdict}",
        f"First: `{first.path}`\nSecond: `{second.path}`",
        "## Made with",
        _changes(comparison.environment) or "No difference in commit, versions, machine, images, backbone weights.",
        _changes(comparison.settings) or "No difference in the settings.",
        *_remarks(comparison),
        "## Result",
        markdown_table(
            ["", "First", "Second", "Difference"],
            [[change.name, *map(_value, change[1:]), _difference(change)] for change in comparison.accuracies],
        ),
        _predictions(comparison),
        *_distances("Weights", "tensors", "tensor that differs most", comparison.weights),
        *_distances("metrics.csv", "epochs", "first that differs", comparison.metrics),
        *_distances("Eigenvalues", "values", None, comparison.spectra),
    ]
    return "\n\n".join(part for part in parts if part)


def _changes(changes: Sequence[Change]) -> str:
    rows = [[change.name, *map(_value, change[1:])] for change in changes]
    return markdown_table(["", "First", "Second"], rows) if rows else ""


def _remarks(comparison: RunComparison) -> list[str]:
    """What the tables cannot show."""
    remarks = []
    if comparison.unrecorded:
        remarks.append(f"Recorded by one of the runs only: {', '.join(comparison.unrecorded)}.")
    for run in (comparison.first, comparison.second):
        if run.commit is not None and run.commit.endswith("-dirty"):
            remarks.append(f"`{run.path}` was made with changes that its commit does not hold.")
        if run.frozen and run.seconds is not None and run.seconds.get("features") == 0:
            remarks.append(f"`{run.path}` read its feature maps from a cache: its backbone was not run.")
    if comparison.incomparable:
        remarks.append(f"Not compared: {'; '.join(comparison.incomparable)}.")
    return ["\n".join(f"- {remark}" for remark in remarks)] if remarks else []


def _predictions(comparison: RunComparison) -> str:
    found = comparison.predictions
    if found is None:
        return ""
    moved = f"confidences differ by at most {found.confidence:.2g}"
    if not found.changed:
        return f"Predictions: none of {found.images} changed; {moved}."
    right = f"{found.became_right} became right, {found.became_wrong} wrong"
    return f"Predictions: {found.changed} of {found.images} changed ({right}); {moved}."


def _distances(title: str, unit: str, where: str | None, distances: Sequence[Distance]) -> list[str]:
    """A table with a row for everything that differs, or a sentence where nothing does."""
    differing = [distance for distance in distances if distance.differing]
    if not differing:
        names = ", ".join(distance.name for distance in distances)
        return [f"{title}: bit-identical ({names})."] if distances else []
    same = [distance.name for distance in distances if not distance.differing]
    relative = any(distance.relative is not None for distance in differing)
    header = [title, f"{unit} that differ", "largest difference", *(["relative"] if relative else [])]
    rows = [
        [d.name, f"{d.differing} of {d.total}", f"{d.largest:.3g}"]
        + ([_value(d.relative)] if relative else [])
        + ([_value(d.where)] if where else [])
        for d in differing
    ]
    table = markdown_table([*header, *([where] if where else [])], rows)
    return [table, *([f"Bit-identical: {', '.join(same)}."] if same else [])]


def _value(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:.6g}"
    return _DIGEST.sub(r"\1…", str(value))  # their beginnings tell them apart


def _difference(change: Change) -> str:
    if change.first is None or change.second is None:
        return ""
    return f"{change.second - change.first:+.4g}" if change.second != change.first else "0"
