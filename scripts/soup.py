"""Average the weights of runs that started from the same weights, into a folder that other commands read like a run.

fgvc soup results/tuned/seed0 results/tuned/seed1 results/tuned/seed2 --output results/tuned/soup
"""

import argparse
from pathlib import Path

from fgvc.cli import exit_on_user_error
from fgvc.inference.ensemble import average_runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of runs that differ in the seed")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args()
    average_runs(arguments.runs, arguments.output)
    print(f"written: {arguments.output}\n\nnext:\n  fgvc evaluate {arguments.output}")


if __name__ == "__main__":
    exit_on_user_error(main)
