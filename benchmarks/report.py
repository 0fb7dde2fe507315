"""A benchmark's result as Markdown: what it was measured on, then one table a shape."""

from collections.abc import Sequence

import numpy as np
from records import CaseRecord, Record, ShapeRecord

_HEADER = ("Method", "Forward ms", "Backward ms", "Total ms", "Ratio to eigh", "Peak memory")

BUSY_FROM = 0.5
"""Load average above which other work is taken to run."""

_NOTES = """\
Times: median [quartiles] over the rounds; the total is that of forward and backward in the same round. Ratio: median
[quartiles] over the rounds of the total divided by the time of torch.linalg.eigh in the same round. Peak memory: most
that torch had allocated at once during forward and backward, beyond the input and the incoming gradient, in float64
C x C matrices per image; it includes the result, the gradient of the features and LAPACK's workspace, and is measured
with one thread."""


def head(record: Record) -> str:
    """What the numbers were measured on."""
    machine, arguments = record.machine, record.arguments
    versions = machine["versions"]
    lines = [
        f"machine: {machine['cpu']}, {machine['cores']} cores, {machine['system']}; {_load(machine['load'])}",
        f"torch {versions['torch']} (LAPACK of {machine['lapack']}), Python {versions['python']}, "
        f"{machine['threads']} threads, device {machine['device']}",
        f"fgvc {versions['fgvc']}, commit {record.commit or 'unknown'}, started {record.started}",
        f"features: {record.features}, float32; seed {arguments['seed']}",
        f"{arguments['repetitions']} interleaved rounds after {arguments['warm_up']} for warm-up",
    ]
    return "\n".join(["# Spectral benchmark", "", *(f"- {line}" for line in lines), "", _NOTES])


def _load(load: float | None) -> str:
    """The load average at the start, with a warning where it cannot have been idle."""
    if load is None:
        return "load unknown"
    return f"load {load:.1f} at the start" + (" (not idle: do not trust the times)" if load > BUSY_FROM else "")


def shape_table(record: ShapeRecord) -> str:
    """The table of one shape."""
    batch, channels, height, width = record.shape
    unit = batch * channels * channels * 8
    reference = np.array(record.cases[0].forward_ms)
    rows = [_row(case, reference, unit) for case in record.cases]
    title = f"## Batch {batch}, {channels} channels, {height} x {width} locations"
    lines = [title, "", _line(_HEADER), _line(["---", *["---:"] * (len(_HEADER) - 1)]), *map(_line, rows)]
    footer = f"Unit of memory: {batch} matrices of {channels} x {channels}, {unit / 2**20:.2f} MiB."
    return "\n".join([*lines, "", footer])


def markdown(record: Record) -> str:
    """The head and all tables."""
    return "\n\n".join([head(record), *map(shape_table, record.shapes)])


def _row(case: CaseRecord, reference: "np.ndarray[tuple[int], np.dtype[np.float64]]", unit: int) -> list[str]:
    total = np.array(case.forward_ms) + np.array(case.backward_ms or 0)
    label = case.label if case.gradient_norm is not None else f"{case.label} (gradient not finite)"
    backward = _quartiles(case.backward_ms) if case.backward_ms else "none"
    times = [_quartiles(case.forward_ms), backward, _quartiles(total.tolist())]
    return [label, *times, _quartiles((total / reference).tolist()), f"{case.peak_bytes / unit:.2f}"]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _quartiles(values: Sequence[float]) -> str:
    low, middle, high = (_number(value) for value in np.percentile(values, [25, 50, 75]))
    return f"{middle} [{low}, {high}]"


def _number(value: float) -> str:
    """Three digits, or two and a zero below 0.1; the whole number from 100."""
    digits = sum(value < limit for limit in (99.95, 9.995, 0.0995))
    return f"{value:.{digits}f}"
