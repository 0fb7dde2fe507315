"""The model of a run with its saved weights, without its dataset."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from fgvc.errors import RunError
from fgvc.models import Backbone, FineGrainedModel, weights_digest
from fgvc.training.config import MethodConfig, RunConfig
from fgvc.training.hybrid import switch_epoch
from fgvc.training.run_folder import RunFolder
from fgvc.training.seeding import seed_epoch
from fgvc.training.setup import build_backbone, build_model


def load_model(path: Path, checkpoint: str = "last") -> FineGrainedModel:
    """The whole model of a run, backbone and head, in evaluation mode on the CPU.

    Args:
        path: the run folder.
        checkpoint: "last" or "best".

    Raises:
        RunError: not a run, its weights are missing, damaged or of another architecture, or the weights of the frozen
            backbone are not those its head was trained on.
        ConfigError, WeightsError: as in training.
    """
    folder = RunFolder(path)
    config = folder.read_config()
    return restore_model(folder, config, restore_backbone(config), checkpoint).eval()


def restore_backbone(config: RunConfig) -> Backbone:
    """The backbone of a run: of a frozen one with the weights it had, else to be filled by `restore_model`.

    `config` is changed: of a run that saved the whole model it loses the weights that training started from.
    """
    if not config.backbone.frozen:
        config.backbone.pretrained, config.backbone.weights, config.initial_weights = False, None, None
    seed_epoch(config.seed, 0)  # a backbone without weights is drawn as in training
    return build_backbone(config)


def restore_model(folder: RunFolder, config: RunConfig, backbone: Backbone, checkpoint: str) -> FineGrainedModel:
    """The model of a run on `backbone`, see `restore_backbone`, with its "last" or "best" weights.

    Raises:
        RunError, WeightsError: as `load_model`.
    """
    weights, summary = folder.read_weights(checkpoint), folder.read_summary()
    stage = replace(config, method=restored_method(config, summary, checkpoint))
    model = build_model(stage, backbone, len(read_classes(folder)))
    if config.backbone.frozen:
        _check_digest(config, weights_digest(backbone), summary)
    try:
        (model.head if config.backbone.frozen else model).load_state_dict(weights)
    except RuntimeError as error:
        raise RunError(f"{folder.weights_file(checkpoint)} belongs to another architecture: {error}") from error
    return model


def restored_method(config: RunConfig, summary: dict[str, Any], checkpoint: str) -> MethodConfig:
    """The head that the "last" or "best" weights belong to: of a hybrid run, with the pooling of their epoch's stage.

    Raises:
        RunError: the summary of a hybrid run does not say of which epoch the weights are.
    """
    if config.hybrid.method is None:
        return config.method
    epoch = summary.get("epochs") if checkpoint == "last" else (summary.get("best") or {}).get("epoch")
    if not isinstance(epoch, int):
        raise RunError(f"the summary does not say of which epoch the {checkpoint} weights are; train the run again")
    if epoch > switch_epoch(config):
        return config.method
    return replace(config.method, name=config.hybrid.method, gradient=None, options=config.hybrid.options)


def read_classes(folder: RunFolder) -> list[str]:
    """Names of the classes a run was trained with. Raises RunError where its summary has none."""
    classes = folder.read_summary().get("classes")
    if not isinstance(classes, list) or not classes:
        raise RunError(f"{folder.summary_file} names no classes; train the run again with this version")
    return [str(name) for name in classes]


def _check_digest(config: RunConfig, digest: str, summary: dict[str, Any]) -> None:
    """Raise RunError where the frozen backbone is not the one the run's head was trained on."""
    trained = summary.get("weights_digest")
    if digest != trained:
        raise RunError(
            f"backbone.weights={config.backbone.weights} are not the weights the run's head was trained on "
            f"(sha256 {digest[:12]}, then {str(trained)[:12]}, see weights_digest in summary.json); "
            "bring the same file back"
        )
