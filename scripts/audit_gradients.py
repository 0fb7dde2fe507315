"""Compare the published gradients of covariance pooling with the exact ones on real features: table, CSV and figure.

fgvc audit_gradients results/cub80_frozen/tf_efficientnet_lite0/mpn_cov/seed0
fgvc audit_gradients results/cache/features-0123abcd.npy --images 32 --keep 200 --output figures
"""

import argparse
from dataclasses import replace
from pathlib import Path

from fgvc.cli import exit_on_user_error
from fgvc.inference.pooling_inputs import load_features
from fgvc.io import default_output, require_own, write_tables
from fgvc.presentation.style import save_figure
from fgvc.studies.gradients.loewner import loewner_picture
from fgvc.studies.gradients.measure import audit_gradients, summarise_gradients
from fgvc.studies.gradients.show import gradients_markdown, loewner_figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "source", type=Path, metavar="RUN_OR_FEATURES", help="a finished run, or a .npy file of (N, C, H, W)"
    )
    parser.add_argument("--images", type=int, default=64, help="number of evenly spaced images (default: %(default)s)")
    parser.add_argument("--keep", type=int, help="number of eigenvalues that SVD-TopN keeps (default: all but 50)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the loss for a file (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="folder of the files (default: RUN/figures, or figures here)")
    parser.add_argument("--root", help="folder of the run's dataset, if it has moved since training")
    parser.add_argument("--cache", help="folder of cached feature maps (default: results/cache)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args()

    output = arguments.output
    if output is None:
        output = default_output(arguments.source, "figures") if arguments.source.is_dir() else Path("figures")
    require_own(output / "gradients.csv")  # before the work
    inputs = load_features(arguments.source, arguments.images, root=arguments.root, cache=arguments.cache)
    table = audit_gradients(inputs.features, grad=inputs.grad, keep=arguments.keep, seed=arguments.seed)
    table["image"] = table["image"].map(inputs.indices.__getitem__)
    summary = summarise_gradients(table)
    picture = loewner_picture(inputs.features, keep=arguments.keep)
    picture = replace(picture, image=inputs.indices[picture.image])
    written = save_figure(loewner_figure(picture, inputs.source), output / "loewner")
    tables = {"gradients": summary, "gradients_images": table, "loewner": picture.table()}
    written += write_tables(output, tables, None)
    loss = "standard normal, seed " + str(arguments.seed) if inputs.grad is None else "that of the run's cross-entropy"
    print(f"{gradients_markdown(summary)}\n\n{inputs.source}; dLoss/dDescriptor: {loss}.")
    print(f"written: {', '.join(map(str, written))}")


if __name__ == "__main__":
    exit_on_user_error(main)
