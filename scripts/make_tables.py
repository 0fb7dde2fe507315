"""Make tables of finished runs and arithmetic, next to published numbers: md, tex, html and csv.

fgvc make_tables results/cub80_frozen
fgvc make_tables results/cub80_frozen --table cost --table condition_number
fgvc make_tables results/cub80_frozen --table all --output tables
"""

import argparse
from pathlib import Path

from fgvc.cli import end_with_notes, exit_on_user_error
from fgvc.errors import ConfigError
from fgvc.io import default_output, require_own, to_json, write_output
from fgvc.reporting.registry import TABLES, Inputs, default_tables, make_tables
from fgvc.resources import resource_folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="*", help="run folders, or folders with them")
    parser.add_argument(
        "--table", action="append", choices=[*TABLES, "all"], help="repeatable (default: accuracy, coarse)"
    )
    parser.add_argument("--output", type=Path, help="folder of the files (default: tables in the first RESULTS)")
    parser.add_argument("--provenance", type=Path, help="JSON file: the runs, configurations and commits of each cell")
    paper = resource_folder("results/paper")
    parser.add_argument("--paper", type=Path, default=paper, help="folder of published numbers (default: %(default)s)")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if anything is left out or doubtful")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_intermixed_args()

    inputs = Inputs(tuple(arguments.results), arguments.paper)
    requested = arguments.table or default_tables(inputs)
    tables, notes = make_tables(list(TABLES) if "all" in requested else list(dict.fromkeys(requested)), inputs)
    folders = [path for path in arguments.results if path.is_dir()]
    output = arguments.output or (default_output(folders[0], "tables") if folders else Path("tables"))
    texts = {output / file: text for name, table in tables.items() for file, text in table.texts(name).items()}
    kinds = dict.fromkeys(texts, "")
    if path := arguments.provenance:
        if path.resolve() in {file.resolve() for file in texts}:
            raise ConfigError(f"--provenance {path} is the file of a table; give another path")
        texts[path] = to_json({"cells": [cell for table in tables.values() for cell in table.provenance()]})
        kinds[path] = "provenance"
    for file, kind in kinds.items():
        require_own(file, kind)  # before the first is written
    for file, text in texts.items():
        write_output(file, text, kinds[file])
    print(*(texts[output / f"{name}.md"] for name in tables), sep="\n")
    print(f"written: {', '.join(map(str, texts))}")
    end_with_notes(notes, strict=arguments.strict)


if __name__ == "__main__":
    exit_on_user_error(main)
