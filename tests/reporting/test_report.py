"""What the report page is made from, and that no name, path or value can become anything but text in it."""

import base64
import gzip
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from datetime import datetime, timezone
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from command_line import ROOT, Done, refused
from matplotlib.colors import to_hex, to_rgb
from PIL import Image
from run_folders import (
    change_summary,
    write_attribution,
    write_config,
    write_history,
    write_metrics,
    write_predictions,
    write_run,
    write_spectrum,
)
from safetensors.numpy import save_file

from fgvc.data import image_file
from fgvc.errors import visible
from fgvc.presentation.style import METHOD_STYLES, method_style
from fgvc.reporting.report import collect, make_report
from fgvc.reporting.report.answer import first_result
from fgvc.reporting.report.charts import MAX_POINTS, Curve, Panel, curves_figure, matrix_figure
from fgvc.reporting.report.pictures import MAX_PICTURES
from fgvc.reporting.report.sections import SECTIONS

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


def figures(text: str) -> list[dict[str, Any]]:
    """The figures that are packed in a page, in its order."""
    packed = re.findall(r'<script type="application/gzip">(.*?)</script>', text)
    return [json.loads(gzip.decompress(base64.b64decode(figure))) for figure in packed]


def paired(folder: Path, method: str, right: list[int], **changes: Any) -> None:
    """A run a seed on 60 images of three classes, so many of them right; the wrong ones of class 0 are named 1."""
    for seed, count in enumerate(right):
        path = write_run(folder / method / f"s{seed}", method, seed=seed, top1=100 * count / 60, **changes)
        target = np.arange(60) // 20
        predicted = np.where(np.arange(60) >= 60 - count, target, (target + 1) % 3)
        files = [f"images/{i}.png" for i in range(60)]
        columns = {"path": files, "target": target, "predicted": predicted, "confidence": 0.9 - np.arange(60) / 1000}
        pd.DataFrame(columns).to_csv(path / "predictions.csv", index=False)
        change_summary(path, classes=["001.Great_auk", "Tern", "Wren"])


def opening(page: Page) -> str:
    """What a reader sees before the first section, on one line."""
    return " ".join(page.texts[""].split("{", 1)[-1].rpartition("}")[2].split())


def test_the_page_opens_with_the_best_head_its_lead_and_what_it_confuses(tmp_path: Path) -> None:
    paired(tmp_path, "gap", [40, 42])
    paired(tmp_path, "seb", [50, 52])
    paired(tmp_path, "mpn_cov", [48, 48])
    text = opening(made(tmp_path)[0])
    assert "85.00 % of the test images are named correctly by SEB (mean of 2 seeds)." in text
    assert re.search(
        r"\+16\.67 points over GAP's 68\.33 % \(95 % interval \+[\d.]+ to \+[\d.]+\): 53 % fewer mistakes", text
    )
    assert "Great auk, taken for Tern: 18 of 40 images" in text and "001." not in text and "Great_auk" not in text
    assert text.index("85.00 %") < text.index("cub80, 80 classes") and text.count("tf_efficientnet_lite0") == 1
    differences = made(tmp_path)[0].texts["accuracy"].split("Differences")[1]
    low, high = re.findall(r"interval \+([\d.]+) to \+([\d.]+)", text)[0]
    assert f"[-{high}, -{low}]" in differences  # the same numbers as in the table
    (tmp_path / "seb" / "s1" / "predictions.csv").write_text("damaged")
    assert "Great auk, taken for Tern: 10 of 20 images" in opening(made(tmp_path)[0])  # of the other seed


def test_heads_on_other_images_are_not_compared(tmp_path: Path) -> None:
    for method, digest in (("gap", "0"), ("seb", "1")):
        path = write_run(tmp_path / method, method, dataset_fingerprint={"test_content": digest})
        write_predictions(path, ["x", "y"])
    text = first_result([tmp_path / "gap", tmp_path / "seb"])
    assert "GAP and SEB had other images and are not compared" in text and "interval" not in text


