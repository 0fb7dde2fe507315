"""Loads a finished run: its model with the saved weights, and its images."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import DataLoader

from fgvc.data import FeatureSet, ImageDataset, fingerprint
from fgvc.errors import RunError, WeightsError
from fgvc.foreign import open_foreign
from fgvc.io import expanded, read_csv
from fgvc.models import Backbone, FineGrainedModel, PoolingHead, weights_digest
from fgvc.models.backbone import is_hosted
from fgvc.models.files import listed, not_floating, read_finite
from fgvc.models.model import head_shapes
from fgvc.runs.config import CacheConfig, MethodConfig, RunConfig
from fgvc.runs.folder import RunFolder
from fgvc.runs.summary import read_run
from fgvc.training.batches import ComputedFeatures
from fgvc.training.environment import check_arithmetic
from fgvc.training.seeds import seed_epoch
from fgvc.training.setup import (
    build_backbone,
    build_model,
    build_transform,
    create_extractor,
    fold_backbone,
    hold_out,
    open_split,
    open_validation,
    ready_split,
    split_features,
    trained_part,
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Restored:
    """A run ready to be evaluated.

    Attributes:
        config: Configuration of the run; `dataset.root` is the current folder of the images.
        trained: Module with saved weights, in evaluation mode: the whole model, or the head, with the last stages if
            they were trained too.
        backbone: Backbone of the model.
        head: Head of the model.
        images: Requested split.
        weights_digest: SHA-256 of the backbone's weights.
        device: Device of backbone and head.
        elsewhere: What to log if feature maps have to be computed: where the run kept its own; None where that folder
            is the one in use.
        note: How the dataset's images differ from those that the run had; None where they do not.
    """

    config: RunConfig
    trained: FineGrainedModel | PoolingHead
    backbone: Backbone
    head: PoolingHead
    images: ImageDataset
    weights_digest: str
    device: torch.device
    elsewhere: str | None
    note: str | None

    @property
    def model(self) -> FineGrainedModel:
        """The whole model: test images (B, 3, size, size) on the device -> logits."""
        if not self.config.backbone.frozen:
            assert isinstance(self.trained, FineGrainedModel)
            return self.trained
        return FineGrainedModel(fold_backbone(self.config, self.backbone.eval(), self.device), self.head)

    @torch.no_grad()
    def pooling_input(self, inputs: Tensor) -> Tensor:
        """Return the pooling's input (B, channels, H, W) for a batch of `inputs()`."""
        return self.trained.pooling_input(inputs.to(self.device))

    def pooling_inputs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of the split: what the pooling reads, (B, channels, H, W), and the targets (B,)."""
        for inputs, targets in DataLoader(self.inputs(), batch_size=self.config.trainer.eval_batch_size):
            yield self.pooling_input(inputs), targets

    def inputs(self) -> ImageDataset | FeatureSet | ComputedFeatures:
        """Return the inputs of `trained` for the split: images, or maps of the frozen part of the backbone.

        Feature maps that are not in the cache are computed.
        """
        if not self.config.backbone.frozen:
            return self.images
        extractor = create_extractor(self.config, self.backbone, self.weights_digest, self.device)
        return split_features(self.config, [self.images], extractor, elsewhere=self.elsewhere)[0]


def restore_run(
    path: Path,
    device: torch.device | None = None,
    *,
    checkpoint: str = "last",
    root: str | None = None,
    cache: str | None = None,
    split: str = "test",
) -> Restored:
    """Load images and model of a run, with its "last" or "best" weights.

    Args:
        path: run folder.
        device: device of the model; None means the GPU if there is one.
        checkpoint: "last" or "best".
        root: folder of the dataset; None means the one in the run's configuration.
        cache: folder of cached feature maps; None means results/cache. That of the run's configuration is not read.
        split: "test"; "train", with the transform of training and without images held out for validation; or
            "validation", the images that selected the best epoch. If fgvc made the split, it is that of
            RUN/split.csv: images that are not in the file are left out, with a warning.

    Raises:
        RunError: the folder is not a run, its weights are missing, damaged or of another architecture, the data or the
            frozen backbone differ from those of training, none of the images that split.csv lists is there, or the run
            has no images for validation.
        DatasetError, WeightsError: as in training.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = RunFolder(path)
    config = folder.read_config(root=root)
    # the folder may come from someone else: its settings name the images, but no place to write to, no network, and
    # no feature maps, which would stand for the images
    own, usual = config.cache.dir, CacheConfig()
    config.cache = replace(config.cache, dir=cache or usual.dir, max_gb=usual.max_gb)
    elsewhere = None
    if Path(own).resolve() != Path(config.cache.dir).resolve():
        elsewhere = f"{path}: computing feature maps; the run kept its own in {own}, see --cache"
    _require_images(config)
    backbone = restore_backbone(config)
    images, notes = _read_split(config, folder, split, backbone)
    require_classes(config, images.classes, read_classes(folder))
    if not _same_images(images, read_run(path).images, split):
        notes.append(
            f"the {split} images are not those that the run had (dataset_fingerprint in {folder.summary_file})"
        )
    for line in notes:
        _log.warning("%s: %s", config.dataset.root, line)
    model = restore_model(folder, config, backbone, checkpoint)
    digest = weights_digest(backbone)
    trained = trained_part(config, model).eval()
    model.to(device)
    note = "; ".join(notes) or None
    return Restored(config, trained, backbone, model.head, images, digest, device, elsewhere, note)


