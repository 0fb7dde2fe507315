"""Builds the parts of a run from its configuration: images or cached feature maps, the module to train, loaders."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from fgvc.data import (
    FeatureSet,
    ImageDataset,
    TransformSpec,
    cached_features,
    create_dataset,
    fingerprint,
    normalization_from_timm,
    read_splits,
    reads_validation,
    require_readable,
    split_validation,
)
from fgvc.data.layout import listing
from fgvc.data.verify import copies_in_both
from fgvc.errors import ConfigError, DatasetError
from fgvc.io import sha256
from fgvc.models import (
    Backbone,
    FineGrainedModel,
    PoolingHead,
    create_backbone,
    fold_batch_norm,
    load_checkpoint,
    weights_digest,
)
from fgvc.models.files import locate_weights
from fgvc.models.lora import add_adapters
from fgvc.models.model import create_head
from fgvc.pooling import CovariancePooling, CrossCovariancePooling, DropCovPooling
from fgvc.runs.config import RunConfig
from fgvc.training.batches import (
    ComputedFeatures,
    Loaders,
    create_loaders,
    loader_workers,
    sampling_weights,
    smallest_batch,
)
from fgvc.training.learner import head_of, require_coarse
from fgvc.training.step import untouched

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A run ready to train.

    Attributes:
        trained: Module to train: the whole model, or only the head if the backbone is frozen.
        head: Head of the model.
        loaders: Batches of images, or of feature maps if the backbone is frozen.
        train: Training images, without held-out ones.
        test: Test images.
        validation: Images that select the best epoch: the dataset's own, or held out of the training images; None if
            there are none.
        feature_seconds: Time spent on computing feature maps; 0 if they came from the cache or are not used.
        digests: SHA-256 by name of what the run is made from: "weights" (of the backbone before training), "classes",
            and "train_list", "validation_list", "test_list" (paths, classes, regions and sizes of the files, so equal
            for a copy in another folder), and "train_content", "validation_content" and "test_content" (the same and
            the bytes of the files; of held-out images that of the whole split), "initial_weights" (the file), and
            "coarse" (the coarser labels, if the loss depends on them).
    """

    trained: FineGrainedModel | PoolingHead
    head: PoolingHead
    loaders: Loaders
    train: ImageDataset
    test: ImageDataset
    validation: ImageDataset | None
    feature_seconds: float
    digests: dict[str, str]


def prepare(
    config: RunConfig, accelerator: Accelerator, check_digests: Callable[[Mapping[str, str]], None]
) -> Prepared:
    """Read the dataset, build the model, compute or load the feature maps of a frozen backbone, make the loaders.

    The first process reads the images, and the others find them checked. All compute feature maps, if there are many.
    `check_digests` is called with `Prepared.digests` before feature maps are computed.

    Raises:
        DatasetError, ConfigError, WeightsError: as raised by the parts.
    """
    device = accelerator.device
    with accelerator.main_process_first():
        # the dataset first, so that a missing one is reported before the backbone's weights are loaded
        train, test, validation = open_splits(config)
        listed = listing_digest((train, test, validation))
        backbone = build_backbone(config)
        train = ready_split(config, train, backbone, training=True)
        test = ready_split(config, test, backbone, training=False)
        if len(train.classes) < 2:
            raise DatasetError(f"{config.dataset.root} has one class, {train.classes[0]}; training needs two or more")
        if validation is not None:
            validation = ready_split(config, validation, backbone, training=False)
        else:
            train, validation = hold_out(config, train)
            validation = validation and validation.with_transform(test.transform)
        if accelerator.is_main_process and (copies := copies_in_both(train, test)):
            _log.warning(
                "%s: training and test images share pictures, byte for byte (%d, e.g. %s and %s), so the test accuracy "
                "is too high; delete one of each",
                *(config.dataset.root, len(copies), *copies[0]),
            )
    model = build_model(config, backbone, len(train.classes))
    digests = {
        "listed": listed,
        "weights": weights_digest(backbone),
        "head": weights_digest(model.head),
        "classes": hashlib.sha256(json.dumps(train.classes).encode()).hexdigest(),
    }
    read: dict[str, Any] = {"train": train, "test": test, "validation": validation}
    for name, split in read.items():
        if split is not None:
            digests |= {f"{name}_list": fingerprint(split, times=False), f"{name}_content": split.content}
    if config.trainer.hierarchy is not None:
        require_coarse(train.coarse)  # before maps are computed
        digests["coarse"] = hashlib.sha256(json.dumps(dict(train.coarse)).encode()).hexdigest()
    if config.initial_weights is not None:
        file = locate_weights(config.initial_weights, "initial_weights")
        digests["initial_weights"] = sha256(file)
    check_digests(digests)
    if config.backbone.lora is not None:  # after the digest, which is that of the weights it begins with
        add_adapters(backbone, config.backbone.lora)
    trained = trained_part(config, model.to(device))
    if config.trainer.epochs:
        try_training(config, trained, backbone, len(train), device)
    seconds = 0.0
    if config.backbone.frozen:
        extractor = create_extractor(config, backbone, digests["weights"], device)
        splits = {name: split for name, split in read.items() if split is not None}
        features = split_features(config, list(splits.values()), extractor)
        read |= dict(zip(splits, features, strict=True))
        seconds = sum(part.seconds for part in features if isinstance(part, FeatureSet) and not part.from_cache)
    loaders = create_loaders(
        **read,
        accelerator=accelerator,
        paths=train.relative_paths(),
        seed=config.seed,
        batch_size=config.trainer.batch_size,
        accumulation=config.trainer.accumulation,
        eval_batch_size=config.trainer.eval_batch_size,
        workers=config.trainer.workers,
        weights=sampling_weights(config.trainer.sampler, train.targets),
    )
    return Prepared(trained, model.head, loaders, train, test, validation, seconds, digests)


