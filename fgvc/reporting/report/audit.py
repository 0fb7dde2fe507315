"""The section of the gradient audit: what `fgvc audit_gradients` wrote."""

from dataclasses import replace
from functools import partial
from pathlib import Path

from fgvc.csv_files import read_csv
from fgvc.errors import RunError
from fgvc.reporting.curves import errors_figure
from fgvc.reporting.report.collect import Collected, run_name
from fgvc.reporting.report.content import GalleryPart, Intervals, Made, Part, PlotPart, TablePart
from fgvc.reporting.report.pictures import read_picture
from fgvc.runs import Run
from fgvc.studies.gradients.show import ERROR_FLOOR, gradients_block

_COLUMNS = ("label", "relative_error", "relative_error_lower", "relative_error_upper")
_PICTURE_WIDTH = 1600


def audit(collected: Collected) -> Made:
    """What `fgvc audit_gradients` wrote: errors of the published gradients."""
    audits, notes = collected.read_each("gradients.csv", "audit", partial(_audit, collected))
    return [part for _, _, parts in audits for part in parts], notes


def _audit(collected: Collected, file: Path, run: Run | None) -> list[Part]:
    summary = read_csv(file, _COLUMNS, names=("label",))
    try:
        block = gradients_block(summary)
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{file}: not an audit of this version ({error!r}); run fgvc audit_gradients again") from error
    runs = None if run is None else collected.of([run])
    title = str(file.parent) if run is None else f"On features of {run_name(run)}"
    shown = summary[summary["relative_error"] > ERROR_FLOOR]
    columns = (list(shown[f"relative_error{end}"]) for end in ("", "_lower", "_upper"))
    chart = Intervals("Relative error", "relative error of the gradient", list(shown["label"]), *columns)
    text = (
        "Relative error of the features' gradient against the exact one: median over images as a dot, quartiles as a "
        f"bar. Those below {ERROR_FLOOR:.0e}, which are exact up to rounding, are in the table only."
    )
    parts: list[Part] = [] if shown.empty else [PlotPart(title, text, errors_figure(shown), [chart], runs)]
    parts.append(TablePart(replace(block, title=f"Gradients: {title}"), [runs] * len(block.rows)))
    picture = file.with_name("loewner.png")
    if picture.is_file():
        text = "Loewner matrices of the audited gradients side by side, and below each its relative error"
        shown_picture = read_picture(picture, _PICTURE_WIDTH, text, "Loewner matrices, |L|, and their relative errors")
        parts.append(GalleryPart("Loewner matrices", [shown_picture], runs, wide=True))
    return parts