def test_a_lead_that_is_none_or_unknown_is_said_in_words(tmp_path: Path) -> None:
    paired(tmp_path / "a", "seb", [50])
    assert "There is no GAP run in this setting" in opening(made(tmp_path / "a")[0])
    paired(tmp_path / "b", "gap", [50])
    assert "no run of another head to compare GAP with" in opening(made(tmp_path / "b")[0])
    paired(tmp_path / "b", "seb", [49])
    assert re.search(
        r"No head is ahead of GAP: \+1\.67 points over SEB, .* may be chance", opening(made(tmp_path / "b")[0])
    )
    paired(tmp_path / "b", "mpn_cov", [50])
    assert "by GAP (one seed). MPN-COV has the same accuracy as GAP." in opening(made(tmp_path / "b")[0])
    shutil.rmtree(tmp_path / "b" / "mpn_cov")
    (tmp_path / "b" / "gap" / "s0" / "predictions.csv").unlink()
    assert "no interval: not the same images" in opening(made(tmp_path / "b")[0])


def test_heads_are_compared_on_the_seeds_that_all_of_them_have(tmp_path: Path) -> None:
    """GAP alone has the second seed, and its mean over both is the highest."""
    paired(tmp_path, "gap", [40, 59])
    paired(tmp_path, "seb", [45])
    text = opening(made(tmp_path)[0])
    assert "75.00 % of the test images are named correctly by SEB (on the one seed that all heads have)." in text
    assert re.search(r"\+8\.33 points over GAP's 66\.67 % .*: 25 % fewer mistakes", text) or "may be chance" in text
    shown = first_result(sorted(tmp_path.glob("*/*")))
    assert re.search(r"\| GAP +\| +1 \| +66\.67 \|", shown) and "by SEB (on the one seed" in shown
    (tmp_path / "seb" / "s0" / "predictions.csv").unlink()
    assert "+8.33 points over GAP's 66.67 % (no interval: not the same images)" in opening(made(tmp_path)[0])
    paired(tmp_path, "mpn_cov", [0, 0, 30])
    for seed in (0, 1):
        shutil.rmtree(tmp_path / "mpn_cov" / f"s{seed}")
    text = opening(made(tmp_path)[0])  # no seed that all have: each mean is over its own seeds
    assert "82.50 % of the test images are named correctly by GAP (mean of 2 seeds)." in text
    assert "No head is ahead of GAP: +7.50 points over SEB, the next (no interval: no seed in common)." in text


def test_images_of_the_confusions_stand_on_the_page_only_where_their_folder_is_given(tmp_path: Path) -> None:
    paired(tmp_path / "runs", "seb", [50])
    (tmp_path / "data" / "images").mkdir(parents=True)
    for i in range(60):
        Image.new("RGB", (400, 300), (4 * i, 80, 80)).save(tmp_path / "data" / "images" / f"{i}.png")
    results = collect([tmp_path / "runs"], PAPER)
    assert Page(make_report(results, MADE).html).count("img") == 0
    report = make_report(results, MADE, [tmp_path / "data"])
    shown = [attributes for tag, attributes in Page(report.html).tags if tag == "img"]
    assert [one["alt"] for one in shown] == ["Great auk, taken for Tern"] * 2 + ["Tern, named correctly"]
    assert {one["width"] for one in shown} == {"240"} and report.notes == made(tmp_path / "runs")[2]
    file = tmp_path / "runs" / "seb" / "s0" / "predictions.csv"
    (tmp_path / "secret.png").write_bytes((tmp_path / "data" / "images" / "0.png").read_bytes())
    file.write_text(file.read_text().replace("images/0.png", "../secret.png").replace("images/1.png", "gone.png"))
    report = make_report(collect([tmp_path / "runs"], PAPER), MADE, [tmp_path / "data"])
    assert Page(report.html).count("img") == 1  # of the other class
    assert all(
        any(f"{name}: no such image below" in note for note in report.notes) for name in ("../secret.png", "gone.png")
    )


