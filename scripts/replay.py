"""Repeat a step in which a run met NaN or infinity, as the run kept it: no dataset is needed.

fgvc replay results/cub_resnet50/resnet50/mpn_cov/seed0
fgvc replay results/cub_resnet50/resnet50/mpn_cov/seed0/replay/step-000123.pt --gradient exact --anomaly
"""

import argparse
from pathlib import Path

from fgvc.cli import exit_on_user_error
from fgvc.training.replay import find_replays
from fgvc.training.replay_step import PRECISIONS, replay_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder, of which all kept steps are repeated, or one file")
    parser.add_argument("--gradient", metavar="NAME", help="another rule of the spectral layer, e.g. exact")
    parser.add_argument("--precision", choices=PRECISIONS, help="another precision")
    parser.add_argument("--anomaly", action="store_true", help="ask torch which operation makes a gradient NaN")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args()
    for file in find_replays(arguments.run):
        replayed = replay_step(
            file, gradient=arguments.gradient, precision=arguments.precision, anomaly=arguments.anomaly
        )
        print(f"{file}\n{replayed.text()}\n")


if __name__ == "__main__":
    exit_on_user_error(main)
