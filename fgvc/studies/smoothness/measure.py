"""How smooth the loss of a batch is along its gradient: one step, a whole training, and the saved table.

Three measures of Santurkar, Tsipras, Ilyas, Madry (How does batch normalization help optimization?, NeurIPS 2018), with
which Song, Sebe, Wang (ICCV 2021) compare gradients of covariance pooling. With the weights x, the loss L of one batch,
g = grad L(x) and step sizes s, over all s:

- variation of the loss: the smallest and the largest L(x - s g);
- gradient predictiveness: the smallest and the largest ||grad L(x - s g) - g||;
- effective beta-smoothness: the largest ||grad L(x - s g) - g|| / (s ||g||).

Lower is smoother. The step goes against the gradient, like that of an optimiser. With an approximate gradient rule,
"grad" is what the rule returns, in both places.
"""

import contextlib
import logging
import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.func import functional_call

from fgvc.errors import ConfigError, DivergenceError, RunError
from fgvc.io import read_csv
from fgvc.pooling import pooling_label
from fgvc.runs import RunConfig
from fgvc.spectral import EigendecompositionError
from fgvc.training import train_run

Weights = Literal["all", "features"]
"""Which weights are moved and whose gradients are compared: all that are trained, or those in front of the classifier,
the only ones whose gradient comes through the pooling."""


@dataclass(frozen=True)
class Smoothness:
    """The measures at one point, each a number a step size, in their order; infinite where there is no finite loss.

    Attributes:
        loss: Loss L(x).
        gradient_norm: Norm ||g||.
        step_sizes: Step sizes s.
        losses: Losses L(x - s g).
        gradient_changes: Changes ||grad L(x - s g) - g||.
    """

    loss: float
    gradient_norm: float
    step_sizes: tuple[float, ...]
    losses: tuple[float, ...]
    gradient_changes: tuple[float, ...]

    @property
    def finite(self) -> bool:
        """Whether there is a loss and a gradient to start from."""
        return math.isfinite(self.loss) and math.isfinite(self.gradient_norm)

    @property
    def beta(self) -> float:
        """Effective beta-smoothness; NaN where the gradient is zero, as nothing moves."""
        if self.gradient_norm == 0:
            return math.nan
        return max(
            change / (s * self.gradient_norm) for change, s in zip(self.gradient_changes, self.step_sizes, strict=True)
        )

    def measures(self) -> dict[str, float]:
        """The numbers of a row of a table, see `fgvc.studies.smoothness.measure`."""
        ranges = {"step_size": self.step_sizes, "loss": self.losses, "gradient_change": self.gradient_changes}
        row = {"loss": self.loss, "gradient_norm": self.gradient_norm}
        row |= {f"{name}_{end.__name__}": end(values) for name, values in ranges.items() for end in (min, max)}
        return row | {"beta": self.beta}


def smoothness_along_gradient(
    module: nn.Module,
    inputs: Tensor,
    loss: Callable[[Tensor], Tensor],
    step_sizes: Sequence[float],
    *,
    weights: Weights = "all",
    clip_norm: float | None = None,
) -> Smoothness:
    """Measure the loss and its gradient along the gradient, on one batch.

    The module is called in the mode it is in, every time with the same random numbers (dropout) and the same buffers.
    Weights, gradients, buffers (running statistics of batch normalisation) and generators do not change: a copy moves.

    Args:
        module: inputs -> what `loss` reads; its parameters that require a gradient are the trained ones.
        inputs: the batch.
        loss: output of the module -> scalar.
        step_sizes: s, positive.
        weights: what is moved and measured, see `Weights`.
        clip_norm: norm to which the optimiser clips the gradient of all trained weights: a longer gradient is walked
            along by s clip_norm / ||g||, which is then the step size.

    Raises:
        ConfigError: nothing to train.
        EigendecompositionError: L(x) itself has none.
    """
    trained = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    moved = [
        name for name in trained if weights == "all" or not {"classifier", "token_classifier"} & {*name.split(".")}
    ]
    if not moved:
        raise ConfigError(f"the model has no trained weights of the kind {weights!r}; measure weights=all")
    at = partial(_loss_and_gradient, module, inputs, loss)
    value, gradient = at(trained)
    step = 1.0
    if clip_norm is not None and (norm := _norm(gradient.values())) > clip_norm:
        step = clip_norm / norm
    scaled = tuple(s * step for s in step_sizes)
    losses, changes = [], []
    for s in scaled:
        there = trained | {name: trained[name] - s * gradient[name] for name in moved}
        try:
            there_value, there_gradient = at(there)
        except EigendecompositionError:
            there_value, there_gradient = math.inf, gradient
        change = _norm([there_gradient[name] - gradient[name] for name in moved])
        finite = math.isfinite(there_value) and math.isfinite(change)
        losses.append(there_value if finite else math.inf)
        changes.append(change if finite else math.inf)
    return Smoothness(value, _norm([gradient[name] for name in moved]), scaled, tuple(losses), tuple(changes))


