"""What the page opens with, and a training ends with: the best head, its lead over GAP, and what it confuses most."""

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from fgvc.errors import RunError, UserError
from fgvc.presentation.render import markdown_table
from fgvc.presentation.style import class_name, method_order
from fgvc.reporting.registry import Inputs
from fgvc.reporting.report.pictures import Picture, read_picture
from fgvc.reporting.report.results import Results
from fgvc.resources import resource_folder
from fgvc.runs import Method, Run
from fgvc.runs.settings import Group, seeds_in_words
from fgvc.runs.statistics import compare, means_and_best
from fgvc.runs.summary import readable_runs, same_images
from fgvc.studies.confusion.measure import top_confusions

_WORST = 3


@dataclass(frozen=True)
class Confusion:
    """A class that is taken for another: names as readers see them, how many of its images (of all seeds), pictures."""

    true: str
    predicted: str
    count: int
    images: int
    pictures: list[Picture] = field(default_factory=list)


@dataclass(frozen=True)
class Answer:
    """The answer of one setting.

    Attributes:
        of: What tells the setting from the others of the page; "" where it is the only one.
        number: Accuracy of the best head, in per cent.
        text: What the number is, a phrase that goes on after it.
        lead: How far the best head is ahead of GAP, sentences.
        confusions: The most frequent ones of the best head, its seeds together.
    """

    of: str
    number: str
    text: str
    lead: str
    confusions: list[Confusion]


def make_answers(results: Results, images: Sequence[Path], notes: list[str]) -> list[Answer]:
    """The answer of each setting; none where runs cannot be grouped, which the sections say.

    The page may carry images of the datasets in the folders `images`; `notes` takes a line on each picture that cannot
    be shown.
    """
    try:
        groups = results.groups
    except UserError:
        return []
    answers = []
    for setting, group in groups.items():
        shared = with_common_seeds(group)
        means, best = means_and_best(shared)
        text = f"of the test images are named correctly by {best.label} ({_after(shared, group, best)})."
        lead = _lead(shared, means, best)
        answers.append(
            Answer(results.of(setting), f"{means[best]:.2f} %", text, lead, _confusions(group[best], images, notes))
        )
    return answers


def with_common_seeds(group: Group) -> Group:
    """The runs of the seeds that every head has, so that their means can be compared; all runs if there is none."""
    common = set.intersection(*({run.seed for run in runs} for runs in group.values()))
    shared = {method: [run for run in runs if run.seed in common] for method, runs in group.items()}
    return shared if common else group


def _after(shared: Group, group: Group, best: Method) -> str:
    runs = shared[best]
    if any(len(shared[method]) < len(group[method]) for method in group):
        return f"on the {seeds_in_words([len(runs)])} that all heads have"
    return "one seed" if len(runs) == 1 else f"mean of {seeds_in_words([len(runs)])}"


def _lead(group: Group, means: dict[Method, float], best: Method) -> str:
    """The best head against the best GAP; where that is the same one, the next head against it."""
    gaps = [method for method in group if method.name == "gap"]
    if not gaps:
        return "There is no GAP run in this setting, so that its lead over average pooling is not known."
    gap = max(gaps, key=lambda method: means[method])
    others = [method for method in group if method.name != "gap"]
    if not others:
        return "There is no run of another head to compare GAP with."
    head = max(others, key=lambda method: means[method])
    if not all(same_images(one, other) for one in group[gap] for other in group[head]):
        return f"GAP and {head.label} had other images and are not compared; delete the older run and train it again."
    lower, upper = (head, gap) if best.name == "gap" else (gap, head)
    found, _ = compare(group[lower], group[upper])  # the same way round as in the table of differences
    same_seeds = {run.seed for run in group[lower]} == {run.seed for run in group[upper]}
    if same_seeds and found["pairs"] == len(group[lower]):  # of the same runs as the means
        # + 0.0: no minus zero
        points, low, high = (round(-found[name], 2) + 0.0 for name in ("difference", "high", "low"))
        how = f"95 % interval {low:+.2f} to {high:+.2f}"
        chance = " The interval holds 0: this may be chance." if low <= 0 else ""
    else:
        points, chance = means[upper] - means[lower], ""
        how = "no interval: " + ("not the same images" if same_seeds else "no seed in common")
    if best.name == "gap" and points == 0:
        return f"{head.label} has the same accuracy as GAP."
    if best.name == "gap":
        return f"No head is ahead of GAP: {points:+.2f} points over {head.label}, the next ({how}).{chance}"
    fewer = 100 * (means[head] - means[gap]) / max(100 - means[gap], 1e-9)
    mistakes = "" if chance or fewer < 1 else f": {fewer:.0f} % fewer mistakes"
    return f"{points:+.2f} points over GAP's {means[gap]:.2f} % ({how}){mistakes}.{chance}"


