"""Get a dataset: download, check, unpack, verify; or say how to get it by hand if its terms forbid a download.

fgvc prepare_data cub
fgvc prepare_data nabirds --from-archive nabirds.tar.gz
fgvc prepare_data cub --root /data/cub --verify-only
"""

import argparse
import logging
from pathlib import Path

from fgvc.cli import exit_on_user_error
from fgvc.data import prepare_dataset
from fgvc.resources import resource_folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = "cub, cars, aircraft, dogs, nabirds, imagenet, inaturalist, synthetic"
    parser.add_argument("name", help=f"card in datasets/: {names}")
    parser.add_argument("--root", type=Path, help="the dataset's folder (default: datasets/NAME)")
    parser.add_argument(
        "--from-archive", type=Path, nargs="+", default=[], metavar="FILE", help="local files instead of downloads"
    )
    parser.add_argument(
        "--verify-only", action="store_true", help="download and write nothing, verify everything again"
    )
    parser.add_argument("--workers", type=int, default=4, help="threads for decoding images (default: %(default)s)")
    cards = resource_folder("datasets")
    parser.add_argument("--cards", type=Path, default=cards, help="folder with the cards (default: %(default)s)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args()

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    prepared = prepare_dataset(
        arguments.name,
        cards=arguments.cards,
        root=arguments.root or Path("datasets") / arguments.name,
        archives=arguments.from_archive,
        verify_only=arguments.verify_only,
        workers=arguments.workers,
    )
    print(prepared.report)


if __name__ == "__main__":
    exit_on_user_error(main)
