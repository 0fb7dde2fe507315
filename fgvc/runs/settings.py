"""Which runs may be compared and which may be averaged.

Runs of one setting share a table. Runs of one setting and one method are repetitions, averaged over their seeds. A
setting comes from the summary. Runs that differ in another setting that changes the result, e.g. the learning rate, are
no repetitions: they are rows of their own, and the label says what differs.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

from fgvc.errors import RunError
from fgvc.runs.summary import Run, result_settings


@dataclass(frozen=True)
class Setting:
    """Properties that comparable runs share: data, backbone, recipe, length and selection of the best epoch."""

    dataset: str
    num_classes: int | None
    train_images: int | None
    test_images: int | None
    backbone: str
    frozen: bool
    image_size: int
    reduction: int | None
    recipe: str | None
    epochs: int
    selected_on: str | None

    @property
    def title(self) -> str:
        """The setting in one line."""
        dataset, _, _, _, backbone, frozen, *rest, _ = self.parts
        return ", ".join([dataset, f"{backbone} ({frozen})", *filter(None, rest)])

    @property
    def words(self) -> str:
        """The setting with what is in the dataset, for a caption."""
        counts = (self.num_classes, self.train_images, self.test_images)
        classes, train, test = ("?" if count is None else f"{count:,}" for count in counts)
        rest = self.title.removeprefix(self.dataset)
        return f"{self.dataset} ({classes} classes, {train} training and {test} test images){rest}"

    @property
    def parts(self) -> tuple[str, ...]:
        """Every property in words, in the order of the fields."""
        return (
            self.dataset,
            f"{self.num_classes} classes",
            f"{self.train_images} training images",
            f"{self.test_images} test images",
            self.backbone,
            "frozen" if self.frozen else "fine-tuned",
            f"{self.image_size} px",
            "no reduction" if self.reduction is None else f"reduction {self.reduction}",
            "" if self.recipe is None else f"recipe {self.recipe}",
            "1 epoch" if self.epochs == 1 else f"{self.epochs} epochs",
            f"best epoch selected on {self.selected_on}",
        )


def distinctions(settings: Iterable[Setting]) -> dict[Setting, str]:
    """Name each setting by what the others do not all share; "" where there is only one."""
    parts = {setting: setting.parts for setting in settings}
    different = [len(set(column)) > 1 for column in zip(*parts.values(), strict=True)]
    return {
        setting: ", ".join(part for part, differs in zip(own, different, strict=True) if part and differs)
        for setting, own in parts.items()
    }


def seeds_in_words(counts: Iterable[int]) -> str:
    """How many seeds the methods of a table have: "one seed", "3 seeds", "1 to 3 seeds"."""
    found = sorted({int(count) for count in counts if count})
    if len(found) > 1:
        return f"{found[0]} to {found[-1]} seeds"
    return "one seed" if found == [1] else f"{found[0] if found else 'no'} seeds"


class Method(NamedTuple):
    """A method of one table; its label is unique within its setting."""

    name: str
    gradient: str | None
    label: str


Group = dict[Method, list[Run]]


def in_order(groups: Mapping[Setting, Group]) -> dict[Setting, Group]:
    """The groups in the order of the accuracy table's blocks."""
    return dict(sorted(groups.items(), key=lambda item: tuple(map(str, vars(item[0]).values()))))


def group_runs(runs: Iterable[Run]) -> dict[Setting, Group]:
    """Group finished runs by setting and method; sort the runs of a method by seed.

    Runs of one method that differ in a setting, e.g. "GAP [optimizer.lr=0.01]", count as different methods. The label
    of a run is that of its method.

    Methods that never have a reduction, such as GAP, join every setting that differs only in the reduction.

    Raises RunError: two runs of one method and setting have the same seed.
    """
    settings: dict[Setting, Group] = {}
    for run in runs:
        setting = Setting(**{field.name: getattr(run, field.name) for field in fields(Setting)})
        group = settings.setdefault(setting, {})
        group.setdefault(Method(run.method, run.gradient, run.label), []).append(run)
    return _with_unreduced(
        {setting: _with_variants(_with_gradient_in_label(group)) for setting, group in settings.items()}
    )


def without_twins(runs: Iterable[Run]) -> tuple[list[Run], list[str]]:
    """Leave out each method of a setting of which two runs have the same seed, so that `group_runs` takes the others.

    Returns:
        The other runs, and notes: on each method that is left out, and on settings that methods of one table do not
        share.

    Raises:
        RunError: none is left.
    """
    left, notes = list(runs), list[str]()
    while left:
        try:
            return left, notes + _unshared(group_runs(left))
        except _TwinsError as error:
            twins = {run.path for run in error.runs}
            left = [run for run in left if run.path not in twins]
            notes.append(f"{error}; until then all runs of this method and setting are left out")
    if notes:
        raise RunError("\n  ".join(notes))
    return [], []


def _unshared(groups: Mapping[Setting, Group]) -> list[str]:
    """A note for each setting or input, other than the method's own, in which methods of one table differ."""
    of, notes = distinctions(groups), list[str]()
    for setting, group in groups.items():
        first = [runs[0] for runs in group.values()]
        values = [result_settings(run) for run in first]
        for name, digests in _input_digests(first).items():
            for own, digest in zip(values, digests, strict=True):
                if own is not None:
                    own[name] = f"SHA-256 {digest[:12]}"
        rows = [(method, own) for method, own in zip(group, values, strict=True) if own is not None]
        for key in sorted({key for _, own in rows for key in own}):
            labels: dict[str, list[str]] = {}
            tried: dict[tuple[str, str | None], set[str]] = {}
            for method, own in rows:
                labels.setdefault(_shown(own.get(key)), []).append(method.label)
                tried.setdefault((method.name, method.gradient), set()).add(_shown(own.get(key)))
            # where each method has the same values, as in a grid, the labels say enough
            if len(set(map(frozenset, tried.values()))) > 1 and not key.startswith(("method.", "hybrid.")):
                which = "; ".join(f"{value}: {', '.join(same)}" for value, same in labels.items())
                notes.append(f"{of[setting] or setting.title}: the methods differ in {key} ({which})")
    return notes


