"""Evaluate the saved weights of a run on its test split.

python scripts/evaluate.py results/cub80_frozen/tf_efficientnet_lite0/seb/seed0 --checkpoint best
"""

import argparse
from pathlib import Path

from fgvc.cli import exit_on_user_error
from fgvc.training import evaluate_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--checkpoint", choices=("last", "best"), default="last")
    parser.add_argument("--root", help="folder of the dataset, where it has moved since training")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args()
    accuracy = evaluate_run(arguments.run, checkpoint=arguments.checkpoint, root=arguments.root)
    print(f"top-1 {accuracy.top1:.2f} %   top-5 {accuracy.top5:.2f} %   mean class {accuracy.mean_class:.2f} %")


if __name__ == "__main__":
    exit_on_user_error(main)
