"""A finished run brought back: its test images and its model with the saved weights."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fgvc.data import FeatureSet, ImageDataset
from fgvc.errors import RunError
from fgvc.models import Backbone, FineGrainedModel, PoolingHead, weights_digest
from fgvc.training.config import RunConfig
from fgvc.training.model_of_run import read_classes, restore_backbone, restore_model
from fgvc.training.run_folder import RunFolder
from fgvc.training.setup import (
    build_transform,
    fold_backbone,
    hold_out,
    open_split,
    ready_split,
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
        images: the split that was asked for.
        weights_digest: sha256 of the backbone's weights.
        device: where backbone and head are.
    """

    config: RunConfig
    trained: FineGrainedModel | PoolingHead
    backbone: Backbone
    head: PoolingHead
    images: ImageDataset
    weights_digest: str
    device: torch.device

    @property
    def model(self) -> FineGrainedModel:
        """Test images (B, 3, size, size) on the device -> logits."""
        if isinstance(self.trained, FineGrainedModel):
            return self.trained
        return FineGrainedModel(fold_backbone(self.config, self.backbone, self.device), self.head)

    @torch.no_grad()
    def pooling_input(self, inputs: Tensor) -> Tensor:
        """What the pooling reads, (B, channels, H, W), of a batch of `inputs()`."""
        return self.trained.pooling_input(inputs.to(self.device))

    def inputs(self) -> ImageDataset | FeatureSet:
        """What `trained` reads of the split: the images, or their cached feature maps if the backbone is frozen.

        Maps that are not in the cache are computed now.
        """
        if not self.config.backbone.frozen:
            return self.images
        extractor = fold_backbone(self.config, self.backbone, self.device)
        return split_features(self.config, self.images, extractor, self.weights_digest, self.device)


def restore_run(
    path: Path,
    device: torch.device | None = None,
    *,
    checkpoint: str = "last",
    root: str | None = None,
    cache: str | None = None,
    split: str = "test",
) -> Restored:
    """Images and model of a run, with its "last" or "best" weights.

    Args:
        path: the run folder.
        device: where the model goes; None: to a GPU where there is one.
        checkpoint: "last" or "best".
        root: folder of the dataset, where it is not the one the run was trained with.
        cache: folder of cached feature maps, where it is not that one.
        split: "test"; "train", with the transform of training and without images held out for validation; or
            "validation", those that were held out.

    Raises:
        RunError: not a run, its weights are missing, damaged or of another architecture, the data or the frozen
            backbone are not those it was trained with, or it held out no images for validation.
        DatasetError, WeightsError: as in training.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = RunFolder(path)
    config = folder.read_config()
    if root is not None:
        config.dataset.root = root
    if cache is not None:
        config.cache.dir = cache
    backbone = restore_backbone(config)
    images = _read_split(config, split, backbone)
    require_classes(config, images.classes, read_classes(folder))
    model = restore_model(folder, config, backbone, checkpoint)
    digest = weights_digest(backbone)
    trained = trained_part(config, model)
    model.to(device)
    return Restored(config, trained, backbone, model.head, images, digest, device)


def _read_split(config: RunConfig, split: str, backbone: Backbone) -> ImageDataset:
    """A split as `restore_run` has it."""
    if split == "test":
        return ready_split(config, open_split(config, split), backbone, training=False)
    images = ready_split(config, open_split(config, "train"), backbone, training=True)
    trained_on, held_out = hold_out(config, images)
    if split == "train":
        return trained_on
    if held_out is None:
        raise RunError("the run held out no images for validation (trainer.val_fraction=0); name another split")
    return held_out.with_transform(build_transform(config, backbone, training=False))


def require_classes(config: RunConfig, classes: list[str], trained: list[str]) -> None:
    """Raise RunError where the dataset is not the one the run was trained with."""
    if classes != trained:
        raise RunError(
            f"{config.dataset.root} has {len(classes)} classes, the first {classes[0]!r}; the run was trained with "
            f"{len(trained)}, the first {trained[0]!r}; give the folder of the same dataset"
        )
