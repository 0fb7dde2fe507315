"""Repeat a finished run from its folder, or compare two finished runs, and report how they differ.

fgvc rerun results/cub80_frozen/tf_efficientnet_lite0/seb/seed0
fgvc rerun results/cub80_frozen/tf_efficientnet_lite0/seb/seed0 --root PATH --cache new_cache --run-dir again
fgvc rerun results/cub80_frozen/tf_efficientnet_lite0/seb/seed0 --compare again --strict
"""

import argparse
import logging
import sys
from pathlib import Path

from accelerate import PartialState

from fgvc.cli import exit_on_user_error
from fgvc.inference import rerun
from fgvc.reporting.comparison import comparison_markdown
from fgvc.runs.compare import compare_runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run; it is only read")
    parser.add_argument("--run-dir", type=Path, help="folder of the repetition (default: RUN-rerun)")
    parser.add_argument("--root", help="folder of the dataset, if it has moved since training")
    parser.add_argument("--cache", help="another folder of cached features; in a new one they are computed again")
    parser.add_argument("--compare", type=Path, metavar="OTHER", help="compare with this run, train nothing")
    parser.add_argument("--strict", action="store_true", help="exit with 1 unless the runs are bit-identical")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    given = parser.parse_args()
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("fgvc").setLevel(logging.INFO)

    other = given.compare
    if other is None:
        other = rerun(given.run, run_dir=given.run_dir, root=given.root, cache=given.cache)
    if not PartialState().is_main_process:  # one process reports
        return
    comparison = compare_runs(given.run, other)
    print(comparison_markdown(comparison))
    if given.strict and not comparison.identical:
        sys.exit(1)


if __name__ == "__main__":
    exit_on_user_error(main)