class _TwinsError(RunError):
    """Two of these runs, of one method and setting, have the same seed."""

    def __init__(self, message: str, runs: Sequence[Run]) -> None:
        super().__init__(message)
        self.runs = runs


def _with_variants(group: Group) -> Group:
    """Part the runs of each method by their variant, sorted by seed, and name it in the labels."""
    parted: Group = {}
    for method, runs in group.items():
        for variant, repetitions in _by_variant(runs).items():
            label = _with_note(method.label, variant) if variant else method.label
            parted[method._replace(label=label)] = [replace(run, label=label) for run in _by_seed(repetitions)]
    return parted


def one_setting(runs: Iterable[Run]) -> tuple[Setting, Group]:
    """Return the setting that all of these runs share, and its methods.

    Raises RunError: the runs belong to several settings, or as in `group_runs`.
    """
    groups = group_runs(runs)
    if len(groups) != 1:
        titles = "".join(f"\n  {setting.title}" for setting in groups)
        raise RunError(
            f"these runs belong to {len(groups)} settings, but only one is allowed; give fewer folders:{titles}"
        )
    ((setting, group),) = groups.items()
    return setting, group


class RunPaths(tuple[str, ...]):
    """Paths of runs in one cell; as text, and so in CSV, "; " between them."""

    def __str__(self) -> str:
        return "; ".join(self)


def sources(runs: Sequence[Run]) -> dict[str, str | RunPaths]:
    """Return the table columns that name the runs of a number: seeds, runs (`RunPaths`), commits."""
    return {
        "seeds": " ".join(dict.fromkeys(str(run.seed) for run in runs)),
        "runs": RunPaths(str(run.path) for run in runs),
        "commits": " ".join(sorted({run.commit for run in runs if run.commit})),
    }


def _by_variant(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Split the runs of one method by the settings that change the result; a key names those that differ.

    The summary lacks some settings, e.g. the learning rate. Runs without a readable config.yaml are apart from others.
    """
    settings = [result_settings(run) for run in runs]
    known = [values for values in settings if values is not None]
    for name, digests in _input_digests(runs).items():
        for values, digest in zip(settings, digests, strict=True):
            if values is not None:
                values[name] = digest[:12]
    keys = sorted({key for values in known for key in values})
    differing = [key for key in keys if len({repr(values.get(key)) for values in known}) > 1]
    variants: dict[str, list[Run]] = {}
    for run, values in zip(runs, settings, strict=True):
        if values is None:
            name = "settings unknown" if known else ""
        else:
            name = ", ".join(f"{key}={_shown(values.get(key))}" for key in differing)
        variants.setdefault(name, []).append(run)
    return variants


def _input_digests(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Digests of the images and initial weights of these runs, since a path does not tell them from others.

    All runs must have a digest, and those of earlier versions may not. The list of the training images depends on the
    seed where some are held out; the digest of their content is that of the whole split.
    """
    initial = [run.initial_weights_digest or "" for run in runs]
    found = {"initial_weights": initial} if all(initial) else {}
    for split, text in (("train", "training images"), ("test", "test images")):
        for kind in (f"{split}_content", f"{split}_list"):
            digests = [run.images.get(kind, "") for run in runs]
            if all(digests) and (kind != "train_list" or not any("validation_list" in run.images for run in runs)):
                found[text] = digests
                break
    return found


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _by_seed(runs: Sequence[Run]) -> list[Run]:
    first: dict[int, Run] = {}
    for run in runs:
        twin = first.setdefault(run.seed, run)
        if twin is not run:
            raise _TwinsError(
                f"two runs of {run.label} on {run.dataset} have the same setting and seed {run.seed}: "
                f"{twin.path} and {run.path}; move or leave out one of them",
                runs,
            )
    return [first[seed] for seed in sorted(first)]


def _with_note(label: str, note: str) -> str:
    """Turn SEB into SEB [note], and SEB [a=1] into SEB [a=1, note]: two brackets in a row are a link in Markdown."""
    return f"{label[:-1]}, {note}]" if label.endswith("]") else f"{label} [{note}]"


def _with_gradient_in_label(group: Group) -> Group:
    """Name the gradient in the label where a published default and the same gradient given by name share one."""
    labels = Counter(method.label for method in group)
    return {
        method._replace(label=_with_note(method.label, f"gradient={method.gradient}"))
        if labels[method.label] > 1 and method.gradient is not None
        else method: runs
        for method, runs in group.items()
    }


def _with_unreduced(settings: dict[Setting, Group]) -> dict[Setting, Group]:
    """Put methods that never have a reduction, such as GAP, into every setting that differs in the reduction alone.

    They stay in their own where others have no reduction either.
    """
    joined = {setting: dict(group) for setting, group in settings.items()}
    for setting, group in settings.items():
        hosts = [other for other in settings if other != setting and replace(other, reduction=None) == setting]
        unreduced = {method: runs for method, runs in group.items() if not _is_reduced(runs[0])}
        for host in hosts:
            joined[host] = {**unreduced, **joined[host]}
        if hosts and len(unreduced) == len(group):
            joined[setting] = {}
    return {setting: group for setting, group in joined.items() if group}


def _is_reduced(run: Run) -> bool:
    # runs of earlier versions do not say; GAP was the only method without a reduction then
    return run.method != "gap" if run.reduced is None else run.reduced
