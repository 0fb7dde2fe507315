"""A whole training run: from its configuration to its folder."""

import contextlib
import logging
import re
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from fgvc.errors import Interrupted, OutOfMemoryError, RunError, UserError, WeightsError
from fgvc.io import expanded, sha256, to_csv, write_text_atomic
from fgvc.models import FineGrainedModel, weights_digest
from fgvc.models.files import locate_weights
from fgvc.models.transformers_backbone import without_folder
from fgvc.pooling import pooling_label
from fgvc.provenance import (
    reset_peak_memory,
    tf32_allowed,
)
from fgvc.runs.config import HybridConfig, RunConfig, check_config, check_steps, flatten
from fgvc.runs.folder import RunFolder, fixed_settings
from fgvc.runs.statistics import shot_accuracy
from fgvc.training.environment import create_accelerator
from fgvc.training.evaluation import Evaluation
from fgvc.training.guard import Guard
from fgvc.training.hybrid import Stages, check_hybrid
from fgvc.training.learner import Learner, create_objective, synchronise_batch_norm
from fgvc.training.loop import Trainer
from fgvc.training.optim import create_optimizer, schedule_factor
from fgvc.training.probe import SpectrumProbe
from fgvc.training.processes import Interruption, is_lost_connection, lost_process
from fgvc.training.record import SESSION, describe_run, progress_summary, run_header, sessions_of, write_split
from fgvc.training.seeds import seed_epoch
from fgvc.training.setup import Prepared, build_backbone, listing_digest, open_splits, prepare
from fgvc.training.states import RunLog, StateStore
from fgvc.training.step import BeforeStep, Stepper

_log = logging.getLogger(__name__)

SPECTRUM_IMAGES = 256


def train_run(config: RunConfig, *, before_step: BeforeStep | None = None, rerun_of: Path | None = None) -> Path:
    """Train a run, or the rest of an unfinished one, and write its folder.

    Args:
        config: configuration of the run.
        before_step: function to call before each optimiser step, see `fgvc.training.step.BeforeStep`; it must not
            change the module or the random generators.
        rerun_of: folder of the run that this one repeats; the summary names it.

    Returns:
        The run folder, with config.yaml, metrics.csv (if an epoch was trained), predictions.csv, spectrum.npz,
        summary.json and checkpoints/; and split.csv if fgvc chose the test or the validation images.

    Raises:
        ConfigError, DatasetError, WeightsError, RunError: a mistake in the settings, the data or the folder; raised
            before anything is written, if possible.
        DivergenceError: NaN or infinity in training; the summary says "failed", the best weights are kept.
        OutOfMemoryError: memory ran out; the message names a setting that needs less.
        ProcessLostError: another process of the run has ended.
        Interrupted: SIGTERM or SIGINT; the state is saved.
    """
    check_config(config)
    config.backbone = without_folder(config.backbone)
    pooling_label(config.method.name)  # raises for an unknown method
    if config.hybrid != HybridConfig():
        check_hybrid(config)
    folder = RunFolder(Path(config.run_dir) if config.run_dir else default_run_dir(config))
    states = StateStore(folder.checkpoints)
    try:
        source = find_source(config, folder, states)  # report a mistake before reading the data
    except RunError as error:
        if expanded(config.dataset.root).exists():
            raise
        raise RunError(f"dataset.root={config.dataset.root} does not exist. Besides, {error}") from error
    if _is_done(folder, config):
        return folder.path
    with Interruption() as interruption, _readable_errors(config):
        started = time.perf_counter()
        reset_peak_memory()
        accelerator = create_accelerator(config, folder.path)
        main = accelerator.is_main_process
        seed_epoch(config.seed, 0)
        prepared = prepare(config, accelerator, partial(require_same_digests, config, source))
        with folder.locked() if main else contextlib.nullcontext():
            accelerator.wait_for_everyone()  # the lock is held now, so every process finds the same
            # again, since another command may have written, or finished the run, while this one read the data
            source = find_source(config, folder, states)
            if _is_done(folder, config):
                return folder.path
            trainer = create_trainer(config, prepared, accelerator, folder, states, interruption, started, before_step)
            require_same_digests(config, source, prepared.digests)
            if source is not None:
                trainer.restore(*source)
            if main and (source is None or source[0] is not folder):
                states.clear()
            trainer.log.progress.seconds["features"] += prepared.feature_seconds
            _log.info("%s", run_header(config, prepared, accelerator, folder))
            sessions = [] if source is None or not main else sessions_of(source[0])
            with _summary(config, prepared, trainer, sessions, rerun_of) as summary:
                interruption.patient = True
                evaluation = trainer.fit()
                if main:
                    _write_results(folder, prepared, evaluation, accelerator.device)
                final = {**vars(evaluation.accuracy), "epoch": trainer.log.progress.epoch}
                summary |= {"status": "finished", "reason": None, "final": final, "epochs": trainer.log.progress.epoch}
                summary["shots"] = shot_accuracy(
                    evaluation.targets.numpy(), evaluation.predicted.numpy(), prepared.train.class_sizes
                )
            if main:
                states.keep_newest()
        if interruption.requested is not None:  # also ends a sweep
            name = interruption.requested.name
            raise Interrupted(name, f"{name}: stopped after the end of {folder.path}")
    return folder.path


