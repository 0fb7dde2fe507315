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
    page.locator(f"#{section} figure.plot").first.scroll_into_view_if_needed()
    page.locator(f"#{section} figure.plot.drawn [data-chart] .main-svg").first.wait_for()


def column(page: "Page", table: str, number: int) -> list[str]:
    return [text.strip() for text in page.locator(f"{table} tbody tr > :nth-child({number})").all_inner_texts()]


def test_plots_are_drawn_when_they_come_into_view(opened: Open) -> None:
    page = opened()
    assert page.evaluate("performance.timing.domContentLoadedEventEnd - performance.timing.fetchStart") < 3000
    assert page.evaluate("typeof Plotly") == "undefined"
    drawn(page, "training")
    assert page.locator("#training [data-chart='0'] .scatterlayer .trace").count() == 200
    page.locator("#training .nsewdrag").first.hover()
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
        assert values[-1] == "not measured" and len(values) == 200
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
    box = page.get_by_label("SEB", exact=False).first
    box.focus()
    page.keyboard.press("Space")
    status = page.locator("#shown")
    expect(status).to_have_text("162 of 200 runs shown")
    expect(page.locator("[data-chart='0'] .scatterlayer .trace")).to_have_count(162, timeout=60_000)
    visible = [row.inner_text() for row in page.locator("#accuracy tbody tr:visible > th").all()]
    assert "SEB" not in visible and "SVD-Padé" in visible
    assert page.locator("#configuration details.values:visible").count() == 162 + 1
    page.get_by_label("Words in method").fill("GAP seed15")
    expect(status).to_have_text("3 of 200 runs shown")  # 15, 150 and 155
    assert page.locator(f"{RUNS} tbody tr:visible").count() == 3
    page.get_by_role("button", name="All", exact=True).click()
    assert status.inner_text() == "200 of 200 runs shown" and page.locator(f"{RUNS} tbody tr:visible").count() == 200
    page.get_by_role("button", name="None", exact=True).click()
    assert page.locator(f"{RUNS} tbody tr:visible").count() == page.locator("#spectra figure:visible").count() == 0


def test_settings_are_found_by_name(opened: Open) -> None:
    page = opened()
    page.get_by_label("Search settings").fill("optimizer.LR")
    rows = page.locator("#configuration tbody tr:visible")
    assert [text.split()[-1] for text in rows.all_inner_texts()] == ["0.1", "1.1", "2.1", "3.1", "4.1"]
    assert page.locator("#configuration [role=status]").inner_text() == "5 settings found"


def test_light_and_dark_follow_the_system_and_the_button(opened: Open) -> None:
    from playwright.sync_api import expect

    colour = "getComputedStyle(document.querySelector('.part')).backgroundColor"
    line = "getComputedStyle(document.querySelector('#spectra .xtick text')).fill"
    light = opened(color_scheme="light")
    drawn(light, "spectra")
    found = [light.evaluate(colour), light.evaluate(line)]
    light.locator("#theme").click()
    expect(light.locator("#spectra .xtick text").first).not_to_have_css("fill", found[1], timeout=60_000)
    dark = opened(color_scheme="dark")
    assert light.evaluate(colour) == dark.evaluate(colour) == "rgb(22, 25, 29)" != found[0] == "rgb(255, 255, 255)"
    assert dark.locator("#theme").get_attribute("aria-pressed") == "true"


def test_a_narrow_screen_scrolls_only_what_is_wide(opened: Open) -> None:
    page = opened()
    page.set_viewport_size({"width": 390, "height": 800})
    drawn(page, "spectra")
    page.evaluate("document.querySelectorAll('details').forEach(element => { element.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_pictures_take_the_place_of_plots_without_scripts(opened: Open) -> None:
    page = opened(java_script_enabled=False)
    figures = page.locator("#training figure.plot, #spectra figure.plot")
    for figure in figures.all():
        assert figure.locator(".still img").is_visible() and not figure.locator(".live").is_visible()
    assert not page.locator("#filter").is_visible() and page.locator(".noscript").is_visible()
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