def build_backbone(config: RunConfig) -> Backbone:
    """Build the backbone with its initial weights. Raises ConfigError, WeightsError as `create_backbone`."""
    return create_backbone(
        config.backbone.name,
        pretrained=config.backbone.pretrained,
        weights=config.backbone.weights,
        last_stride=config.backbone.last_stride,
        maps=config.backbone.maps,
        grad_checkpointing=config.backbone.grad_checkpointing,
        image_size=config.dataset.transform.size,
        options=config.backbone.options,
    )


def build_model(config: RunConfig, backbone: Backbone, num_classes: int) -> FineGrainedModel:
    """Add a new head to the backbone; load `initial_weights` into both if the run has them.

    Raises:
        ConfigError, WeightsError: as `PoolingHead` and `load_checkpoint`.
    """
    model = FineGrainedModel(backbone, create_head(backbone, config.method, num_classes))
    if config.initial_weights is not None:
        # classifier=None ignores a classifier with another number of classes
        report = load_checkpoint(model, config.initial_weights, classifier=None)
        new = [name for name in report.kept if name.startswith("head.classifier.")]
        classifier = "its classifier ignored (other number of classes)" if new else "with its classifier"
        _log.info("initial weights: %d tensors of %s (%s), %s", report.loaded, report.source, report.format, classifier)
    return model


def trained_part(config: RunConfig, model: FineGrainedModel) -> FineGrainedModel | PoolingHead:
    """Return the module to train and save: the whole model, its head, or its last stages with the head.

    What it reads are images, or maps of the frozen part of the backbone, see `frozen_part`.

    Raises:
        ConfigError: as `Backbone.split`.
    """
    trainable = config.backbone.trainable_stages
    if not config.backbone.frozen:
        return model.to(memory_format=torch.channels_last)
    model.backbone.requires_grad_(False).eval()
    if trainable is None:
        return model.head
    last = model.backbone.split(trainable)[1].requires_grad_(True)
    return FineGrainedModel(last, model.head).to(memory_format=torch.channels_last)


def frozen_part(config: RunConfig, backbone: Backbone) -> Backbone:
    """Return the frozen stages of a backbone. Raises ConfigError as `Backbone.split`."""
    trainable = config.backbone.trainable_stages
    return backbone if trainable is None else backbone.split(trainable)[0]


