"""The page as a whole: one file that asks for nothing, neither from the network nor from the disk."""

import base64
import gzip
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from plotly.offline import get_plotlyjs, get_plotlyjs_version

from fgvc.presentation.style import method_style
from fgvc.provenance import commit_label, source_state, versions
from fgvc.reporting.report.chart_data import chart_data
from fgvc.reporting.report.collect import Collected
from fgvc.reporting.report.content import Section, TablePart
from fgvc.reporting.report.looks import plot_style, swatch
from fgvc.reporting.report.markup import Markup
from fgvc.reporting.report.sections import make_sections
from fgvc.runs import Run

_ESCAPES = {ord(letter): f"\\u{ord(letter):04x}" for letter in "<>&\u2028\u2029"}


@dataclass(frozen=True)
class Report:
    """A page and what it does not show.

    Attributes:
        html: the page.
        notes: on runs and parts that are left out, or doubtful.
    """

    html: str
    notes: list[str]


def make_report(collected: Collected, made: datetime) -> Report:
    """The report of some runs; the same, but for the time `made`, for the same runs."""
    sections = make_sections(collected)
    markup = Markup()
    values: dict[str, Any] = {
        "title": escape(_title(collected)),
        "facts": _facts(collected),
        "style": _asset("style.css"),
        "script": _asset("report.js"),
        "navigation": "".join(f'<li><a href="#{s.name}">{escape(s.title)}</a></li>' for s in sections),
        "methods": _methods(collected, sections),
        "run_count": len(collected.runs),
        "sections": "\n".join(markup.section(section) for section in sections),
        "plotly": _plotly()[0] if markup.charts else "",
        "plotly_version": get_plotlyjs_version(),
        "made": f"{made:%Y-%m-%d %H:%M} {made.tzname() or ''}".strip(),
        "made_with": _made_with(),
        "pictures": _megabytes(markup.picture_bytes),
    }
    values["data"] = embedded_json(
        {
            "runs": [{"label": run.label, "text": _searched(run)} for run in collected.runs],
            "styles": {label: plot_style(method_style(label)) for label in _chart_labels(markup, collected)},
            "charts": [chart_data(chart) for chart in markup.charts],
        }
    )
    scripts = [_digest(values["script"]), *([_plotly()[1]] if markup.charts else [])]
    values["script_sources"] = " ".join(f"'sha256-{digest}'" for digest in scripts)
    template = Template(_asset("page.html"))
    size = len(template.substitute(values, size="0.0 MB").encode("utf-8", "replace"))
    text = template.substitute(values, size=_megabytes(size))
    notes = list(dict.fromkeys(note for section in sections for note in section.notes))
    return Report(text.encode("utf-8", "replace").decode("utf-8"), notes)  # a lone surrogate is no character


def embedded_json(value: Any) -> str:
    """JSON that no parser of HTML takes for anything else: without <, >, & and the separators of lines."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).translate(_ESCAPES)


def _asset(name: str) -> str:
    return (files(__package__) / "assets" / name).read_text(encoding="utf-8")


@cache
def _plotly() -> tuple[str, str]:
    """plotly.js, compressed for the page to unpack when the first plot comes into view, and its digest."""
    source = get_plotlyjs()
    packed = gzip.compress(source.encode("utf-8"), 9, mtime=0)
    return base64.b64encode(packed).decode("ascii"), _digest(source)


def _digest(script: str) -> str:
    """As a content security policy names a script that may run."""
    return base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")


def _title(collected: Collected) -> str:
    datasets = list(dict.fromkeys(run.dataset for run in collected.runs))
    return f"Report of {_counted(len(collected.runs), 'run')} on {', '.join(datasets)}"


def _facts(collected: Collected) -> str:
    runs = collected.runs
    statuses = {status: sum(run.status == status for run in runs) for status in sorted({run.status for run in runs})}
    facts = {
        "Runs": ", ".join(f"{count} {status}" for status, count in statuses.items()),
        "Methods": ", ".join(collected.labels),
        "Datasets": ", ".join(dict.fromkeys(run.dataset for run in runs)),
        "Backbones": ", ".join(dict.fromkeys(run.backbone for run in runs)),
        "Commits": ", ".join(sorted({(run.commit or "not stated")[:12] for run in runs})),
    }
    return "".join(f"<div><dt>{name}</dt><dd><bdi>{escape(text)}</bdi></dd></div>" for name, text in facts.items())


def _methods(collected: Collected, sections: Sequence[Section]) -> str:
    """A box to tick for each method, and one for the rows that no run here is behind."""
    counts = {label: sum(run.label == label for run in collected.runs) for label in collected.labels}
    boxes = [
        f'<label><input type="checkbox" name="method" value="{escape(label)}" checked> {swatch(method_style(label))} '
        f'<bdi>{escape(label)}</bdi> <span class="count">({count})</span></label>'
        for label, count in counts.items()
    ]
    if any(() in part.runs for section in sections for part in section.parts if isinstance(part, TablePart)):
        boxes.append('<label><input type="checkbox" name="published" checked> methods not run here</label>')
    return "\n".join(boxes)


def _searched(run: Run) -> str:
    """What the filter's words are looked for in, in lower case."""
    parts = (run.label, run.method, run.dataset, run.backbone, f"seed{run.seed}", run.status, run.reason, run.path)
    return " ".join(str(part) for part in parts if part is not None).lower()


def _chart_labels(markup: Markup, collected: Collected) -> list[str]:
    drawn = [curve.label for chart in markup.charts for curve in getattr(chart, "curves", ())]
    return list(dict.fromkeys([*collected.labels, *drawn]))


def _made_with() -> str:
    commit = commit_label(source_state())
    return escape(f"fgvc {versions()['fgvc']}" + (f", commit {commit}" if commit else ""))


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")