def test_context_stands_once_and_settings_are_named_by_what_differs(tmp_path: Path) -> None:
    for frozen in (True, False):
        paired(tmp_path / str(frozen), "seb", [50], frozen=frozen)
        write_history(tmp_path / str(frozen) / "seb" / "s0")
    page, _, _ = made(tmp_path)
    assert "Accuracy, top-1 in %: frozen" in page.texts["accuracy"] and "SEB: fine-tuned" in page.texts["confusions"]
    assert "published" not in page.texts["conditions"].lower()  # numbers of another network and dataset
    for name, text in made(tmp_path / "True")[0].texts.items():
        assert name in ("configuration", "runs") or text.count("tf_efficientnet_lite0") == (name == ""), name


def test_runs_that_did_not_finish_are_listed_with_the_reason(tmp_path: Path) -> None:
    write_metrics(write_run(tmp_path / "a", top1=90.0))
    write_run(tmp_path / "b", "gap", status="stopped", reason="SIGTERM in epoch 3", final=None, best=None)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "summary.json").write_text("{")
    page, _, notes = made(tmp_path)
    assert page.texts["runs"].count("SIGTERM in epoch 3") == 1 and "—: not measured." in page.texts["runs"]
    assert any("c/summary.json is missing or damaged" in note for note in notes)
    assert "90.00" in page.texts["accuracy"] and "—" not in page.texts["accuracy"]


