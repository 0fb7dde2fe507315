"""Show which pixels a run's answers depend on, for the whole spectrum and parts of it: overlays, grids, maps.

fgvc attribute results/demo/tf_efficientnet_lite0/seb/seed0 --images 6 --bands all,top4,bottom16
fgvc attribute RUN --images bird.jpg --method hirescam,extremal --bands top16,bottom16 --eigenvectors 6
"""

import argparse
from pathlib import Path

import psutil

from fgvc.cli import exit_on_user_error
from fgvc.io import default_output
from fgvc.studies.attribution import METHODS
from fgvc.studies.attribution.explain import attribute_run
from fgvc.studies.attribution.report import attribution_markdown, require_free, write_attribution


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--images", default="6", metavar="N|PATH", help="N test images, a file, or a folder (6)")
    parser.add_argument("--bands", type=_names, default=["all"], help="all, top16, bottom16, 8:24 ..., comma-separated")
    parser.add_argument("--method", type=_names, default=["gradcam"], help=f"{', '.join(METHODS)} (gradcam)")
    parser.add_argument("--classes", help="class to explain, or one per image, comma-separated; true: the true classes")
    parser.add_argument("--eigenvectors", type=int, default=0, metavar="N", help="draw N from each end of the spectrum")
    parser.add_argument("--checkpoint", choices=("last", "best"), default="last")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of N test images (0)")
    parser.add_argument("--batch-size", type=int, default=8, help="number of images explained at once (8)")
    parser.add_argument("--root", help="folder of the dataset, if it has moved since training")
    parser.add_argument("--output", type=Path, help="folder of the files (default: attribution in the run folder)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args()

    output = arguments.output or default_output(arguments.run, "attribution")
    require_free(arguments.images, output)
    found = attribute_run(
        *(arguments.run, arguments.images),
        bands=arguments.bands,
        methods=arguments.method,
        classes=arguments.classes,
        eigenvectors=arguments.eigenvectors,
        checkpoint=arguments.checkpoint,
        root=arguments.root,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
    )
    written = write_attribution(found, output)
    print(attribution_markdown(found), end="\n\n")
    for method, seconds in found.seconds.items():
        print(f"{method}: {seconds:.2f} s per image, {len(found.bands)} bands (load {psutil.getloadavg()[0]:.1f})")
    print(f"written: {len(written)} files in {output}, see attribution.json")


if __name__ == "__main__":
    exit_on_user_error(main)
