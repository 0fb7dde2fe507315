"""Export the trained model of a run, with a model card; the run's dataset is not needed.

fgvc export results/cub80_frozen/tf_efficientnet_lite0/isqrt_cov/seed0 --to onnx --checkpoint best
"""

import argparse
from pathlib import Path

from fgvc.cli import exit_on_user_error
from fgvc.inference.export import export_run
from fgvc.resources import resource_folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--to", required=True, help="safetensors, hub, onnx, timm or pt2")
    parser.add_argument("--checkpoint", choices=("last", "best"), default="last")
    parser.add_argument(
        "--output", type=Path, help="folder to write (default: exports/TO-CHECKPOINT in the run folder)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an export of another run, or a changed one")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args()
    folder = export_run(
        arguments.run,
        to=arguments.to,
        checkpoint=arguments.checkpoint,
        output=arguments.output,
        overwrite=arguments.overwrite,
        cards=resource_folder("datasets"),
    )
    print(f"export: {folder}")


if __name__ == "__main__":
    exit_on_user_error(main)