def load_model(path: Path, checkpoint: str = "last") -> FineGrainedModel:
    """Load the whole model of a run with its "last" or "best" weights, in evaluation mode on the CPU, without images.

    Raises:
        RunError: the folder is not a run, its weights are missing, damaged or of another architecture, or the frozen
            backbone has other weights than in training.
        ConfigError, WeightsError: as in training.
    """
    folder = RunFolder(path)
    config = folder.read_config()
    return restore_model(folder, config, restore_backbone(config), checkpoint).eval()


def restore_backbone(config: RunConfig) -> Backbone:
    """Build the backbone of a run. A frozen one has its weights; `restore_model` fills a trained one.

    `config` is changed: if the run saved the whole model, the initial weights are removed.

    Raises:
        RunError: the name of the backbone is one to look up.
        ConfigError: an environment variable changes the precision, or as in training.
    """
    check_arithmetic()
    if is_hosted(config.backbone.name):
        raise RunError(
            f"backbone.name={config.backbone.name} is looked up on a hub or in a folder, which a run folder may not "
            "ask for: it may come from someone else; train with timm's own name of the architecture"
        )
    if not config.backbone.frozen:
        config.backbone.pretrained, config.backbone.weights, config.initial_weights = False, None, None
    seed_epoch(config.seed, 0)  # a random backbone is initialised as in training
    return build_backbone(config)


def restore_model(folder: RunFolder, config: RunConfig, backbone: Backbone, checkpoint: str) -> FineGrainedModel:
    """Build the model of a run on `backbone` (see `restore_backbone`) with its "last" or "best" weights.

    Raises RunError, WeightsError as `load_model`.
    """
    weights, run = read_weights(folder, checkpoint), read_run(folder.path)
    if run.method != config.method.name:
        raise RunError(
            f"{folder.summary_file} is of {run.method} and {folder.config_file} of {config.method.name}; restore them"
        )
    with_method = replace(config, method=restored_method(config, folder, checkpoint))
    classes = read_classes(folder)
    # before they take memory: a stranger's files may name any
    shapes = {tuple(tensor.shape) for tensor in weights.values()}
    for shape in head_shapes(with_method.method, backbone.map_channels, len(classes)):
        if shape not in shapes:
            files = f"{folder.config_file} or {folder.summary_file}"
            raise RunError(
                f"{folder.weights_file(checkpoint)} belongs to another architecture: it has no layer of shape {shape}, "
                f"which {files} asks for; restore them"
            )
    model = build_model(with_method, backbone, len(classes))
    if config.backbone.frozen and (digest := weights_digest(backbone)) != run.weights_digest:
        given = f"backbone.weights={config.backbone.weights}"
        if config.initial_weights is not None:
            given = f"initial_weights={config.initial_weights}"
        raise RunError(
            f"{given} are not the weights the run's head was trained on "
            f"(sha256 {digest[:12]}; in training {str(run.weights_digest)[:12]}, see weights_digest in summary.json); "
            "restore the same file"
        )
    trained = trained_part(config, model) if config.backbone.frozen else model
    if wrong := not_floating(weights, trained.state_dict()):
        file = folder.weights_file(checkpoint)
        raise RunError(f"{file} is damaged: no floating numbers{listed(wrong)}; restore it, or train the run again")
    try:
        trained.load_state_dict(weights)
    except RuntimeError as error:
        raise RunError(f"{folder.weights_file(checkpoint)} belongs to another architecture: {error}") from error
    return model


def restored_method(config: RunConfig, folder: RunFolder, checkpoint: str) -> MethodConfig:
    """Return the method of the "last" or "best" weights; in a hybrid run it depends on their epoch.

    Raises RunError: the weights of a hybrid run are missing or damaged, or nothing names their epoch.
    """
    if config.hybrid.method is None:
        return config.method
    # of the file itself: the summary of a run that was killed is older than its weights
    epoch = _epoch_of_weights(folder.weights_file(checkpoint))
    if epoch is None:  # written by an earlier version
        run = read_run(folder.path)
        epoch = run.epochs if checkpoint == "last" else run.best_epoch
    if epoch is None:
        raise RunError(f"the summary does not name the epoch of the {checkpoint} weights; train the run again")
    if epoch > config.switch_epoch:
        return config.method
    first = MethodConfig(name=config.hybrid.method, options=config.hybrid.options)  # as published, see `Stages`
    return replace(config.method, name=first.name, gradient=first.gradient, solver=first.solver, options=first.options)