def _is_done(folder: RunFolder, config: RunConfig) -> bool:
    """Return whether the run is finished. Raises RunError if images or weights, where they are here, are others now."""
    if not folder.is_finished():
        return False
    if others := other_images(folder, config) or _other_weights(folder, config):
        raise RunError(f"{folder.path} is finished, on {others}; give {_another(config)} to train on these")
    _log.info("%s is finished already; to train again, delete it or give %s", folder.path, _another(config))
    return True


def other_images(folder: RunFolder, config: RunConfig) -> str | None:
    """Say how the images of the dataset, where it is here, differ from those that a run listed; None if they do not."""
    summary = folder.read_summary()
    before = (summary.get("dataset_fingerprint") or {}).get("listed")  # runs of earlier versions do not say
    if not (before and expanded(config.dataset.root).exists()):
        return None
    splits = open_splits(config)
    coarse = {level: list(names) for level, names in splits[0].coarse.items()}
    if config.trainer.hierarchy is not None and coarse != (summary.get("coarse") or {}):
        return f"other coarser labels than are in {config.dataset.root} now"
    if listing_digest(splits) == before:
        return None
    counts = ("num_classes", "train_images", "test_images")
    then = "{} classes, {} training and {} test images".format(*(summary.get(name) for name in counts))
    now = f"{len(splits[0].classes)} classes, {len(splits[0])} training and {len(splits[1])} test images"
    return f"other images ({then}) than are in {config.dataset.root} now ({now})"


def _other_weights(folder: RunFolder, config: RunConfig) -> str | None:
    """Name the file of weights, where it is here, that holds others than a run began with; None if there is none."""
    source = config.initial_weights or config.backbone.weights
    try:
        file = locate_weights(source, "weights") if source else None
    except WeightsError:  # it is not here
        return None
    if file is None:
        return None
    name = "initial_weights" if config.initial_weights else "weights"
    try:
        digest = sha256(file) if config.initial_weights else weights_digest(build_backbone(config))
    except WeightsError:  # of another architecture
        digest = ""
    before = folder.read_summary().get(f"{name}_digest")
    return None if before in (None, digest) else f"other weights than are in {file} now"


