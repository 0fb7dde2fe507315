"""Measure how smooth the loss is along its gradient: in trainings like a finished run, or at saved weights.

fgvc study_smoothness results/cub80_frozen/tf_efficientnet_lite0/mpn_cov/seed0 --epochs 3 --seeds 0,1,2
fgvc study_smoothness results/cub80_frozen --checkpoint last
"""

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fgvc.cli import end_with_notes, exit_on_user_error
from fgvc.io import require_own
from fgvc.studies.smoothness.show import smoothness_markdown, write_smoothness
from fgvc.studies.smoothness.study import smoothness_of_runs, smoothness_study


def _list(kind: type) -> Callable[[str], list[Any]]:
    def list_of_numbers(text: str) -> list[Any]:  # argparse shows this name in its error
        return [kind(part) for part in text.split(",")]

    return list_of_numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("run", type=Path, help="a finished run; with --checkpoint also a folder of runs")
    option("--checkpoint", choices=("last", "best"), help="measure these weights, train nothing")
    option("--methods", type=_list(str), help="METHOD[-GRADIENT],... (default: published; with --checkpoint the run's)")
    option("--weights", choices=("all", "features"), default="all", help="weights to move (default: %(default)s)")
    option("--step-factors", type=_list(float), default="0.5,1,2,4", help="times optimizer.lr (default: %(default)s)")
    option("--seeds", type=_list(int), default="0", help="seeds of the trainings (default: %(default)s)")
    option("--every", type=int, default=20, help="measure every EVERY-th step (default: %(default)s)")
    option("--epochs", type=int, help="end the trainings after these epochs, on the run's schedule")
    option("--steps", type=int, help="the same in steps")
    option("--batches", type=int, default=8, help="number of batches with --checkpoint (default: %(default)s)")
    option("--keep", type=int, help="number of eigenvalues that SVD-TopN keeps (default: all but 50)")
    option("--root", help="folder of the dataset, if it has moved since training")
    option("--cache", help="another folder of cached feature maps")
    option("--output", type=Path, default="figures", help="folder of the files (default: %(default)s)")
    option("--strict", action="store_true", help="exit with 1 if a run is left out or a training diverged")
    option("--debug", action="store_true", help="show the traceback of an error")
    given = vars(parser.parse_args())
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("fgvc").setLevel(logging.INFO)

    require_own(given["output"] / "smoothness.csv")  # before the work
    own = ("checkpoint", "batches") if given["checkpoint"] else ("seeds", "every", "epochs", "steps")
    measure = {key: given[key] for key in ("methods", "weights", "step_factors", "keep", "root", "cache", *own)}
    table, notes = (smoothness_of_runs if given["checkpoint"] else smoothness_study)(given["run"], **measure)
    written = write_smoothness(table, given["output"])
    print(f"{smoothness_markdown(table)}\n\nwritten: {', '.join(map(str, written))}")
    end_with_notes(notes, strict=given["strict"])


if __name__ == "__main__":
    exit_on_user_error(main)
