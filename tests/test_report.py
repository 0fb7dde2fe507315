"""What the report page is made from, and that no name, path or value can become anything but text in it."""

import json
import re
from collections.abc import Callable
from datetime import datetime, timezone
from html.parser import HTMLParser
from pathlib import Path

import pytest
from command_line import ROOT, Done, refused
from run_folders import (
    write_attribution,
    write_config,
    write_history,
    write_metrics,
    write_predictions,
    write_run,
    write_spectrum,
)

from fgvc.presentation.style import METHOD_STYLES
from fgvc.reporting.report import collect, make_report
from fgvc.reporting.report.chart_data import MAX_POINTS, chart_data, thinned
from fgvc.reporting.report.content import Curve, Curves
from fgvc.reporting.report.gallery import MAX_PICTURES
from fgvc.reporting.report.looks import DARK, LIGHT, contrast, on_dark, on_light
from fgvc.reporting.report.page import embedded_json

PAPER = ROOT / "results" / "paper"
MADE = datetime(2026, 1, 2, 3, 4, tzinfo=timezone.utc)
ODD = [
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(2)</script>",
    '"><b onmouseover=alert(3)>&amp;',
    "عصفور\u202eabc",
    "two\nlines",
    '<a href="https://example.org">link</a>',
    "🐦 wren",
    "$x^{2}$ %{x} ${y}",
    "long" * 500,
]


