"""Make every table and figure of the documentation from the results kept in `results/` and `benchmarks/results/`.

python tools/make_docs.py            # rewrites what is stale
python tools/make_docs.py --check    # changes nothing, names what is stale, exits with 1 if anything is

A new table is a line in TABLES and a pair of comments in a page, a new figure a line in FIGURES; see
fgvc.reporting.documents.
"""

import argparse
import sys
from pathlib import Path

from matplotlib.figure import Figure

from fgvc.analysis.grid import effects
from fgvc.analysis.truncation import band_table, chance, load_study
from fgvc.cli import exit_on_user_error
from fgvc.reporting.bands_plot import (
    bands_figure,
    bands_markdown,
    class_changes_markdown,
    effects_figure,
    effects_markdown,
    factor_markdown,
)
from fgvc.reporting.documents import Kept, draw_figure, figure_is_current, stale_pages, write_pages

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "benchmarks" / "README.md"]
FIGURE_FOLDER = ROOT / "docs" / "figures"

REFERENCE = "MPN-COV (exact)"
STUDY = tuple(f"results/cub80/truncation/{name}.csv" for name in ("grid", "bands", "band_classes"))
AMPLIFICATION = ("results/cub80/amplification/grid.csv",)


def effects_table(grid: Path, *_: Path) -> str:
    return effects_markdown(effects(load_study(grid.parent).grid, REFERENCE), REFERENCE)


def effects_plot(grid: Path) -> Figure:
    runs = load_study(grid.parent).grid
    return effects_figure(effects(runs, REFERENCE), runs, REFERENCE)


def bands_plot(grid: Path, *_: Path) -> Figure:
    study = load_study(grid.parent)
    return bands_figure(band_table(study), chance(study))


TABLES: dict[str, Kept[str]] = {
    "cub80_bands": Kept(STUDY, lambda grid, *_: bands_markdown(band_table(load_study(grid.parent)))),
    "cub80_band_classes": Kept(STUDY, lambda grid, *_: class_changes_markdown(load_study(grid.parent).classes)),
    "cub80_amplification": Kept(AMPLIFICATION, effects_table),
    "cub80_factor": Kept(AMPLIFICATION, lambda grid: factor_markdown(load_study(grid.parent).grid)),
}
FIGURES: dict[str, Kept[Figure]] = {
    "cub80_bands": Kept(STUDY, bands_plot),
    "cub80_amplification": Kept(AMPLIFICATION, effects_plot),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, exit with 1 if anything is stale")
    check = parser.parse_args().check

    figures = {FIGURE_FOLDER / f"{name}.png": kept for name, kept in FIGURES.items()}
    stale = [path for path, kept in figures.items() if not figure_is_current(path, kept, ROOT)]
    pages = stale_pages(PAGES, TABLES, ROOT) if check else write_pages(PAGES, TABLES, ROOT)
    if not check:
        for path in stale:
            draw_figure(path, figures[path], ROOT)
    for path in [*pages, *stale]:
        print(f"{'stale' if check else 'written'}: {path.relative_to(ROOT)}")
    if check and (pages or stale):
        sys.exit(1)


if __name__ == "__main__":
    exit_on_user_error(main)
