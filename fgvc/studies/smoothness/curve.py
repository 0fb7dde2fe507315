"""Smoothness of the loss while a method trains."""

import logging
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor, nn

from fgvc.errors import ConfigError, DivergenceError
from fgvc.pooling import pooling_label
from fgvc.runs import RunConfig
from fgvc.spectral import EigendecompositionError
from fgvc.studies.smoothness.measure import Smoothness, Weights, smoothness_along_gradient
from fgvc.studies.smoothness.table import MEASURES, SMOOTHNESS_COLUMNS
from fgvc.training import train_run

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
    recorder = _Recorder(every, run_measure(config, step_factors, weights))
    with tempfile.TemporaryDirectory(prefix="fgvc-smoothness-") as folder:
        trainer = replace(config.trainer, tracker=None)
        own = replace(config, run_dir=str(Path(folder) / "run"), resume="never", trainer=trainer)
        try:
            train_run(own, before_step=recorder)
        except DivergenceError as error:
            _log.info("%s", error)
            recorder.rows.append({"step": recorder.step, "diverged": True})
    return smoothness_frame(recorder.rows, config, "training", weights)


class _Recorder:
    """Measures before every N-th step of a training, the first included; `step` is the last that began."""

    def __init__(self, every: int, measure: Measure) -> None:
        self.rows: list[dict[str, Any]] = []
        self.step = 0
        self._every = every
        self._measure = measure

    def __call__(self, step: int, module: nn.Module, inputs: Tensor, loss: Callable[[Tensor], Tensor]) -> None:
        self.step = step
        if (step - 1) % self._every:
            return
        try:
            found = self._measure(module, inputs, loss)
        except EigendecompositionError:
            return  # the step itself is about to fail by it, and says so
        if found.finite:
            self.rows.append({"step": step, "diverged": False, **found.measures()})


def run_measure(config: RunConfig, step_factors: Sequence[float], weights: Weights) -> Measure:
    """`smoothness_along_gradient` with the step sizes and the clipping of a run.

    Raises:
        ConfigError: step factors that are not positive.
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
        point: "training", or the checkpoint.
        weights: see `Weights`.
        label: of the method, None: as its configuration says.

    Returns:
        A frame with `SMOOTHNESS_COLUMNS`.
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
    frame: pd.DataFrame = pd.DataFrame([{**shared, **row} for row in rows], columns=SMOOTHNESS_COLUMNS).astype(types)
    return frame


def _setting(config: RunConfig) -> str:
    """What must be the same for smoothness to compare, in a line."""
    backbone = f"{config.backbone.name} ({'frozen' if config.backbone.frozen else 'fine-tuned'})"
    reduction = "no reduction" if config.method.reduction is None else f"reduction {config.method.reduction}"
    clip = "no clipping" if config.trainer.clip_norm is None else f"clipped at {config.trainer.clip_norm:g}"
    optimizer = f"{config.optimizer.name} lr {config.optimizer.lr:g}, {clip}"
    return f"{config.dataset.name}, {backbone}, {reduction}, {optimizer}, batches of {config.trainer.batch_size}"