def test_a_section_with_nothing_to_show_names_the_command(tmp_path: Path) -> None:
    write_run(tmp_path / "a", status="failed", reason="out of memory", final=None, best=None)
    page, text, _ = made(tmp_path)
    absent = page.texts["absent"]
    found = dict(re.findall(r"^(\w[^:\n]*): (.*?What makes it: [^\n]+)$", absent, re.DOTALL | re.MULTILINE))
    for section, command in {
        "Accuracy": "fgvc train",
        "Spectra": "fgvc train",
        "Gradient audit": "fgvc audit_gradients RUN",
        "Attribution": "fgvc attribute RUN",
        "Calibration": "fgvc calibrate RUN",
    }.items():
        assert command in found[section], section
    for section, file in {"Gradient audit": "gradients.csv", "Attribution": "attribution.json"}.items():
        assert f"no {file} of fgvc" in found[section]
    assert "accuracy" not in page.texts and "failed" in page.texts[""]
    assert figures(text) == []
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
        setting = name.replace("${", "$ {")  # an interpolation is refused
        write_config(folder, name=setting, dataset={"name": setting}, **{f"k{number}": setting})
    write_attribution(tmp_path / "r0", **dict.fromkeys(("image", "class", "predicted", "explained", "method"), ODD[0]))
    page, text, _ = made(tmp_path)
    scripts = [attributes.get("type") for tag, attributes in page.tags if tag == "script"]
    assert scripts.count(None) == 1 and set(scripts) == {None, "application/gzip"}  # one runs, the others are data
    handlers = [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert handlers == [] and not any("src" in attributes for tag, attributes in page.tags if tag == "script")
    assert {str(a["src"])[:11] for tag, a in page.tags if tag == "img"} == {"data:image/"}
    assert page.count("b") == 0 and page.count("link") == page.count("iframe") == 0
    assert all(str(attributes["href"]).startswith("#") for tag, attributes in page.tags if tag == "a")
    for name in ODD:
        assert " ".join(visible(name).split())[:40] in " ".join(page.texts["runs"].split())
    for trace in (trace for figure in figures(text) for trace in figure["data"]):  # plotly reads tags and formulas
        names = [trace["name"], trace["meta"]] if trace["type"] == "scatter" else trace["x"]
        assert not set("<>$\n") & set("".join(names))


def test_one_damaged_seed_leaves_the_others_on_the_page(tmp_path: Path) -> None:
    paired(tmp_path, "seb", [50, 52, 54])
    for seed in (0, 1, 2):
        write_spectrum(tmp_path / "seb" / f"s{seed}", images=4, channels=6, seed=seed)
    for file in ("s0/spectrum.npz", "s1/predictions.csv"):
        path = tmp_path / "seb" / file
        path.write_bytes(path.read_bytes()[:-100] + b"," * 7)
    page, _, notes = made(tmp_path)
    assert "SEB" in page.texts["spectra"] and "Most frequent confusions" in page.texts["confusions"]
    assert "of 120 answers" in page.texts["confusions"]  # of two seeds
    for file in ("s0/spectrum.npz", "s1/predictions.csv"):
        assert any("left out" in note and file in note for note in notes), notes


def test_lost_predictions_are_noted(tmp_path: Path) -> None:
    paired(tmp_path, "seb", [50])
    (tmp_path / "seb" / "s0" / "predictions.csv").unlink()
    notes = made(tmp_path)[2]
    assert any("the section Confusions shows nothing: none of 1 finished runs kept" in note for note in notes)


def test_a_copied_run_keeps_nothing_else_off_the_page(tmp_path: Path, here: Callable[..., Done]) -> None:
    for method in ("gap", "seb"):
        paired(tmp_path / "runs", method, [50])
    shutil.copytree(tmp_path / "runs" / "seb" / "s0", tmp_path / "runs" / "seb" / "copy")
    page, _, notes = made(tmp_path / "runs")
    assert "GAP183.33" in page.texts["accuracy"] and "SEB1" not in page.texts["accuracy"]
    assert sum("two runs of SEB on cub80 have the same setting and seed 0" in note for note in notes) == 1
    done = here("make_tables.py", "runs", cwd=tmp_path)
    assert done.returncode == 0 and "until then all runs of this method and setting are left out" in done.stderr
    assert here("make_tables.py", "runs", "--strict", cwd=tmp_path).returncode == 1
    refused(here("make_tables.py", "runs/seb", cwd=tmp_path), "two runs of SEB", "copy")


def test_the_policy_of_the_page_allows_its_own_scripts_alone(tmp_path: Path) -> None:
    write_metrics(write_run(tmp_path / "a"))
    page, text, _ = made(tmp_path)
    (policy,) = [str(a["content"]) for tag, a in page.tags if tag == "meta" and "http-equiv" in a]
    script = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)[0]
    library = re.findall(r'<script type="application/gzip" id="plotly">(.*?)</script>', text)[0]
    sources = [script.encode(), gzip.decompress(base64.b64decode(library))]
    digests = [f"'sha256-{base64.b64encode(hashlib.sha256(source).digest()).decode()}'" for source in sources]
    assert "default-src 'none'" in policy and "unsafe-eval" not in policy and "http" not in policy
    assert re.findall(r"script-src ([^;]+);", policy)[0].split() == digests


def test_charts_have_a_curve_a_run_and_a_style_a_method(tmp_path: Path) -> None:
    for seed in (0, 1):
        for method in ("seb", "gap"):
            write_metrics(write_run(tmp_path / method / f"s{seed}", method, seed=seed))
    (figure,) = figures(made(tmp_path)[1])
    curves = figure["data"]
    assert [curve["legendgroup"] for curve in curves] == ["GAP", "GAP", "SEB", "SEB"] * 3
    assert len({curve["meta"] for curve in curves}) == 4 and "seed 1" in curves[1]["meta"]
    assert curves[0]["line"] == curves[1]["line"] != curves[2]["line"]
    assert curves[0]["y"] == [60, 70, pytest.approx(73.33, abs=0.01), 75]


