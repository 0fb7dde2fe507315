"""Runs below the folders that a user gives."""

from collections.abc import Iterable
from pathlib import Path

from fgvc.analysis.runs import Run, read_run
from fgvc.analysis.settings import split_finished
from fgvc.errors import RunError


def find_runs(paths: Iterable[Path]) -> list[Run]:
    """Runs in the given folders at any depth, each once, in the order of the folders and then of their paths.

    A folder is a run if it holds summary.json.

    Raises:
        RunError: a folder does not exist or holds no run, or a summary is damaged.
    """
    folders = (folder for root in paths for folder in _run_folders(root))
    return [read_run(folder) for folder in _each_once(folders)]


def find_finished(paths: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """The finished runs in some folders, and a note for each folder and run that is left out.

    Raises:
        RunError: no run can be read, or none is finished.
    """
    runs, unread = readable_runs(paths)
    finished, unfinished = split_finished(runs)
    return finished, unread + unfinished


def readable_runs(paths: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """As `find_runs`, but what it would raise for a folder or a run is a note, and the others are read.

    Raises:
        RunError: no run is left.
    """
    folders: list[Path] = []
    runs, problems = [], []
    for root in paths:
        try:
            folders += _run_folders(root)
        except RunError as error:
            problems.append(str(error))
    for folder in _each_once(folders):
        try:
            runs.append(read_run(folder))
        except RunError as error:
            problems.append(str(error))
    if not runs:
        raise RunError("\n  ".join(problems))
    return runs, [f"left out {problem}" for problem in problems]


def _run_folders(root: Path) -> list[Path]:
    if not root.is_dir():
        raise RunError(f"{root}: no such folder; give a run folder or a folder of runs")
    summaries = sorted(root.rglob("summary.json"))
    if not summaries:
        raise RunError(f"{root}: no run in it: looked for summary.json at any depth; train first or give its parent")
    return [summary.parent for summary in summaries]


def _each_once(folders: Iterable[Path]) -> list[Path]:
    found: dict[Path, Path] = {}  # resolved -> as given
    for folder in folders:
        found.setdefault(folder.resolve(), folder)
    return list(found.values())
