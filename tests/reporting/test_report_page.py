"""The report page in a browser: what a reader clicks, types and sees, and that nothing is asked of the network."""

import importlib.util
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from command_line import ROOT
from run_folders import (
    write_attribution,
    write_config,
    write_history,
    write_metrics,
    write_predictions,
    write_run,
    write_spectrum,
)
from test_report import ODD

from fgvc.reporting.report import collect, make_report

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.browser

CHROMIUM = os.environ.get("FGVC_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
RUNS = "#runs .table:last-of-type table"
METHODS = ("gap", "isqrt_cov", "mpn_cov", "svd_pade", "seb")


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    missing = [
        name
        for name, found in {"playwright": importlib.util.find_spec("playwright"), "chromium": CHROMIUM}.items()
        if not found
    ]
    if missing:
        reason = f"{' and '.join(missing)} not here: pip install playwright, install chromium (or set FGVC_CHROMIUM)"
        if os.environ.get("FGVC_REQUIRE_BROWSER") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two hundred runs, of five methods and of some with odd names; few of them kept spectra and predictions."""
    folder = tmp_path_factory.mktemp("results")
    for number in range(200 - len(ODD)):
        method = METHODS[number % len(METHODS)]
        failed = {"status": "stopped", "reason": "SIGTERM", "final": None, "best": None} if number == 7 else {}
        run = write_run(folder / f"run{number:03}", method, seed=number, top1=60 + number / 7, **failed)
        write_metrics(run, epochs=6, level=60 + number / 7)
        if number < len(METHODS):
            write_config(run, optimizer={"lr": 0.1 + number, "name": "sgd"})
            write_spectrum(run, images=4, channels=6)
            write_history(run)
    write_predictions(folder / "run000", ODD)
    write_attribution(folder / "run002", explained=ODD[0])
    for number, name in enumerate(ODD):
        write_metrics(write_run(folder / f"odd{number}", label=name, dataset="odd", reason=name))
    file = folder / "page.html"
    file.write_text(make_report(collect([folder], ROOT / "results" / "paper"), datetime.now(timezone.utc)).html)
    return file


Open = Callable[..., "Page"]


@pytest.fixture
def opened(browser: "Browser", report: Path) -> Iterator[Open]:
    """Opens the page as a reader would; afterwards nothing must have been asked for, logged or thrown."""
    contexts, requests, problems = [], [], []

    def open_page(**options: Any) -> "Page":
        contexts.append(browser.new_context(viewport={"width": 1280, "height": 900}, **options))
        page = contexts[-1].new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: problems.append(f"dialog {dialog.message}"))
        page.goto(report.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []
    assert {url for url in requests if not url.startswith(("data:", "blob:"))} == {report.as_uri()}


def drawn(page: "Page", section: str) -> None:
    """Scroll to the first plot of a section and wait until it is drawn."""
    page.set_default_timeout(60_000)
    page.locator(f"#{section} .plot").first.scroll_into_view_if_needed()
    page.locator(f"#{section} .plot .main-svg").first.wait_for()


def searched(page: "Page", words: str) -> str:
    """Type into the filter; returns what the page says of it."""
    status = page.locator("#shown")
    before = status.inner_text()
    page.get_by_label("Show only rows").fill(words)
    page.wait_for_function("before => document.getElementById('shown').textContent !== before", arg=before)
    return status.inner_text()


def column(page: "Page", table: str, number: int) -> list[str]:
    return [text.strip() for text in page.locator(f"{table} tbody tr > :nth-child({number})").all_inner_texts()]


def test_plots_are_drawn_when_they_come_into_view(opened: Open) -> None:
    page = opened()
    assert page.evaluate("performance.timing.domContentLoadedEventEnd - performance.timing.fetchStart") < 3000
    assert page.evaluate("typeof Plotly") == "undefined"
    drawn(page, "training")
    assert page.locator("#training .plot .scatterlayer .trace").count() == 3 * 200
    assert page.locator("#training .legend .traces").count() == len(METHODS) + len(ODD)
    page.locator("#training .nsewdrag").first.hover()
    assert page.locator("#training .modebar-btn").count() and not page.locator("[data-title*=Share]").count()
    drawn(page, "spectra")
    drawn(page, "conditions")
    drawn(page, "confusions")
    assert page.locator("#confusions .main-svg a").count() == 0 and page.locator("img[src=x]").count() == 0


def test_tables_are_sorted_by_value_and_what_is_missing_stays_last(opened: Open) -> None:
    page = opened()
    table = RUNS
    button = page.locator(f"{table} thead th:nth-child(4) button")
    header = page.locator(f"{table} thead th:nth-child(4)")
    for press in (button.click, lambda: (button.focus(), page.keyboard.press("Enter"))):
        press()
        values = column(page, table, 4)
        assert values[-1] == "—" and len(values) == 200
        numbers = [float(value) for value in values[:-1]]
        order = header.get_attribute("aria-sort")
        assert numbers == sorted(numbers, reverse=order == "descending")
    assert order == "descending"
    page.locator(f"{table} thead th:nth-child(1) button").click()
    assert header.get_attribute("aria-sort") == "none"
    assert page.locator(f"{table} thead th:nth-child(1)").get_attribute("aria-sort") == "ascending"


def test_the_filter_acts_on_tables_curves_and_runs_together(opened: Open) -> None:
    from playwright.sync_api import expect

    page = opened()
    drawn(page, "training")
    searched(page, 'gap "seed 15"')
    visible = page.locator(f"{RUNS} tbody tr:visible")
    assert [row.split()[2] for row in visible.all_inner_texts()] == ["15", "150", "155"]
    expect(page.locator("#training .plot .scatterlayer .trace")).to_have_count(3 * 3, timeout=60_000)
    searched(page, "mpn-cov cub80")
    assert {row.split()[0] for row in page.locator("#accuracy tbody tr:visible > th").all_inner_texts()} >= {"MPN-COV"}
    assert page.locator("#accuracy tbody tr:visible").count() < page.locator("#accuracy tbody tr").count()
    assert page.locator("#attribution .gallery:visible").count() > 0
    searched(page, "no-such-word")
    assert page.locator("main tbody tr:visible, main .table:visible, main .gallery:visible").count() == 0
    assert searched(page, "") == "" and page.locator(f"{RUNS} tbody tr:visible").count() == 200


def test_settings_are_found_by_name(opened: Open) -> None:
    page = opened()
    assert searched(page, "optimizer.LR").startswith("5 of ")
    rows = page.locator("#configuration tbody tr:visible")  # the lines that fold them up are open
    assert [text.split()[-1] for text in rows.all_inner_texts()] == ["0.1", "1.1", "2.1", "3.1", "4.1"]
    searched(page, "")
    assert page.locator("#configuration tbody tr:visible").count() == 0


def test_light_and_dark_follow_the_system_and_the_button(opened: Open) -> None:
    colour = "getComputedStyle(document.querySelector('.part')).backgroundColor"
    turned = "getComputedStyle(document.querySelector('.plot')).filter"
    light, dark = opened(color_scheme="light"), opened(color_scheme="dark")
    looks = [[page.evaluate(colour), page.evaluate(turned)] for page in (light, dark)]
    assert looks[0] == ["rgb(255, 255, 255)", "none"] and looks[1][0] == "rgb(22, 25, 29)" and "invert" in looks[1][1]
    for page, other in ((light, looks[1]), (dark, looks[0])):
        page.locator("#theme").click()
        assert [page.evaluate(colour), page.evaluate(turned)] == other
        page.reload()
        assert [page.evaluate(colour), page.evaluate(turned)] == other
    assert light.locator("#theme").get_attribute("aria-pressed") == "true"


def test_a_narrow_screen_scrolls_only_what_is_wide(opened: Open) -> None:
    page = opened()
    page.set_viewport_size({"width": 390, "height": 800})
    drawn(page, "spectra")
    page.evaluate("document.querySelectorAll('details').forEach(element => { element.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_a_telephone_shows_the_number_first_and_a_list_in_place_of_the_matrix(opened: Open) -> None:
    page = opened()
    assert page.locator("#confusions details[open] .chart").count() == 1
    assert page.locator("#confusions details[open] .chart").is_visible()
    page.set_viewport_size({"width": 390, "height": 800})
    number = page.locator(".answer strong").first
    assert number.is_visible() and number.bounding_box()["y"] < 150  # type: ignore[index]
    assert number.inner_text().endswith(" %")
    page.evaluate("document.querySelectorAll('details').forEach(element => { element.open = true; })")
    assert not page.locator("#confusions .chart").first.is_visible()
    assert page.locator("#confusions tbody tr").first.is_visible()
    over = """[...document.querySelectorAll('thead tr')].flatMap(row => [...row.cells].filter((cell, i) => {
        const word = document.createRange(); word.selectNodeContents(cell);
        const next = row.cells[i + 1];
        return next && word.getBoundingClientRect().right > next.getBoundingClientRect().right; })).length"""
    assert page.evaluate(over) == 0  # no head of a column over another


def test_tables_and_texts_are_read_without_scripts(opened: Open) -> None:
    page = opened(java_script_enabled=False)
    assert page.locator("#training figcaption").first.is_visible() and page.locator(f"{RUNS} tbody tr").count() == 200
    assert page.locator("noscript p").is_visible() and not page.locator("[role=search]").is_visible()
    assert page.locator("thead button").count() == 0


def test_a_reader_of_screens_finds_names_and_headings(opened: Open) -> None:
    page = opened()
    assert page.locator("img:not([alt]), img[alt='']").count() == 0
    unnamed = "[...document.querySelectorAll('input, button, [role=img], section, nav, aside, form')].filter(e =>"
    unnamed += "!(e.labels?.length || e.ariaLabel || e.getAttribute('aria-labelledby') || e.textContent.trim()))"
    assert page.evaluate(f"{unnamed}.length") == 0
    levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3, h4')].map(e => Number(e.tagName[1]))")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(below - above <= 1 for above, below in itertools.pairwise(levels))
    assert page.locator("th:not([scope])").count() == 0
    ids = page.evaluate("[...document.querySelectorAll('body > * [id], body > [id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    page.evaluate("scrollTo(0, 0)")
    page.locator("h1").click()
    page.keyboard.press("Shift+Tab")
    focused = page.evaluate("document.activeElement.className")
    assert focused == "skip" and page.locator(".skip").bounding_box()["x"] >= 0  # type: ignore[index]
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "content"
