"""Tables of finished runs: hybrid against standalone, what a head costs, differences, condition numbers by epoch."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from safetensors import SafetensorError, safe_open

from fgvc.errors import NothingToShowError, RunError
from fgvc.foreign import open_foreign
from fgvc.presentation.render import NOT_MEASURED, PLACES_NOTE, Block, places, titled, with_spread
from fgvc.presentation.style import method_order
from fgvc.runs import Run, Setting, group_runs
from fgvc.runs.settings import Group, distinctions, in_order, seeds_in_words, sources
from fgvc.runs.statistics import coarse_accuracy, compare, differences_to_best
from fgvc.runs.summary import result_settings
from fgvc.studies.spectra.measure import condition_history

_INTERVAL_NOTE = (
    "Seeds that both have are paired. Interval: 95 % each, bootstrap over the test images with the seeds averaged; it "
    "speaks of these weights on other such images."
)
_BEST_NOTE = (
    "The best one was chosen by the same numbers: its lead over the others is flattered, all the more the more there "
    "are. p: exact McNemar tests, one a seed, combined by Rüger's rule, which holds however they depend on each other. "
    "Holm: p corrected for the number of methods."
)
_HYBRID = " (hybrid)"
_PROTOCOLS = ("standalone", "hybrid")
COST_COLUMNS = ("head_parameters", "descriptor", "train_ms", "eval_ms", "peak_memory_mb")


def differences(groups: Mapping[Setting, Group]) -> tuple[list[Block], pd.DataFrame, list[str]]:
    """Each method against the best one of its setting: a block for each setting of two methods or more."""
    blocks, frames, notes = [], [], []
    of = distinctions(groups)
    for setting, group in in_order(groups).items():
        table, more = differences_to_best(group)
        notes += more
        if table.empty:
            continue
        frames.append(table.assign(setting=setting.title))
        blocks.append(differences_block(frames[-1], of[setting]))
    return blocks, _concat(frames), notes


def differences_block(table: pd.DataFrame, of: str = "") -> Block:
    """The differences of one setting, of `differences_to_best` with the column setting; `of` tells it from others."""
    records = sorted(table.to_dict("records"), key=lambda row: method_order(row["label"]))
    best = table["against"].iloc[0]
    header = ["Method", f"minus {best}", "95 % interval", "p", "Holm"]
    caption = (
        f"Final top-1 accuracy of each method minus that of {best}, the best one, in percentage points, on "
        f"{table['setting'].iloc[0]}; {seeds_in_words(row['pairs'] for row in records)}."
    )
    notes = [f"{_INTERVAL_NOTE}{_pairs(records)}", _BEST_NOTE]
    rows = [_difference(row) for row in records]
    return Block(titled("Differences to the best, in points", of), header, rows, notes, caption, "differences")


def _pairs(records: Sequence[Mapping[Any, Any]]) -> str:
    """Of how many seeds the difference of each method is, where some lack predictions."""
    numbers = {row["label"]: row["pairs"] for row in records if row["state"] == "ok"}
    if len(set(numbers.values())) <= 1:
        return ""
    return f" Pairs of runs: {', '.join(f'{label} {number}' for label, number in numbers.items())}."


def _difference(row: Mapping[Any, Any]) -> list[str]:
    if row["state"] != "ok":
        return [row["label"], *_with_interval(row), NOT_MEASURED, NOT_MEASURED]
    return [row["label"], *_with_interval(row), f"{row['mcnemar_combined']:.2g}", f"{row['holm']:.2g}"]


def _with_interval(row: Mapping[Any, Any]) -> list[str]:
    if row["state"] != "ok":
        return [NOT_MEASURED if row["state"] == "not measured" else row["state"], NOT_MEASURED]
    return [f"{row['difference']:+.2f}", f"[{row['low']:+.2f}, {row['high']:+.2f}]"]


def hybrid(groups: Mapping[Setting, Group], accuracy: pd.DataFrame) -> tuple[list[Block], pd.DataFrame, list[str]]:
    """Compare methods trained under the hybrid protocol with the same ones trained alone.

    The groups are of `group_runs`, the published numbers in `accuracy`, an `accuracy_table`.

    Raises:
        RunError: no method was trained in both ways, nor is one published so.
    """
    blocks, frames, notes = [], [], []
    of = distinctions(groups)
    for number, (setting, group) in enumerate(in_order(groups).items(), start=1):
        part = accuracy[accuracy["block"] == number]
        rows, cells = [], []
        pairs = _hybrid_pairs(set(part["label"]))
        for label in sorted(pairs, key=method_order):
            cell, note = _hybrid_cell(label, pairs[label], group, part)
            cells.append({"setting": setting.title, **cell})
            rows.append(_hybrid_row(cell))
            notes += note
        if rows:
            header = ["Method", "Standalone", "Hybrid", "Difference", "95 % interval"]
            header += ["Published standalone", "Published hybrid"]
            caption = (
                "Final top-1 accuracy in % of methods trained alone and under the hybrid protocol, and the difference "
                f"in percentage points, on {setting.words}. Mean ± sample standard deviation over "
                f"{seeds_in_words(cell[f'{protocol}_n'] for cell in cells for protocol in _PROTOCOLS)}."
            )
            marks: dict[tuple[int, int], int] = {}
            for column, protocol in enumerate(_PROTOCOLS, start=1):
                marks |= places([cell[f"{protocol}_mean"] for cell in cells], column)
            under = [f"{_INTERVAL_NOTE}{_pairs(cells)}", *([PLACES_NOTE] if marks else [])]
            title = titled("Hybrid protocol, top-1 in %", of[setting])
            blocks.append(Block(title, header, rows, under, caption, "hybrid", marks))
            frames.append(pd.DataFrame(cells))
    if not blocks:
        raise NothingToShowError(
            "no method trained both alone and under the hybrid protocol (hybrid.method=...) in one setting"
        )
    return blocks, _concat(frames), notes


def _hybrid_pairs(labels: Collection[str]) -> dict[str, str]:
    """The label of the hybrid protocol for each standalone one that has it; a variant stands behind both."""
    standalone = {label.replace(_HYBRID, "").replace("] [", ", "): label for label in labels if _HYBRID in label}
    return {label: standalone[label] for label in labels if label in standalone}


def _hybrid_cell(label: str, hybrid: str, group: Group, part: pd.DataFrame) -> tuple[dict[str, Any], list[str]]:
    """One row of the frame, and notes; `part` is the setting's part of the accuracy table."""
    names = dict(zip(_PROTOCOLS, (label, hybrid), strict=True))
    runs = {protocol: next((r for m, r in group.items() if m.label == name), []) for protocol, name in names.items()}
    cell: dict[str, Any] = {"label": label, "against": "standalone", "state": "not measured"}
    notes: list[str] = []
    if all(runs.values()):
        compared, notes = compare(runs["hybrid"], runs["standalone"])
        cell |= compared
    for protocol in _PROTOCOLS:
        cell |= {f"{protocol}_{name}": value for name, value in _top1(runs[protocol]).items()}
        cell[f"published_{protocol}"] = _published(part, names[protocol])
    return cell | sources([*runs["standalone"], *runs["hybrid"]]), notes