def default_run_dir(config: RunConfig) -> Path:
    """Return results/NAME[-RECIPE]/BACKBONE/METHOD[-GRADIENT][-OPTIONS][-hybrid]/seedN."""
    name = "-".join(part for part in (config.name, config.recipe) if part)
    hybrid = None if config.hybrid.method is None else "hybrid"
    # without list brackets, since a shell and Hydra would interpret them
    options = [
        re.sub(r"[^\w.-]+", "_", f"{k}{value}").strip("_") for k, value in sorted(config.method.shown_options.items())
    ]
    method = "-".join(part for part in (config.method.name, config.method.gradient, *options, hybrid) if part)
    return Path("results") / name / config.backbone.name.replace("/", "_") / method / f"seed{config.seed}"


def find_source(config: RunConfig, folder: RunFolder, states: StateStore) -> tuple[RunFolder, StateStore] | None:
    """Return the run to continue from (this one or that of resume=PATH) and its states; None for a new run.

    Raises:
        RunError: the folder holds another run, or the folder in `resume` holds none.
    """
    if folder.config_file.is_file():
        if config.resume == "never":
            raise RunError(
                f"{folder.path} holds a run already and resume=never; delete the folder, give {_another(config)}, "
                "or continue it with resume=auto"
            )
        if folder.has_mean_weights():
            raise RunError(f"{folder.path} holds a mean of weights of fgvc soup; give {_another(config)}")
        _require_same(folder, config)
        if states.exists():
            return folder, states
        if (old := folder.checkpoints / "state.pt").is_file():
            raise RunError(f"{old} is the state of an earlier version and cannot be continued; delete {folder.path}")
    elif folder.path.resolve() == expanded(config.dataset.root).resolve():
        raise RunError(f"{folder.path} is the folder of the images; give {_another(config)}")
    elif foreign := folder.files():
        raise RunError(f"{foreign[0]} exists, and without config.yaml it is of no run; give {_another(config)}")
    if config.resume in ("auto", "never"):
        return None
    source = RunFolder(Path(config.resume))
    _require_same(source, config)
    source_states = StateStore(source.checkpoints)
    if not source_states.exists():
        raise RunError(f"{source.checkpoints} holds no state: the run in {source.path} has saved none yet")
    return source, source_states


def _another(config: RunConfig) -> str:
    """Return the setting that leads to another folder; in a sweep, one `run_dir` would be that of all runs."""
    return "another run_dir=" if config.run_dir else f"another name= (it is {config.name})"


def _require_same(folder: RunFolder, config: RunConfig) -> None:
    """Raise RunError if the run in a folder differs in a setting that a resumed run must keep."""
    old, new = fixed_settings(folder.read_config()), fixed_settings(config)
    keys = dict.fromkeys((*new, *old))  # an option may be in one of them alone
    differences = [f"{key} was {old.get(key)}, now {new.get(key)}" for key in keys if old.get(key) != new.get(key)]
    if differences:
        raise RunError(
            f"{folder.path} holds a run of another configuration: {'; '.join(differences)}; "
            f"give {_another(config)} or delete the folder"
        )


_INPUTS = {
    "weights": "weights of the backbone",
    "initial_weights": "initial weights",
    "classes": "classes",
    "coarse": "coarser labels",
    "train_list": "training images",
    "train_content": "training images",
    "validation_list": "held-out images",
    "validation_content": "held-out images",
    "test_list": "test images",
    "test_content": "test images",
}


def require_same_digests(
    config: RunConfig, source: tuple[RunFolder, StateStore] | None, digests: Mapping[str, str]
) -> None:
    """Raise RunError if a run to continue began with other weights, images or classes; `digests` are those of now."""
    if source is None:
        return
    folder, states = source
    before = states.digests()
    if not before:
        _log.warning("%s: its states hold no digests of weights and images, so these are not compared", folder.path)
        return
    # an earlier version kept no digests of what is in the files
    known = [name for name in _INPUTS if name in before or name in ("weights", "classes") or name.endswith("_list")]
    changed = [name for name in known if before.get(name) != digests.get(name)]
    if changed:
        root, weights = f"dataset.root={config.dataset.root}", f"backbone.weights={config.backbone.weights}"
        if config.initial_weights is not None:
            weights = f"initial_weights={config.initial_weights}"
        settings = dict.fromkeys(weights if "weights" in name else root for name in changed)
        raise RunError(
            f"{folder.path} began with other {', '.join(dict.fromkeys(_INPUTS[name] for name in changed))} than are "
            f"there now ({', '.join(settings)}); restore them to continue, or give {_another(config)} to train again"
        )


