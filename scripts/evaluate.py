"""Evaluate the saved weights of a run on its test split: accuracies, predictions, classes, confusion matrix.

Of several runs, the ensemble: the mean of their probabilities on the same test images.

fgvc evaluate results/cub80_frozen/tf_efficientnet_lite0/seb/seed0 --checkpoint best
fgvc evaluate results/cub80_frozen/tf_efficientnet_lite0/seb/seed0 --views ten_crop --resize-size 256
fgvc evaluate results/cub80_frozen/tf_efficientnet_lite0/seb/seed0 results/cub80_frozen/tf_efficientnet_lite0/seb/seed1
"""

import argparse
from pathlib import Path

from fgvc.cli import exit_on_user_error
from fgvc.data import VIEWS
from fgvc.errors import ConfigError
from fgvc.inference import evaluate_run
from fgvc.inference.ensemble import evaluate_ensemble
from fgvc.studies.confusion.show import write_class_report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run folder; several are averaged")
    parser.add_argument("--checkpoint", choices=("last", "best"), default="last")
    parser.add_argument("--views", choices=VIEWS, default="single", help="average the logits over views of an image")
    parser.add_argument("--resize-size", type=int, metavar="N", help="pixels before the crop, instead of the run's")
    parser.add_argument(
        "--retrieval", action="store_true", help="whether nearest images share a class: recall@k, mAP@R"
    )
    parser.add_argument("--root", help="folder of the dataset, if it has moved since training")
    parser.add_argument("--cache", help="folder of cached feature maps (default: results/cache)")
    parser.add_argument("--output", type=Path, help="folder of the files (default: the run folder, or nowhere)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args()

    names = ("checkpoint", "views", "resize_size", "root", "cache", "output")
    given = {name: getattr(arguments, name) for name in names}
    if len(arguments.runs) > 1:
        if arguments.retrieval:
            raise ConfigError("retrieval compares descriptors of one model; give one run, or leave out --retrieval")
        print(evaluate_ensemble(arguments.runs, **given).text)
        return
    result = evaluate_run(arguments.runs[0], **given, retrieval=arguments.retrieval)
    text, files = write_class_report(result.predictions, result.classes, result.title, result.folder, result.name)
    record = result.record
    print(result.text)
    if result.retrieval is not None:
        print(f"retrieval: {result.retrieval.text}")
    print(f"{record['images']} images, views: {record['views']}, {record['seconds']:.1f} s\n\n{text}\n")
    print(f"written: {', '.join(map(str, [*result.files, *files]))}")


if __name__ == "__main__":
    exit_on_user_error(main)