def _hybrid_row(cell: Mapping[str, Any]) -> list[str]:
    measured = [_mean(cell[f"{protocol}_mean"], cell[f"{protocol}_std"]) for protocol in _PROTOCOLS]
    published = [cell[f"published_{protocol}"] for protocol in _PROTOCOLS]
    return [cell["label"], *measured, *_with_interval(cell), *published]


def _top1(runs: Sequence[Run]) -> dict[str, float]:
    values = [run.final.top1 for run in runs if run.final is not None]
    mean = float(np.mean(values)) if values else np.nan
    return {"n": len(values), "mean": mean, "std": float(np.std(values, ddof=1)) if len(values) > 1 else np.nan}


def _mean(mean: float, std: float) -> str:
    return NOT_MEASURED if np.isnan(mean) else with_spread(mean, std)


def _published(part: pd.DataFrame, label: str) -> str:
    cells = part[(part["label"] == label) & (part["origin"] == "published") & (part["state"] == "ok")]
    texts = []
    for cell in cells.to_dict("records"):
        backbone = f" ({cell['published_backbone']})" if cell["published_backbone"] else ""
        texts.append(f"{cell['top1_mean']:.2f}{backbone}")
    return "; ".join(texts) or NOT_MEASURED


def coarse(runs: Sequence[Run]) -> tuple[list[Block], pd.DataFrame, list[str]]:
    """Accuracy at the coarser labels of the classes and the share of mistakes that stay inside them, over the seeds.

    Raises NothingToShowError: no run has coarser labels and predictions.
    """
    blocks, frames, notes = [], [], []
    groups = group_runs(runs)
    of = distinctions(groups)
    for setting, group in in_order(groups).items():
        cells = []
        first = next((run for of_method in group.values() for run in of_method if run.coarse), None)
        if first is None:
            continue
        for method, of_method in group.items():
            found, more = _coarse_cells(of_method, first)
            head = {"setting": setting.title, "label": method.label}
            cells += [{**head, **cell} for cell in found]
            notes += more
        if cells:
            frames.append(pd.DataFrame(cells))
            blocks.append(_coarse_block(frames[-1], of[setting]))
    if not blocks:
        raise NothingToShowError("no run has coarser labels of its classes, such as those of a file coarse.csv")
    return blocks, _concat(frames), notes


