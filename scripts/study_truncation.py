"""Measure how much small eigenvalues matter: tables and figures of runs with heads that treat them differently.

fgvc study_truncation results/cub80_truncation
fgvc study_truncation results/cub80_amplification --no-cut --reference "MPN-COV (exact)"
"""

import argparse
from pathlib import Path

from fgvc.cli import end_with_notes, exit_on_user_error
from fgvc.io import default_output, require_own
from fgvc.runs import find_finished
from fgvc.studies.truncation.measure import read_study, save_study
from fgvc.studies.truncation.show import study_markdown, write_study_figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="runs of one setting, or folders with them")
    parser.add_argument(
        "--reference", default="MPN-COV (exact)", help="label of the method to compare with (%(default)s)"
    )
    parser.add_argument(
        "--no-cut", action="store_true", help="do not evaluate runs with all eigenvalues on parts of them"
    )
    parser.add_argument("--root", help="folder of the dataset, if it has moved since training")
    parser.add_argument("--cache", help="folder of cached feature maps (default: results/cache)")
    parser.add_argument("--output", type=Path, help="folder of the files (default: study in the first RESULTS)")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a run is left out")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args()

    output = arguments.output or default_output(arguments.results[0], "study")
    require_own(output / "grid.csv")  # before the work
    runs, notes = find_finished(arguments.results)
    study, more = read_study(runs, cut=not arguments.no_cut, root=arguments.root, cache=arguments.cache)
    print(study_markdown(study, arguments.reference))
    written = save_study(study, output) + write_study_figures(study, arguments.reference, output)
    print(f"written: {', '.join(map(str, written))}")
    end_with_notes(notes + more, strict=arguments.strict)


if __name__ == "__main__":
    exit_on_user_error(main)
