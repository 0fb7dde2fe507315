"""A run from its configuration to its folder."""

import contextlib
import logging
import re
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fgvc.csv_files import to_csv
from fgvc.errors import Interrupted, RunError, UserError
from fgvc.io import write_text_atomic
from fgvc.runs.config import RunConfig
from fgvc.runs.folder import RunFolder, fixed_settings
from fgvc.training.check import check
from fgvc.training.evaluation import Evaluation
from fgvc.training.loop import Trainer
from fgvc.training.machine import peak_memory_mb, reset_peak_memory, tf32_allowed
from fgvc.training.memory import out_of_memory
from fgvc.training.probe import SpectrumProbe
from fgvc.training.processes import Interruption, lost_processes_named
from fgvc.training.record import describe_run
from fgvc.training.seeds import seed_epoch
from fgvc.training.setup import Prepared, create_accelerator, prepare
from fgvc.training.states import Progress, StateStore
from fgvc.training.step import BeforeStep

_log = logging.getLogger(__name__)

SPECTRUM_IMAGES = 256


def default_run_dir(config: RunConfig) -> Path:
    """results/NAME[-RECIPE]/BACKBONE/METHOD[-GRADIENT][-OPTIONS][-hybrid]/seedN."""
    name = "-".join(part for part in (config.name, config.recipe) if part)
    hybrid = None if config.hybrid.method is None else "hybrid"
    # no brackets of a list, which a shell and Hydra would read
    options = [
        re.sub(r"[^\w.-]+", "_", f"{k}{value}").strip("_") for k, value in sorted(config.method.shown_options.items())
    ]
    method = "-".join(part for part in (config.method.name, config.method.gradient, *options, hybrid) if part)
    return Path("results") / name / config.backbone.name.replace("/", "_") / method / f"seed{config.seed}"


def train_run(config: RunConfig, *, before_step: BeforeStep | None = None) -> Path:
    """Carry out a run, or what is left of it, and write its folder.

    Args:
        config: the run.
        before_step: looks at the module before each optimiser step, see `Trainer`.

    Returns:
        The run folder, with config.yaml, metrics.csv (where an epoch was trained), predictions.csv, spectrum.npz,
        summary.json and checkpoints/.

    Raises:
        ConfigError, DatasetError, WeightsError, RunError: a mistake in the settings, the data or the folder; found
            before anything is written where it can be.
        DivergenceError: NaN or infinity in training; the summary says "failed", the best weights are kept.
        ProcessLostError: another process of the run has ended.
        Interrupted: SIGTERM or SIGINT; what was done is saved.
    """
    check(config)
    folder = RunFolder(Path(config.run_dir) if config.run_dir else default_run_dir(config))
    _source(folder, config)  # a mistake is said before the data is read
    if folder.is_finished():
        _log.info("%s is finished already; give another run_dir= to train again", folder.path)
        return folder.path
    with Interruption() as interruption, lost_processes_named():
        accelerator = create_accelerator(config, folder.path)
        start = time.perf_counter()
        reset_peak_memory()
        seed_epoch(config.seed, 0)
        with accelerator.main_process_first():  # the others find its feature maps in the cache
            prepared = prepare(config, accelerator)
        with folder.locked() if accelerator.is_main_process else contextlib.nullcontext():
            trainer = Trainer(
                config,
                prepared.trained,
                prepared.loaders,
                num_classes=prepared.num_classes,
                accelerator=accelerator,
                folder=folder,
                interruption=interruption,
                started=start,
                before_step=before_step,
            )
            source = _source(folder, config)  # once more: another process may have written meanwhile
            if source is not None:
                trainer.restore(source)
            if source is not folder and accelerator.is_main_process:
                StateStore(folder.checkpoints).clear()
            trainer.progress.seconds["features"] += prepared.feature_seconds
            _carry_out(config, folder, prepared, trainer, interruption)
            if accelerator.is_main_process:
                StateStore(folder.checkpoints).keep_newest()
        if interruption.requested is not None:  # so that a sweep ends, too
            name = interruption.requested.name
            raise Interrupted(name, f"{name}: stopped after the end of {folder.path}")
    return folder.path


