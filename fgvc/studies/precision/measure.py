"""float32 against float64 spectra: errors on the features of runs, and the accuracy of runs trained in each.

Small tables hold a study, and its tables and figure need no more: `errors`, `eigenvalues` and `images` of the features,
`pairs` of the trainings.

Shapes: N images, C = d channels, M = H * W locations; x (N, C, H, W), grad (N, d (d + 1) / 2) = dLoss/dDescriptor.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from fgvc.errors import ConfigError, RunError
from fgvc.inference.pooling_inputs import load_features
from fgvc.io import write_tables
from fgvc.pooling import CovariancePooling, Pooling, create_pooling, pooling_label
from fgvc.runs.spectra import nonzero_condition_number, numerical_rank
from fgvc.runs.statistics import mcnemar, pair_predictions
from fgvc.runs.summary import Run
from fgvc.spectral import EigendecompositionError, covariance_eigenvalues
from fgvc.spectral.descriptor import is_thin
from fgvc.spectral.precision import eigenvalue_floor

STUDIED: tuple[str, ...] = (
    *("isqrt_cov", "mpn_cov", "mpn_cov-exact", "svd_pade", "svd_taylor", "svd_trunc", "svd_newton", "svd_pi"),
    *("svd_topn", "svd_topn-exact", "seb", "seb-exact", "log_cov"),
)
"""METHOD as in `list_poolings()`, with its published gradient, or METHOD-GRADIENT. The exact gradient of the other
methods of ICCV 2021 is that of MPN-COV: they share the square root."""


ARITHMETIC: dict[str, tuple[torch.dtype, str]] = {
    "float32 spectrum": (torch.float32, "float32"),
    "bfloat16 features": (torch.bfloat16, "float64"),
    "float16 features": (torch.float16, "float64"),
}
"""What is compared with float64, the precision of the features and of the spectrum: the option, and the two kinds of
autocast, in which the features and the gradient that they get are rounded."""

FAILURES: tuple[str, ...] = ("no convergence", "not finite")
ERROR_COLUMNS = ("arithmetic", "label", "image", "condition", "descriptor", "gradient", "failure")
_STATISTICS = tuple(f"{what}_{value}" for what in ("descriptor", "gradient") for value in ("median", "q95", "max"))
SUMMARY_COLUMNS = ("arithmetic", "label", "images", *FAILURES, *_STATISTICS)
DECADE_COLUMNS = ("decade", "eigenvalues", "error_median", "error_max", "null")


def precision_errors(
    x: Tensor, grad: Tensor, methods: Sequence[str] = STUDIED, *, keep: int | None = None
) -> pd.DataFrame:
    """Relative errors of the descriptor and of the gradient of the features, of each image, against float64.

    Args:
        x: (N, C, H, W) float32, the features as they are where autocast is off.
        grad: (N, C (C + 1) / 2), the same for every method and arithmetic.
        methods: names as in `STUDIED`.
        keep: eigenvalues that svd_topn keeps; None drops 50, or half of them where there are no more than 50.

    Returns:
        One row an arithmetic, method and image: `ERROR_COLUMNS`. `condition`: largest over smallest non-zero
        eigenvalue; `descriptor`, `gradient`: norm of the difference over the norm in float64, NaN where `failure` says
        what happened in place of a number.

    Raises:
        ConfigError: a method that is no covariance pooling, or as `create_pooling`.
        EigendecompositionError: the float64 reference cannot be had.
    """
    eigenvalues = covariance_eigenvalues(x).numpy()
    conditions, images = nonzero_condition_number(eigenvalues), np.arange(len(x))
    frames = []
    for method in methods:
        make, label = _pooling(method, x.shape[1], keep)
        reference = _passed(make("float64"), x.double(), grad)
        for name, (features, spectrum) in ARITHMETIC.items():
            found, failure = _one_by_one(make(spectrum), x.to(features), grad)
            errors = [_relative(part, whole) for part, whole in zip(found, reference, strict=True)]
            failure = np.where((failure == "") & ~np.isfinite(sum(errors)), "not finite", failure)
            descriptor, gradient = (np.where(failure == "", error, math.nan) for error in errors)
            columns = (name, label, images, conditions, descriptor, gradient, failure)
            frames.append(pd.DataFrame(dict(zip(ERROR_COLUMNS, columns, strict=True))))
    return pd.concat(frames, ignore_index=True)


def _pooling(method: str, channels: int, keep: int | None) -> tuple[Callable[[str], Pooling], str]:
    """dtype -> the pooling of this name, and its label."""
    name, _, gradient = method.partition("-")
    options: dict[str, Any] = {}
    if name == "svd_topn":
        options["keep"] = keep or (channels - 50 if channels > 50 else (channels + 1) // 2)

    def make(dtype: str) -> Pooling:
        return create_pooling(name, channels=channels, gradient=gradient or None, dtype=dtype, **options)

    if not isinstance(make("float64"), CovariancePooling):
        raise ConfigError(f"method {method!r} has no spectrum; choose of {', '.join(STUDIED)}")
    return make, pooling_label(name, gradient or None)


def _passed(pool: Pooling, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Descriptor (N, D) and gradient of the features (N, C, H, W), in the precisions the pooling hands them on."""
    leaf = x.detach().clone().requires_grad_()
    descriptor = pool(leaf)
    return descriptor.detach(), torch.autograd.grad(descriptor, leaf, grad.to(descriptor.dtype))[0]


