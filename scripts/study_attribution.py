"""Measure whether large and small eigenvalues look at different places, and which map explains the head better.

fgvc study_attribution results/cub80_frozen/tf_efficientnet_lite0/mpn_cov/seed0 --bands top8,8:
fgvc study_attribution RUN OTHER_RUN --method gradcam,decomposition --images 80 --output figures
"""

import argparse
import logging
import sys
from pathlib import Path

from fgvc.cli import end_with_notes, exit_on_user_error
from fgvc.io import default_output, require_own
from fgvc.presentation.style import save_figure
from fgvc.runs import find_finished
from fgvc.studies.attribution import METHODS
from fgvc.studies.attribution.show import attribution_figure, study_markdown
from fgvc.studies.attribution.study import save_attribution_study, study_attribution


def _names(text: str) -> list[str]:
    return text.split(",")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("results", type=Path, nargs="+", help="runs of one setting on one backbone, or folders with them")
    option("--images", type=int, default=200, help="number of test images, evenly spaced (default: %(default)s)")
    option("--bands", type=_names, default="top8,8:", help="top8, bottom8, 8:24, 8:, ... (default: %(default)s)")
    option("--method", type=_names, default="gradcam,decomposition", help=f"any of {', '.join(METHODS)} (%(default)s)")
    option("--steps", type=int, default=16, help="number of steps of the curves (default: %(default)s)")
    option("--cell", type=int, default=16, help="side in pixels of replaced cells (default: %(default)s)")
    option("--boxes", action="store_true", help="also measure each map's share inside the object's bounding box")
    option("--seed", type=int, default=0, help="seed of random maps, ties and resampling (default: %(default)s)")
    option("--root", help="folder of the dataset, if it has moved since training")
    option("--cache", help="folder of cached feature maps (default: results/cache)")
    option("--output", type=Path, help="folder of the files (default: attribution_study in the first RESULTS)")
    option("--strict", action="store_true", help="exit with 1 if a run is left out")
    option("--debug", action="store_true", help="show the traceback of an error")
    given = parser.parse_args()
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("fgvc").setLevel(logging.INFO)

    output = given.output or default_output(given.results[0], "attribution_study")
    require_own(output / "attribution.png")  # before the work
    runs, notes = find_finished(given.results)
    measure = ("images", "bands", "steps", "cell", "boxes", "seed", "root", "cache")
    study = study_attribution(runs, methods=given.method, **{key: getattr(given, key) for key in measure})
    written = save_figure(attribution_figure(study), output / "attribution")
    written += save_attribution_study(study, output)
    print(f"{study_markdown(study)}\n\nwritten: {', '.join(map(str, written))}")
    end_with_notes(notes, strict=given.strict)


if __name__ == "__main__":
    exit_on_user_error(main)
