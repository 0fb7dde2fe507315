"""Plot covariance eigenvalues of finished runs: a figure as PNG and PDF, its data as CSV, and a table.

fgvc plot_spectra results/cub80_frozen
fgvc plot_spectra results/cub80_frozen --view conditions --view epochs --output figures
fgvc plot_spectra results/cub80_frozen/tf_efficientnet_lite0/seb --view classes --images 2400
"""

import argparse
from pathlib import Path

from fgvc.cli import end_with_notes, exit_on_user_error
from fgvc.io import default_output
from fgvc.runs import find_finished
from fgvc.studies.spectra.views import FILES, VIEWS, Options


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders of one setting, or folders with them")
    parser.add_argument("--view", action="append", choices=list(VIEWS), help="repeatable (default: methods)")
    parser.add_argument("--images", type=int, metavar="N", help="compute N test images again (views classes, layers)")
    parser.add_argument("--smallest", type=int, default=8, metavar="K", help="number of small eigenvalues (8)")
    parser.add_argument("--root", help="folder of the dataset, if it has moved since training")
    parser.add_argument("--cache", help="folder of cached feature maps (default: results/cache)")
    parser.add_argument("--output", type=Path, help="folder of the files (default: figures in the first RUNS)")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a run is left out")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_intermixed_args()

    runs, notes = find_finished(arguments.runs)
    options = Options(arguments.images, arguments.smallest, arguments.root, arguments.cache)
    output = arguments.output or default_output(arguments.runs[0], "figures")
    for name in dict.fromkeys(arguments.view or ["methods"]):
        view = VIEWS[name](runs, options)
        written = view.write(FILES.get(name, name), output)
        print(f"{view.markdown}\n\nwritten: {', '.join(map(str, written))}\n")
        notes += view.notes
    end_with_notes(notes, strict=arguments.strict)


if __name__ == "__main__":
    exit_on_user_error(main)
