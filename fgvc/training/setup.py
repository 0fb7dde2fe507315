"""From a configuration to what the loop needs: images or cached feature maps, the module to train, loaders."""

import logging
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs
from torch import nn

from fgvc.data import (
    FeatureSet,
    ImageDataset,
    TransformSpec,
    cached_features,
    create_dataset,
    normalization_from_timm,
    require_readable,
    split_validation,
)
from fgvc.errors import ConfigError, DatasetError
from fgvc.models import (
    Backbone,
    FineGrainedModel,
    PoolingHead,
    create_backbone,
    fold_batch_norm,
    load_checkpoint,
    weights_digest,
)
from fgvc.runs.config import RunConfig
from fgvc.training.batches import Loaders, create_loaders
from fgvc.training.seeds import set_deterministic

_log = logging.getLogger(__name__)

_PATIENCE = timedelta(hours=6)


@dataclass(frozen=True)
class Prepared:
    """A run ready to train.

    Attributes:
        trained: module that is trained: the whole model, or the head alone where the backbone is frozen.
        head: head of the model.
        loaders: batches of images, or of feature maps where the backbone is frozen.
        train: training images, without those held out.
        test: test images.
        validation: images held out to select the best epoch; None where nothing is held out.
        feature_seconds: time spent on computing feature maps; 0 where they came from the cache, or are not used.
        weights_digest: sha256 of the backbone's weights before training.
    """

    trained: FineGrainedModel | PoolingHead
    head: PoolingHead
    loaders: Loaders
    train: ImageDataset
    test: ImageDataset
    validation: ImageDataset | None
    feature_seconds: float
    weights_digest: str


def create_accelerator(config: RunConfig, path: Path, *, training: bool = True) -> Accelerator:
    """Device, precision, processes and algorithms of a run whose folder is `path`.

    What was trained in fp16 on a GPU is evaluated in float32 on a CPU, which `training=False` allows.

    Raises:
        ConfigError: the device cannot train in `trainer.precision`.
    """
    set_deterministic(config.trainer.deterministic)  # before anything runs on a GPU
    AcceleratorState._reset_state()  # one process may carry out several runs, of different precision
    precision = config.trainer.precision
    # while one process computes feature maps, the others wait for it; one that has ended is noticed by its connection
    patience = InitProcessGroupKwargs(timeout=_PATIENCE)
    try:
        accelerator = Accelerator(
            mixed_precision=precision, log_with=config.trainer.tracker, project_dir=path, kwargs_handlers=[patience]
        )
    except ValueError as error:  # of this version of accelerate or torch, on this device
        raise ConfigError(f"trainer.precision={precision}: {error}; use trainer.precision=no") from error
    if training and precision == "fp16" and accelerator.device.type == "cpu":
        # accelerate says nothing: it would train in float32, without autocast and without scaling the loss
        raise ConfigError(
            "trainer.precision=fp16 needs a GPU, and this run would train on the cpu; use trainer.precision=bf16 or no"
        )
    return accelerator


def prepare(config: RunConfig, accelerator: Accelerator) -> Prepared:
    """Read the dataset, build the model, compute or find the feature maps of a frozen backbone, make the loaders.

    Raises:
        DatasetError, ConfigError, WeightsError: as the parts raise them.
    """
    device = accelerator.device
    # the dataset first: where it is missing, nobody should wait for the backbone's weights to learn that
    train, test = (open_split(config, which) for which in ("train", "test"))
    backbone = build_backbone(config)
    train = ready_split(config, train, backbone, training=True)
    test = ready_split(config, test, backbone, training=False)
    if train.classes != test.classes:
        raise DatasetError(f"{config.dataset.root}: training and test split differ in their classes")
    train, validation = hold_out(config, train)
    if validation is not None:
        validation = validation.with_transform(test.transform)
    model = build_model(config, backbone, len(train.classes))
    digest = weights_digest(backbone)
    backbone.to(device)
    trained = trained_part(config, model)
    read: dict[str, Any] = {"train": train, "test": test, "validation": validation}
    seconds = 0.0
    if config.backbone.frozen:
        extractor = fold_backbone(config, backbone, device)
        for name, split in read.items():
            if split is not None:
                read[name] = features = split_features(config, split, extractor, digest, device)
                seconds += 0.0 if features.from_cache else features.seconds
    loaders = create_loaders(
        **read,
        accelerator=accelerator,
        paths=train.relative_paths(),
        seed=config.seed,
        batch_size=config.trainer.batch_size,
        accumulation=config.trainer.accumulation,
        eval_batch_size=config.trainer.eval_batch_size,
        workers=config.trainer.workers,
    )
    return Prepared(trained, model.head, loaders, train, test, validation, seconds, digest)


