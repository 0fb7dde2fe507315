"""Accuracy against the learning rate of the classifier, for heads whose descriptors differ by a factor.

A classifier W that reads c q trains like one that reads q at c^2 times the rate under SGD, at c times the rate under
AdamW (docs/findings.md has the algebra and its conditions). Here is what is left of it in practice. The study is one
table with a row for each run, see `read_rates`; everything else is computed from it.
"""

import hashlib
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from fgvc.errors import RunError
from fgvc.runs import Run
from fgvc.runs.config import flatten
from fgvc.runs.statistics import two_level_interval
from fgvc.runs.summary import result_settings
from fgvc.spectral import EIGENVALUE_FLOOR
from fgvc.spectral.maps import seb_scale

RATE_COLUMNS = (
    *("dataset", "optimizer", "label", "factor", "lr", "rate", "seed", "top1", "validation"),
    *("images", "listed", "right", "commit"),
)
_POWERS = {"sgd": 2, "adamw": 1}  # a factor c acts like the rate times c to this power


def read_rates(runs: Sequence[Run]) -> tuple[pd.DataFrame, list[str]]:
    """A row for each run with `RATE_COLUMNS`, and notes on runs that are left out.

    `factor` is the number that multiplies the square root: option `scale`, or the mean of SEB's 1 + t over test
    images. `rate` is the learning rate of the classifier at the start, `lr` that of all else. top1 (test) and
    validation (held-out images, NaN without any) are in per cent after the last epoch. `right` has a bit for each test
    image in the order of paths, 1 where the prediction is right, as hexadecimal digits; `images` is their number,
    `listed` a digest of their paths and targets.

    Raises RunError: no run can be read, two have one label, rates and seed, or runs of one dataset and optimiser differ
    in more than method, learning rates and seed.
    """
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    settings: dict[tuple[str, str], tuple[Run, dict[str, Any]]] = {}
    places: dict[tuple[object, ...], Run] = {}
    for run in runs:
        try:
            row = _row(run)
        except RunError as error:
            notes.append(f"left out {run.path}: {error}")
            continue
        place = (run.label, *(row[name] for name in ("dataset", "optimizer", "lr", "rate", "seed")))
        twin = places.setdefault(place, run)
        if twin is not run:
            raise RunError(
                f"two runs of {run.label} at rate {row['rate']:g} and seed {run.seed}: {twin.path} and {run.path}"
            )
        own = _other_settings(run)
        first, others = settings.setdefault((row["dataset"], row["optimizer"]), (run, own))
        if differing := [name for name in sorted({*own, *others}) if own.get(name) != others.get(name)]:
            raise RunError(
                f"{first.path} and {run.path} differ in {', '.join(differing)}; give runs that differ in method, "
                "learning rates and seed only"
            )
        rows.append(row)
    if not rows:
        raise RunError("no run can be read:\n  " + "\n  ".join(notes))
    table = pd.DataFrame(rows, columns=RATE_COLUMNS)
    return table.sort_values(["dataset", "optimizer", "label", "rate", "seed"], ignore_index=True), notes


def _row(run: Run) -> dict[str, Any]:
    """The row of a run. Raises RunError where a file of it is missing or damaged."""
    settings, held_out = flatten(run.settings()), run.held_out_top1()
    predictions = run.predictions().sort_values("path")
    right = (predictions["target"] == predictions["predicted"]).to_numpy()
    label, optimizer = run.label, settings.get("optimizer.name")
    try:
        factor = float(settings.get("method.options.scale", 1))
        lr = float(settings["optimizer.lr"])
        rate = lr * float(settings["optimizer.classifier_factor"])
        if not math.isfinite(rate * factor):
            raise ValueError(rate)
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"{run.path / 'config.yaml'}: optimizer.lr, optimizer.classifier_factor or method.options.scale is no "
            "number; restore it"
        ) from error
    if optimizer not in list(_POWERS):
        raise RunError(f"{run.path}: no rule for the optimiser {optimizer!r}; give runs of {' or '.join(_POWERS)}")
    if run.method == "seb":
        before = torch.from_numpy(run.spectrum().before)
        factor = float(1 + seb_scale(before.clamp(min=EIGENVALUE_FLOOR)).mean())
    elif factor != 1:
        label = re.sub(r" \[scale=[^],]+\]", "", run.label) + " × c"  # c differs from dataset to dataset
    assert run.final is not None
    listed = "\n".join(f"{path},{target}" for path, target in predictions[["path", "target"]].to_numpy())
    return {
        "dataset": run.dataset,
        "optimizer": optimizer,
        "label": label,
        "factor": factor,
        "lr": lr,
        "rate": float(f"{rate:.4g}"),
        "seed": run.seed,
        "top1": run.final.top1,
        "validation": float("nan") if held_out is None else held_out,
        "images": len(right),
        "listed": hashlib.sha256(listed.encode()).hexdigest()[:12],
        "right": np.packbits(right).tobytes().hex(),
        "commit": run.commit,
    }


