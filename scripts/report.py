"""Write one HTML page about runs that needs no other file and no network: tables, plots, pictures, configurations.

fgvc report results/cub80_frozen
fgvc report results/cub80_frozen results/demo --output report.html
"""

import argparse
from datetime import datetime, timezone
from pathlib import Path

from fgvc.cli import end_with_notes, exit_on_user_error
from fgvc.io import default_output, require_own, write_output
from fgvc.reporting.report import collect, make_report
from fgvc.resources import resource_folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="run folders, or folders with them")
    parser.add_argument("--output", type=Path, help="the page (default: report.html in the first RESULTS)")
    paper = resource_folder("results/paper")
    parser.add_argument("--paper", type=Path, default=paper, help="folder of published numbers (default: %(default)s)")
    images = "folder of the dataset: shows images of the worst confusions, which then travel with the page; repeatable"
    parser.add_argument("--images", type=Path, action="append", default=[], help=images)
    parser.add_argument("--strict", action="store_true", help="exit with 1 if anything is left out or doubtful")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_intermixed_args()

    output = arguments.output or default_output(arguments.results[0], "report.html")
    require_own(output, "report")
    report = make_report(collect(arguments.results, arguments.paper), datetime.now(timezone.utc), arguments.images)
    write_output(output, report.html, "report")
    print(f"written: {output} ({len(report.html.encode('utf-8')) / 1e6:.1f} MB)")
    end_with_notes(report.notes, strict=arguments.strict)


if __name__ == "__main__":
    exit_on_user_error(main)
