"""Formulas of the pages on the site: typeset where they are formulas, left alone where they are code."""

import re
from pathlib import Path

import pytest
from command_line import ROOT

pytest.importorskip("latex2mathml", reason="needs the extra [docs]")
pytest.importorskip("mkdocs", reason="needs the extra [docs]")
pytest.importorskip("nbconvert", reason="needs the extra [docs]")

from site_hooks import take_formulas

PAGES = [page for page in sorted((ROOT / "docs").rglob("*.md")) if "```math" in page.read_text(encoding="utf-8")]
assert len(PAGES) >= 3


def test_formulas_become_mathml_and_code_stays() -> None:
    page = "Take $x_i$, not `$y$`:\n\n```math\n\\frac{a}{b}\n```\n\n```sh\necho $HOME $PATH\n```\n\n5 $ and 6 $.\n"
    text, formulas = take_formulas(page)
    inline, display = formulas
    assert text == f"Take {inline}, not `$y$`:\n\n{display}\n\n```sh\necho $HOME $PATH\n```\n\n5 $ and 6 $.\n"
    assert "<msub>" in formulas[inline] and 'display="inline"' in formulas[inline]
    assert "<mfrac>" in formulas[display] and 'display="block"' in formulas[display]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_formula_is_understood(page: Path) -> None:
    _, formulas = take_formulas(page.read_text(encoding="utf-8"))
    for formula in formulas.values():
        symbols = re.sub(r"<[^>]+>", " ", formula)
        assert re.search(r"\\|&(?!#\w+;)", symbols) is None, symbols  # a command or a column that was not read
