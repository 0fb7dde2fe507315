"""Smoothness of covariance poolings by name: each trained as a finished run was, or at the weights that a run saved."""

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from torch.utils.data import DataLoader

from fgvc.data import ImageDataset
from fgvc.errors import ConfigError, DatasetError, RunError, WeightsError
from fgvc.inference.restore import Restored, restore_run
from fgvc.pooling import CovariancePooling, create_pooling, pooling_label
from fgvc.runs import RunConfig, RunFolder
from fgvc.runs.config import HybridConfig, MethodConfig
from fgvc.runs.settings import one_setting
from fgvc.runs.summary import Run, find_finished, read_finished
from fgvc.spectral import EigendecompositionError
from fgvc.studies.smoothness.measure import (
    STEP_FACTORS,
    Measure,
    Weights,
    divergence_notes,
    run_measure,
    smoothness_curve,
    smoothness_frame,
)
from fgvc.training.batches import StepBatches, sampling_weights
from fgvc.training.learner import create_objective
from fgvc.training.seeds import SeededSamples, derived_seed, seed_epoch

_log = logging.getLogger(__name__)

STUDIED: tuple[str, ...] = (
    *("isqrt_cov", "mpn_cov", "mpn_cov-exact", "svd_pade", "svd_taylor", "svd_newton", "svd_trunc"),
    *("svd_topn", "svd_topn-exact", "seb"),
)
"""What is trained by default: METHOD as in `list_poolings()`, with its published gradient, or METHOD-GRADIENT, as run
folders are called."""


def smoothness_study(
    path: Path,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] = (0,),
    *,
    steps: int | None = None,
    epochs: int | None = None,
    keep: int | None = None,
    root: str | None = None,
    cache: str | None = None,
    **measure: Any,
) -> tuple[pd.DataFrame, list[str]]:
    """Train methods afresh under the configuration of a finished run and measure each; the run is only read.

    Every method trains by itself from the first step on, also where the run is a hybrid one.

    Args:
        path: the run folder: data, backbone, reduction, optimiser, schedule.
        methods: None means `STUDIED`.
        seeds: of the trainings.
        steps, epochs: stop after so many; the schedule stays that of the run. At most one of them; None: to its end.
        keep: eigenvalues that svd_topn keeps; None drops the 50 smallest.
        root, cache: other folders of the dataset and of cached features than those of the run's configuration.
        measure: `every`, `step_factors` and `weights` of `smoothness_curve`.

    Returns:
        The frames of `smoothness_curve`, one below the other; and a note for each training that diverged.

    Raises:
        RunError: not a finished run.
        ConfigError: no methods, an unknown one, or one without a covariance; no seeds; a number out of range.
        ConfigError, DatasetError, WeightsError: as in training.
    """
    config, run = RunFolder(path).read_config(root=root, cache=cache), read_finished(path)
    methods = STUDIED if methods is None else methods
    if not methods or not seeds or min(seeds) < 0:
        raise ConfigError(f"give methods, and seeds of at least 0; got {list(methods)} and {list(seeds)}")
    studied = [_studied(config, method, keep) for method in methods]
    for method in studied:  # a mistake in the last should not wait for the trainings of the others
        _pooling(method, config.method.reduction or 2048)  # without a reduction the backbone says how many; any will do
    config = replace(config, hybrid=HybridConfig())
    config.trainer.max_steps = _limit(run, config, steps, epochs)
    curves = []
    for method in studied:
        for seed in seeds:
            _log.info("training %s, seed %d", pooling_label(method.name, method.gradient, method.options), seed)
            curves.append(smoothness_curve(replace(config, method=method, seed=seed), **measure))
    table = pd.concat(curves, ignore_index=True)
    return table, divergence_notes(table)


def smoothness_of_run(
    path: Path,
    methods: Sequence[str] | None = None,
    *,
    checkpoint: str = "last",
    batches: int = 8,
    step_factors: Sequence[float] = STEP_FACTORS,
    weights: Weights = "all",
    keep: int | None = None,
    root: str | None = None,
    cache: str | None = None,
) -> pd.DataFrame:
    """Measure a finished run at its saved weights, on batches of its training images, without training.

    Computes in float32, on a GPU where there is one. Batch normalisation takes the statistics of the batch, as in
    training.

    Args:
        path: the run folder.
        methods: measure each of these, see `STUDIED`, in the place of the run's own pooling, at the same weights and on
            the same batches; None means the run's own.
        checkpoint: "last" or "best".
        batches: how many, of the run's size; fewer where the images do not suffice.
        step_factors, weights, keep, root, cache: as in `smoothness_study`.

    Returns:
        A frame with `SMOOTHNESS_COLUMNS`, one row a method and batch.

    Raises:
        RunError: not a finished run, one without a covariance, no finite gradient at its weights, or as `restore_run`.
        ConfigError: an unknown method, or one without a covariance; a number out of range.
        DatasetError, WeightsError: as in training.
    """
    if batches < 1:
        raise ConfigError(f"batches must be at least 1, got {batches}")
    config, run = RunFolder(path).read_config(root=root, cache=cache), read_finished(path)
    measure = run_measure(config, step_factors, weights)
    studied = [_studied(config, method, keep) for method in methods or ()]
    restored = restore_run(path, checkpoint=checkpoint, root=root, cache=cache, split="train")
    own = restored.head.pooling
    if not isinstance(own, CovariancePooling):
        raise RunError(f"{run.label} maps no covariance; give a run of another method, e.g. mpn_cov")
    if not studied:
        return smoothness_frame(_at_weights(restored, measure, batches), config, checkpoint, weights, run.label)
    frames = []
    for method in studied:
        restored.head.pooling = _pooling(method, own.channels)
        rows = _at_weights(restored, measure, batches)
        frames.append(smoothness_frame(rows, replace(config, method=method), checkpoint, weights))
    return pd.concat(frames, ignore_index=True)


