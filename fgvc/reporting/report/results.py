"""What a report is made from: the runs of some folders and the files that lie there."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from fgvc.errors import NothingToShowError, RunError
from fgvc.presentation.style import method_order
from fgvc.reporting.registry import Inputs
from fgvc.runs import Run, Setting, group_runs
from fgvc.runs.settings import Group
from fgvc.runs.summary import readable_runs, split_finished

T = TypeVar("T")


@dataclass(frozen=True)
class Results:
    """Runs in the order of the page: by method, then by folder.

    Attributes:
        runs: Readable runs, finished or not.
        notes: A line for each run that cannot be read.
        inputs: Given folders and published numbers, as tables take them.
    """

    runs: list[Run]
    notes: list[str]
    inputs: Inputs

    @cached_property
    def parent(self) -> Path:
        """The folder that all runs lie in."""
        return Path(os.path.commonpath([run.path.absolute().parent for run in self.runs]))

    def folder(self, run: Run) -> str:
        """The folder of a run as seen from `parent`."""
        return str(run.path.absolute().relative_to(self.parent))

    @cached_property
    def groups(self) -> dict[Setting, Group]:
        """The finished runs by setting and method. Raises RunError where two have one seed, or none is finished."""
        if not any(run.finished for run in self.runs):
            raise NothingToShowError("no run among those given is finished")
        return group_runs(split_finished(self.runs)[0])

    def with_file(self, name: str) -> tuple[dict[Setting, Group], list[str]]:
        """The finished runs that kept a file, and a note for each setting in which others did not."""
        groups, notes = {}, []
        for setting, group in self.groups.items():
            kept = {method: [run for run in runs if (run.path / name).is_file()] for method, runs in group.items()}
            everything, left = (sum(map(len, part.values())) for part in (group, kept))
            if left < everything:
                notes.append(f"{setting.title}: {everything - left} of {everything} runs kept no {name}")
            groups[setting] = {method: runs for method, runs in kept.items() if runs}
        return {setting: group for setting, group in groups.items() if group}, notes

    def read_each(
        self, name: str, command: str, read: Callable[[Path], T]
    ) -> tuple[list[tuple[Path, Run | None, T]], list[str]]:
        """Read the files of a name at any depth; each with the run whose folder it lies in, and notes on damaged ones.

        Args:
            name: file name.
            command: subcommand of fgvc that writes such files.
            read: function of a file; it raises RunError, OSError or ValueError where the file is damaged.

        Raises:
            RunError: there is no such file.
        """
        files = {file.resolve(): file for folder in self.inputs.results for file in sorted(folder.rglob(name))}
        if not files:
            raise NothingToShowError(f"no {name} of fgvc {command} lies in these folders")
        folders = [folder.resolve() for folder in self.inputs.results]
        outside = [file for real, file in files.items() if not any(map(real.is_relative_to, folders))]
        files = {real: file for real, file in files.items() if file not in outside}
        found: list[tuple[Path, Run | None, T]] = []
        notes = [f"{file}: a link out of the given folders, which is not followed" for file in outside]
        for file in files.values():
            owner = next((run for run in self.runs if run.path in file.parents), None)
            try:
                found.append((file, owner, read(file)))
            except RunError as error:
                notes.append(str(error))
            except (OSError, ValueError) as error:
                notes.append(f"{file}: cannot be read ({error}); run fgvc {command} again")
        return found, notes


def collect(folders: Sequence[Path], paper: Path) -> Results:
    """Read the summaries of the runs in some folders.

    Args:
        folders: run folders, or folders that they lie in.
        paper: folder of the published numbers.

    Raises:
        RunError: no run can be read.
    """
    runs, notes = readable_runs(folders)
    runs = sorted(runs, key=lambda run: method_order(run.label))
    return Results(runs, notes, Inputs(tuple(folders), paper))
