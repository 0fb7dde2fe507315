"""Measure the cost of float32 spectra and features in half precision against float64: errors, accuracy of runs.

fgvc study_precision results/cub80_frozen/tf_efficientnet_lite0/mpn_cov/seed0
fgvc study_precision RUN OTHER_RUN --trained results/cub80_precision --output results/cub80/precision
"""

import argparse
from pathlib import Path

from fgvc.cli import end_with_notes, exit_on_user_error
from fgvc.io import require_own, write_tables
from fgvc.presentation.style import save_figure
from fgvc.runs import find_finished
from fgvc.studies.precision.measure import STUDIED, precision_pairs, save_precision, study_precision
from fgvc.studies.precision.show import eigenvalues_markdown, errors_figure, errors_markdown, pairs_markdown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="finished runs of covariance heads with different widths")
    parser.add_argument("--trained", type=Path, nargs="+", help="runs in float64 and in float32, or folders with them")
    parser.add_argument("--images", type=int, default=64, help="number of test images per run (default: %(default)s)")
    parser.add_argument("--methods", nargs="+", default=STUDIED, metavar="METHOD[-GRADIENT]", help="(%(default)s)")
    parser.add_argument("--keep", type=int, help="number of eigenvalues that SVD-TopN keeps (default: all but 50)")
    parser.add_argument("--root", help="folder of the dataset, if it has moved since training")
    parser.add_argument("--cache", help="folder of cached feature maps (default: results/cache)")
    parser.add_argument("--output", type=Path, default=Path("figures"), help="folder of the files (%(default)s)")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a run is left out")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    given = parser.parse_args()

    require_own(given.output / "errors.csv")  # before the work
    measure = {"images": given.images, "methods": given.methods, "keep": given.keep}
    study = study_precision(given.runs, **measure, root=given.root, cache=given.cache)
    for channels, part in study.errors.groupby("channels", sort=False):
        print(f"{errors_markdown(part, 'arithmetic')}\n\nRelative errors, d = {channels}: median / 95 % / max.\n")
    print(f"{eigenvalues_markdown(study.eigenvalues)}\n\nEigenvalues in float32: median / max error (number).\n")
    notes: list[str] = []
    trained = {}
    if given.trained:
        runs, notes = find_finished(given.trained)
        trained["pairs"] = precision_pairs(runs)
        print(f"{pairs_markdown(trained['pairs'])}\n")
    written = save_precision(study, given.output) + write_tables(given.output, trained)
    title = f"{given.images} test images of each of {len(given.runs)} runs"
    written += save_figure(errors_figure(study.images, title), given.output / "precision")
    print(f"written: {', '.join(map(str, written))}")
    end_with_notes(notes, strict=given.strict)


if __name__ == "__main__":
    exit_on_user_error(main)