def try_training(
    config: RunConfig, trained: FineGrainedModel | PoolingHead, backbone: Backbone, images: int, device: torch.device
) -> None:
    """Take one backward pass up to the pooling, on random numbers, to see now what would fail during an epoch.

    Parameters of a trained backbone that get no gradient are frozen, since several processes cannot train them.

    Args:
        config: configuration of the run.
        trained: module to train, on `device`; afterwards it is as before.
        backbone: backbone of the run, trained or not.
        images: number of training images.
        device: device of the run.

    Raises:
        ConfigError: a covariance would be that of one location, or a batch normalisation would see a single number.
    """
    size, trainer = config.dataset.transform.size, config.trainer
    pooling = head_of(trained).pooling
    reads_covariance = isinstance(pooling, CovariancePooling | DropCovPooling | CrossCovariancePooling)
    if reads_covariance and backbone.out_shape[1:] == (1, 1):
        raise ConfigError(
            f"the map of {backbone.name} has a single location at dataset.transform.size={size}, and a covariance "
            f"needs two or more (method={config.method.name}); choose a larger size, or method=gap"
        )
    smallest = smallest_batch(images, trainer.batch_size, trainer.accumulation)
    shape = frozen_part(config, backbone).out_shape if config.backbone.frozen else (3, size, size)
    with untouched(trained):
        try:
            maps = trained.train().pooling_input(torch.randn(min(smallest, 2), *shape, device=device))
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            near = sorted(range(2, images + 1), key=lambda number: abs(number - trainer.batch_size))
            fitting = (number for number in near if smallest_batch(images, number, trainer.accumulation) > 1)
            best = next(fitting, None)
            raise ConfigError(
                f"trainer.batch_size={trainer.batch_size} with trainer.accumulation={trainer.accumulation} leaves a "
                f"batch of one of the {images} training images, for which a batch normalisation has a single number; "
                f"set {f'trainer.batch_size={best}' if best else f'trainer.accumulation=1 trainer.batch_size={images}'}"
            ) from error
        if isinstance(trained, FineGrainedModel):
            torch.autograd.backward(maps.sum())
    unused = [(name, p) for name, p in backbone.named_parameters() if p.requires_grad and p.grad is None]
    for _, parameter in unused:
        parameter.requires_grad_(False)
    if unused:
        _log.info(
            "%s: %d parameters, such as %s, do not change the map and stay as they are",
            *(backbone.name, len(unused), unused[0][0]),
        )
    trained.zero_grad()


def fold_backbone(config: RunConfig, backbone: Backbone, device: torch.device) -> Backbone:
    """Make a frozen backbone on `device` faster, see `fold_batch_norm`."""
    size = config.dataset.transform.size
    return fold_batch_norm(backbone, torch.randn(1, 3, size, size, device=device))


def open_split(config: RunConfig, which: str) -> ImageDataset:
    """Open "train", "val" or "test" without a transform. Raises ConfigError, DatasetError as `create_dataset`."""
    return create_dataset(config.dataset.reader, root=config.dataset.root, split=which, **config.dataset.options)


def listing_digest(splits: Sequence[ImageDataset | None]) -> str:
    """Return the SHA-256 of the names, classes and sizes of all images of some splits, read or not."""
    found = [fingerprint(split, times=False) for split in splits if split is not None]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def open_splits(config: RunConfig) -> tuple[ImageDataset, ImageDataset, ImageDataset | None]:
    """Open the training and test images, and the dataset's own validation images, if it has any.

    Raises:
        ConfigError, DatasetError: as `read_splits` and `open_validation`.
    """
    splits = read_splits(config.dataset.reader, config.dataset.root, **config.dataset.options)
    return splits["train"], splits["test"], _validation(config, splits.get("val"))


def open_validation(config: RunConfig) -> ImageDataset | None:
    """Open the dataset's own validation split without a transform; None if it has none.

    Raises:
        ConfigError: `trainer.val_fraction` asks for another one.
        ConfigError, DatasetError: as `create_dataset`.
    """
    if not reads_validation(config.dataset.reader):
        return None  # without opening it: some adapters write or fetch what is missing
    return _validation(config, open_split(config, "val"))