def _loss_and_gradient(
    module: nn.Module, inputs: Tensor, loss: Callable[[Tensor], Tensor], weights: dict[str, Tensor]
) -> tuple[float, dict[str, Tensor]]:
    """The loss with these weights in place of the module's, and its gradient."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in weights.items()}
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}  # batch normalisation updates them
    devices = [inputs.device] if inputs.is_cuda else []
    with torch.random.fork_rng(devices), torch.enable_grad():
        value = loss(functional_call(module, leaves | buffers, (inputs,)))
        gradients = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return float(value.detach()), dict(zip(leaves, gradients, strict=True))


def _norm(tensors: Iterable[Tensor]) -> float:
    """Euclidean norm of all tensors together."""
    return math.hypot(*(float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) for tensor in tensors))


_log = logging.getLogger(__name__)

STEP_FACTORS = (0.5, 1.0, 2.0, 4.0)
"""Step sizes by default, in units of a run's `optimizer.lr`, the rate before any schedule: the same all along."""

Measure = Callable[[nn.Module, Tensor, Callable[[Tensor], Tensor]], Smoothness]


def smoothness_curve(
    config: RunConfig, *, every: int = 20, step_factors: Sequence[float] = STEP_FACTORS, weights: Weights = "all"
) -> pd.DataFrame:
    """Train as `config` says, in a folder that is thrown away, and measure before every N-th optimiser step.

    The training is the same as without measures, to the last bit. It is that of one process.

    Args:
        config: the run; its `run_dir` and `resume` do not count.
        every: N; the first step is measured.
        step_factors: see `STEP_FACTORS`. Where the run clips gradients, the measured ones are clipped alike.
        weights: see `Weights`.

    Returns:
        A frame with `SMOOTHNESS_COLUMNS`, one row a measured step. Where training diverges, the last row says in which
        step, without measures.

    Raises:
        ConfigError: `every` below 1, or step factors that are not positive.
        ConfigError, DatasetError, WeightsError: as in training.
    """
    if every < 1:
        raise ConfigError(f"every must be at least 1, got {every}; measure before every N-th step")
    measure = run_measure(config, step_factors, weights)
    rows: list[dict[str, Any]] = []
    began = 0

    def record(step: int, module: nn.Module, inputs: Tensor, loss: Callable[[Tensor], Tensor]) -> None:
        nonlocal began
        began = step
        if (step - 1) % every:
            return
        with contextlib.suppress(EigendecompositionError):  # the step itself is about to fail by it, and says so
            found = measure(module, inputs, loss)
            if found.finite:
                rows.append({"step": step, "diverged": False, **found.measures()})

    with tempfile.TemporaryDirectory(prefix="fgvc-smoothness-") as folder:
        trainer = replace(config.trainer, tracker=None)
        own = replace(config, run_dir=str(Path(folder) / "run"), resume="never", trainer=trainer)
        try:
            train_run(own, before_step=record)
        except DivergenceError as error:
            _log.info("%s", error)
            rows.append({"step": began, "diverged": True})
    return smoothness_frame(rows, config, "training", weights)


def run_measure(config: RunConfig, step_factors: Sequence[float], weights: Weights) -> Measure:
    """`smoothness_along_gradient` with the step sizes and the clipping of a run.

    Raises ConfigError: step factors that are not positive.
    """
    if not step_factors or not all(0 < factor < math.inf for factor in step_factors):
        raise ConfigError(f"step factors must be positive, got {list(step_factors)}; give some, e.g. 0.5 1 2 4")
    sizes = [factor * config.optimizer.lr for factor in step_factors]
    return partial(smoothness_along_gradient, step_sizes=sizes, weights=weights, clip_norm=config.trainer.clip_norm)


def smoothness_frame(
    rows: Sequence[dict[str, Any]], config: RunConfig, point: str, weights: Weights, label: str | None = None
) -> pd.DataFrame:
    """Rows of measures with what they were measured on.

    Args:
        rows: each with step, diverged and, unless that is true, `Smoothness.measures()`.
        config: of the run.
        point, weights, label: as in `SMOOTHNESS_COLUMNS`; None: the label that the configuration says.
    """
    method = config.method
    shared = {
        "setting": _setting(config),
        "point": point,
        "weights": weights,
        "method": method.name,
        "gradient": method.gradient or "",  # as published
        "label": label or pooling_label(method.name, method.gradient, method.options),
        "seed": config.seed,
    }
    types = {"seed": int, "step": int, "diverged": bool, **dict.fromkeys(MEASURES, float)}
    return pd.DataFrame([{**shared, **row} for row in rows], columns=SMOOTHNESS_COLUMNS).astype(types)


def _setting(config: RunConfig) -> str:
    """What must be the same for smoothness to compare, in a line."""
    backbone = f"{config.backbone.name} ({'frozen' if config.backbone.frozen else 'fine-tuned'})"
    reduction = "no reduction" if config.method.reduction is None else f"reduction {config.method.reduction}"
    clip = "no clipping" if config.trainer.clip_norm is None else f"clipped at {config.trainer.clip_norm:g}"
    optimizer = f"{config.optimizer.name} lr {config.optimizer.lr:g}, {clip}"
    return f"{config.dataset.name}, {backbone}, {reduction}, {optimizer}, batches of {config.trainer.batch_size}"


