"""A search of settings by Optuna: `fgvc train search=NAME` trains a run a trial; held-out training images decide."""

import dataclasses
import logging
import os
import shlex
import warnings
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from fgvc.errors import ConfigError
from fgvc.io import write_output
from fgvc.presentation.render import markdown_table
from fgvc.runs import read_run
from fgvc.runs.config import flatten
from fgvc.runs.folder import RunFolder
from fgvc.training.launch import is_sweep

SHOWN = 10
"""Trials in the table."""


def with_sweep(arguments: Sequence[str]) -> list[str]:
    """Add -m, which makes Hydra start the sweeper. Raises ConfigError: the library is missing; several processes."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # each would have a search of its own
        raise ConfigError("a search runs in one process; start fgvc train without accelerate launch or torchrun")
    try:
        import hydra_plugins.hydra_optuna_sweeper  # noqa: F401
        import optuna  # which prints each trial with a handler of its own
    except ImportError as error:
        raise ConfigError("a search needs the library hydra-optuna-sweeper: pip install 'fgvc[search]'") from error

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="optuna")
    return list(arguments) if is_sweep(arguments) else ["-m", *arguments]


def held_out_accuracy(folder: Path) -> float:
    """Top-1 in per cent on the images that a run held out of training, after its last epoch.

    Raises ConfigError: the run has none.
    """
    found = read_run(folder).held_out_top1()
    if found is None:
        raise ConfigError(f"{folder}: a search needs held-out images to choose by; give trainer.val_fraction=0.2")
    return found


def write_best(folders: Sequence[Path]) -> str:
    """Write the settings of the best trial as an experiment file, best.yaml; return a table of all and what comes next.

    The file is in a folder experiment/ next to those of the trials. It has all settings of the trial but its folder,
    its name, its seed and its held-out images, which are trained on then.

    Raises OutputError: a file that fgvc did not make is in the way.
    """
    trials = [(held_out_accuracy(folder), folder.name, RunFolder(folder).read_config()) for folder in folders]
    trials.sort(key=lambda trial: -trial[0])
    accuracy, name, best = trials[0]
    settings = dataclasses.asdict(best)
    for own in ("name", "seed", "run_dir", "resume"):
        del settings[own]
    settings["trainer"]["val_fraction"] = 0.0
    parent = folders[0].parent
    file = parent / "experiment" / "best.yaml"
    said = f"# @package _global_\n# the best of {len(trials)} trials, {name}: {accuracy:.2f} % on held-out images\n"
    write_output(file, said + OmegaConf.to_yaml(OmegaConf.create(settings)))

    flat = [flatten(dataclasses.asdict(config)) for *_, config in trials]
    varied = [key for key in flat[0] if key != "run_dir" and len({str(one.get(key)) for one in flat}) > 1]
    rows = [
        [
            trial[1],
            f"{trial[0]:.2f}",
            *(f"{one[key]:.3g}" if isinstance(one[key], float) else str(one[key]) for key in varied),
        ]
        for trial, one in zip(trials[:SHOWN], flat, strict=False)
    ]
    return (
        f"\n{markdown_table(['Trial', 'Held-out top-1 in %', *varied], rows)}\n\nwritten: {file}\n\nnext, on all "
        f"training images:\n  fgvc train -m --config-dir {shlex.quote(str(parent))} experiment=best "
        f"name={shlex.quote(f'{best.name}_best')} seed=0,1,2"
    )