def _epoch_of_weights(file: Path) -> int | None:
    try:
        with open_foreign(file), safe_open(file, "pt") as content:
            return int((content.metadata() or {})["epoch"])
    except KeyError:
        return None
    except Exception as error:  # safetensors and the file system raise many types
        raise RunError(f"{file} is damaged: {error}; restore it, or train the run again") from error


def read_weights(folder: RunFolder, which: str) -> dict[str, Tensor]:
    """Return the "best" or "last" weights of a run by name. Raises RunError if it is missing, damaged or holds NaN."""
    file = folder.weights_file(which)
    if not file.exists():
        when = "when the run ends" if which == "last" else "after its first epoch"
        raise RunError(f"{file} is missing: the {which} weights are written {when}")
    try:
        return read_finite(file)
    except WeightsError as error:
        raise RunError(f"{error}; restore it, or train the run again") from error


def read_classes(folder: RunFolder) -> list[str]:
    """Return the class names that a run was trained with. Raises RunError if its summary has none."""
    classes = read_run(folder.path).classes
    if not classes:
        raise RunError(f"{folder.summary_file} names no classes; train the run again with this version")
    return [str(name) for name in classes]


def require_classes(config: RunConfig, classes: list[str], trained: list[str]) -> None:
    """Raise RunError if the dataset is not the one that the run was trained with."""
    if classes != trained:
        raise RunError(
            f"{config.dataset.root} has {len(classes)} classes, the first {classes[0]!r}; the run was trained with "
            f"{len(trained)}, the first {trained[0]!r}; give the folder of the same dataset"
        )


def _same_images(images: ImageDataset, known: Mapping[str, str], split: str) -> bool:
    """Whether images have the digests of a run's summary; True where an earlier version wrote none to compare."""
    if f"{split}_content" in known:
        return images.content == known[f"{split}_content"]
    listed = known.get("test_list") if split == "test" else None
    return listed is None or fingerprint(images, times=False) == listed


def _require_images(config: RunConfig) -> None:
    """Raise RunError if opening the dataset would write or fetch it."""
    made, root = config.dataset.reader in ("hf", "synthetic"), expanded(config.dataset.root)
    if made and not (root.is_dir() and any(root.iterdir())):
        raise RunError(f"dataset.root={root} is not there, and no run folder may have it made; give the images: --root")


def _read_split(config: RunConfig, folder: RunFolder, split: str, backbone: Backbone) -> tuple[ImageDataset, list[str]]:
    """The images of a split, and notes on how they differ from those of split.csv."""
    own = None if split == "test" else open_validation(config)
    if split == "validation" and own is not None:
        return ready_split(config, own, backbone, training=False), []
    opened, notes = open_split(config, "test" if split == "test" else "train"), list[str]()
    sides = _sides(folder)
    if sides:
        opened = _as_listed(opened, sides, split, folder.split_file, notes)
    images = ready_split(config, opened, backbone, training=split != "test")
    if split == "test":
        return images, notes
    if not sides:
        trained_on, held_out = hold_out(config, images)
    else:
        found = [sides[name] for name in images.relative_paths()]
        trained_on, held_out = (
            images.subset([i for i, side in enumerate(found) if side == part]) for part in ("train", "val")
        )
    if split == "train":
        return trained_on, notes
    if not held_out:
        raise RunError("the run had no images for validation (trainer.val_fraction=0); name another split")
    return held_out.with_transform(build_transform(config, backbone, training=False)), notes


def _sides(folder: RunFolder) -> dict[str, str]:
    """The split of each image in split.csv; empty where the run wrote none. Raises RunError if it is damaged."""
    if not folder.split_file.is_file():
        return {}
    # of all images, where other tables have the test images: 5.6 million of them
    table = read_csv(folder.split_file, ("path", "split"), as_text=True, times=8)
    return dict(zip(table["path"], table["split"], strict=True))


def _as_listed(
    opened: ImageDataset, sides: Mapping[str, str], split: str, file: Path, notes: list[str]
) -> ImageDataset:
    """The images that the run had as test images, or as training and validation images; a note counts others.

    Where the dataset has test images of its own, which split.csv may not list, they count unless it lists them on
    another side.
    """
    whole, parts = opened.samples.whole, ("test",) if split == "test" else ("train", "val")
    if whole is not None:
        paths, targets = whole
        opened = ImageDataset(replace(opened.samples, paths=paths, targets=targets), opened.root)
    names = opened.relative_paths()
    unlisted = "test" if whole is None and split == "test" else None
    kept = [i for i, name in enumerate(names) if sides.get(name, unlisted) in parts]
    if not kept:
        raise RunError(
            f"{opened.root} has none of the {split} images that {file} lists; give the folder of the run's images, or "
            "one with a test split of its own: --root"
        )
    others = len(names) - (len(kept) if whole is None else sum(name in sides for name in names))
    if others:
        notes.append(f"left out {others} images that {file} does not list for this split")
    return opened.subset(kept)
