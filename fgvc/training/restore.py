"""A finished run brought back: its data, its model with the saved weights, and their evaluation."""

from pathlib import Path
from typing import Any

import torch

from fgvc.errors import RunError
from fgvc.files import write_json_atomic
from fgvc.training.config import RunConfig
from fgvc.training.evaluation import Accuracy, evaluate
from fgvc.training.run_folder import RunFolder
from fgvc.training.seeding import seed_epoch
from fgvc.training.setup import Prepared, create_accelerator, prepare


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
    accelerator = create_accelerator(config, path)
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
        config.backbone.pretrained, config.backbone.weights, config.initial_weights = False, None, None
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