def _coarse_cells(runs: Sequence[Run], first: Run) -> tuple[list[dict[str, Any]], list[str]]:
    """A cell for each level of one method, and notes on runs that are left out; `first` has the labels of the table."""
    frames, used, notes = [], [], []
    for run in runs:
        if run.coarse != first.coarse:
            notes.append(f"left out of the coarser levels: {run.path} has other labels than {first.path}, or none")
            continue
        try:
            predictions = run.predictions()
            frames.append(coarse_accuracy(predictions, run.coarse or {}).assign(of=len(predictions)))
            used.append(run)
        except RunError as error:
            notes.append(f"left out of the coarser levels: {error}")
    cells = []
    for level, rows in _concat(frames).groupby("level", sort=False) if frames else ():
        numbers: dict[str, float] = {}
        for name in ("accuracy", "inside"):
            values = rows[name].dropna()
            numbers |= {f"{name}_mean": float(values.mean()), f"{name}_std": float(values.std())}
        counts = {"n": len(rows), **{name: int(rows[name].iloc[0]) for name in ("groups", "images", "of")}}
        cells.append({"level": level, **counts, **numbers, **sources(used)})
    return cells, notes


def _coarse_block(table: pd.DataFrame, of: str) -> Block:
    levels = list(dict.fromkeys(table["level"]))
    labels = sorted(set(table["label"]), key=method_order)
    columns = [(level, name) for level in levels for name in _COARSE]
    cells = table.set_index(["label", "level"])
    rows = [[label, str(int(cells.loc[label, "n"].max()))] for label in labels]
    marks: dict[tuple[int, int], int] = {}
    for column, (level, name) in enumerate(columns, start=2):
        found = cells.xs(level, level="level").reindex(labels)
        for row, mean, std in zip(rows, found[f"{name}_mean"], found[f"{name}_std"], strict=True):
            row.append(_mean(mean, std))
        marks |= places(found[f"{name}_mean"].tolist(), column) if name == "accuracy" else {}
    of_level = table.drop_duplicates("level").set_index("level")
    groups = of_level["groups"]
    part = of_level[of_level["images"] < of_level["of"]]
    header = [text for level in levels for text in (f"{level} ({groups[level]})", f"Mistakes inside {level}")]
    caption = (
        f"Accuracy in % at coarser labels of the classes, on {table['setting'].iloc[0]}. Mean and standard deviation "
        f"over {seeds_in_words(table['n'])}, after the last epoch."
    )
    notes = [
        "Accuracy: share of the test images whose predicted class has the coarser label of the true class, in brackets "
        "the number of labels. Mistakes inside: share of the wrong predictions that keep the coarser label.",
        *(
            f"{row.Index}: {row.images} of {row.of} test images; the classes of the others have no label there."
            for row in part.itertuples()
        ),
        *([PLACES_NOTE] if marks else []),
    ]
    return Block(titled("Coarser levels", of), ["Method", "n", *header], rows, notes, caption, "coarse", marks)