def smoothness_of_runs(
    path: Path, methods: Sequence[str] | None = None, **measure: Any
) -> tuple[pd.DataFrame, list[str]]:
    """`smoothness_of_run` for each run in a folder, and a note for each that could not be measured.

    Raises:
        RunError: no run there, runs of several settings or two of one method and seed, or none could be measured.
        ConfigError: as `smoothness_of_run`; `methods` in the place of different ones, at whose weights they would mix.
    """
    runs, notes = find_finished([path])
    _, group = one_setting(runs)
    labels = sorted(method.label for method in group)
    if methods and len(labels) > 1:
        raise ConfigError(f"{path} holds runs of {', '.join(labels)}; measure other methods at the weights of one")
    frames = []
    for run in (run for repetitions in group.values() for run in repetitions):
        _log.info("measuring %s", run.path)
        try:
            frame = smoothness_of_run(run.path, methods, **measure)
            frames.append(frame if methods else frame.assign(label=run.label))
        except (RunError, DatasetError, WeightsError) as error:
            notes.append(f"left out {run.path}: {error}")
    if not frames:
        raise RunError("no run could be measured:\n  " + "\n  ".join(notes))
    return pd.concat(frames, ignore_index=True), notes


def _at_weights(restored: Restored, measure: Measure, batches: int) -> list[dict[str, Any]]:
    """Measures on the first batches of an epoch, always the same ones."""
    config = restored.config
    trainer, inputs = config.trainer, restored.inputs()
    objective = create_objective(trainer, restored.images, restored.device)
    samples = SeededSamples(inputs) if isinstance(inputs, ImageDataset) else inputs
    weights = sampling_weights(trainer.sampler, restored.images.targets)
    order = StepBatches(len(restored.images), trainer.batch_size, config.seed, weights=weights)
    loader = DataLoader(samples, batch_sampler=order)
    seed_epoch(config.seed, 0)
    samples.start_epoch(derived_seed(config.seed, "samples", 0))
    restored.trained.train()
    rows: list[dict[str, Any]] = []
    for inputs, targets in loader:
        mixed, mixed_targets = objective.mix(inputs.to(restored.device), targets.to(restored.device))
        try:
            found = measure(restored.trained, mixed, partial(objective.mean, targets=mixed_targets))
        except EigendecompositionError as error:
            raise RunError(f"no loss at the saved weights ({error}); train the run again") from error
        if not found.finite:
            what = f"a loss of {found.loss} with a gradient of norm {found.gradient_norm}"
            raise RunError(f"{what} at the saved weights; train the run again")
        rows.append({"step": len(rows) + 1, "diverged": False, **found.measures()})
        if len(rows) == batches:
            break
    return rows


def _studied(config: RunConfig, method: str, keep: int | None) -> MethodConfig:
    """The run's head with another pooling, METHOD or METHOD-GRADIENT."""
    name, _, gradient = method.partition("-")
    options = {"keep": keep} if name == "svd_topn" and keep is not None else {}
    return replace(config.method, name=name, gradient=gradient or None, options=options)


def _pooling(method: MethodConfig, channels: int) -> CovariancePooling:
    """Raises ConfigError: unknown method, gradient or option, or a method that maps no covariance."""
    pooling = create_pooling(
        method.name,
        channels=channels,
        gradient=method.gradient,
        eigh_device=method.eigh_device,
        solver=method.solver,
        dtype=method.spectral_dtype,
        **method.options,
    )
    if not isinstance(pooling, CovariancePooling):
        raise ConfigError(f"method {method.name!r} maps no covariance; choose of {', '.join(STUDIED)}")
    return pooling


def _limit(run: Run, config: RunConfig, steps: int | None, epochs: int | None) -> int | None:
    """Optimiser steps of a training, None: to the end of the run's epochs."""
    if steps is not None and epochs is not None:
        raise ConfigError(f"give steps or epochs, not both, got {steps} and {epochs}")
    if epochs is None:
        return config.trainer.max_steps if steps is None else steps  # that it is positive is checked in training
    if epochs < 1:
        raise ConfigError(f"epochs must be at least 1, got {epochs}")
    if run.train_images is None:
        raise RunError(f"{run.path}: the summary does not say how many images it trained on; give steps, not epochs")
    return epochs * math.ceil(run.train_images / config.trainer.batch_size)
