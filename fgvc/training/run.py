"""A run from its configuration to its folder, and the evaluation of a finished one."""

import logging
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from fgvc.errors import RunError
from fgvc.files import atomic_path, write_json_atomic
from fgvc.pooling import is_second_order, pooling_label, pooling_spectrum
from fgvc.training.check import check
from fgvc.training.config import RunConfig
from fgvc.training.evaluation import Accuracy, Evaluation, evaluate
from fgvc.training.loop import Progress, Trainer
from fgvc.training.machine import commit, peak_memory_mb, reset_peak_memory, versions
from fgvc.training.run_folder import RunFolder
from fgvc.training.seeding import seed_epoch
from fgvc.training.setup import Prepared, prepare

_log = logging.getLogger(__name__)

SPECTRUM_IMAGES = 256


def default_run_dir(config: RunConfig) -> Path:
    """results/NAME/BACKBONE/METHOD[-GRADIENT]/seedN."""
    method = config.method.name + (f"-{config.method.gradient}" if config.method.gradient else "")
    return Path("results") / config.name / config.backbone.name.replace("/", "_") / method / f"seed{config.seed}"


def train_run(config: RunConfig) -> Path:
    """Carry out a run, or what is left of it, and write its folder.

    Returns:
        The run folder, with config.yaml, metrics.csv, predictions.csv, spectrum.npz, summary.json and checkpoints/.

    Raises:
        ConfigError, DatasetError, WeightsError, RunError: a mistake in the settings, the data or the folder; found
            before anything is written where it can be.
        DivergenceError: NaN or infinity in training; the summary says "failed", the best weights are kept.
    """
    check(config)
    folder = RunFolder(Path(config.run_dir) if config.run_dir else default_run_dir(config))
    source = _source(folder, config)
    if folder.is_finished():
        _log.info("%s is finished already; give another run_dir= to train again", folder.path)
        return folder.path
    accelerator = _accelerator(config, folder.path)
    start = time.perf_counter()
    reset_peak_memory()
    seed_epoch(config.seed, 0)
    with accelerator.main_process_first():  # the others find its feature maps in the cache
        prepared = prepare(config, accelerator.device)
    trainer = Trainer(
        config,
        prepared.trained,
        prepared.loaders,
        num_classes=prepared.num_classes,
        accelerator=accelerator,
        folder=folder,
    )
    if source is not None:
        trainer.restore(source)
    trainer.progress.seconds["features"] += prepared.feature_seconds
    trainer.progress.seconds["total"] += time.perf_counter() - start
    # described now: the checkout may have moved on when the run ends
    summary = _description(config, prepared) | {"status": "stopped", "reason": "killed", "final": None}
    if accelerator.is_main_process:
        folder.begin(config, summary | _books(trainer.progress))
    if config.trainer.tracker:
        accelerator.init_trackers(config.name)
    try:
        evaluation = trainer.fit()
        if accelerator.is_main_process:
            _write_results(folder, prepared, evaluation, accelerator.device)
        final = evaluation.accuracy.as_dict() | {"epoch": trainer.progress.epoch}
        summary |= {"status": "finished", "reason": None, "final": final, "epochs": trainer.progress.epoch}
    except KeyboardInterrupt:
        summary["reason"] = "interrupted"
        raise
    except BaseException as error:
        summary |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
        raise
    finally:
        trainer.count_time()
        if accelerator.is_main_process:
            folder.write_summary(summary | _books(trainer.progress))
        accelerator.end_training()
    return folder.path


def _source(folder: RunFolder, config: RunConfig) -> RunFolder | None:
    """The run folder to continue from, None for a new run; RunError where it holds another run or none."""
    if folder.claimable(config):
        return folder
    if config.resume in ("auto", "never"):
        return None
    source = RunFolder(Path(config.resume))
    source.require_state(config)
    return source


def _books(progress: Progress) -> dict[str, Any]:
    """What the summary says of the run's course: the selected epoch, seconds by phase, peak memory."""
    best = progress.best and {key: value for key, value in progress.best.items() if key != "selected_by"}
    seconds = {key: round(value, 3) for key, value in progress.seconds.items()}
    return {"best": best, "seconds": seconds, "peak_memory_mb": round(peak_memory_mb(), 1)}