def _one_by_one(pool: Pooling, x: Tensor, grad: Tensor) -> tuple[tuple[Tensor, Tensor], np.ndarray]:
    """As `_passed`, image by image: one that cannot be decomposed is NaN, and named in (N,) failures."""
    results, failures = [], []
    for image in range(len(x)):
        part = slice(image, image + 1)
        try:
            results.append(_passed(pool, x[part], grad[part]))
            failures.append("")
        except EigendecompositionError:
            results.append((torch.full_like(grad[part], math.nan), torch.full_like(x[part], math.nan)))
            failures.append("no convergence")
    descriptors, gradients = zip(*results, strict=True)
    return (torch.cat(descriptors), torch.cat(gradients)), np.array(failures, dtype=object)


def _relative(found: Tensor, reference: Tensor) -> np.ndarray:
    """Norm of the difference of each image over that of the reference, (N,)."""
    difference = (found.double() - reference).flatten(1).norm(dim=1)
    relative: np.ndarray = (difference / reference.flatten(1).norm(dim=1)).numpy()
    return relative


def summarise_errors(errors: pd.DataFrame) -> pd.DataFrame:
    """`SUMMARY_COLUMNS` of rows of `precision_errors`: median, 95th percentile and maximum over the images without a
    failure (each the value of some image), and the number of each failure."""
    rows = []
    for (arithmetic, label), part in errors.groupby(["arithmetic", "label"], sort=False):
        row = {"arithmetic": arithmetic, "label": label, "images": len(part)}
        row |= {failure: int((part["failure"] == failure).sum()) for failure in FAILURES}
        for what in ("descriptor", "gradient"):
            values = part[what].dropna()
            quantiles = np.quantile(values, [0.5, 0.95, 1], method="inverted_cdf") if len(values) else [math.nan] * 3
            row |= dict(zip((f"{what}_median", f"{what}_q95", f"{what}_max"), quantiles, strict=True))
        rows.append(row)
    return pd.DataFrame(rows).reindex(columns=SUMMARY_COLUMNS)


def eigenvalue_errors(x: Tensor) -> pd.DataFrame:
    """How well float32 knows the non-zero eigenvalues of the covariances, by their size relative to the largest.

    Returns:
        One row a decade: `DECADE_COLUMNS`. `decade` k holds 10^k <= l / l_max < 10^(k + 1), the largest themselves with
        k = -1; `error_*` of |l32 - l| / l; `null`: how many the layers take for zero, or set to the
        floor, in float32.
    """
    wide = covariance_eigenvalues(x).numpy()
    narrow = covariance_eigenvalues(x.float(), "float32").double().numpy()
    used = np.arange(wide.shape[1]) < numerical_rank(wide)[:, None]
    size = (wide / wide[:, :1])[used]
    error = (np.abs(narrow - wide) / np.where(used, wide, 1))[used]
    lost = (narrow <= (0 if is_thin(x) else eigenvalue_floor(torch.float32)))[used]
    frame = pd.DataFrame({"decade": np.minimum(np.floor(np.log10(size)), -1), "error": error, "null": lost})
    measures = {"eigenvalues": ("error", "size"), "error_median": ("error", "median"), "error_max": ("error", "max")}
    found = frame.groupby("decade").agg(**measures, null=("null", "sum"))
    return found.sort_index(ascending=False).reset_index().astype({"decade": int})


FEATURES = ("channels", "locations")
PAIR_COLUMNS = (
    *("label", "seed", "float64", "float32", "difference"),
    *("images", "changed", "only64", "only32", "confidence"),
)
DRAWN = ("iSQRT-COV", "MPN-COV", "SVD-TopN")
"""What `images` keeps, of the float32 spectra: methods without and with an eigendecomposition, and the leak."""