def _other_settings(run: Run) -> dict[str, Any]:
    """The settings that may not differ between the runs of one dataset and optimiser."""
    free = ("method.name", "method.gradient", "method.options", "optimizer.lr", "optimizer.classifier_factor")
    settings = result_settings(run) or {}
    own = {name: value for name, value in settings.items() if not name.startswith(free)}
    # of the configuration: the summary of a head without a reduction, such as GAP, has none
    reduction = flatten(run.settings()).get("method.reduction")
    return own | {"method.reduction": reduction, "training images": run.images.get("train_content")}


def curves(table: pd.DataFrame) -> pd.DataFrame:
    """Mean and sample standard deviation of top-1 over seeds, and the mean of the other numbers.

    Columns: dataset, optimizer, label, rate, n, mean, std, validation, factor.
    """
    by_rate = table.groupby(["dataset", "optimizer", "label", "rate"])
    return by_rate.agg(
        n=("top1", "size"),
        mean=("top1", "mean"),
        std=("top1", "std"),
        validation=("validation", "mean"),
        factor=("factor", "mean"),
    ).reset_index()


def equivalent_rate(part: pd.DataFrame, optimizer: str) -> pd.Series:
    """The rate at which the plain square root would train the same: rate times c^2 (SGD) or c (AdamW)."""
    moved: pd.Series = part["rate"] * part["factor"] ** _POWERS[optimizer]
    return moved


def comparable(table: pd.DataFrame, reference: str) -> tuple[pd.DataFrame, list[str]]:
    """The rows of the datasets and optimisers that have runs of the reference, and a note on each of the others.

    Raises RunError: none has runs of the reference, or the runs of one label have two values of the option `scale` or
    differ in the classifier's rate and in the others' as well, so that they are no curve.
    """
    kept, notes = [], []
    for keys, part in table.groupby(["dataset", "optimizer"]):
        where = f"{keys[0]} with {keys[1]}"
        for label, own in part.groupby("label"):
            scales = sorted(set(own["factor"])) if str(label).endswith("× c") else []
            if len(scales) > 1:
                raise RunError(f"{label} on {where} has {scales[0]:g} and {scales[1]:g} as scale; give runs of one")
            factors = own["rate"] / own["lr"]
            if own["lr"].nunique() > 1 and factors.max() > 1.01 * factors.min():
                raise RunError(
                    f"{label} on {where} has several values of optimizer.lr and of optimizer.classifier_factor; give "
                    "runs in which one of them is fixed"
                )
        labels = sorted(set(part["label"]))
        if reference in labels:
            kept.append(part)
        else:
            notes.append(f"left out: no runs of {reference} on {where}, only of {', '.join(labels)}; see --reference")
    if not kept:
        raise RunError("; ".join(notes))
    return pd.concat(kept, ignore_index=True), notes


def shifts(table: pd.DataFrame, reference: str) -> pd.DataFrame:
    """How far each curve lies from that of the reference, as measured and after the move.

    A row for each dataset, optimiser and other label: factor; before and after, the mean absolute distance in points
    over the rates where both curves are known (the reference is interpolated linearly in the logarithm of the rate);
    rates, how many those are after the move; best_move, the factor on the rate, in a fine grid, that brings the curves
    nearest, and expected_move, what the algebra says. Distances over fewer than three rates are NaN.

    Raises RunError: a dataset and optimiser without runs of the reference.
    """
    rows = []
    for keys, part in curves(table).groupby(["dataset", "optimizer"]):
        dataset, optimizer = map(str, keys)
        plain = part[part["label"] == reference]
        for label, own in part[part["label"] != reference].groupby("label"):
            factor = float(own["factor"].mean())
            expected = (factor / float(plain["factor"].mean())) ** _POWERS[optimizer]
            moves = np.geomspace(1 / 100, 100, 401)
            distances = np.nan_to_num([_distance(own, plain, move)[0] for move in moves], nan=np.inf)
            nearest = int(distances.argmin())
            after, rates = _distance(own, plain, expected)
            rows.append(
                {
                    "dataset": dataset,
                    "optimizer": optimizer,
                    "label": label,
                    "factor": factor,
                    "before": _distance(own, plain, 1)[0],
                    "after": after,
                    "rates": rates,
                    "expected_move": expected,
                    "best_move": moves[nearest] if np.isfinite(distances[nearest]) else float("nan"),
                }
            )
    return pd.DataFrame(rows)


