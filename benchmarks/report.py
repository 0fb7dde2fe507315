"""A benchmark's result as Markdown: what it was measured on, then one table a shape."""

from collections.abc import Sequence

import numpy as np
from machine import machine_line
from records import CaseRecord, Record, ShapeRecord

from fgvc.presentation.render import markdown_table

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
        f"{machine_line(machine)}; {_load(machine['load'])}",
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


_HEADER = ["Method", "Forward ms", "Backward ms", "Total ms", "Ratio to eigh", "Peak memory"]
_ERRORS = ["Error", "Error of gradient"]
_ERROR_NOTE = """\
Errors: distance of the descriptor, and of the features' gradient, from those of the exact layer, on the features in
float64, in units of the exact one's norm. The exact layer is the one with its exact gradient, by eigendecomposition;
for what approximates the square root, it is the square root."""


def shape_table(record: ShapeRecord) -> str:
    """The table of one shape."""
    batch, channels, height, width = record.shape
    reference = np.array(record.cases[0].forward_ms)
    unit = batch * channels * channels * 8  # bytes of one float64 C x C matrix for each image of the batch
    with_errors = any(case.forward_error is not None for case in record.cases)
    header = _HEADER + (_ERRORS if with_errors else [])
    table = markdown_table(header, [_row(case, reference, unit)[: len(header)] for case in record.cases])
    title = f"## Batch {batch}, {channels} channels, {height} x {width} locations"
    memory = f"Unit of memory: {batch} matrices of {channels} x {channels}, {unit / 2**20:.2f} MiB."
    return f"{title}\n\n{table}\n\n{memory}" + (f"\n\n{_ERROR_NOTE}" if with_errors else "")


def _row(case: CaseRecord, reference: np.ndarray, unit: int) -> list[str]:
    total = _total(case)
    label = case.label if case.gradient_norm is not None else f"{case.label} (gradient not finite)"
    backward = _quartiles(case.backward_ms) if case.backward_ms else "none"
    times = [_quartiles(case.forward_ms), backward, _quartiles(total.tolist())]
    shown = ["" if error is None else f"{error:.0e}" for error in (case.forward_error, case.gradient_error)]
    if case.gradient_norm is None:
        shown[1] = "not finite"
    return [label, *times, _quartiles((total / reference).tolist()), f"{case.peak_bytes / unit:.2f}", *shown]


def _quartiles(values: Sequence[float]) -> str:
    low, middle, high = (_number(value) for value in np.percentile(values, [25, 50, 75]))
    return f"{middle} [{low}, {high}]"


def _number(value: float) -> str:
    """Three digits, or two and a zero below 0.1; the whole number from 100."""
    digits = sum(value < limit for limit in (99.95, 9.995, 0.0995))
    return f"{value:.{digits}f}"


def markdown(record: Record) -> str:
    """The head and all tables."""
    return "\n\n".join([head(record), *map(shape_table, record.shapes)])


def choice_markdown(record: Record) -> str:
    """A row a candidate: its time at each shape, and at the last its memory and errors; at the others the gradient's.

    Args:
        record: of `benchmarks/spectral.py` with the same candidates at each shape.
    """
    rows: dict[str, list[str]] = {}
    for shape in record.shapes:
        reference = np.array(shape.cases[0].forward_ms)
        for case in shape.cases[1:]:
            rows.setdefault(case.label, [case.label]).append(_number(float(np.median(_total(case) / reference))))
    *singular, full = record.shapes
    for case in full.cases[1:]:
        unit = full.shape[0] * full.shape[1] ** 2 * 8
        errors = [case.forward_error, case.gradient_error]
        found = [other.gradient_error for shape in singular for other in shape.cases if other.name == case.name]
        rows[case.label] += [f"{case.peak_bytes / unit:.1f}", *(_error(error, case) for error in errors)]
        rows[case.label].append(", ".join(dict.fromkeys(_error(error, case) for error in found)))
    sizes = [f"{height} x {width}" for _, _, height, width in (shape.shape for shape in record.shapes)]
    header = ["Method", *sizes, "Memory", "Error", "Error of gradient", "Where the covariance is singular"]
    return markdown_table(header, list(rows.values()))


def _error(error: float | None, case: CaseRecord) -> str:
    if error is None:
        return "not finite" if case.forward_error is not None else ""
    return "0" if error == 0 else f"{error:.0e}"


def times_markdown(record: Record) -> str:
    """Forward and backward of each pooling in float64, and the time of float32 as a part of it.

    Args:
        record: of `benchmarks/spectral.py` with NAME and NAME@float32 of each pooling.
    """
    rows: dict[str, list[str]] = {}
    for shape in record.shapes:
        cases = {case.name: case for case in shape.cases}
        for name, narrow in cases.items():
            wide = cases.get(name.removesuffix("@float32"))
            if wide is None or wide is narrow:
                continue
            ratio = np.percentile(_total(narrow) / _total(wide), [50, 25, 75])
            cells = [f"{np.median(_total(wide)):.3g}", "{:.2f} [{:.2f}, {:.2f}]".format(*ratio)]
            rows.setdefault(wide.label, []).extend(cells)
    header = ["Method"]
    for shape in record.shapes:
        size = "x".join(map(str, shape.shape))
        header += [f"{size}: float64, ms", "float32 / float64"]
    return markdown_table(header, [[label, *cells] for label, cells in rows.items()])


def _total(case: CaseRecord) -> np.ndarray:
    total: np.ndarray = np.array(case.forward_ms) + np.array(case.backward_ms or 0)
    return total
