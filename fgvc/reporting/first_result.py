"""What a user sees at the end of a training: the heads against GAP, and the next commands."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from fgvc.presentation.render import markdown_table
from fgvc.presentation.style import method_order
from fgvc.reporting.registry import Inputs
from fgvc.reporting.report.answer import make_answers, means_and_best, with_common_seeds
from fgvc.reporting.report.results import Results
from fgvc.resources import resource_folder
from fgvc.runs.summary import readable_runs


def first_result(folders: Sequence[Path]) -> str:
    """Return the accuracy of each head, the lead over GAP, and the most frequent confusions, for each setting.

    Raises:
        RunError: none of the runs can be read.
    """
    results = Results(*readable_runs(folders), Inputs(tuple(folders), resource_folder("results/paper")))
    parts = []
    for (setting, group), answer in zip(results.groups.items(), make_answers(results, (), []), strict=True):
        shared = with_common_seeds(group)
        means, _ = means_and_best(shared)
        rows = [
            [method.label, str(len(shared[method])), f"{means[method]:.2f}"]
            for method in sorted(group, key=lambda method: method_order(method.label))
        ]
        confusions = "; ".join(
            f"{pair.true}, taken for {pair.predicted} ({pair.share:.0f} %)" for pair in answer.confusions
        )
        parts += [
            f"\n{setting.title}\n",
            markdown_table(["Head", "Runs", "Test top-1 in %"], rows),
            f"\n{answer.number} {answer.text}\n{answer.lead}",
            *([f"Most frequent mistakes: {confusions}"] if confusions else []),
        ]
    return "\n".join(parts)


def next_commands(folders: Sequence[Path]) -> str:
    """Return the commands that use the best of some runs, and all of them. Raises RunError where none can be read."""
    runs, _ = readable_runs(folders)
    run = shlex.quote(str(max(runs, key=lambda run: run.final.top1 if run.final else -1.0).path))
    common = shlex.quote(os.path.commonpath([folder.parent for folder in folders])) if len(folders) > 1 else run
    commands = {
        f"fgvc predict {run} IMAGE_OR_FOLDER": "names and probabilities",
        f"fgvc evaluate {run}": "accuracy by class, confusions",
        f"fgvc report {common}": "all of it on one page",
        f"fgvc make_tables {common}": "tables for a paper",
    }
    width = max(map(len, commands))
    return "\nnext:\n" + "\n".join(f"  {command:{width}}  {text}" for command, text in commands.items())
