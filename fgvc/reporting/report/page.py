"""The page as a whole: one file that asks for nothing, neither from the network nor from the disk."""

import base64
import gzip
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from importlib.resources import files

import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup
from plotly.offline import get_plotlyjs, get_plotlyjs_version

from fgvc.presentation.render import html_block
from fgvc.provenance import commit_label, source_state, versions
from fgvc.reporting.report.results import Results
from fgvc.reporting.report.sections import Chart, Group, Part, make_sections


@dataclass(frozen=True)
class Report:
    """A page and what it does not show.

    Attributes:
        html: The page.
        notes: Lines on runs and parts that are left out, or doubtful.
    """

    html: str
    notes: list[str]


def make_report(results: Results, made: datetime) -> Report:
    """The report of some runs; the same, but for the time `made`, for the same runs."""
    sections = make_sections(results)
    charts = any(isinstance(part, Chart) for section in sections for part in _with_inner(section.parts))
    script, library = _asset("report.js"), get_plotlyjs() if charts else ""
    commit = commit_label(source_state())
    page = _template().render(
        title=_title(results),
        facts=_facts(results),
        sections=sections,
        style=Markup(_asset("style.css")),
        script=Markup(script),
        plotly=_packed(library) if library else "",
        plotly_version=get_plotlyjs_version(),
        script_hashes=[_digest(text) for text in (script, library) if text],
        made=f"{made:%Y-%m-%d %H:%M} {made.tzname() or ''}".strip(),
        made_with=f"fgvc {versions()['fgvc']}" + (f", commit {commit}" if commit else ""),
    )
    notes = list(dict.fromkeys(note for section in sections for note in section.notes))
    return Report(page.encode("utf-8", "replace").decode("utf-8"), notes)  # a lone surrogate is no character


def _template() -> Template:
    environment = Environment(
        loader=PackageLoader(__package__, "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["table"] = lambda block: Markup(html_block(block))
    environment.filters["packed_json"] = _packed_figure
    return environment.get_template("page.html")


def _asset(name: str) -> str:
    return (files(__package__) / "assets" / name).read_text(encoding="utf-8")


def _with_inner(parts: Iterable[Part]) -> Iterator[Part]:
    for part in parts:
        yield part
        if isinstance(part, Group):
            yield from _with_inner(part.parts)


def _packed_figure(figure: go.Figure) -> str:
    return _packed(str(figure.to_json(engine="json")))


def _packed(text: str) -> str:
    """Compressed, in letters that mean nothing in HTML; the page's script unpacks it."""
    return base64.b64encode(gzip.compress(text.encode("utf-8"), 9, mtime=0)).decode("ascii")


def _digest(script: str) -> str:
    """As a content security policy names a script that may run."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode('utf-8')).digest()).decode('ascii')}"


def _title(results: Results) -> str:
    datasets = list(dict.fromkeys(run.dataset for run in results.runs))
    count = len(results.runs)
    return f"Report of {count} run{'' if count == 1 else 's'} on {', '.join(datasets)}"


def _facts(results: Results) -> dict[str, str]:
    runs = results.runs
    statuses = [run.status for run in runs]
    return {
        "Runs": ", ".join(f"{statuses.count(status)} {status}" for status in sorted(set(statuses))),
        "Methods": ", ".join(dict.fromkeys(run.label for run in runs)),
        "Datasets": ", ".join(dict.fromkeys(run.dataset for run in runs)),
        "Backbones": ", ".join(dict.fromkeys(run.backbone for run in runs)),
        "Commits": ", ".join(sorted({(run.commit or "not stated")[:12] for run in runs})),
    }