class PrecisionStudy(NamedTuple):
    """The tables of the features of several runs, told apart by `FEATURES`.

    Attributes:
        errors: `FEATURES` and the columns of `summarise_errors`.
        eigenvalues: `FEATURES` and the columns of `eigenvalue_errors`.
        images: `FEATURES` and the columns of `precision_errors`, of float32 spectra and the methods in `DRAWN`.
    """

    errors: pd.DataFrame
    eigenvalues: pd.DataFrame
    images: pd.DataFrame


def study_precision(
    paths: Sequence[Path],
    *,
    images: int = 64,
    methods: Sequence[str] = STUDIED,
    keep: int | None = None,
    root: str | None = None,
    cache: str | None = None,
) -> PrecisionStudy:
    """Errors on the features that each run's pooling reads of its test images, under the gradient of its own loss.

    Args:
        paths: finished runs with a covariance pooling, of different numbers of channels or locations.
        images: how many of each, evenly spaced.
        methods, keep: as in `precision_errors`.
        root, cache: as in `load_features`.

    Raises:
        RunError, DatasetError, WeightsError, ConfigError: as `load_features` and `precision_errors`; or two runs have
            features of one shape.
    """
    frames: list[tuple[pd.DataFrame, ...]] = []
    seen: dict[tuple[int, int], Path] = {}
    for path in paths:
        inputs = load_features(path, images, root=root, cache=cache)
        assert inputs.grad is not None  # a run has a loss
        shape = (inputs.features.shape[1], inputs.features[0, 0].numel())
        if shape in seen:
            raise RunError(f"{seen[shape]} and {path} both have {shape[0]} channels x {shape[1]} locations; give one")
        seen[shape] = path
        errors = precision_errors(inputs.features, inputs.grad, methods, keep=keep)
        drawn = errors[(errors["arithmetic"] == "float32 spectrum") & errors["label"].isin(DRAWN)]
        parts = (summarise_errors(errors), eigenvalue_errors(inputs.features), drawn)
        named = dict(zip(FEATURES, shape, strict=True))
        frames.append(tuple(part.assign(**named)[[*FEATURES, *part.columns]] for part in parts))
    return PrecisionStudy(*(pd.concat(parts, ignore_index=True) for parts in zip(*frames, strict=True)))


def precision_pairs(runs: Sequence[Run]) -> pd.DataFrame:
    """Runs that differ in `method.spectral_dtype` alone, side by side.

    Returns:
        One row a method and seed with both: `PAIR_COLUMNS`. Top-1 in per cent and the difference float32 - float64 in
        points; of `images`, those with another prediction and those that only one of the two gets right; and the
        largest change of a confidence.

    Raises:
        RunError: no such pair, two runs of the same configuration, or predictions that are missing or damaged.
    """
    found: dict[str, dict[str, Run]] = {}
    for run in runs:
        twins = found.setdefault(_all_but_precision(run), {})
        if run.spectral_dtype in twins:
            raise RunError(f"{twins[run.spectral_dtype].path} and {run.path} have the same configuration; give one")
        twins[run.spectral_dtype] = run
    rows = [_pair(twins["float64"], twins["float32"]) for twins in found.values() if len(twins) == 2]
    if not rows:
        raise RunError("no two runs differ in method.spectral_dtype alone; train each with float64 and with float32")
    return pd.DataFrame(rows, columns=PAIR_COLUMNS)


def _all_but_precision(run: Run) -> str:
    """The configuration that two runs of a pair share, as text."""
    config = {key: value for key, value in run.settings().items() if key not in ("run_dir", "resume")}
    method = {key: value for key, value in config.get("method", {}).items() if key != "spectral_dtype"}
    return json.dumps(config | {"method": method}, sort_keys=True)


def _pair(wide: Run, narrow: Run) -> tuple[Any, ...]:
    assert wide.final is not None and narrow.final is not None  # finished
    first, second = wide.predictions(), narrow.predictions()
    test, pairs = mcnemar(first, second), pair_predictions(first, second, ["confidence"])
    changed = int((pairs["predicted_first"] != pairs["predicted_second"]).sum())
    confidence = float((pairs["confidence_first"] - pairs["confidence_second"]).abs().max())
    top1 = (wide.final.top1, narrow.final.top1, narrow.final.top1 - wide.final.top1)
    return (wide.label, wide.seed, *top1, test.images, changed, test.only_first, test.only_second, confidence)


def save_precision(study: PrecisionStudy, folder: Path) -> list[Path]:
    """Write errors.csv, eigenvalues.csv and images.csv; returns the paths."""
    return write_tables(folder, study._asdict(), "%.3e")