_COARSE = ("accuracy", "inside")


def cost(runs: Sequence[Run]) -> tuple[list[Block], pd.DataFrame, list[str]]:
    """What a head costs: parameters, descriptor, time an image, memory; medians over the seeds, a block a setting."""
    frames, blocks = [], []
    groups = group_runs(runs)
    of = distinctions(groups)
    for setting, group in in_order(groups).items():
        cells = []
        for method, of_method in group.items():
            costs = pd.DataFrame([run_cost(run) for run in of_method], columns=COST_COLUMNS)
            head = {"setting": setting.title, "label": method.label, "frozen": setting.frozen}
            cells.append({**head, **costs.median(), **sources(of_method)})
        frames.append(pd.DataFrame(cells))
        blocks.append(cost_block(frames[-1], of[setting]))
    return blocks, _concat(frames), []


def cost_block(table: pd.DataFrame, of: str = "") -> Block:
    """The costs of one setting, of the frame that `cost` returns; `of` tells it from others."""
    records = sorted(table.to_dict("records"), key=lambda row: method_order(row["label"]))
    marks: dict[tuple[int, int], int] = {}
    for column, name in enumerate(COST_COLUMNS, start=1):
        ranked = places([row[name] for row in records], column, lowest=True)
        marks |= {cell: place for cell, place in ranked.items() if place == 1}
    digits = dict(zip(COST_COLUMNS, (0, 0, 2, 2, 0), strict=True))
    rows = [
        [row["label"], *(NOT_MEASURED if pd.isna(row[n]) else f"{row[n]:,.{d}f}" for n, d in digits.items())]
        for row in records
    ]
    header = ["Method", "Head parameters", "Descriptor", "Training ms/image", "Evaluation ms/image", "Peak MiB"]
    what = "on cached features, the backbone is not in them" if table["frozen"].iloc[0] else "of the whole network"
    caption = (
        "Cost of each head: its parameters, length of its descriptor, time an image and peak memory, on "
        f"{table['setting'].iloc[0]}. Medians over {seeds_in_words(len(str(row['seeds']).split()) for row in records)}."
    )
    notes = [f"Times {what}; on the machine of the run, whatever else it did."]
    notes += ["Bold: the lowest of a column."] if marks else []
    return Block(titled("Cost", of), header, rows, notes, caption, "cost", marks)


