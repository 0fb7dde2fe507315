"""The pages hold no placeholder and no dead link, and name only scripts, experiments and methods that exist."""

import re
from pathlib import Path

import pytest

from fgvc import spectral
from fgvc.pooling import list_poolings, pooling_label
from fgvc.spectral import GRADIENTS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "results" / "README.md",
    ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_names(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert re.findall(r"@[A-Z0-9_]+@", text) == []
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []
    for script in re.findall(r"scripts/\w+\.py", text):
        assert (ROOT / script).is_file(), script
    for group in ("experiment", "method", "backbone", "dataset"):
        for names in re.findall(rf"(?<![\w.]){group}=([\w,]+)", text):
            for name in names.split(","):
                assert (ROOT / "configs" / group / f"{name}.yaml").is_file(), f"{group}={name}"


@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in page.read_text(encoding="utf-8")], ids=str)
def test_python_examples_run(page: Path) -> None:
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)):
        exec(compile(block, f"{page.name}, example {number + 1}", "exec"), {"__name__": "example"})


def test_the_tables_of_the_spectral_page_are_complete() -> None:
    text = (ROOT / "docs" / "spectral.md").read_text(encoding="utf-8")
    for name in list_poolings():
        assert f"| `{name}` | {pooling_label(name)} | " in text, name
    for name in GRADIENTS:
        assert f'`"{name}"`' in text, name
    for name in spectral.__all__:
        assert name in text or name in ("EIGENVALUE_FLOOR", "GRADIENTS", "EigenvalueMap", "GradientRule"), name
