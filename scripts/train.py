"""Train one run, a sweep of runs with -m, or a first comparison on images of your own.

fgvc train dataset.root=FOLDER
fgvc train experiment=cub80_frozen dataset.root=FOLDER method=seb seed=0
fgvc train -m experiment=demo method=gap,isqrt_cov,mpn_cov,seb
fgvc train dataset.root=FOLDER search=heads
"""

import logging
import os
import sys
from pathlib import Path

from fgvc.cli import exit_on_user_error
from fgvc.errors import DivergenceError, OutOfMemoryError, RunError
from fgvc.inference.calibrate import calibrate_finished
from fgvc.reporting.report.answer import first_result, next_commands
from fgvc.resources import resource_folder
from fgvc.runs import RunConfig
from fgvc.training import dry_run, train_run
from fgvc.training.first_run import as_baseline, is_first_run, names_gap, require_dataset, with_first_settings
from fgvc.training.launch import OPTIONS, USAGE, check_arguments, choices, help_text, hydra_main, is_search, start_log
from fgvc.training.search import held_out_accuracy, with_sweep, write_best

log = logging.getLogger(__name__)


def main() -> None:
    configs, options = resource_folder("configs"), set(sys.argv) & set(OPTIONS)
    arguments = [argument for argument in sys.argv[1:] if argument not in OPTIONS]
    if not arguments:
        print(USAGE, end="", file=sys.stderr)
        sys.exit(2)
    if {"-h", "--help"} & set(arguments):
        print(help_text(configs))
        return
    start_log(quiet="--quiet" in options)
    check_arguments(arguments, choices(configs, arguments))
    first = is_first_run(arguments)
    adds_gap = first and not names_gap(arguments)
    if first:
        arguments = with_first_settings(arguments)
    require_dataset(arguments)
    search = is_search(arguments)
    if search:
        arguments = with_sweep(arguments)
    folders: list[Path] = []
    diverged: list[str | None] = []
    speaks = os.environ.get("RANK", "0") == "0"  # of several processes, the first one

    def task(config: RunConfig) -> float:
        if adds_gap and config.method.name == "gap":
            config = as_baseline(config)
        if "--dry-run" in options:
            print(dry_run(config))
            return 0.0
        try:
            folders.append(train_run(config))
        except (DivergenceError, OutOfMemoryError) as error:
            if not search:
                raise
            diverged.append(config.run_dir)
            log.warning("%s: %s; this trial counts as 0 %%", config.run_dir, error)
            return 0.0
        calibrate_finished(folders[-1], config.cache.dir)
        if speaks:
            print(f"run folder: {folders[-1]}")
        return held_out_accuracy(folders[-1]) if search else 0.0

    hydra_main(arguments, configs, task, keep_going=not (first or search))
    if diverged and not folders:
        raise RunError("every trial has diverged, so none is the best; give hydra.sweeper.params smaller rates")
    if search and folders and speaks:
        print(write_best(folders))
        return
    if first and folders and speaks:
        print(first_result(folders))
    if folders and speaks and "--quiet" not in options:
        print(next_commands(folders))


if __name__ == "__main__":
    exit_on_user_error(main)