def _carry_out(
    config: RunConfig, folder: RunFolder, prepared: Prepared, trainer: Trainer, interruption: Interruption
) -> None:
    """Train from where the run is, and write its folder."""
    accelerator = trainer.accelerator
    summary: dict[str, Any] = {"status": "stopped", "reason": "killed", "final": None}
    if accelerator.is_main_process:
        # described now: the checkout may have moved on when the run ends
        summary = describe_run(config, prepared) | {"tf32": tf32_allowed(accelerator.device)} | summary
        folder.begin(config, summary | _books(trainer.progress))
    if config.trainer.tracker:
        accelerator.init_trackers(config.name)
    interruption.patient = True
    try:
        with lost_processes_named():
            evaluation = trainer.fit()
        if accelerator.is_main_process:
            _write_results(folder, prepared, evaluation, accelerator.device)
        final = asdict(evaluation.accuracy) | {"epoch": trainer.progress.epoch}
        summary |= {"status": "finished", "reason": None, "final": final, "epochs": trainer.progress.epoch}
    except KeyboardInterrupt as error:
        summary["reason"] = str(error) or "interrupted"
        raise
    except BaseException as error:
        advice = out_of_memory(
            error,
            batch_size=config.trainer.batch_size,
            accumulation=config.trainer.accumulation,
            processes=accelerator.num_processes,
        )
        failed = advice or error
        summary |= {"status": "failed", "reason": f"{type(failed).__name__}: {failed}"}
        if advice is not None:
            raise advice from error
        # printed now: when the connections to other processes end, these would speak first
        if accelerator.num_processes > 1 and not isinstance(error, UserError):
            traceback.print_exc()
        raise
    finally:
        trainer.books.count_time()
        if accelerator.is_main_process:
            folder.write_summary(summary | _books(trainer.progress))
        accelerator.end_training()


def _source(folder: RunFolder, config: RunConfig) -> RunFolder | None:
    """The run folder to continue from, None for a new run; RunError where it holds another run or none."""
    if folder.config_file.is_file():
        if config.resume == "never":
            raise RunError(
                f"{folder.path} holds a run already and resume=never; delete the folder, give another run_dir=, "
                "or continue it with resume=auto"
            )
        _require_same(folder, config)
        if StateStore(folder.checkpoints).exists():
            return folder
        if (old := folder.checkpoints / "state.pt").is_file():
            raise RunError(f"{old} is the state of an earlier version, which cannot be continued; delete {folder.path}")
    if config.resume in ("auto", "never"):
        return None
    source = RunFolder(Path(config.resume))
    _require_same(source, config)
    if not StateStore(source.checkpoints).exists():
        raise RunError(f"{source.checkpoints} holds no state: the run in {source.path} has saved none yet")
    return source


def _require_same(folder: RunFolder, config: RunConfig) -> None:
    """Raise RunError where the run in a folder has another configuration, but for what a continued run may change."""
    old, new = fixed_settings(folder.read_config()), fixed_settings(config)
    differences = [
        f"{key} was {old.get(key)}, now {new.get(key)}" for key in {**old, **new} if old.get(key) != new.get(key)
    ]
    if differences:
        raise RunError(
            f"{folder.path} holds a run of another configuration: {'; '.join(differences)}; "
            "give another run_dir= or delete the folder"
        )


def _books(progress: Progress) -> dict[str, Any]:
    """What the summary says of the run's course: the selected epoch, seconds by phase, peak memory."""
    best = progress.best and {key: value for key, value in progress.best.items() if key != "selected_by"}
    seconds = {key: round(value, 3) for key, value in progress.seconds.items()}
    return {"best": best, "seconds": seconds, "peak_memory_mb": round(peak_memory_mb(), 1)}


def _write_results(folder: RunFolder, prepared: Prepared, evaluation: Evaluation, device: torch.device) -> None:
    test = prepared.images.test
    write_text_atomic(
        folder.predictions_file, to_csv(evaluation.predictions(test.relative_paths(), test.classes), None)
    )
    spectrum = SpectrumProbe(prepared.loaders.test.dataset, SPECTRUM_IMAGES).measure(prepared.trained, device)
    spectrum.write(folder.spectrum_file)
