"""Show the training images of a run that are nearest to an image: distance, class, and a contact sheet.

fgvc neighbours RUN bird.jpg
fgvc neighbours RUN photographs/ -k 10 --sheets sheets
"""

import argparse
import sys
from pathlib import Path

from fgvc.cli import end_with_notes, exit_on_user_error
from fgvc.errors import one_line
from fgvc.inference.neighbours import load_neighbours
from fgvc.inference.predict import find_all, load_run, require_all
from fgvc.io import default_output
from fgvc.reporting.predictions import ON_SHEET, find_neighbours, sheet_files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder; its dataset is read")
    parser.add_argument("images", type=Path, nargs="+", help="image files, or folders of them")
    parser.add_argument("-k", type=int, default=5, metavar="N", help="number of neighbours of each image (default: 5)")
    parser.add_argument("--checkpoint", choices=("last", "best"), default="last")
    parser.add_argument("--root", help="folder of the dataset, if it has moved since training")
    parser.add_argument("--cache", help="folder of cached feature maps (default: results/cache)")
    parser.add_argument(
        "--sheets",
        type=Path,
        metavar="FOLDER",
        help=f"where the contact sheets go, with up to {ON_SHEET} neighbours each (default: neighbours in RUN)",
    )
    parser.add_argument("--no-sheets", action="store_true", help="draw no contact sheets")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args()

    paths = find_all(arguments.images)
    folder = arguments.sheets or default_output(arguments.run, "neighbours")
    sheets = None if arguments.no_sheets else sheet_files(folder, paths)
    predictor = load_run(arguments.run, arguments.checkpoint)
    index = load_neighbours(arguments.run, checkpoint=arguments.checkpoint, root=arguments.root, cache=arguments.cache)
    failed, drawn = [], []
    for near in find_neighbours(predictor, index, paths, arguments.k, sheets):
        if near.error is not None:
            failed.append(near.path)
            print(f"error: {one_line(near.error)}", file=sys.stderr)
        else:
            print(near.text(index), flush=True)
        drawn += [str(near.sheet)] if near.sheet else []
    if drawn:
        print(f"written: {', '.join(drawn) if len(drawn) <= 3 else f'{len(drawn)} contact sheets in {folder}'}")
    end_with_notes(predictor.notes, strict=False)
    require_all(failed, len(paths))


if __name__ == "__main__":
    exit_on_user_error(main)
