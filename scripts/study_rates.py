"""Ask whether heads differ by more than the learning rate of their classifier: tables and figures.

fgvc study_rates results/rates
"""

import argparse
from pathlib import Path

from fgvc.cli import end_with_notes, exit_on_user_error
from fgvc.io import default_output, to_csv, write_output
from fgvc.runs import find_finished
from fgvc.studies.rates.measure import comparable, read_rates
from fgvc.studies.rates.show import best_markdown, curves_markdown, shifts_markdown, write_rate_figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="runs at several rates, or folders with them")
    parser.add_argument("--reference", default="MPN-COV (exact)", help="label to compare with (%(default)s)")
    parser.add_argument("--margin", type=float, default=0.5, help="points within which heads are equal (%(default)s)")
    parser.add_argument("--output", type=Path, help="folder of the files (default: study in the first RESULTS)")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a run is left out")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args()

    runs, notes = find_finished(arguments.results)
    table, more = read_rates(runs)
    output = arguments.output or default_output(arguments.results[0], "study")
    write_output(output / "rates.csv", to_csv(table))
    table, left_out = comparable(table, arguments.reference)
    tables = [curves_markdown(table), shifts_markdown(table, arguments.reference)]
    if table["validation"].notna().all():
        tables.append(best_markdown(table, arguments.reference, arguments.margin))
    else:
        more.append("no comparison at the best rates: some runs have no held-out images (trainer.val_fraction=0.2)")
    print("\n\n".join(tables))
    written = [output / "rates.csv", *write_rate_figures(table, output)]
    print(f"written: {', '.join(map(str, written))}")
    end_with_notes(notes + more + left_out, strict=arguments.strict)


if __name__ == "__main__":
    exit_on_user_error(main)
