"""Pages and figures made from committed files: what is stale is found, and the committed ones are current."""

import re
import runpy
import shutil
from pathlib import Path

import documents
import pandas as pd
import pytest
from command_line import ROOT
from matplotlib.figure import Figure

from fgvc.errors import ConfigError, RunError, UserError
from fgvc.presentation.style import new_figure
from fgvc.runs.known_settings import known_settings

DOCS = runpy.run_path(str(ROOT / "tools" / "make_docs.py"))


def listing(path: Path) -> str:
    return "| n |\n| -- |\n" + "\n".join(f"| {n} |" for n in pd.read_csv(path)["n"])


def curve(path: Path) -> Figure:
    figure = new_figure(2, 2)
    figure.subplots().plot(pd.read_csv(path)["n"])
    return figure


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "kept.csv").write_text("n\n1\n2\n")
    (tmp_path / "page.md").write_text("Text.\n\n<!-- table: list -->\nold\n<!-- end of table -->\n\nMore.\n")
    return tmp_path


TABLES = {"list": documents.FromFiles(("kept.csv",), listing)}


def test_a_stale_table_is_found_and_rewritten_in_place(root: Path) -> None:
    page = root / "page.md"
    assert documents.stale_pages([page], TABLES, root) == [page]
    assert documents.write_pages([page], TABLES, root) == [page]
    text = page.read_text()
    assert text.startswith("Text.\n\n<!-- table: list -->\n\n| n |\n| -- |\n| 1 |\n| 2 |\n\n<!-- end of table -->")
    assert text.endswith("\n\nMore.\n") and "old" not in text
    assert documents.stale_pages([page], TABLES, root) == documents.write_pages([page], TABLES, root) == []
    (root / "kept.csv").write_text("n\n3\n")
    assert documents.stale_pages([page], TABLES, root) == [page]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table: lost -->\n\n<!-- end of table -->\n", "page.md: unknown table lost; choose one of list"),
        ("<!-- table: list -->\n", "page.md: .* without the other"),
        ("<!-- table: list -->\n<!-- table: list -->\n\n<!-- end of table -->\n", "without the other"),
    ],
)
def test_broken_pages_are_named(root: Path, text: str, message: str) -> None:
    (root / "page.md").write_text(text)
    with pytest.raises(ConfigError, match=message):
        documents.page_text(root / "page.md", TABLES, root)


def test_a_figure_knows_its_data_and_its_looks(root: Path) -> None:
    kept, path = documents.FromFiles(("kept.csv",), curve), root / "figure.png"
    assert not documents.figure_is_current(path, kept, root)
    documents.draw_figure(path, kept, root)
    assert documents.figure_is_current(path, kept, root)
    assert not documents.figure_is_current(path, documents.FromFiles(("kept.csv",), lambda _: new_figure(2, 2)), root)
    (root / "kept.csv").write_text("n\n1\n2 \n")
    assert not documents.figure_is_current(path, kept, root)
    (root / "kept.csv").unlink()
    with pytest.raises(ConfigError, match=r"kept.csv: cannot be read"):
        documents.figure_is_current(path, kept, root)


def damage(path: Path, kind: str) -> None:
    header, first, *rest = path.read_text(encoding="utf-8").splitlines(keepends=True)
    lines = {
        "longer row": [header, f"9,{first}", *rest],
        "other columns": [",".join(f"c{i}" for i in range(header.count(",") + 1)) + "\n", first, *rest],
        "no row": [],
    }
    path.write_text("".join(lines[kind]), encoding="utf-8")


@pytest.mark.parametrize("kind", ["missing", "longer row", "other columns", "no row"])
def test_a_damaged_file_is_named_by_whatever_is_made_of_it(tmp_path: Path, kind: str) -> None:
    for kept in [*DOCS["TABLES"].values(), *DOCS["FIGURES"].values()]:
        if kind == "other columns" and kept.make is DOCS["as_written"]:
            continue  # text of any form
        for file in kept.files:
            root = tmp_path / kept.checksum(ROOT) / Path(file).stem
            for each in kept.files:
                (root / each).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / each, root / each)
            (root / file).unlink() if kind == "missing" else damage(root / file, kind)
            with pytest.raises(UserError, match=re.escape(str(root / file))):
                kept(root)


def test_text_in_place_of_a_number_is_named(root: Path) -> None:
    (root / "kept.csv").write_text("n\nmany\n")
    with pytest.raises(RunError, match=r"kept\.csv: nothing can be made of it \(ValueError: "):
        documents.FromFiles(("kept.csv",), lambda path: f"{pd.read_csv(path)['n'][0]:.2f}")(root)


@pytest.mark.parametrize("page", DOCS["PAGES"], ids=lambda page: page.name)
def test_the_tables_of_the_documentation_are_current(page: Path) -> None:
    assert page.read_text(encoding="utf-8") == documents.page_text(page, DOCS["TABLES"], ROOT), "run `make tables`"


def test_every_table_that_is_made_stands_in_a_page() -> None:
    assert {name for page in DOCS["PAGES"] for name in documents.table_names(page)} == set(DOCS["TABLES"])


@pytest.mark.parametrize("name", DOCS["FIGURES"])
def test_the_figures_of_the_documentation_are_current(name: str) -> None:
    assert documents.figure_is_current(DOCS["FIGURE_FOLDER"] / f"{name}.png", DOCS["FIGURES"][name], ROOT), (
        "run `make tables`"
    )


def test_every_figure_of_the_documentation_is_made() -> None:
    assert {path.stem for path in DOCS["FIGURE_FOLDER"].glob("*.png")} == set(DOCS["FIGURES"])


def test_the_page_of_settings_is_current_and_complete() -> None:
    text = DOCS["SETTINGS"].read_text(encoding="utf-8")
    assert text == DOCS["settings_page"](DOCS["choices"](ROOT / "configs")), "run `make tables`"
    assert [key for key in known_settings() if f"\n### `{key}`\n" not in text] == []


def test_kept_results_are_small_and_tell_no_path_of_a_machine() -> None:
    kept = ROOT / "results" / "cub80"
    files = [path for path in kept.rglob("*") if path.is_file()]
    assert files and sum(path.stat().st_size for path in files) < 1_000_000
    assert {path.suffix for path in files} <= {".csv", ".json", ".md"}
    readme = (kept / "README.md").read_text(encoding="utf-8")
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert not any(place in text for place in ("/home/", "/tmp/", "/root/", "C:\\")), path
        assert path.name == "README.md" or f"`{path.relative_to(ROOT / 'results' / 'cub80').as_posix()}`" in readme, (
            path
        )
