"""The sections of the report by name: each is one function of what was collected."""

from collections.abc import Callable
from dataclasses import dataclass

from fgvc.errors import UserError
from fgvc.reporting.registry import make_tables
from fgvc.reporting.report.audit import audit
from fgvc.reporting.report.class_section import confusions
from fgvc.reporting.report.collect import Collected
from fgvc.reporting.report.content import Made, Part, Section, TablePart
from fgvc.reporting.report.gallery import attribution
from fgvc.reporting.report.plots import conditions, spectra, training
from fgvc.reporting.report.run_list import calibration, configuration, run_table


@dataclass(frozen=True)
class Maker:
    """How a section is made.

    Attributes:
        title: its heading.
        command: what makes its content, for a reader who finds none.
        make: raises UserError where there is nothing to show; no parts, but notes, where nothing there can be shown.
    """

    title: str
    command: str
    make: Callable[[Collected], Made]


def _tables(*names: str) -> Callable[[Collected], Made]:
    def make(collected: Collected) -> Made:
        tables, notes = make_tables(list(names), collected.inputs)
        parts: list[Part] = []
        for table in tables.values():
            for block in table.blocks:
                parts.append(TablePart(block, [collected.behind(block.title, row[0]) for row in block.rows]))
        return parts, notes

    return make


def _conditions(collected: Collected) -> Made:
    parts, notes = conditions(collected)
    tables, more = _tables("condition_number")(collected)
    return parts + tables, notes + more


_TRAIN = "fgvc train experiment=NAME method=NAME"
SECTIONS: dict[str, Maker] = {
    "accuracy": Maker("Accuracy", _TRAIN, _tables("accuracy")),
    "training": Maker("Training", _TRAIN, training),
    "spectra": Maker("Spectra", f"{_TRAIN}    # a finished run keeps spectrum.npz", spectra),
    "conditions": Maker("Condition numbers", f"{_TRAIN} trainer.probe_images=32", _conditions),
    "audit": Maker("Gradient audit", "fgvc audit_gradients RUN", audit),
    "confusions": Maker("Confusions", _TRAIN, confusions),
    "attribution": Maker("Attribution", "fgvc attribute RUN --images 8", attribution),
    "calibration": Maker("Calibration", "fgvc calibrate RUN", calibration),
    "hybrid": Maker("Hybrid protocol", f"{_TRAIN} hybrid.method=isqrt_cov", _tables("hybrid")),
    "cost": Maker("Cost", _TRAIN, _tables("cost")),
    "runs": Maker("Runs", _TRAIN, run_table),
    "configuration": Maker("Configuration and provenance", _TRAIN, configuration),
}


def make_sections(collected: Collected) -> list[Section]:
    """Every section; one that cannot be made says why and what would make it."""
    sections = []
    for name, maker in SECTIONS.items():
        try:
            parts, notes = maker.make(collected)
        except UserError as error:
            sections.append(Section(name, maker.title, missing=str(error), command=maker.command))
            continue
        missing = "" if parts else "what lies here is left out, as the notes say"
        sections.append(Section(name, maker.title, parts, notes, missing, maker.command))
    return sections
