"""The page to play with: what it says of an image, in Python and in a browser."""

import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from command_line import ROOT, Train, refused, trainable
from miniature import write_coloured
from test_report_page import browser  # noqa: F401  # a fixture

import fgvc
from fgvc.inference.neighbours import load_neighbours
from fgvc.reporting.app import Answers, build_app
from fgvc.runs.config import DatasetConfig, MethodConfig, TrainerConfig, TransformConfig
from fgvc.studies.attribution import explain
from fgvc.studies.attribution.report import overlay
from fgvc.training import train_run

if TYPE_CHECKING:
    from playwright.sync_api import Browser

ODD = "<img src=x onerror=alert(1)>"
CLASSES = ["001.Great_${1+1}_{{value}}_Auk", ODD, "Gänsegeier"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of `seb` and `gap` on three colours; classes with names that a page could take for code."""
    folder = tmp_path_factory.mktemp("home")
    write_coloured(folder / "data", CLASSES)
    for method in ("seb", "gap"):
        config = trainable(
            folder,
            run_dir=str(folder / method),
            dataset=DatasetConfig(name="folder", root=str(folder / "data"), transform=TransformConfig(size=64)),
            method=MethodConfig(name=method, reduction=6),
            trainer=TrainerConfig(batch_size=6, workers=0, epochs=1),
        )
        train_run(config)
    return folder


@pytest.fixture
def image(home: Path) -> Path:
    return home / "data" / "train" / CLASSES[0] / "1.png"


def test_answers_are_those_of_the_run(home: Path, image: Path) -> None:
    predictor = fgvc.load_run(home / "seb")
    answers = Answers(predictor, load_neighbours(home / "seb"))
    predicted = predictor.predict(image)
    assert answers.names(image) == pytest.approx(
        {
            name.replace("001.", "").replace("_", " "): share
            for name, share in zip(predicted.names, predicted.probabilities, strict=True)
        }
    )
    assert answers.most_eigenvalues == 3  # a map of 2 x 2 locations
    name, (seen, *maps) = answers.maps(image, 1)
    assert name == next(iter(answers.names(image))) and seen.pixels.shape == (64, 64, 3)
    assert [figure.title for figure in maps] == ["all eigenvalues", "the 1 largest", "the 1 smallest"]
    inputs = predictor.prepare(image)
    for figure, band in zip(maps, ("all", "top1", "bottom1"), strict=True):
        heat = explain(predictor.model, inputs[None], method="hirescam", band=band).maps[0].numpy()
        picture = predictor.transform.picture(inputs).numpy()
        np.testing.assert_array_equal(figure.pixels, overlay(picture, heat, signed=True))
    assert answers.maps(image, 99)[1][2].title == "the 3 largest"  # no more than the image has
    near = answers.neighbours(image)
    assert len(near) == 6 and near[0].title == "Great ${1+1} {{value}} Auk" and near[0].note == "distance 0.000"
    np.testing.assert_allclose(near[0].pixels, seen.pixels, atol=1)


def test_a_head_without_eigenvalues_has_one_map(home: Path, image: Path) -> None:
    answers = Answers(fgvc.load_run(home / "gap"), "the dataset has moved")
    assert answers.most_eigenvalues == 0 and answers.neighbours(image) == []
    assert [figure.title for figure in answers.maps(image, 1)[1]] == ["as the model sees it", "the map"]


def test_without_gradio_the_command_names_the_extra(
    home: Path, here: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    refused(here("app.py", home / "seb", cwd=tmp_path), "pip install 'fgvc[app]'")


@pytest.mark.extras
def test_the_page_answers_in_this_process(home: Path, image: Path, tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="gradio is not here: pip install 'fgvc[app]'")
    blocks = build_app(Answers(fgvc.load_run(home / "seb"), "no dataset <here>"), "SEB on <birds>", "3 classes")
    answer, look = (function.fn for function in blocks.fns.values())
    named, results, failure, names, maps, near = answer(str(image), 1)
    assert named["visible"] and results["visible"] and not failure["visible"] and len(names) == 3
    assert maps.count("data:image/jpeg;base64,") == 4 and "the 1 smallest" in maps
    assert "no dataset &lt;here&gt;" in near and "<img" not in near
    assert "the 2 smallest" in look(str(image), 2) and look(None, 2) == ""
    assert ODD not in maps
    (tmp_path / "bad.png").write_text("no image")
    named, results, failure, names, *_ = answer(str(tmp_path / "bad.png"), 1)
    assert not named["visible"] and not results["visible"] and names is None
    assert "The image cannot be read" in failure["value"] and "bad.png" not in failure["value"]
    assert "SEB on &lt;birds&gt;" in str(blocks.config)


@pytest.fixture
def served(home: Path, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """`fgvc app` as a user starts it: its address, and the folder of its temporary files."""
    pytest.importorskip("gradio", reason="gradio is not here: pip install 'fgvc[app]'")
    run = shutil.copytree(home / "seb", tmp_path / "a_path_without_a_place_to_break_it_on_a_telephone")
    command = [sys.executable, str(ROOT / "scripts" / "app.py"), str(run)]
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=settings)
    assert process.stdout is not None
    found = re.match(r"(http://127\.0\.0\.1:\d+/) ", process.stdout.readline())
    assert found is not None
    (folder,) = tmp_path.glob("fgvc-app-*")
    yield found[1], folder
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    assert not folder.exists()


@pytest.mark.extras
@pytest.mark.browser
def test_a_visitor_drops_an_image(
    browser: "Browser",  # noqa: F811
    served: tuple[str, Path],
    image: Path,
    tmp_path: Path,
) -> None:
    address, folder = served
    for dark, width in ((False, 1280), (True, 390)):
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light"
        )
        page, requests, problems = context.new_page(), [], []
        page.on("request", lambda request, requests=requests: requests.append(request.url))
        page.on("pageerror", lambda error, problems=problems: problems.append(str(error)))
        page.on("dialog", lambda dialog, problems=problems: problems.append(f"dialog {dialog.message}"))
        page.goto(address)
        page.set_default_timeout(60_000)
        upload = page.locator("input[type=file]").first
        upload.wait_for(state="attached")
        assert not page.get_by_text("Where it looks").is_visible()
        upload.set_input_files(image)
        page.get_by_text("Nearest training images").wait_for()
        assert page.get_by_text("the 1 largest").is_visible()
        assert page.get_by_text("Great ${1+1} {{value}} Auk").first.is_visible()
        assert page.get_by_text(ODD).first.is_visible()
        assert page.locator("figure img").count() == 4 + 6
        assert page.evaluate("[...document.querySelectorAll('figure img')].every(image => image.naturalWidth == 64)")
        number = page.get_by_label("Number of eigenvalues", exact=False).first
        number.fill("2")
        number.press("Enter")
        page.get_by_text("the 2 smallest").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate("[...document.querySelectorAll('.fgvc p')].every(p => p.scrollWidth <= p.clientWidth)")
        assert folder.is_dir() and [*folder.rglob("1.png")]
        page.get_by_label("Clear").or_(page.get_by_label("Remove Image")).first.click()
        page.get_by_text("Where it looks").wait_for(state="hidden")
        (tmp_path / "bad.png").write_text("no image")
        page.locator("input[type=file]").first.set_input_files(tmp_path / "bad.png")
        page.get_by_text("not an image in a format").wait_for()
        assert problems == []
        assert [url for url in requests if not url.startswith((address, "data:", "blob:"))] == []
        context.close()


@pytest.mark.extras
def test_nothing_but_the_page_is_served(served: tuple[str, Path], image: Path) -> None:
    address, _ = served
    for path in (image, Path("/etc/hostname"), ROOT / "pyproject.toml"):
        with pytest.raises(urllib.error.HTTPError, match=r"403|404"):
            urllib.request.urlopen(f"{address}gradio_api/file={path}")