def build_backbone(config: RunConfig) -> Backbone:
    """The backbone with the weights it starts from. Raises ConfigError, WeightsError as `create_backbone`."""
    return create_backbone(
        config.backbone.name,
        pretrained=config.backbone.pretrained,
        weights=config.backbone.weights,
        last_stride=config.backbone.last_stride,
        image_size=config.dataset.transform.size,
    )


def build_model(config: RunConfig, backbone: Backbone, num_classes: int) -> FineGrainedModel:
    """The backbone with a new head, both filled from `initial_weights` where the run starts from them.

    Raises:
        ConfigError, WeightsError: as `PoolingHead` and `load_checkpoint`.
    """
    head = PoolingHead(
        backbone.out_channels,
        method=config.method.name,
        num_classes=num_classes,
        reduction=config.method.reduction,
        hidden=config.method.hidden,
        gradient=config.method.gradient,
        eigh_device=config.method.eigh_device,
        spectral_dtype=config.method.spectral_dtype,
        options=config.method.options,
    )
    model = FineGrainedModel(backbone, head)
    if config.initial_weights is not None:
        # the classifier is left out where it is of another number of classes
        report = load_checkpoint(model, config.initial_weights, classifier=None)
        new = [name for name in report.kept if name.startswith("head.classifier.")]
        classifier = "its classifier left out, of another number of classes" if new else "with its classifier"
        _log.info("initial weights: %d tensors of %s (%s), %s", report.loaded, report.source, report.format, classifier)
    return model


def trained_part(config: RunConfig, model: FineGrainedModel) -> FineGrainedModel | PoolingHead:
    """What is trained and saved: the whole model, or its head alone where the backbone is frozen."""
    if not config.backbone.frozen:
        return model.to(memory_format=torch.channels_last)
    model.backbone.requires_grad_(False).eval()
    return model.head


def fold_backbone(config: RunConfig, backbone: Backbone, device: torch.device) -> Backbone:
    """A frozen backbone on `device`, faster: see `fold_batch_norm`."""
    size = config.dataset.transform.size
    return fold_batch_norm(backbone, torch.randn(1, 3, size, size, device=device))


def open_split(config: RunConfig, which: str) -> ImageDataset:
    """The "train" or "test" split as it lies on the disk. Raises ConfigError, DatasetError as `create_dataset`."""
    name = config.dataset.adapter or config.dataset.name
    return create_dataset(name, root=config.dataset.root, split=which, **config.dataset.options)


def build_transform(config: RunConfig, backbone: Backbone, *, training: bool) -> TransformSpec:
    """The run's transform, normalised as the backbone needs it. Raises ConfigError as `TransformSpec`."""
    return TransformSpec(
        **asdict(config.dataset.transform), **normalization_from_timm(backbone.data_config), training=training
    )


def ready_split(config: RunConfig, opened: ImageDataset, backbone: Backbone, *, training: bool) -> ImageDataset:
    """A split with the transform that the backbone needs, every image readable.

    Raises:
        DatasetError: an image cannot be read.
    """
    dataset = opened.with_transform(build_transform(config, backbone, training=training))
    return require_readable(dataset, config.trainer.on_bad_image, Path(config.cache.dir))


def hold_out(config: RunConfig, train: ImageDataset) -> tuple[ImageDataset, ImageDataset | None]:
    """The images that are trained on, and those held out to select the best epoch, if any."""
    if config.trainer.val_fraction == 0:
        return train, None
    return split_validation(train, config.trainer.val_fraction, config.seed)


def inference_batch_size(config: RunConfig, device: torch.device) -> int:
    """Images in a batch through the whole network without gradients."""
    # on a CPU small batches are faster: their activations stay in the processor's cache; what was trained is evaluated
    # in the batches of its training, so that a repeated evaluation rounds alike
    return 4 if config.backbone.frozen and device.type == "cpu" else config.trainer.eval_batch_size


def split_features(
    config: RunConfig, images: ImageDataset, extractor: nn.Module, digest: str, device: torch.device
) -> FeatureSet:
    """Feature maps of one split, from the cache where it holds them."""
    assert isinstance(images.transform, TransformSpec)
    key_parts = {"backbone": config.backbone.name, "weights": digest, "last_stride": str(config.backbone.last_stride)}
    return cached_features(
        images,
        images.transform,
        extractor,
        key_parts=key_parts,
        cache_dir=Path(config.cache.dir),
        batch_size=inference_batch_size(config, device),
        workers=config.trainer.workers,
        device=device,
        dtype=config.cache.dtype,
        max_gb=config.cache.max_gb,
    )
