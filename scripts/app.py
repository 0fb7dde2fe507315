"""Open a page to play with a run: drop an image, see names, where the run looks, and the nearest training images.

fgvc app results/cub80_frozen/tf_efficientnet_lite0/seb/seed0
"""

import argparse
from pathlib import Path

from fgvc.cli import exit_on_user_error
from fgvc.reporting.app import serve_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--checkpoint", choices=("last", "best"), default="last")
    parser.add_argument("--root", help="folder of the dataset, if it has moved since training")
    parser.add_argument("--cache", help="folder of cached feature maps (default: results/cache)")
    parser.add_argument("--no-neighbours", action="store_true", help="show no training images and do not read them")
    parser.add_argument("--port", type=int, metavar="N", help="port on 127.0.0.1 (default: a free one from 7860)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args()
    serve_run(
        arguments.run,
        checkpoint=arguments.checkpoint,
        root=arguments.root,
        cache=arguments.cache,
        neighbours=not arguments.no_neighbours,
        port=arguments.port,
    )


if __name__ == "__main__":
    exit_on_user_error(main)