def test_a_chart_has_no_more_points_than_are_stated() -> None:
    y = [float("nan"), *range(1, 5000), float("inf")]
    table = pd.DataFrame({"x": range(len(y)), "y": y})
    figure = curves_figure("x", "x", [Panel("y", [Curve("SEB", "run", table)] * 50, "y", log=True)])
    curves = json.loads(figure.to_json())["data"]
    assert sum(len(curve["x"]) for curve in curves) <= MAX_POINTS
    assert (curves[0]["x"][0], curves[0]["x"][-1]) == (0, 5000)
    assert curves[0]["y"][0] is None and curves[0]["y"][-1] is None  # neither NaN nor infinity is JSON
    few = json.loads(curves_figure("x", "x", [Panel("y", [Curve("SEB", "run", table[1:3])], "y")]).to_json())
    assert few["data"][0]["x"] == [1, 2]


def test_a_matrix_parts_right_from_wrong_and_classes_of_one_name() -> None:
    wrong, right = json.loads(matrix_figure(["wren", "wren"], np.array([[3, 1], [0, 0]])).to_json())["data"]
    assert wrong["z"] == [[None, 25.0], [None, None]] and right["z"] == [[75.0, None], [None, 0.0]]
    assert len(set(wrong["x"])) == 2 and wrong["customdata"] == [[3, 1], [0, 0]]


def test_texts_have_a_contrast_of_four_and_a_half() -> None:
    style = (ROOT / "fgvc" / "reporting" / "report" / "assets" / "style.css").read_text()
    colours = {name: pair for name, *pair in re.findall(r"--(\w+): light-dark\((#\w{6}), (#\w{6})\)", style)}
    for text in ("text", "muted", "accent"):
        for background in ("page", "card", "stripe"):
            for theme in (0, 1):
                assert contrast(colours[text][theme], colours[background][theme]) >= 4.5, (text, background, theme)


@pytest.mark.parametrize("label", [*METHOD_STYLES, *(f"unknown {number}" for number in range(8))])
def test_curves_have_a_contrast_of_three_in_both_themes(label: str) -> None:
    colour = method_style(label).color
    style = (ROOT / "fgvc" / "reporting" / "report" / "assets" / "style.css").read_text()
    (card,) = re.findall(r"--card: light-dark\(#ffffff, (#\w{6})\)", style)
    (inverted,) = map(float, re.findall(r"\.plot \{ filter: invert\(([\d.]+)\) hue-rotate\(180deg\)", style))
    turned = np.array([[-0.574, 1.43, 0.144], [0.426, 0.43, 0.144], [0.426, 1.43, -0.856]])  # hue-rotate of CSS
    dark = turned @ (inverted + (1 - 2 * inverted) * np.array(to_rgb(colour)))
    assert contrast(colour, "#ffffff") >= 3 and contrast(to_hex(dark.clip(0, 1)), card) >= 3


def contrast(first: str, second: str) -> float:
    """Contrast ratio of two colours, between 1 and 21 [WCAG 2.2]."""
    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(colour: str) -> float:
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in to_rgb(colour))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


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
    notes = [note for note in notes if "config.yaml" not in note and "predictions.csv" not in note]
    assert [("lies outside" in note, "cannot be shown" in note) for note in notes] == [
        (True, False),
        (True, False),
        (False, True),
    ]
    record["grids"] = ["gone.png"] * 100_000
    file.write_text(json.dumps(record))
    assert len(made(tmp_path)[2]) < 2 * MAX_PICTURES


