"""The pages hold no placeholder and no dead link, and name only scripts, experiments and methods that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "results" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_names(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert re.findall(r"@[A-Z_]+@", text) == []
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []
    for script in re.findall(r"scripts/\w+\.py", text):
        assert (ROOT / script).is_file(), script
    for group in ("experiment", "method", "backbone", "dataset"):
        for names in re.findall(rf"(?<![\w.]){group}=([\w,]+)", text):
            for name in names.split(","):
                assert (ROOT / "configs" / group / f"{name}.yaml").is_file(), f"{group}={name}"
