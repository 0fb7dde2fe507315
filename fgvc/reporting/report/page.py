"""The page as a whole: one file that asks for nothing, neither from the network nor from the disk."""

import base64
import functools
import gzip
import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from plotly.offline import get_plotlyjs, get_plotlyjs_version

from fgvc.errors import UserError
from fgvc.presentation.render import html_block
from fgvc.provenance import commit_label, source_state, versions
from fgvc.reporting.report.answer import make_answers
from fgvc.reporting.report.results import Results
from fgvc.reporting.report.sections import make_sections


@dataclass(frozen=True)
class Report:
    """A page, and lines on runs and parts that it leaves out, or that are doubtful."""

    html: str
    notes: list[str]


def make_report(results: Results, made: datetime, images: Sequence[Path] = ()) -> Report:
    """The report of some runs; the same, but for the time `made`, for the same runs.

    Args:
        results: Runs, and the files that lie with them.
        made: Time that the page states.
        images: Folders of datasets whose images the page may carry: of the worst confusions, a few.
    """
    environment = Environment(loader=PackageLoader(__package__, "assets"), autoescape=True, undefined=StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = True
    environment.filters |= {"table": html_block, "packed": _packed}
    notes: list[str] = []
    answers, sections, runs = make_answers(results, images, notes), make_sections(results), results.runs
    commit = commit_label(source_state())
    script, library = (files(__package__) / "assets" / "report.js").read_text(encoding="utf-8"), get_plotlyjs()
    datasets = dict.fromkeys(run.dataset for run in runs)
    facts: dict[str, Iterable[str]] = {
        "Setting": _shared_parts(results) or [*datasets, *dict.fromkeys(run.backbone for run in runs)],
        "Runs": [f"{count} {status}" for status, count in sorted(Counter(run.status for run in runs).items())],
        "Heads": dict.fromkeys(run.label for run in runs),
        "Commit": sorted({(run.commit or "not stated")[:12] for run in runs}),
    }
    page = environment.get_template("page.html").render(
        title=f"Report of {len(runs)} run{'' if len(runs) == 1 else 's'} on {', '.join(datasets)}",
        answers=answers,
        facts=facts,
        sections=[section for section in sections if not section.missing],
        absent=[section for section in sections if section.missing],
        script=script,
        library=library,
        script_hashes=[_digest(script), _digest(library)],
        plotly_version=get_plotlyjs_version(),
        made=f"{made:%Y-%m-%d %H:%M} {made.tzname() or ''}".strip(),
        made_with=f"fgvc {versions()['fgvc']}" + (f", commit {commit}" if commit else ""),
    )
    notes = list(dict.fromkeys([*notes, *(note for section in sections for note in section.notes)]))
    return Report(page.encode("utf-8", "replace").decode("utf-8"), notes)  # a lone surrogate is no character


def _shared_parts(results: Results) -> list[str]:
    """What all settings of the finished runs have in common, in words."""
    try:
        every = [setting.parts for setting in results.groups]
    except UserError:
        return []
    return [values[0] for values in zip(*every, strict=True) if values[0] and len(set(values)) == 1]


@functools.lru_cache(maxsize=32)  # half a second for the library of a page, which is that of the next one too
def _packed(text: str) -> str:
    """Compressed, in letters that mean nothing in HTML; the page's script unpacks it."""
    return base64.b64encode(gzip.compress(text.encode("utf-8"), 9, mtime=0)).decode("ascii")


def _digest(script: str) -> str:
    """As a content security policy names a script that may run."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode('utf-8')).digest()).decode('ascii')}"