SMOOTHNESS_COLUMNS = (
    "setting",  # data, backbone and optimiser in a line
    "point",  # training; last or best: the saved weights of a run
    "weights",  # which ones were moved: all, features
    "method",
    "gradient",
    "label",
    "seed",
    "step",  # of the optimiser, from 1; at saved weights the number of the batch
    "diverged",  # whether training ended in this step, without measures
    "loss",
    "gradient_norm",
    "step_size_min",
    "step_size_max",
    "loss_min",
    "loss_max",
    "gradient_change_min",
    "gradient_change_max",
    "beta",
)

MEASURES = SMOOTHNESS_COLUMNS[SMOOTHNESS_COLUMNS.index("loss") :]

SUMMARISED = ("loss_range", "gradient_change_max", "relative_change", "beta")
"""What is drawn and summarised, see `with_ranges`."""

_SHARED = ("setting", "point", "weights")


def load_smoothness(path: Path) -> pd.DataFrame:
    """Read measures back from their CSV file.

    Returns:
        A frame with `SMOOTHNESS_COLUMNS`.

    Raises:
        RunError: the file is missing or damaged, holds no row, or something else than a number where one belongs.
    """
    table = read_csv(path, SMOOTHNESS_COLUMNS)
    if not len(table):
        raise RunError(f"{path}: no row in it; make it again: fgvc study_smoothness")
    kinds = {"diverged": pd.api.types.is_bool_dtype} | dict.fromkeys(
        ("seed", "step", *MEASURES), pd.api.types.is_numeric_dtype
    )
    for column, fits in kinds.items():
        if not fits(table[column]):
            raise RunError(f"{path}: column {column} holds {table[column].iloc[0]!r} or the like; restore the file")
    return table.assign(gradient=table["gradient"].astype(object).fillna(""))


def require_one_setting(table: pd.DataFrame) -> None:
    """Raise RunError where measures of different settings are mixed: their smoothness does not compare."""
    for column in _SHARED:
        found = table[column].unique().tolist()
        if len(found) > 1:
            raise RunError(f"measures of different {column} do not compare: {'; '.join(found)}; give those of one")


def divergence_notes(table: pd.DataFrame) -> list[str]:
    """A line for each training that diverged."""
    ended = table[table["diverged"]]
    return [f"{row['label']}, seed {row['seed']}: diverged at step {row['step']}" for _, row in ended.iterrows()]


def with_ranges(table: pd.DataFrame) -> pd.DataFrame:
    """The measured rows with `SUMMARISED`: `loss_range` is the largest less the smallest loss, `relative_change` the
    largest change of the gradient over its norm."""
    measured = table[~table["diverged"]]
    finite = np.isfinite(measured["loss_max"])
    return measured.assign(
        loss_range=(measured["loss_max"] - measured["loss_min"].where(finite, 0)),  # infinite where a loss is
        relative_change=measured["gradient_change_max"] / measured["gradient_norm"],
    )


def summarise_smoothness(table: pd.DataFrame) -> pd.DataFrame:
    """One row a method: medians and quartiles over measured steps and seeds, and how far the seeds' medians lie apart.

    Medians and quartiles are order statistics, so that a few infinite values leave them finite. The table has
    `SMOOTHNESS_COLUMNS`, of one setting.

    Returns:
        Columns method, gradient, label, seeds, points (measured steps of all seeds), diverged (seeds that did),
        gradient_norm (median), and `SUMMARISED`, each followed by *_lower and *_upper (quartiles), *_seed_min and
        *_seed_max (of the medians of the seeds).

    Raises:
        RunError: different settings are mixed, or every training diverged before it was measured.
    """
    require_one_setting(table)
    measured = with_ranges(table)
    if not len(measured):
        raise RunError(f"nothing was measured: {'; '.join(divergence_notes(table))}; lower optimizer.lr of the run")
    diverged = table[table["diverged"]].groupby("label")["seed"].nunique()
    rows = []
    for label, part in measured.groupby("label", sort=False):
        row: dict[str, object] = {name: part[name].iloc[0] for name in ("method", "gradient", "label")}
        row |= {"seeds": part["seed"].nunique(), "points": len(part), "diverged": int(diverged.get(label, 0))}
        row["gradient_norm"] = _quantile(part["gradient_norm"], 0.5)
        for name in SUMMARISED:
            seeds = [_quantile(values, 0.5) for _, values in part.groupby("seed")[name]]
            row |= {name: _quantile(part[name], 0.5)}
            row |= {f"{name}_lower": _quantile(part[name], 0.25), f"{name}_upper": _quantile(part[name], 0.75)}
            row |= {f"{name}_seed_min": min(seeds), f"{name}_seed_max": max(seeds)}
        rows.append(row)
    return pd.DataFrame(rows)


def _quantile(values: "pd.Series[float]", share: float) -> float:
    return float(np.quantile(values, share, method="inverted_cdf"))
