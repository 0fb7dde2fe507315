"""Calibrate the probabilities of runs on images they were not trained on; write calibration.json to each run.

fgvc calibrate results/cub80_frozen/tf_efficientnet_lite0/seb/seed0
fgvc calibrate results/cub80_frozen/tf_efficientnet_lite0/*/seed* --output results/calibration
"""

import argparse
import sys
from pathlib import Path

from fgvc.cli import exit_on_user_error
from fgvc.errors import RunError, UserError
from fgvc.inference.calibrate import calibrate_run
from fgvc.reporting.calibration_report import require_free, write_calibrations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="run", help="run folders")
    parser.add_argument("--checkpoint", choices=("last", "best"), default="last")
    parser.add_argument("--root", help="folder of the dataset, if it has moved since training")
    parser.add_argument("--cache", help="folder of cached feature maps (default: results/cache)")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="write tables and reliability diagrams of all")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args()

    if arguments.output is not None:
        require_free(arguments.output)  # before the work
    found, failed = {}, []
    for run in arguments.runs:
        try:
            found[run] = calibrate_run(run, checkpoint=arguments.checkpoint, root=arguments.root, cache=arguments.cache)
            print(f"{run}: {found[run].text}")
        except UserError as error:
            if len(arguments.runs) == 1:
                raise
            failed.append(str(run))
            print(f"error: {error}", file=sys.stderr)
    if arguments.output is not None and found:
        print(f"written: {', '.join(map(str, write_calibrations(arguments.output, found)))}")
    if failed:
        raise RunError(f"{len(failed)} of {len(arguments.runs)} failed, for the reasons above: {', '.join(failed)}")


if __name__ == "__main__":
    exit_on_user_error(main)
