"""Tabulate the accuracies of finished runs beside published numbers: Markdown on the terminal, and md, tex, csv.

python scripts/make_tables.py results
python scripts/make_tables.py results/cub80_frozen results/demo --output tables --strict
"""

import argparse
import sys
from pathlib import Path

from fgvc.analysis import config_notes, find_runs, split_finished
from fgvc.cli import exit_on_user_error
from fgvc.files import write_text_atomic
from fgvc.reporting import accuracy_table, load_published, to_csv, to_latex, to_markdown

PAPER = Path(__file__).resolve().parents[1] / "results" / "paper"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="run folders, or folders with runs at any depth")
    parser.add_argument("--output", type=Path, help="folder of the three files (default: tables in the first RESULTS)")
    parser.add_argument(
        "--paper", type=Path, default=PAPER, help="folder of the published numbers (default: %(default)s)"
    )
    parser.add_argument(
        "--strict", action="store_true", help="exit with 1 if a run is left out or averages are doubtful"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args()

    runs, notes = split_finished(find_runs(arguments.results))
    table = accuracy_table(runs, load_published(arguments.paper))
    output = arguments.output or arguments.results[0] / "tables"
    texts = {"md": to_markdown(table), "tex": to_latex(table), "csv": to_csv(table)}
    for kind, text in texts.items():
        write_text_atomic(output / f"accuracy.{kind}", text)
    print(texts["md"])
    print(f"written: {', '.join(str(output / f'accuracy.{kind}') for kind in texts)}")
    notes += config_notes(runs)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    if notes and arguments.strict:
        sys.exit(1)


if __name__ == "__main__":
    exit_on_user_error(main)