@pytest.mark.parametrize(
    ("section", "file", "content", "message"),
    [
        ("attribution", "attribution.json", "{", "attribution.json: cannot be read"),
        ("attribution", "attribution.json", '{"schema": 2}', "schema 2, this version reads 1"),
        ("attribution", "attribution.json", '{"schema": 1, "items": {}}', "'items' is no list"),
        ("attribution", "attribution.json", "[]", "it holds list, not an object"),
        ("attribution", "attribution.json", '{"schema": 1, "items": []}', "names no picture"),
        ("attribution", "attribution.json", '{"schema": 1, "items": [{"file": "\\u0000"}]}', "a NUL byte"),
        ("attribution", "attribution.json", '{"schema": 1, "grids": ["\\u0000"]}', "a NUL byte"),
        ("calibration", "calibration.json", "{", "calibration.json: cannot be read"),
        ("audit", "gradients.csv", "{", "gradients.csv"),
    ],
)
def test_a_section_of_damaged_files_alone_is_noted(
    tmp_path: Path, section: str, file: str, content: str, message: str
) -> None:
    (write_run(tmp_path / "a") / file).write_text(content)
    page, _, notes = made(tmp_path)
    title = {"audit": "Gradient audit"}.get(section, section.capitalize())
    (line,) = (line for line in page.texts["absent"].splitlines() if line.startswith(title))
    assert section not in page.texts and "lies in these folders" not in line
    assert any(message in note for note in notes)


