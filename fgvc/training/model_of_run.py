"""The model of a run with its saved weights, without its dataset."""

from pathlib import Path

from fgvc.errors import RunError
from fgvc.models import FineGrainedModel, PoolingHead, create_backbone, load_checkpoint, weights_digest
from fgvc.training.run_folder import RunFolder
from fgvc.training.seeding import seed_epoch


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
    config, summary = folder.read_config(), folder.read_summary()
    weights = folder.read_weights(checkpoint)
    frozen = config.backbone.frozen
    if not frozen:  # the checkpoint holds the whole model
        config.backbone.pretrained, config.backbone.weights, config.initial_weights = False, None, None
    seed_epoch(config.seed, 0)  # a frozen backbone without weights is drawn as in training
    backbone = create_backbone(
        config.backbone.name,
        pretrained=config.backbone.pretrained,
        weights=config.backbone.weights,
        last_stride=config.backbone.last_stride,
        image_size=config.dataset.transform.size,
    )
    head = PoolingHead(
        backbone.out_channels,
        method=config.method.name,
        num_classes=len(read_classes(folder)),
        reduction=config.method.reduction,
        gradient=config.method.gradient,
        eigh_device=config.method.eigh_device,
        options=config.method.options,
    )
    model = FineGrainedModel(backbone, head)
    if config.initial_weights is not None:
        load_checkpoint(model, config.initial_weights, classifier=None)
    if frozen and weights_digest(backbone) != summary.get("weights_digest"):
        raise RunError(
            f"{path}: backbone.weights={config.backbone.weights} are not the weights the run's head was trained on: "
            "their sha256 is not weights_digest in summary.json; bring the same file back"
        )
    try:
        (head if frozen else model).load_state_dict(weights)
    except RuntimeError as error:
        raise RunError(f"{folder.weights_file(checkpoint)} belongs to another architecture: {error}") from error
    return model.eval()


def read_classes(folder: RunFolder) -> list[str]:
    """Names of the classes a run was trained with. Raises RunError where its summary has none."""
    classes = folder.read_summary().get("classes")
    if not isinstance(classes, list) or not classes:
        raise RunError(f"{folder.summary_file} names no classes; train the run again with this version")
    return [str(name) for name in classes]
