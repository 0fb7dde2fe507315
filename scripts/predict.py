"""Classify images with the model of a run: probable classes, calibrated probabilities, an overlay per image.

fgvc predict results/cub80_frozen/tf_efficientnet_lite0/seb/seed0 bird.jpg
fgvc predict results/cub80_frozen/tf_efficientnet_lite0/seb/seed0 photographs/ --json > names.json
fgvc predict hf://OWNER/NAME bird.jpg
"""

import argparse
import json
from pathlib import Path

from fgvc.cli import end_with_notes, exit_on_user_error
from fgvc.errors import one_line
from fgvc.inference.predict import find_all, load_run, prediction_notes, require_all
from fgvc.models.hub import is_published
from fgvc.reporting import predictions
from fgvc.studies.attribution import METHODS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run folder, an export --to hub, or hf://OWNER/NAME on the Hugging Face hub")
    parser.add_argument("images", type=Path, nargs="+", help="image files, or folders of them")
    parser.add_argument("--checkpoint", choices=("last", "best"), default="last")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="number of names per image (default: 5)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="default with a folder: predicted/FOLDER.csv in RUN")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    parser.add_argument("--overlay", type=Path, metavar="FOLDER", help="default without a folder: predicted in RUN")
    parser.add_argument("--no-overlay", action="store_true", help="draw no overlays")
    parser.add_argument(
        "--method", choices=METHODS, default=predictions.METHOD, help="overlay method (default: %(default)s)"
    )
    parser.add_argument("--strict", action="store_true", help="exit with 1 if there is a note")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args()

    paths = find_all(arguments.images)
    folders = any(source.is_dir() for source in arguments.images)
    place = Path() if is_published(arguments.run) else Path(arguments.run)  # an export keeps its files
    table = predictions.folder_table(place, arguments.images) if folders else None
    table = predictions.TableFile(arguments.csv) if arguments.csv else table
    overlays = arguments.overlay or (None if folders else place / "predicted")
    overlays = None if arguments.no_overlay else overlays
    predictions.require_free(paths, table, overlays)
    predictor = load_run(arguments.run, arguments.checkpoint)
    found = predictions.name_files(predictor, paths, arguments.top, overlays, arguments.method)
    named = predictions.show_files(found, table, text=not (arguments.json or folders))
    if arguments.json:
        document = predictions.predictions_document(predictor, arguments.run, arguments.checkpoint, named)
        print(json.dumps(document, indent=2))
    else:
        pictures = [one.overlay for one in named if one.overlay]
        shown = [overlays] if folders and pictures else pictures
        written = ", ".join(map(one_line, [*([table.path] if table else []), *shown]))
        print((predictions.summary(named) + "\n" if folders else "") + predictor.status)
        print(*([f"written: {written}"] if written else []), sep="\n")
    failed = [one.path for one in named if one.error]
    notes = prediction_notes(arguments.run, predictor, arguments.checkpoint)
    end_with_notes(notes, strict=arguments.strict and not failed)
    require_all(failed, len(named))


if __name__ == "__main__":
    exit_on_user_error(main)