def _confusions(runs: Sequence[Run], images: Sequence[Path], notes: list[str]) -> list[Confusion]:
    """None where no run kept predictions and names, which the section on confusions says."""
    try:
        predictions, classes = pooled_predictions(runs, [])
        pairs = top_confusions(predictions, classes, _WORST)
    except RunError:
        return []
    found = []
    for pair in pairs.to_dict("records"):
        true, predicted = class_name(pair["true"]), class_name(pair["predicted"])
        pictures = _pictures(predictions, pair["target"], pair["answer"], (true, predicted), images, notes)
        found.append(Confusion(true, predicted, pair["count"], pair["images"], pictures))
    return found


def pooled_predictions(runs: Sequence[Run], notes: list[str]) -> tuple[pd.DataFrame, list[str]]:
    """Of all seeds that can be read, and the names of the classes; `notes` takes a line on each of the others.

    Raises RunError: no run has predictions that can be read, or the classes differ.
    """
    classes = runs[0].classes
    if classes is None or any(run.classes != classes for run in runs):
        raise RunError(f"{runs[0].path}: the classes' names are not kept (earlier versions) or not those of all seeds")
    found, failed = [], []
    for run in runs:
        try:
            found.append(run.predictions())
        except RunError as error:
            failed.append(error)
    if not found:
        raise failed[0]
    notes += [f"left out of the confusions: {error}" for error in failed]
    return pd.concat(found, ignore_index=True), [str(name) for name in classes]


def _pictures(
    predictions: pd.DataFrame,
    target: int,
    answer: int,
    names: tuple[str, str],
    images: Sequence[Path],
    notes: list[str],
) -> list[Picture]:
    """Two images of the class that are taken for the other, the surest ones, and one that shows the other class."""
    if not images:
        return []
    true, predicted = names
    ordered = predictions.sort_values("confidence", ascending=False, kind="stable").drop_duplicates("path")
    wrong = ordered[(ordered["target"] == target) & (ordered["predicted"] == answer)].head(2)
    right = ordered[(ordered["target"] == answer) & (ordered["predicted"] == answer)].head(1)
    shown = [(path, f"{true}, taken for {predicted}", true) for path in wrong["path"]]
    shown += [(path, f"{predicted}, named correctly", predicted) for path in right["path"]]
    pictures = []
    for path, text, caption in shown:
        try:
            pictures.append(read_picture(_inside(images, str(path)), 240, text, caption))
        except RunError as error:
            notes.append(str(error))
    return pictures


def _inside(folders: Sequence[Path], name: str) -> Path:
    """The file of that name below one of the folders. Raises RunError without one; a name that leads out has none."""
    for folder in folders:
        path = folder / name
        if path.resolve().is_relative_to(folder.resolve()) and path.is_file():
            return path
    raise RunError(f"{name}: no such image below {', '.join(map(str, folders))}; give --images the dataset's folder")


def first_result(folders: Sequence[Path]) -> str:
    """Return the accuracy of each head, the lead over GAP, and the most frequent confusions, for each setting.

    Raises RunError: none of the runs can be read.
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
            f"{pair.true}, taken for {pair.predicted} ({pair.count} of {pair.images})" for pair in answer.confusions
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