def _distance(own: pd.DataFrame, plain: pd.DataFrame, move: float) -> tuple[float, int]:
    """Mean absolute distance of two curves, one moved, and over how many rates; NaN over fewer than three."""
    moved = np.log(own["rate"].to_numpy(float) * move)
    known = np.log(plain["rate"].to_numpy(float))
    # a hundredth of slack: a rate that is moved onto the last one counts
    inside = (moved > known.min() - 0.01) & (moved < known.max() + 0.01)
    if inside.sum() < 3:
        return float("nan"), int(inside.sum())
    expected = np.interp(moved[inside], known, plain["mean"].to_numpy(float))
    return float(np.abs(own["mean"].to_numpy(float)[inside] - expected).mean()), int(inside.sum())


def best_values(table: pd.DataFrame, reference: str, margin: float) -> pd.DataFrame:
    """Each label at its own rate, against the reference at its own.

    The rate of a label is the one with the highest mean accuracy on the held-out images. A row for each dataset,
    optimiser and label: rate, n (seeds), top1 and, but for the reference, difference (points), low and high (ends of
    the 90 % interval over seeds and test images), pairs (seeds that both have, which are compared), verdict: "equal"
    where the interval lies within the margin (two one-sided tests at 5 %), "different" where it lies outside, else
    "undecided"; "no seed in common". `table` is as for `shifts`.

    Raises RunError: a row without held-out images, or labels with other test images than the reference.
    """
    if table["validation"].isna().any():
        raise RunError(
            "a rate is chosen on held-out images, and some runs have none; train with trainer.val_fraction=0.2"
        )
    rows = []
    for keys, part in table.groupby(["dataset", "optimizer"]):
        best = {str(label): _at_best_rate(own) for label, own in part.groupby("label")}
        plain = _at_best_rate(part[part["label"] == reference])
        for label, own in best.items():
            row: dict[str, Any] = {"dataset": keys[0], "optimizer": keys[1], "label": label}
            row |= {"rate": own["rate"].iloc[0], "n": len(own), "top1": own["top1"].mean()}
            if label != reference:
                row |= _compare(own, plain, margin)
            rows.append(row)
    return pd.DataFrame(rows)


def _at_best_rate(part: pd.DataFrame) -> pd.DataFrame:
    """The rows of one label at the rate with the highest mean validation accuracy."""
    means = part.groupby("rate")["validation"].mean()
    return part[part["rate"] == means.idxmax()].sort_values("seed")


def _compare(first: pd.DataFrame, second: pd.DataFrame, margin: float) -> dict[str, Any]:
    """Difference of top-1 of two labels on the seeds of both, its 90 % interval, and the verdict, see `best_values`."""
    if set(first["listed"]) != set(second["listed"]):
        raise RunError(f"{first['label'].iloc[0]} and {second['label'].iloc[0]} differ in test images")
    first, second = (one[one["seed"].isin(other["seed"])] for one, other in ((first, second), (second, first)))
    if first.empty:
        return {"pairs": 0, "verdict": "no seed in common"}
    difference = 100.0 * (right_answers(first) - right_answers(second))
    low, high = two_level_interval(difference, level=0.9)
    equal, apart = -margin < low and high < margin, low > margin or high < -margin
    verdict = "equal" if equal else "different" if apart else "undecided"
    return {"difference": float(difference.mean()), "low": low, "high": high, "pairs": len(first), "verdict": verdict}


def right_answers(rows: pd.DataFrame) -> NDArray[np.float64]:
    """(seeds, images): 1 where the prediction is right."""
    bits = [np.frombuffer(bytes.fromhex(text), np.uint8) for text in rows["right"]]
    return np.unpackbits(np.stack(bits), axis=1, count=int(rows["images"].iloc[0])).astype(float)
