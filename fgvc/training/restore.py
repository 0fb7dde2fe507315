"""A finished run brought back: its test images and its model with the saved weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from fgvc.data import ImageDataset
from fgvc.errors import RunError
from fgvc.models import Backbone, PoolingHead, weights_digest
from fgvc.training.config import RunConfig
from fgvc.training.hybrid import Stages
from fgvc.training.run_folder import RunFolder
from fgvc.training.seeding import seed_epoch
from fgvc.training.setup import (
    build_backbone,
    build_model,
    fold_backbone,
    read_split,
    split_features,
    trained_part,
)


@dataclass(frozen=True)
class Restored:
    """A run ready to be evaluated.

    Attributes:
        config: of the run; `dataset.root` is where the images are now.
        trained: the module whose weights the run saved: the whole model, or the head where the backbone is frozen.
        backbone: its backbone.
        head: its head.
        images: the test split.
        weights_digest: sha256 of the backbone's weights before training; of a run that trained them, of no meaning.
        device: where backbone and head are.
    """

    config: RunConfig
    trained: nn.Module
    backbone: Backbone
    head: PoolingHead
    images: ImageDataset
    weights_digest: str
    device: torch.device

    @property
    def model(self) -> nn.Module:
        """Test images (B, 3, size, size) on the device -> logits."""
        if not self.config.backbone.frozen:
            return self.trained
        return nn.Sequential(fold_backbone(self.config, self.backbone, self.device), self.head)

    def inputs(self) -> Dataset[Any]:
        """What `trained` reads of the test split: the images, or their cached feature maps if the backbone is frozen.

        Maps that are not in the cache are computed now.
        """
        if not self.config.backbone.frozen:
            return self.images
        extractor = fold_backbone(self.config, self.backbone, self.device)
        return split_features(self.config, self.images, extractor, self.weights_digest, self.device)


def restore_run(path: Path, device: torch.device, *, checkpoint: str = "last", root: str | None = None) -> Restored:
    """Test images and model of a run, with its "last" or "best" weights.

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
    backbone = build_backbone(config)
    images = read_split(config, "test", backbone)
    model = build_model(config, backbone, len(images.classes))
    digest = weights_digest(backbone)
    _check_same(config, summary, images.classes, digest)
    trained = trained_part(config, model)
    try:
        trained.load_state_dict(weights)
    except RuntimeError as error:
        raise RunError(f"{folder.weights_file(checkpoint)} belongs to another architecture: {error}") from error
    _enter_stage(config, model.head, summary, checkpoint)
    model.to(device)
    return Restored(config, trained, backbone, model.head, images, digest, device)


def _enter_stage(config: RunConfig, head: PoolingHead, summary: dict[str, Any], checkpoint: str) -> None:
    """Give the head of a hybrid run the pooling its weights were saved with."""
    if config.hybrid.method is None:
        return
    epoch = summary.get("epochs") if checkpoint == "last" else (summary.get("best") or {}).get("epoch")
    if not isinstance(epoch, int):
        raise RunError(f"the summary does not say of which epoch the {checkpoint} weights are; train the run again")
    Stages(config, head).enter(head, epoch)


def _check_same(config: RunConfig, summary: dict[str, Any], classes: list[str], digest: str) -> None:
    """Raise RunError where the data or the frozen backbone are not those the run was trained with."""
    trained = summary.get("classes")
    if classes != trained:
        known = f"{len(trained)}, the first {trained[0]!r}" if isinstance(trained, list) and trained else "others"
        raise RunError(
            f"{config.dataset.root} has {len(classes)} classes, the first {classes[0]!r}; the run was trained with "
            f"{known}; give the folder of the same dataset"
        )
    if config.backbone.frozen and digest != summary.get("weights_digest"):
        raise RunError(
            f"backbone.weights={config.backbone.weights} are not the weights the run's head was trained on "
            f"(sha256 {digest[:12]}, then {str(summary.get('weights_digest'))[:12]})"
        )
