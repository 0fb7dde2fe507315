"""Plot the sorted eigenvalues of covariances before and after normalisation, one curve a method, as PNG and PDF.

python scripts/plot_spectra.py results/cub80_frozen
python scripts/plot_spectra.py results/demo/gap/seed0 results/demo/seb/seed0 --output figures
"""

import argparse
import sys
from pathlib import Path

from fgvc.analysis import find_runs, group_runs, pool_spectra, split_finished
from fgvc.cli import exit_on_user_error
from fgvc.reporting import spectra_markdown, write_spectra_figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders of one setting, or folders with them")
    parser.add_argument("--output", type=Path, help="folder of the figure (default: figures in the first RUNS)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args()

    runs, notes = split_finished(find_runs(arguments.runs))
    spectra = pool_spectra(runs)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    (setting,) = group_runs(runs)
    written = write_spectra_figure(spectra, setting.title, arguments.output or arguments.runs[0] / "figures")
    print(spectra_markdown(spectra))
    print("\nMedians over the test images of all seeds.")
    print(f"written: {', '.join(map(str, written))}")


if __name__ == "__main__":
    exit_on_user_error(main)