def condition_numbers(runs: Sequence[Run], published: pd.DataFrame) -> tuple[list[Block], pd.DataFrame, list[str]]:
    """Condition number of the covariance by epoch, of runs that kept their spectra, and as published.

    The runs are finished; `published` has columns method, epoch, condition_number and source.
    """
    blocks, frames, notes = [], [], []
    groups = group_runs(runs)
    of = distinctions(groups)
    for setting, group in in_order(groups).items():
        history, more = condition_history(group)
        notes += more
        if history.empty:
            continue
        frames.append(history.assign(setting=setting.title))
        every = sorted(set(history["epoch"]))
        # up to seven, evenly spaced, first and last among them
        epochs = [every[i] for i in sorted(set(np.linspace(0, len(every) - 1, 7).round().astype(int)))]
        rows = []
        for label in sorted((method.label for method in group), key=method_order):
            of_label = history[history["label"] == label].set_index("epoch")
            if of_label.empty:
                rows.append([label, *[NOT_MEASURED] * len(epochs)])
                continue
            for column, name in (
                ("condition_number", label),
                ("nonzero_condition_number", f"{label}, of the non-zero"),
            ):
                rows.append([name, *(_power(of_label[column].get(epoch)) for epoch in epochs)])
        header = ["Method", *(f"Epoch {epoch}" for epoch in epochs)]
        note = (
            "Of a rank-deficient covariance the smallest eigenvalue is rounding: of the non-zero ones it has meaning."
        )
        caption = (
            "Condition number of the covariance by epoch: largest over smallest eigenvalue, median over a fixed batch "
            f"of test images, then over {seeds_in_words(map(len, group.values()))}, on {setting.words}."
        )
        blocks.append(Block(titled("Condition number", of[setting]), header, rows, [note], caption, "condition_number"))
    blocks.append(_published_conditions(published))
    return blocks, _concat([*frames, published.assign(setting="published")]), notes


def _published_conditions(published: pd.DataFrame) -> Block:
    table = published.pivot_table(index="method", columns="epoch", values="condition_number")
    rows = [[str(label), *map(_power, row)] for label, row in zip(table.index, table.to_numpy(), strict=True)]
    header = ["Method", *(f"Epoch {epoch}" for epoch in table.columns)]
    sources = sorted(set(published["source"]))
    caption = f"Condition number of the covariance by epoch, as published ({'; '.join(sources)}); seeds are not stated."
    return Block("Condition number, published", header, rows, [], caption, "condition_number_published")


def _power(value: float | None) -> str:
    return NOT_MEASURED if value is None or np.isnan(value) else f"{value:.2e}"


def _concat(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    table: pd.DataFrame = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()
    return table


_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def run_cost(run: Run) -> dict[str, float]:
    """`COST_COLUMNS`: parameters of the head, descriptor size, milliseconds an image to train and to evaluate, MiB.

    NaN for what the run did not keep.
    """
    seconds, settings, trained = run.seconds or {}, result_settings(run) or {}, run.epochs * (run.train_images or 0)
    if settings.get("trainer.max_steps"):
        trained = min(trained, settings["trainer.max_steps"] * settings["trainer.batch_size"])
    return {
        "head_parameters": _head_parameters(run),
        "descriptor": math.nan if run.out_features is None else run.out_features,
        "train_ms": _milliseconds(seconds.get("train"), trained),
        "eval_ms": _milliseconds(seconds.get("eval"), run.epochs * ((run.test_images or 0) + _validation_images(run))),
        "peak_memory_mb": math.nan if run.peak_memory_mb is None else run.peak_memory_mb,
    }


def _milliseconds(seconds: float | None, images: float) -> float:
    return 1000 * seconds / images if seconds is not None and images else math.nan


def _validation_images(run: Run) -> float:
    """How many images selected the best epoch; NaN for a run of an earlier version that does not say."""
    if run.validation_images is not None:
        return run.validation_images
    return 0 if run.selected_on == "test" else math.nan


def _head_parameters(run: Run) -> float:
    """From the header of the saved weights; NaN without them. Of a frozen backbone the head alone is saved."""
    path = run.path / "checkpoints" / "last.safetensors"
    try:
        with open_foreign(path), safe_open(path, framework="np") as file:
            names = [name for name in file.keys() if run.frozen or name.startswith("head.")]  # noqa: SIM118
            shapes = [file.get_slice(name).get_shape() for name in names if not name.endswith(_BUFFERS)]
    except (OSError, ValueError, SafetensorError):
        return math.nan
    return float(sum(math.prod(shape) for shape in shapes))