def evaluate_run(path: Path, *, checkpoint: str = "last", root: str | None = None) -> Accuracy:
    """Evaluate the "last" or "best" weights of a run on its test split; writes evaluation-CHECKPOINT.json there.

    Args:
        path: the run folder.
        checkpoint: "last" or "best".
        root: folder of the dataset, where it is not the one the run was trained with.

    Raises:
        RunError: not a run, or its weights are missing, damaged or of another architecture.
        DatasetError, WeightsError: as in training.
    """
    config = RunFolder(path).read_config()
    accelerator = _accelerator(config, path)
    prepared = restore_run(path, accelerator.device, checkpoint=checkpoint, root=root)
    module, loader = accelerator.prepare(prepared.trained, prepared.loaders.test)
    evaluation = evaluate(module, loader, prepared.num_classes, accelerator, "test")
    write_json_atomic(
        path / f"evaluation-{checkpoint}.json",
        {"checkpoint": checkpoint, "images": len(evaluation.targets), **evaluation.accuracy.as_dict()},
    )
    return evaluation.accuracy


def restore_run(path: Path, device: torch.device, *, checkpoint: str = "last", root: str | None = None) -> Prepared:
    """Data and model of a run, with its "last" or "best" weights.

    Args:
        path: the run folder.
        device: where the model goes.
        checkpoint: "last" or "best".
        root: folder of the dataset, where it is not the one the run was trained with.

    Raises:
        RunError: not a run, its weights are missing, damaged or of another architecture, or the data or the frozen
            backbone are not those it was trained with.
        DatasetError, WeightsError: as in training.
    """
    folder = RunFolder(path)
    config = folder.read_config()
    weights = folder.read_weights(checkpoint)
    summary = folder.read_summary()
    if root is not None:
        config.dataset.root = root
    if not config.backbone.frozen:  # the checkpoint holds the whole model
        config.backbone.pretrained, config.backbone.weights = False, None
    seed_epoch(config.seed, 0)  # a backbone without weights is drawn as in training
    prepared = prepare(config, device)
    _check_same(config, summary, prepared)
    try:
        prepared.trained.load_state_dict(weights)
    except RuntimeError as error:
        raise RunError(f"{folder.weights_file(checkpoint)} belongs to another architecture: {error}") from error
    return prepared


def _check_same(config: RunConfig, summary: dict[str, Any], prepared: Prepared) -> None:
    """Raise RunError where the data or the frozen backbone are not those the run was trained with."""
    classes, trained = prepared.images.train.classes, summary.get("classes")
    if classes != trained:
        known = f"{len(trained)}, the first {trained[0]!r}" if isinstance(trained, list) and trained else "others"
        raise RunError(
            f"{config.dataset.root} has {len(classes)} classes, the first {classes[0]!r}; the run was trained with "
            f"{known}; give the folder of the same dataset"
        )
    if prepared.frozen and prepared.weights_digest != summary.get("weights_digest"):
        raise RunError(
            f"backbone.weights={config.backbone.weights} are not the weights the run's head was trained on "
            f"(sha256 {prepared.weights_digest[:12]}, then {str(summary.get('weights_digest'))[:12]})"
        )


def _accelerator(config: RunConfig, path: Path) -> Accelerator:
    AcceleratorState._reset_state()  # one process may carry out several runs, of different precision
    return Accelerator(mixed_precision=config.trainer.precision, log_with=config.trainer.tracker, project_dir=path)


def _write_results(folder: RunFolder, prepared: Prepared, evaluation: Evaluation, device: torch.device) -> None:
    folder.write_table(
        folder.predictions_file,
        evaluation.predictions([prepared.images.test.relative_path(i) for i in range(len(prepared.images.test))]),
    )
    spectra = [pooling_spectrum(prepared.head.pooling, x) for x in prepared.probe(SPECTRUM_IMAGES, device)]
    arrays = {"before": np.concatenate([before.cpu().numpy() for before, _ in spectra])}
    after = [values.cpu().numpy() for _, values in spectra if values is not None]
    if after:
        arrays["after"] = np.concatenate(after)
    with atomic_path(folder.spectrum_file) as temporary:
        np.savez(temporary, **arrays)  # type: ignore[arg-type]  # numpy's stub takes the names for options


def _description(config: RunConfig, prepared: Prepared) -> dict[str, Any]:
    """What a table needs to know of a run besides its result."""
    return {
        "name": config.name,
        "method": config.method.name,
        "gradient": config.method.gradient,
        "label": pooling_label(config.method.name, config.method.gradient),
        "dataset": config.dataset.name,
        "backbone": config.backbone.name,
        "frozen": config.backbone.frozen,
        "reduction": config.method.reduction if is_second_order(config.method.name) else None,
        "image_size": config.dataset.transform.size,
        "seed": config.seed,
        "epochs": config.trainer.epochs,
        "num_classes": prepared.num_classes,
        "classes": prepared.images.train.classes,
        "train_images": len(prepared.images.train),
        "test_images": len(prepared.images.test),
        "out_features": prepared.head.pooling.out_features,
        "weights_digest": prepared.weights_digest,
        "versions": versions(),
        "commit": commit(),
        "command": " ".join(sys.argv),
    }
