"""What a report is made from: the runs of some folders and the files that lie there."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from fgvc.errors import NothingToShowError, RunError
from fgvc.presentation.render import titled
from fgvc.presentation.style import method_order
from fgvc.reporting.registry import Inputs
from fgvc.runs import Run, Setting, group_runs
from fgvc.runs.settings import Group, distinctions, in_order, without_twins
from fgvc.runs.summary import readable_runs, split_finished

T = TypeVar("T")

_OF_EVERY_RUN = ("predictions.csv",)  # a finished run without it has lost it; the others may be switched off


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
    def groups(self) -> dict[Setting, Group]:
        """The finished runs by setting and method. Raises RunError where `without_twins` leaves none."""
        return in_order(group_runs(self.finished[0]))

    @cached_property
    def finished(self) -> tuple[list[Run], list[str]]:
        """The finished runs of methods that no two runs of one seed keep out, and notes. Raises as `without_twins`."""
        return without_twins(split_finished(self.runs)[0] if any(run.finished for run in self.runs) else [])

    def of(self, setting: Setting) -> str:
        """What tells a setting from the others of the page; "" where it is the only one."""
        return distinctions(self.groups).get(setting, setting.title)

    def name(self, run: Run) -> str:
        """A run in one line: what it does not share with all runs of the page."""
        own = [run.label, *(getattr(run, fact) for fact in ("dataset", "backbone") if not self.shared(fact))]
        return ", ".join([*own, f"seed {run.seed}", *([] if run.finished else [run.status])])

    def shared(self, fact: str) -> bool:
        """Whether an attribute is the same in all runs."""
        return len({getattr(run, fact) for run in self.runs}) == 1

    def with_file(self, name: str, notes: list[str]) -> dict[Setting, Group]:
        """The finished runs that kept a file; notes how many of each setting did not.

        Raises NothingToShowError if none did, or RunError for what every run keeps; RunError as `without_twins`.
        """
        finished, twins = self.finished
        notes.extend(twins)
        kept = [run for run in finished if (run.path / name).is_file()]
        lacking = [run for run in finished if run not in kept]
        if not kept:
            kind = RunError if name in _OF_EVERY_RUN and lacking else NothingToShowError
            raise kind(f"none of {len(lacking)} finished runs kept {name}")
        for setting, group in group_runs(lacking).items():
            notes.append(titled(f"runs that kept no {name}", self.of(setting)) + f": {sum(map(len, group.values()))}")
        return in_order(group_runs(kept))

    def read_each(
        self, name: str, command: str, read: Callable[[Path], T], notes: list[str]
    ) -> Iterator[tuple[Path, Run | None, T]]:
        """Files of a name at any depth, as `read` reads them, each with the run whose folder it lies in.

        A file that is damaged, where `read` raises an error, is noted. A run folder that was left out is not read.
        Raises RunError where there is no file.
        """
        files = {file.resolve(): file for folder in self.inputs.results for file in sorted(folder.rglob(name))}
        if not files:
            raise NothingToShowError(f"no {name} of fgvc {command} lies in these folders")
        folders = [folder.resolve() for folder in self.inputs.results]
        outside = [real for real in files if not any(map(real.is_relative_to, folders))]
        notes += [f"{files.pop(real)}: a link out of the given folders, which is not followed" for real in outside]
        owners = {run.path.resolve(): run for run in self.runs}
        for real, file in files.items():
            owner = next((owners[folder] for folder in real.parents if folder in owners), None)
            given = [folder for folder in real.parents if any(map(folder.is_relative_to, folders))]
            if owner is None and any((folder / "summary.json").exists() for folder in given):
                notes.append(f"{file}: not read, since its run folder is left out")
                continue
            try:
                content = read(file)
            except RunError as error:
                notes.append(str(error))
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                notes.append(f"{file}: cannot be read ({type(error).__name__}: {error}); run fgvc {command} again")
            else:
                yield file, owner, content


def collect(folders: Sequence[Path], paper: Path) -> Results:
    """The runs in some folders, at any depth, and the folder of published numbers. Raises RunError without a run."""
    runs, notes = readable_runs(folders)
    return Results(sorted(runs, key=lambda run: method_order(run.label)), notes, Inputs(tuple(folders), paper))