def create_trainer(
    config: RunConfig,
    prepared: Prepared,
    accelerator: Accelerator,
    folder: RunFolder,
    states: StateStore,
    interruption: Interruption,
    started: float,
    before_step: BeforeStep | None,
) -> Trainer:
    """Build the trainer of a run from its parts; later code does not see the whole configuration.

    Raises:
        ConfigError: unknown optimiser or invalid rate, `max_steps` ends a hybrid run before its switch, or mixup or
            CutMix would get odd parts of a batch.
    """
    loaders = prepared.loaders
    settings = replace(config.trainer, epochs=config.trainer.planned_epochs(loaders.batches.steps))
    check_steps(config, config.switch_epoch * loaders.batches.steps, accelerator.num_processes)
    module = prepared.trained
    if accelerator.num_processes > 1:
        module = synchronise_batch_norm(module, accelerator)
    optimizer = create_optimizer(module, config.optimizer)
    objective = create_objective(settings, prepared.train, accelerator.device)
    if settings.compile:
        assert isinstance(module, FineGrainedModel)
        module.backbone.compile()  # in place: names of weights stay
    learner = Learner(module, optimizer, objective, accelerator, ema_decay=settings.ema_decay)
    stages = None
    if config.hybrid.method is not None:
        stages = Stages(prepared.head, config.method, config.hybrid, config.switch_epoch)
    return Trainer(
        settings,
        seed=config.seed,
        schedule=partial(schedule_factor, config.schedule, epochs=settings.epochs),
        learner=learner,
        stepper=Stepper(
            learner,
            accumulation=settings.accumulation,
            clip_norm=settings.clip_norm,
            before_step=before_step,
            reduction_gradient=config.optimizer.reduction_gradient,
        ),
        loaders=loaders,
        guard=Guard(settings, learner, loaders, folder),
        log=RunLog(folder, writes=accelerator.is_main_process, started=started),
        folder=folder,
        states=states,
        digests=prepared.digests,
        interruption=interruption,
        stages=stages,
    )


@contextlib.contextmanager
def _summary(
    config: RunConfig, prepared: Prepared, trainer: Trainer, sessions: list[dict[str, Any]], rerun_of: Path | None
) -> Iterator[dict[str, Any]]:
    """Write the configuration and a first summary, and the final summary when the block ends or fails."""
    accelerator, folder = trainer.accelerator, trainer.folder
    # described now, since the checkout may change before the run ends
    summary = describe_run(config, prepared) if accelerator.is_main_process else {}
    tf32 = tf32_allowed() if accelerator.device.type == "cuda" else None
    summary |= {"tf32": tf32, "status": "stopped", "reason": "killed, or still running", "final": None}
    summary["rerun_of"] = None if rerun_of is None else str(rerun_of)
    if accelerator.is_main_process:
        now = {key: summary[key] for key in SESSION}
        # those under other code or on another machine
        summary["earlier_sessions"] = [session for session in sessions if session != now]
        folder.begin(config, summary | progress_summary(trainer.log.progress))
        if prepared.test.samples.own_split or config.trainer.val_fraction:
            write_split(folder, prepared)
    if config.trainer.tracker:
        _start_tracker(config, accelerator, folder)
    try:
        with _readable_errors(config):
            yield summary
    except KeyboardInterrupt as error:
        summary["reason"] = str(error) or "interrupted"
        raise
    except BaseException as error:
        summary |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
        # printed now, otherwise the other processes report their lost connections first
        if accelerator.num_processes > 1 and not isinstance(error, UserError):
            traceback.print_exc()
        raise
    finally:
        trainer.log.count_time()
        if accelerator.is_main_process:
            folder.write_summary(summary | progress_summary(trainer.log.progress))
        for tracker in accelerator.trackers:
            tracker.finish()