def test_a_section_that_meets_a_defect_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paired(tmp_path, "seb", [50])
    monkeypatch.setitem(SECTIONS, "cost", ("Cost", "fgvc train", lambda *_: [1 // 0]))
    page, _, notes = made(tmp_path)
    assert "SEB" in page.texts["accuracy"] and "cost" not in page.texts
    assert any("the section Cost shows nothing: ZeroDivisionError: " in note for note in notes)


def gradients_of(folder: Path) -> Path:
    """What audit_gradients writes into a folder, without its picture; returns the picture's path."""
    (folder / "figures").mkdir(parents=True)
    bands = ("diagonal", "both_large", "mixed", "both_small", "null")
    numbers = (
        "norm_ratio",
        "cosine",
        *(f"{name}{end}" for name in ("largest", "reaching") for end in ("", "_high", "_low")),
    )
    row = dict.fromkeys((*numbers, *bands, "relative_error", "relative_error_lower", "relative_error_upper"), 0.5)
    table = pd.DataFrame([{"label": "SEB", "kept": 4, "channels": 4, **row}])
    table.to_csv(folder / "figures" / "gradients.csv", index=False)
    return folder / "figures" / "loewner.png"


@pytest.mark.parametrize("place", ["received/run", "received"])
def test_a_picture_behind_a_link_is_not_shown(tmp_path: Path, place: str) -> None:
    write_run(tmp_path / "received" / "good", "gap")
    if place == "received/run":
        write_run(tmp_path / place)
    picture = gradients_of(tmp_path / place)
    Image.new("RGB", (64, 48), "orange").save(tmp_path / "private.png")
    picture.symlink_to(tmp_path / "private.png")
    page, _, notes = made(tmp_path / "received")
    assert page.count("img") == 0
    assert any("not followed" in note and str(picture) in note for note in notes), notes
    picture.unlink()
    Image.new("RGB", (64, 48), "orange").save(picture)
    assert made(tmp_path / "received")[0].count("img") == 1


@pytest.mark.parametrize("key", ["temperature", "loss"])
def test_a_calibration_of_words_is_noted(tmp_path: Path, key: str) -> None:
    numbers = {"calibration_error": 5.25, "loss": 0.5}
    record = {"temperature": 1.5, "split": "validation", "images": 100, "before": numbers, "after": {**numbers}}
    (record if key in record else record["after"])[key] = "many"  # type: ignore[index]
    file = write_run(tmp_path / "a") / "calibration.json"
    file.write_text(json.dumps({"schema": 1, "checkpoints": {"last": record}}))
    page, _, notes = made(tmp_path)
    assert "calibration" not in page.texts and any("'many' is no number" in note for note in notes)


def test_many_classes_make_no_matrix(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    write_predictions(folder, [f"c{number}" for number in range(3)])
    change_summary(folder, classes=[f"c{number}" for number in range(100_000)])
    page, _, notes = made(tmp_path)
    assert "Most frequent confusions" in page.texts["confusions"]
    assert any("a matrix of more than 250 classes is not drawn" in note for note in notes)


def test_a_picture_that_is_named_often_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_run(tmp_path / "a") / "attribution"
    write_attribution(folder.parent, items=1)
    record = json.loads((folder / "attribution.json").read_text())
    record["items"] = [*record["items"] * 50, *[record["items"][0] | {"file": "gone.png"}] * 50]
    (folder / "attribution.json").write_text(json.dumps(record))
    decoded: list[Path] = []
    decode = image_file.decode_rgb
    monkeypatch.setattr(image_file, "decode_rgb", lambda path: decoded.append(path) or decode(path))
    page, _, _ = made(tmp_path)
    assert page.count("img") == 51 and len(decoded) == 3


def test_calibrations_stand_in_a_table(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", seed=7)
    numbers = {"calibration_error": 5.25, "loss": 0.5, "brier": 0.1}
    record = {"temperature": 1.5, "split": "validation", "images": 100, "before": numbers, "after": numbers}
    (folder / "calibration.json").write_text(json.dumps({"schema": 1, "checkpoints": {"last": record}}))
    text = made(tmp_path)[1]
    cells = ["7", "last", "validation", "100", "1.500", "5.25", "5.25", "0.500", "0.500"]
    row = re.search(r'<th scope="row">SEB</th>((?:<td[^>]*>[^<]*</td>){9})</tr>', text)
    assert row is not None and re.findall(r">([^<]+)</td>", row[1]) == cells
    (folder / "checkpoints").mkdir()
    save_file({"classifier.weight": np.zeros((2, 3))}, folder / "checkpoints" / "last.safetensors")
    record["weights"] = "0" * 64
    (folder / "calibration.json").write_text(json.dumps({"schema": 1, "checkpoints": {"last": record}}))
    _, text, notes = made(tmp_path)
    assert "1.500" not in text and any("is of other last weights" in note for note in notes)


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
    assert "MB)" in done.stdout and "spectrum" in (folder / "report.html").read_text(encoding="utf-8")
    write_run(tmp_path / "b", status="failed", final=None, best=None)
    assert here("report.py", ".", "--output", "r.html", "--strict", cwd=tmp_path).returncode == 1
    refused(here("report.py", "nowhere", cwd=tmp_path), "nowhere", "no such folder")
    write_run(tmp_path / "a_run", "seb")
    refused(here("report.py", "nowhere", "a_run", cwd=tmp_path), "nowhere", "no such folder")
    assert not (tmp_path / "nowhere").exists()


def test_a_section_that_fails_is_a_note_and_a_rerun_is_no_second_run(tmp_path: Path, here: Callable[..., Done]) -> None:
    for name, changes in (("a", {}), ("a-rerun", {"rerun_of": "a"})):
        folder = write_run(tmp_path / "runs" / name, **changes)
        write_spectrum(folder, images=4, channels=6)
        write_predictions(folder, ["x", "y"])
        write_metrics(folder)
        write_config(folder, seed=0)
    done = here("report.py", "runs", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr.count("note: ") == 1, done.stderr
    assert "note: left out runs/a-rerun: a rerun of a, not a second run" in done.stderr
    assert here("report.py", "runs/a", "--strict", cwd=tmp_path).returncode == 0
    assert here("report.py", "runs/a-rerun", "--strict", cwd=tmp_path).returncode == 0  # alone it is a run
    change_summary(tmp_path / "runs" / "a-rerun", rerun_of=None)
    done = here("report.py", "runs", "--strict", cwd=tmp_path)
    assert done.returncode == 1 and (tmp_path / "runs" / "report.html").is_file()
    for section in ("Accuracy", "Spectra", "Confusions", "Cost"):
        assert f"note: the section {section} shows nothing: two runs of SEB" in done.stderr, done.stderr
