"""What a report is made from: the runs of some folders and what lies beside them."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from fgvc.errors import RunError
from fgvc.presentation.style import method_order
from fgvc.reporting.registry import Inputs
from fgvc.reporting.report.content import Runs
from fgvc.runs import Run, Setting, group_runs
from fgvc.runs.settings import Group
from fgvc.runs.summary import readable_runs

T = TypeVar("T")


@dataclass(frozen=True)
class Collected:
    """Runs in the order of the page: by method, then as they were found.

    Attributes:
        folders: that were given.
        runs: all that can be read, finished or not.
        notes: on those that cannot.
        inputs: of the tables.
    """

    folders: tuple[Path, ...]
    runs: list[Run]
    notes: list[str]
    inputs: Inputs

    @cached_property
    def places(self) -> dict[Path, int]:
        return {run.path: place for place, run in enumerate(self.runs)}

    @cached_property
    def parent(self) -> Path:
        """The folder that all runs lie in."""
        return Path(os.path.commonpath([run.path.absolute().parent for run in self.runs]))

    def folder(self, run: Run) -> str:
        """The folder of a run as seen from `parent`."""
        return str(run.path.absolute().relative_to(self.parent))

    @cached_property
    def finished(self) -> list[Run]:
        return [run for run in self.runs if run.finished]

    @cached_property
    def labels(self) -> list[str]:
        """Of the runs' methods, in the order of tables."""
        return sorted({run.label for run in self.runs}, key=method_order)

    @cached_property
    def groups(self) -> dict[Setting, Group]:
        """The finished runs by setting and method. Raises RunError where two have one seed, or none is finished."""
        if not self.finished:
            raise RunError("no run among those given is finished")
        return group_runs(self.finished)

    def of(self, runs: Sequence[Run]) -> Runs:
        """Places of some of the runs."""
        return tuple(self.places[run.path] for run in runs)

    def behind(self, title: str, cell: str) -> Runs:
        """The runs behind a row of a table: its title ends with a setting's, its first cell begins with a label.

        A table of no one setting takes in all of them.
        """
        settings = {s: group for s, group in self.groups.items() if title.endswith(s.title)} or self.groups
        labels = {method.label for group in settings.values() for method in group}
        label = next((x for x in sorted(labels, key=len, reverse=True) if cell == x or cell.startswith(f"{x}, ")), None)
        runs = [run for group in settings.values() for m, of in group.items() if m.label == label for run in of]
        return self.of(runs)

    def kept(self, group: Group, name: str) -> tuple[Group, list[str]]:
        """The part of a group whose runs kept a file, and a note on how many others there are."""
        found = {method: [run for run in runs if (run.path / name).is_file()] for method, runs in group.items()}
        all_runs, left = (sum(map(len, g.values())) for g in (group, found))
        note = [f"{all_runs - left} of {all_runs} runs kept no {name}"] if left < all_runs else []
        return {method: runs for method, runs in found.items() if runs}, note

    def files(self, name: str) -> list[Path]:
        """Files of this name at any depth of the folders, each once, in order."""
        found = {file.resolve(): file for folder in self.folders for file in sorted(folder.rglob(name))}
        return list(found.values())

    def read_each(
        self, name: str, what: str, read: Callable[[Path, Run | None], T]
    ) -> tuple[list[tuple[Path, Run | None, T]], list[str]]:
        """What is read of each file of a name, with the run it lies in, and notes on those that are of no use.

        Args:
            name: of the files.
            what: they hold.
            read: raises RunError where a file is of no use.

        Raises:
            RunError: there is no such file.
        """
        found: list[tuple[Path, Run | None, T]] = []
        notes: list[str] = []
        for file in self.files(name):
            run = self.owner(file)
            try:
                found.append((file, run, read(file, run)))
            except RunError as error:
                notes.append(str(error))
        if not found and not notes:
            raise RunError(f"no {what} ({name}) lies in these folders")
        return found, notes

    def owner(self, file: Path) -> Run | None:
        """The run whose folder a file lies in."""
        return next((run for run in self.runs if run.path in file.parents), None)


def collect(folders: Sequence[Path], paper: Path) -> Collected:
    """Read the summaries of the runs in some folders.

    Raises:
        RunError: no run can be read.
    """
    runs, notes = readable_runs(folders)
    runs = sorted(runs, key=lambda run: method_order(run.label))  # stable: the rest as found
    return Collected(tuple(folders), runs, notes, Inputs(tuple(folders), paper))


def run_name(run: Run) -> str:
    """A run in one line."""
    status = "" if run.finished else f", {run.status}"
    return f"{run.label}, {run.dataset}, {run.backbone}, seed {run.seed}{status}"
