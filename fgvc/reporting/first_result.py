"""What a user sees at the end of a training: the table against GAP, and the next commands."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from fgvc.reporting.registry import Inputs, make_tables
from fgvc.resources import resource_folder


def first_result(folders: Sequence[Path]) -> str:
    """Return the accuracies of some runs and their differences as a Markdown table, with its notes.

    Raises:
        RunError: none of the runs is finished.
    """
    tables, _ = make_tables(["accuracy"], Inputs(tuple(folders), resource_folder("results/paper")))
    return "\n" + tables["accuracy"].texts("accuracy")["accuracy.md"]


def next_commands(folders: Sequence[Path]) -> str:
    """Return the commands that use a finished run, and all of them."""
    run = shlex.quote(str(folders[-1]))
    common = shlex.quote(os.path.commonpath([folder.parent for folder in folders])) if len(folders) > 1 else run
    commands = {
        f"fgvc predict {run} IMAGE_OR_FOLDER": "names and probabilities",
        f"fgvc evaluate {run}": "accuracy by class, confusions",
        f"fgvc report {common}": "all of it on one page",
    }
    width = max(map(len, commands))
    return "\nnext:\n" + "\n".join(f"  {command:{width}}  {text}" for command, text in commands.items())