class Page(HTMLParser):
    """The elements of a page, its text by section, and what should not be there."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.section = ""
        self.texts: dict[str, str] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "section" and dict(attrs).get("class") == "part":
            self.section = str(dict(attrs)["id"])
        if tag == "footer":
            self.section = "footer"

    def handle_data(self, data: str) -> None:
        self.texts[self.section] = self.texts.get(self.section, "") + data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def made(*folders: Path) -> tuple[Page, str, list[str]]:
    report = make_report(collect(folders, PAPER), MADE)
    return Page(report.html), report.html, report.notes


def embedded(text: str) -> dict[str, list[dict[str, object]]]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    data: dict[str, list[dict[str, object]]] = json.loads(found[1])
    return data


def test_runs_that_did_not_finish_are_listed_with_the_reason(tmp_path: Path) -> None:
    write_metrics(write_run(tmp_path / "a", top1=90.0))
    write_run(tmp_path / "b", "gap", status="stopped", reason="SIGTERM in epoch 3", final=None, best=None)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "summary.json").write_text("{")
    page, _, notes = made(tmp_path)
    assert page.texts["runs"].count("SIGTERM in epoch 3") == 1 and "not measured" in page.texts["runs"]
    assert any("c/summary.json is missing or damaged" in note for note in notes)
    assert "90.00" in page.texts["accuracy"] and "not measured" not in page.texts["accuracy"]


def test_a_section_with_nothing_to_show_names_the_command(tmp_path: Path) -> None:
    write_run(tmp_path / "a", status="failed", reason="out of memory", final=None, best=None)
    page, text, _ = made(tmp_path)
    for section, command in {
        "accuracy": "fgvc train",
        "spectra": "fgvc train",
        "audit": "fgvc audit_gradients RUN",
        "attribution": "fgvc attribute RUN",
        "calibration": "fgvc calibrate RUN",
    }.items():
        assert "Nothing to show" in page.texts[section] and command in page.texts[section], section
    for section, file in {"audit": "gradients.csv", "attribution": "attribution.json"}.items():
        assert f"no {section} ({file}) lies in these folders" in page.texts[section]
    assert embedded(text)["charts"] == [] and "application/gzip" in text
    assert len(text) < 200_000  # the library of plots is left out where there are none


def test_the_same_runs_make_the_same_page(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    write_metrics(folder)
    write_spectrum(folder, images=4, channels=6)
    assert made(tmp_path)[1] == made(tmp_path)[1]


def test_no_name_becomes_markup_or_script(tmp_path: Path) -> None:
    plain = write_run(tmp_path / "plain", "mpn_cov", label="plain")
    write_predictions(plain, [f"class {i}" for i in range(len(ODD))])
    for number, name in enumerate(ODD):
        folder = write_run(tmp_path / f"r{number}", label=name, reason=name, commit=name, dataset=name, backbone=name)
        write_metrics(folder)
        write_predictions(folder, [*ODD[number:], *ODD[:number]])
        write_config(folder, name=name, dataset={"name": name}, **{f"k{number}": name})
    write_attribution(tmp_path / "r0", **dict.fromkeys(("image", "class", "predicted", "explained", "method"), ODD[0]))
    page, text, _ = made(tmp_path)
    scripts = [attributes for tag, attributes in page.tags if tag == "script"]
    assert len(scripts) == 3 and not any("src" in attributes for attributes in scripts)
    handlers = [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert handlers == []
    assert {str(a["src"])[:11] for tag, a in page.tags if tag == "img"} == {"data:image/"}
    assert page.count("b") == 0 and page.count("link") == page.count("iframe") == page.count("a") - 13 == 0
    for name in ODD:
        assert " ".join(name.split())[:40] in " ".join(page.texts["runs"].split())
    assert embedded(text)["runs"][0]["label"] in [*ODD, "plain"]


def test_json_in_the_page_cannot_end_its_script() -> None:
    value = {"</script>": ["<!--", "&", "\u2028", "é🐦"]}
    text = embedded_json(value)
    assert not set("<>&\u2028") & set(text) and json.loads(text) == value


def test_rows_and_curves_know_their_runs(tmp_path: Path) -> None:
    for seed in (0, 1):
        for dataset in ("ants", "bees"):
            write_metrics(write_run(tmp_path / dataset / f"s{seed}", seed=seed, dataset=dataset))
    write_run(tmp_path / "cub", "isqrt_cov", dataset="cub", num_classes=200)
    collected = collect([tmp_path], PAPER)
    place = {run.path.relative_to(tmp_path).as_posix(): i for i, run in enumerate(collected.runs)}
    text = make_report(collected, MADE).html
    bees = {place["bees/s0"], place["bees/s1"]}
    caption = r"<span>\d\. bees, [^<]*</span>.*?<tbody>\s*<tr data-runs=\"([\d ]+)\"><th scope=\"row\">SEB<"
    (found,) = re.findall(caption, text, re.DOTALL)
    assert set(map(int, found.split())) == bees
    assert '<tr data-runs=""><th scope="row">SVD-Padé</th>' in text  # published for cub, run by nobody
    chart = embedded(text)["charts"][0]
    assert [curve["runs"] for curve in chart["curves"]] == [[i] for path, i in place.items() if path != "cub"]


def test_a_chart_has_no_more_points_than_are_stated() -> None:
    y = [float("nan"), *range(1, 5000), float("inf")]
    chart = Curves("t", "x", "y", [Curve("SEB", "run", range(len(y)), y, runs=(0,)) for _ in range(50)], log=True)
    curves = chart_data(chart)["curves"]
    assert sum(len(curve["x"]) for curve in curves) <= MAX_POINTS + len(curves)
    assert (curves[0]["x"][0], curves[0]["x"][-1]) == (0, 5000)
    assert curves[0]["y"][0] is None and curves[0]["y"][-1] is None  # neither NaN nor infinity is JSON
    assert list(thinned(3, 10)) == [0, 1, 2] and list(thinned(0, 10)) == [] and list(thinned(5, 2)) == [0, 3, 4]


def test_curves_are_seen_on_light_and_on_dark() -> None:
    for label, style in METHOD_STYLES.items():
        assert contrast(on_light(style.color), LIGHT) >= 3 and contrast(on_dark(style.color), DARK) >= 3, label
    assert contrast("#000000", "#ffffff") == pytest.approx(21)


def test_texts_have_a_contrast_of_four_and_a_half() -> None:
    style = (ROOT / "fgvc" / "reporting" / "report" / "assets" / "style.css").read_text()
    themes = re.findall(r"--page: (\S+); --card: (\S+); --text: (\S+); --muted: (\S+);.*?--accent: (\S+);", style, re.S)
    assert len(themes) == 3 and themes[1] == themes[2]
    for page, card, *texts in themes:
        assert all(contrast(text, background) >= 4.5 for text in texts for background in (page, card)), texts
    assert (themes[0][1], themes[1][1]) == (LIGHT, DARK)


def test_pictures_are_few_and_stay_in_their_folder(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    write_attribution(folder, items=MAX_PICTURES + 8)
    page, _, _ = made(tmp_path)
    assert f"{MAX_PICTURES} pictures" in page.texts["attribution"] and "; 9 more lie in" in page.texts["attribution"]
    assert page.count("img") == MAX_PICTURES
    file = folder / "attribution" / "attribution.json"
    secret = tmp_path / "secret.png"
    (folder / "attribution" / "maps" / "0.png").rename(secret)
    record = json.loads(file.read_text())
    record["items"] = [record["items"][0] | {"file": name} for name in ("../../secret.png", str(secret), "gone.png")]
    file.write_text(json.dumps(record))
    page, _, notes = made(tmp_path)
    assert page.count("img") == 1  # the grid
    notes = [note for note in notes if "config.yaml" not in note]
    assert [("lies outside" in note, "cannot be shown" in note) for note in notes] == [
        (True, False),
        (True, False),
        (False, True),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "attribution.json: cannot be read"),
        ('{"schema": 2}', "schema 2, this version reads 1"),
        ('{"schema": 1, "items": {}}', "'items' is no list"),
        ("[]", "it holds list, not an object"),
        ('{"schema": 1, "items": []}', "names no picture"),
    ],
)
def test_damaged_attributions_are_named(tmp_path: Path, content: str, message: str) -> None:
    (write_run(tmp_path / "a") / "attribution").mkdir()
    (tmp_path / "a" / "attribution" / "attribution.json").write_text(content)
    page, _, notes = made(tmp_path)
    assert message in page.texts["attribution"] and "no attribution" not in page.texts["attribution"]
    assert any(message in note for note in notes)


@pytest.mark.parametrize(("section", "file"), [("calibration", "calibration.json"), ("audit", "gradients.csv")])
def test_a_section_of_damaged_files_alone_is_noted(tmp_path: Path, section: str, file: str) -> None:
    (write_run(tmp_path / "a") / file).write_text("{")
    page, _, notes = made(tmp_path)
    assert "Nothing to show" in page.texts[section] and "lies in these folders" not in page.texts[section]
    assert any(file in note for note in notes)


def test_calibrations_stand_in_a_table(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", seed=7)
    numbers = {"calibration_error": 5.25, "loss": 0.5, "brier": 0.1}
    record = {"temperature": 1.5, "split": "validation", "images": 100, "before": numbers, "after": numbers}
    (folder / "calibration.json").write_text(json.dumps({"schema": 1, "checkpoints": {"last": record}}))
    text = made(tmp_path)[1]
    cells = ["7", "last", "validation", "100", "1.5", "5.25", "5.25", "0.5", "0.5"]
    row = re.search(r'<th scope="row">SEB</th>((?:<td[^>]*>[^<]*</td>){9})</tr>', text)
    assert row is not None and re.findall(r">([^<]+)</td>", row[1]) == cells


def test_common_settings_stand_once(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_config(write_run(tmp_path / f"s{seed}", seed=seed), optimizer={"lr": 0.1, "betas": [seed, 1]}, seed=seed)
    page, text, _ = made(tmp_path)
    assert page.texts["configuration"].count("config: optimizer.lr") == 1
    assert page.texts["configuration"].count("config: optimizer.betas") == 2 and "[1, 1]" in text
    assert page.texts["configuration"].count("made with: config_sha256") == 2


def test_script_writes_the_page_and_says_where(tmp_path: Path, here: Callable[..., Done]) -> None:
    folder = write_run(tmp_path / "a")
    write_history(folder)
    done = here("report.py", "a", cwd=tmp_path)
    assert done.returncode == 0 and "written: a/report.html (" in done.stdout
    text = (folder / "report.html").read_text(encoding="utf-8")
    size = re.search(r"This file is ([\d.]+) MB", text)
    assert size is not None and float(size[1]) == pytest.approx((folder / "report.html").stat().st_size / 1e6, abs=0.06)
    write_run(tmp_path / "b", status="failed", final=None, best=None)
    assert here("report.py", ".", "--output", "r.html", "--strict", cwd=tmp_path).returncode == 1
    refused(here("report.py", "nowhere", cwd=tmp_path), "nowhere", "no such folder")
