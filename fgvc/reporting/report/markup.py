"""Parts of a section as HTML. Every text goes through `escape`; names stand in <bdi>, whatever direction they have."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from fgvc.presentation.render import html_block
from fgvc.presentation.style import method_style
from fgvc.reporting.report.content import (
    Chart,
    Curves,
    DetailsPart,
    GalleryPart,
    GroupPart,
    Part,
    Picture,
    PlotPart,
    Runs,
    Section,
    TablePart,
)
from fgvc.reporting.report.looks import swatch
from fgvc.reporting.report.pictures import figure_picture


@dataclass
class Markup:
    """Makes HTML, and keeps count of the charts that it left places for and of the pictures' bytes."""

    charts: list[Chart] = field(default_factory=list)
    picture_bytes: int = 0

    def section(self, section: Section) -> str:
        """A section under its heading."""
        parts = [self._part(part) for part in section.parts]
        if section.missing:
            parts.append(
                f'<div class="missing"><p>Nothing to show: {_lines(section.missing)}.</p>'
                f"<p>What makes it:</p><pre><code>{escape(section.command)}</code></pre></div>"
            )
        if section.notes:
            items = "".join(f"<li>{_lines(note)}</li>" for note in dict.fromkeys(section.notes))
            parts.append(
                f'<details class="notes"><summary>{_counted(len(set(section.notes)), "note")} on what is left out or '
                f"doubtful</summary><ul>{items}</ul></details>"
            )
        body = "\n".join(parts)
        return (
            f'<section id="{section.name}" class="part" aria-labelledby="{section.name}-title">\n'
            f'<h2 id="{section.name}-title">{escape(section.title)}</h2>\n{body}\n</section>'
        )

    def _part(self, part: Part) -> str:
        if isinstance(part, TablePart):
            return _table(part)
        if isinstance(part, PlotPart):
            return self._plot(part)
        if isinstance(part, GalleryPart):
            return self._gallery(part)
        if isinstance(part, DetailsPart):
            return _details(part)
        if isinstance(part, GroupPart):
            return self._group(part)
        return "".join(f"<p>{escape(line)}</p>" for line in part.lines)

    def _plot(self, part: PlotPart) -> str:
        """The picture first: the script replaces it by the charts, where there is a script."""
        places = []
        for chart in part.charts:
            alternative = escape(f"{chart.title}. {part.text}")
            heading = f"<h4>{escape(chart.title)}</h4>" if isinstance(chart, Curves) else ""
            places.append(
                f'<div class="chart {type(chart).__name__.lower()}">{heading}'
                f'<div data-chart="{len(self.charts)}" role="img" aria-label="{alternative}"></div></div>'
            )
            self.charts.append(chart)
        still = self._image(figure_picture(part.figure, f"Plot: {part.title}. {part.text}"))
        return (
            f'<figure class="plot"{runs_attribute(part.runs)}>\n<h3>{_name(part.title)}</h3>\n'
            f'<div class="still">{still}</div>\n<div class="live">{legend(part.charts)}'
            f'<div class="charts">{"".join(places)}</div></div>\n'
            f"<figcaption>{escape(part.text)}</figcaption>\n</figure>"
        )

    def _group(self, part: GroupPart) -> str:
        body = "\n".join(self._part(inner) for inner in part.parts)
        opened = " open" if part.open else ""
        return (
            f'<details class="group"{runs_attribute(part.runs)}{opened}><summary>{_name(part.summary)}</summary>\n'
            f"{body}\n</details>"
        )

    def _gallery(self, part: GalleryPart) -> str:
        pictures = "".join(
            f"<figure>{self._image(picture)}<figcaption>{_name(picture.caption)}</figcaption></figure>"
            for picture in part.pictures
        )
        kind = "gallery wide" if part.wide else "gallery"
        return (
            f'<div class="{kind}"{runs_attribute(part.runs)}><h3>{_name(part.title)}</h3>'
            f'<div class="pictures">{pictures}</div></div>'
        )

    def _image(self, picture: Picture) -> str:
        self.picture_bytes += len(picture.data)
        data = base64.b64encode(picture.data).decode("ascii")
        width, height = picture.size
        return (
            f'<img src="data:{picture.kind};base64,{data}" width="{width}" height="{height}" '
            f'alt="{escape(picture.text)}" loading="lazy">'
        )


def legend(charts: Sequence[Chart]) -> str:
    """The methods whose curves the charts have, each with the runs behind them; "" where there are none."""
    runs: dict[str, set[int]] = {}
    for chart in charts:
        for curve in chart.curves if isinstance(chart, Curves) else ():
            runs.setdefault(curve.label, set()).update(curve.runs or ())
    items = "".join(
        f"<li{runs_attribute(tuple(sorted(places)))}>{swatch(method_style(label))} {_name(label)}</li>"
        for label, places in runs.items()
    )
    return f'<ul class="legend" aria-label="Legend">{items}</ul>' if items else ""


def runs_attribute(runs: Runs | None) -> str:
    """Which runs something belongs to, for the filter."""
    return "" if runs is None else f' data-runs="{" ".join(map(str, runs))}"'


def _table(part: TablePart) -> str:
    attributes = iter([runs_attribute(runs) for runs in part.runs])
    return f'<div class="table">{html_block(part.block, lambda _: next(attributes))}</div>'


def _details(part: DetailsPart) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{_name(value)}</td></tr>' for name, value in part.values.items()
    )
    table = (
        f'<table class="values"><thead><tr><th scope="col">Setting</th><th scope="col">Value</th></tr></thead>'
        f"<tbody>{rows}</tbody></table>"
        if rows
        else "<p>Nothing that is not common to all.</p>"
    )
    opened = " open" if part.open else ""
    return (
        f'<details class="values"{runs_attribute(part.runs)}{opened}><summary>{_name(part.summary)} '
        f'<span class="count">({len(part.values)})</span></summary>{table}</details>'
    )


def _name(text: str) -> str:
    return f"<bdi>{escape(text)}</bdi>"


def _lines(text: str) -> str:
    return "<br>".join(escape(line.strip()) for line in text.splitlines())


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")
