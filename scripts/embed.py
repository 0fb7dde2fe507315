"""Write the descriptors of images, what the classifier of a run reads: as Parquet, NumPy archive or CSV.

fgvc embed RUN photographs/ --output descriptors.parquet
fgvc embed RUN photographs/ --pca 32 --output descriptors.csv
"""

import argparse
import sys
from pathlib import Path

from fgvc.cli import end_with_notes, exit_on_user_error
from fgvc.errors import one_line
from fgvc.inference.embed import embed_files, require_components, require_free
from fgvc.inference.predict import find_all, load_run, require_all


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run folder, an export --to hub, or hf://OWNER/NAME on the Hugging Face hub")
    parser.add_argument("images", type=Path, nargs="+", help="image files, or folders of them")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="ends in .parquet, .npz or .csv")
    parser.add_argument("--pca", type=int, metavar="N", help="reduce to N numbers by PCA, fitted on these images")
    parser.add_argument("--checkpoint", choices=("last", "best"), default="last")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args()

    require_free(arguments.output)
    paths = find_all(arguments.images)
    predictor = load_run(arguments.run, arguments.checkpoint)
    if arguments.pca is not None:  # before the work
        require_components(arguments.pca, len(paths), predictor.model.head.pooling.out_features)
    found = embed_files(predictor, paths)
    for reason in found.errors.values():
        print(f"error: {one_line(reason)}", file=sys.stderr)
    if found.paths:
        found = found if arguments.pca is None else found.reduced(arguments.pca)
        found.write(arguments.output)
        if found.note:
            print(found.note)
        print(f"{len(found.paths):,} images, {found.descriptors.shape[1]:,} numbers each")
        print(f"written: {arguments.output}")
    end_with_notes(predictor.notes, strict=False)
    require_all([*found.errors], len(paths))


if __name__ == "__main__":
    exit_on_user_error(main)
