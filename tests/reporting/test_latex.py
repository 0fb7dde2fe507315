"""Every table by its name in LaTeX: what stands around its cells, and that pdflatex takes it, with booktabs alone."""

import re
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest
from command_line import ROOT
from run_folders import write_config, write_history, write_predictions, write_run

from fgvc.presentation.render import Block, to_latex
from fgvc.reporting.accuracy import load_accuracy, table_blocks
from fgvc.reporting.registry import TABLES, Inputs, make_tables
from fgvc.reporting.run_tables import cost_block, differences_block

KEPT = ROOT / "results" / "cub80"
NAMES = ["a_b & 50%", "$x^2$ ~{|<>}\\\\", "Gänsegeier — № 水 🐦 «»", "[\u202e\x1b--]"]

FAMILIES = {"family": ["wrens"] * 100 + ["terns"] * 100}


@pytest.fixture
def tables(tmp_path: Path) -> dict[str, str]:
    """Every table by its name, of runs of two settings and of the hybrid protocol, one with an odd reason."""
    for number, method in enumerate(("gap", "mpn_cov", "svd_pade")):
        for seed in (0, 1):
            for frozen in (True, False):
                path = tmp_path / f"{method}{seed}{frozen}"
                write_run(
                    path,
                    method,
                    seed=seed,
                    top1=80 + number,
                    dataset="cub",
                    frozen=frozen,
                    num_classes=200,
                    test_images=12,
                    coarse=FAMILIES,
                )
                write_predictions(path, ["x", "y"], seed=number)
                write_history(path)
                write_config(path, method={"name": method})
    write_run(
        tmp_path / "hybrid", "svd_pade", label="SVD-Padé (hybrid)", dataset="cub", num_classes=200, test_images=12
    )
    write_run(tmp_path / "stopped", status="stopped", reason=" ".join(NAMES), final=None, best=None)
    made, _ = make_tables(list(TABLES), Inputs((tmp_path,), ROOT / "results" / "paper"))
    assert set(made) == set(TABLES)
    return {name: table.texts(name)[f"{name}.tex"] for name, table in made.items()}


def test_every_table_has_a_caption_in_words_and_a_label_of_its_own(tables: dict[str, str]) -> None:
    text = "".join(tables.values())
    labels = re.findall(r"\\label\{tab:([\w-]+)\}", text)
    assert len(set(labels)) == len(labels) == text.count(r"\begin{tabular}{") and "accuracy-2" in labels
    captions = re.findall(r"\\caption\{(.*)\}", text)
    assert len(captions) == len(labels)
    for caption in captions:
        assert len(caption.split()) > 10 and caption.endswith(".") and "seed" in caption, caption
    assert "cub (200 classes, 2,317 training and 12 test images)" in captions[1]
    assert captions[1].endswith("over 2 seeds.") and captions[2].endswith("over 1 to 2 seeds.")


def test_the_best_is_bold_and_a_dash_is_explained_once_a_table(tables: dict[str, str]) -> None:
    for name in ("accuracy", "cost", "hybrid", "approximation_error"):
        assert r"\textbf{" in tables[name] or name == "hybrid", name  # one method alone is no best
    for text in tables.values():
        for part in text.split(r"\end{table")[:-1]:
            body = part.split(r"\midrule")[1].split(r"\bottomrule")[0]
            assert part.count("---: not measured") == (re.search("(& |m{)---", body) is not None)


def test_negative_numbers_have_a_minus_and_names_their_hyphen() -> None:
    text = to_latex([Block("T", ["M", "a"], [["MPN-COV", "-1.50 [-2.0, -1.0]"], ["1-2", "inf"]])])
    assert r"MPN-COV & $-$1.50 {[}$-$2.0, $-$1.0{]} \\" in text and r"1-2 & $\infty$ \\" in text


@pytest.mark.slow
@pytest.mark.extras
def test_every_table_compiles_and_fits_on_the_page(tables: dict[str, str], tmp_path: Path) -> None:
    program = shutil.which("pdflatex")
    if program is None:
        pytest.skip("pdflatex not here: install texlive-latex-recommended")
    frozen = KEPT / "frozen"
    kept = [
        *table_blocks(load_accuracy(frozen / "accuracy.csv")),
        *table_blocks(load_accuracy(KEPT / "hybrid" / "accuracy.csv")),
        differences_block(pd.read_csv(frozen / "differences.csv")),
        cost_block(pd.read_csv(frozen / "cost.csv")),
    ]
    odd = to_latex([Block(name, NAMES, [NAMES, NAMES], NAMES, name, places={(0, 0): 1}) for name in NAMES])
    for name, text in {**tables, "kept": to_latex(kept), "odd": odd}.items():
        (tmp_path / "table.tex").write_text(text, encoding="utf-8")
        page = r"\documentclass{article}\usepackage{booktabs}\begin{document}\input{table}\end{document}"
        (tmp_path / "page.tex").write_text(page, encoding="utf-8")
        done = subprocess.run(
            [program, "-interaction=nonstopmode", "-halt-on-error", "page.tex"], cwd=tmp_path, capture_output=True
        )
        log = (tmp_path / "page.log").read_text(encoding="utf-8", errors="replace")
        assert done.returncode == 0, (name, re.findall(r"^!.*", log, re.M))
        wide = re.findall(r"Overfull \\hbox \((\d+)", log)
        assert name == "odd" or not [points for points in wide if int(points) > 5], (name, wide)
        assert "multiply defined" not in log and "Missing character" not in log, name