def _validation(config: RunConfig, validation: ImageDataset | None) -> ImageDataset | None:
    if validation is None or not len(validation):
        return None
    if config.trainer.val_fraction > 0:
        raise ConfigError(
            f"trainer.val_fraction={config.trainer.val_fraction} holds out training images, but {config.dataset.root} "
            f"has a validation split of {len(validation)} images, which selects the best epoch; set "
            "trainer.val_fraction=0"
        )
    return validation


def build_transform(config: RunConfig, backbone: Backbone, *, training: bool) -> TransformSpec:
    """Return the run's transform with the backbone's normalisation. Raises ConfigError as `TransformSpec`."""
    return TransformSpec(
        **asdict(config.dataset.transform), **normalization_from_timm(backbone.data_config), training=training
    )


def ready_split(config: RunConfig, opened: ImageDataset, backbone: Backbone, *, training: bool) -> ImageDataset:
    """Add the run's transform to a split and check that every image is readable.

    Raises:
        DatasetError: an image cannot be read, and `trainer.on_bad_image` is "refuse"; or no training image of a class
            can be read.
    """
    dataset = opened.with_transform(build_transform(config, backbone, training=training))
    dataset = require_readable(dataset, config.trainer.on_bad_image, Path(config.cache.dir))
    if training and (lost := sorted(set(opened.targets) - set(dataset.targets))):
        names = listing([opened.classes[target] for target in lost])
        raise DatasetError(
            f"{opened.root}: no training image of {names} can be decoded; replace them or remove the class"
        )
    return dataset


def hold_out(config: RunConfig, train: ImageDataset) -> tuple[ImageDataset, ImageDataset | None]:
    """Return the training images, and those held out of them by `trainer.val_fraction`, if any."""
    if config.trainer.val_fraction == 0:
        return train, None
    return split_validation(train, config.trainer.val_fraction, config.seed)


def inference_batch_size(config: RunConfig, device: torch.device) -> int:
    """Return the number of images per batch through the whole network without gradients."""
    # on a CPU small batches are faster, since their activations fit into its cache; a trained backbone is evaluated in
    # the same batches as during training, so that a repeated evaluation rounds the same way
    return 4 if config.backbone.frozen and device.type == "cpu" else config.trainer.eval_batch_size


@dataclass(frozen=True)
class Extractor:
    """The frozen part of a backbone, ready to compute maps.

    Attributes:
        module: The folded part, see `fold_batch_norm`, on `device`.
        digest: SHA-256 of its weights before they were folded.
        device: Device of the maps.
    """

    module: Backbone
    digest: str
    device: torch.device


def create_extractor(config: RunConfig, backbone: Backbone, digest: str, device: torch.device) -> Extractor:
    """Take the frozen part of a backbone on `device`; `digest` is that of the whole backbone's weights."""
    part = frozen_part(config, backbone)
    return Extractor(fold_backbone(config, part, device), digest if part is backbone else weights_digest(part), device)


def split_features(
    config: RunConfig, splits: Sequence[ImageDataset], extractor: Extractor, *, elsewhere: str | None = None
) -> Sequence[FeatureSet | ComputedFeatures]:
    """Return the feature maps of some splits: from the cache, see `cached_features`, or computed when read."""
    batch_size = inference_batch_size(config, extractor.device)
    if not config.cache.enabled:
        return [ComputedFeatures(images, extractor.module, batch_size, extractor.device) for images in splits]
    settings = asdict(replace(config.backbone, pretrained=False, weights=None))  # the digest says which weights
    del settings["grad_checkpointing"], settings["lora"]  # of a trained one only
    return cached_features(
        splits,
        extractor.module,
        map_shape=extractor.module.out_shape,
        # the libraries that build the network and decode and resize the images
        key_parts={"backbone": json.dumps(settings, sort_keys=True), "weights": extractor.digest}
        | {name: version(name) for name in ("timm", "torchvision", "pillow")},
        cache_dir=Path(config.cache.dir),
        elsewhere=elsewhere,
        batch_size=batch_size,
        workers=loader_workers(config.trainer.workers),
        device=extractor.device,
        dtype=config.cache.dtype,
        max_gb=config.cache.max_gb,
    )
