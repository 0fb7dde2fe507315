"""Find similar classes in a run's descriptors: pairs and their confusion, nearest neighbours, a t-SNE map.

fgvc study_descriptors results/cub80_frozen
fgvc study_descriptors results/cub80_frozen/tf_efficientnet_lite0/seb/seed0 --output figures
"""

import argparse
from pathlib import Path

from fgvc.cli import end_with_notes, exit_on_user_error
from fgvc.io import default_output, require_own, write_tables
from fgvc.presentation.style import save_figure
from fgvc.runs import find_finished
from fgvc.studies.descriptors.measure import study_descriptors
from fgvc.studies.descriptors.show import correlations_markdown, embedding_figure, neighbours_markdown, pairs_markdown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="runs of one setting, or folders with them")
    parser.add_argument("--map", dest="label", help="label of the method to draw (default: the most accurate)")
    parser.add_argument("--seed", type=int, default=0, help="seed of map and intervals (default: %(default)s)")
    parser.add_argument("--root", help="folder of the dataset, if it has moved since training")
    parser.add_argument("--cache", help="folder of cached feature maps (default: results/cache)")
    parser.add_argument("--output", type=Path, help="folder of the files (default: descriptors in the first RESULTS)")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a run is left out")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args()

    output = arguments.output or default_output(arguments.results[0], "descriptors")
    require_own(output / "pairs.csv")  # before the work
    runs, notes = find_finished(arguments.results)
    study, more = study_descriptors(
        runs, label=arguments.label, seed=arguments.seed, root=arguments.root, cache=arguments.cache
    )
    written = save_figure(embedding_figure(study.embedding, study.pairs), output / "embedding")
    written += write_tables(output, study._asdict())
    drawn = study.embedding["label"].iloc[0]
    print(f"{neighbours_markdown(study.neighbours)}\n\nLeave-one-out top-1 in % by nearest neighbours.\n")
    print(f"{pairs_markdown(study.pairs[study.pairs['label'] == drawn])}\n\nClosest pairs of classes of {drawn}.\n")
    print(f"{correlations_markdown(study.correlations)}\n\nCloseness against confusion, over all pairs of classes.\n")
    print(f"written: {', '.join(map(str, written))}")
    end_with_notes(notes + more, strict=arguments.strict)


if __name__ == "__main__":
    exit_on_user_error(main)