def _start_tracker(config: RunConfig, accelerator: Accelerator, folder: RunFolder) -> None:
    """Start `trainer.tracker` with the settings of the run; its project is the experiment.

    TensorBoard writes into the run folder; wandb and mlflow where their own variables say.
    """
    label = "-".join(folder.path.resolve().parts[-2:])  # e.g. seb-seed0
    own: dict[str, dict[str, Any]] = {"wandb": {"name": label}, "mlflow": {"run_name": label}}
    every = flatten(asdict(config))
    settings = {key: value if isinstance(value, int | float | str) else str(value) for key, value in every.items()}
    project = config.name.replace("/", "_")  # a name, not a path out of the run folder
    accelerator.init_trackers(project, config=settings, init_kwargs=own)


def _write_results(folder: RunFolder, prepared: Prepared, evaluation: Evaluation, device: torch.device) -> None:
    test = prepared.test
    predictions = evaluation.predictions(test.relative_paths(), test.classes)
    write_text_atomic(folder.predictions_file, to_csv(predictions, None))
    SpectrumProbe(prepared.loaders.test.dataset, SPECTRUM_IMAGES).measure(prepared.trained, device).write(
        folder.spectrum_file
    )


# RuntimeErrors of PyTorch on CPU and MPS, cuDNN and cuBLAS when memory runs out
_NO_MEMORY = re.compile(r"can't allocate memory|out of memory|(CUDNN|CUBLAS)_STATUS_(INTERNAL_ERROR_HOST_)?ALLOC", re.I)
_AMOUNT = re.compile(r"(?:tried to allocate|unable to allocate) (?:(\d+) bytes|([\d.]+ [KMGTPE]i?B))", re.I)


@contextlib.contextmanager
def _readable_errors(config: RunConfig) -> Iterator[None]:
    """Turn library errors for lack of memory or a lost process into errors that say what to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if is_lost_connection(error):
            raise lost_process() from error
        advice = memory_advice(error, config.trainer.batch_size, config.trainer.accumulation)
        if advice is not None:
            raise OutOfMemoryError(advice) from error
        raise


def memory_advice(error: BaseException, batch_size: int, accumulation: int) -> str | None:
    """Return a message with settings that need less memory; None if `error` is not about memory.

    Args:
        error: exception of a step.
        batch_size: number of images in a step, `trainer.batch_size`.
        accumulation: number of micro-batches in a step, `trainer.accumulation`.
    """
    said = str(error)
    if not (isinstance(error, MemoryError | torch.OutOfMemoryError) or _NO_MEMORY.search(said)):
        return None
    found = _AMOUNT.search(said)
    asked = found and (found[2] or f"{int(found[1]) / 2**20:,.1f} MiB")
    room = f"no room for another {asked} in memory" if asked else "not enough memory"
    if "in DataLoader worker process" in said:
        return f"{room} for an image-loading process; lower trainer.workers"
    smaller = "choose a smaller dataset.transform.size or method.reduction (both change the result)"
    if isinstance(error, torch.OutOfMemoryError) or re.search("CUDA|CUDNN|CUBLAS", said):
        smaller += "; with method.solver=eigh, method.eigh_device=cpu takes the eigendecompositions off the GPU"
    if accumulation >= batch_size:
        return f"{room} even with 1 of trainer.batch_size={batch_size} images at a time; {smaller}"
    return (
        f"{room}; set trainer.accumulation={min(2 * accumulation, batch_size)}: it splits the "
        f"trainer.batch_size={batch_size} images of a step into smaller batches and keeps the result comparable (only "
        f"batch normalisation in training sees fewer images). If that is still too much, {smaller}"
    )
