"""The configuration of a run as typed dataclasses; Hydra fills them from `configs/` and the command line."""

import importlib.util
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf

from fgvc.errors import ConfigError
from fgvc.io import expanded

LARGEST_SIDE = 4096
"""Most pixels of a side of a resized image: a received run may ask for any number."""


@dataclass
class TransformConfig:
    """How an image becomes the input tensor; normalisation comes from the backbone's own data config.

    Attributes:
        size: Height and width of the input in pixels.
        resize: Side to scale to `resize_size`: "short" (the shorter side) or "square" (both sides).
        resize_size: Size after resizing, in pixels; None means `size`.
        crop: Crop in training: "center" (as published), "random", "random_resized" or "none"; evaluation always takes
            the centre.
        min_scale: Smallest share of an image's area for "random_resized".
        hflip: Whether to mirror training images at random.
        randaugment: RandAugment of training images in timm's notation, e.g. "rand-m9-mstd0.5-inc1"; None for none.
        erasing: Probability that a random rectangle of a training image is set to the mean colour (random erasing,
            torchvision's: 2 to 33 % of the area), 0 to 1.
    """

    size: int = 224
    resize: str = "short"
    resize_size: int | None = None
    crop: str = "center"
    min_scale: float = 0.08
    hflip: bool = True
    randaugment: str | None = None
    erasing: float = field(default=0.0, repr=False)  # 0 in testing, so not in the keys of cached maps


@dataclass
class DatasetConfig:
    """The dataset and how its images are read.

    Attributes:
        name: Name in tables and run folders, e.g. "cub80"; by default the name of the folder `root`.
        adapter: Adapter, one of `fgvc.data.list_datasets()`; None means `name`.
        root: Folder of the dataset.
        options: Options of the adapter.
        transform: How an image becomes the input tensor.
    """

    name: str = MISSING
    adapter: str | None = None
    root: str = MISSING
    options: dict[str, Any] = field(default_factory=dict)
    transform: TransformConfig = field(default_factory=TransformConfig)

    @property
    def reader(self) -> str:
        """Name of the adapter."""
        return self.adapter or self.name


@dataclass
class BackboneConfig:
    """The network that computes the feature maps.

    Attributes:
        name: Name of a timm model, or transformers:FOLDER for a model of that library.
        pretrained: Whether to load timm's weights from its hub.
        weights: Weights to load instead: a .safetensors or .pth file, or package:NAME for a file in an installed
            package.
        frozen: Whether to compute the feature maps once, cache them, and train only the head on them.
        trainable_stages: Number of last stages that are trained with the head, on cached maps of the frozen stages
            before. Stages are those of timm's `feature_info`. 0 is the same as `frozen`; None trains all, or none if
            `frozen`.
        last_stride: Stride of a ResNet's last stage: 1 removes it, as covariance networks do; None keeps it.
        grad_checkpointing: Whether the backward pass computes the activations of the backbone once more instead of
            keeping them: less memory, more time. Statistics of batch normalisation are then updated twice a step.
        lora: Rank of low-rank adapters (LoRA; Hu et al., ICLR 2022) on the linear layers of a transformer's attention.
            Only they and the head are trained; saved weights are merged, with the names of any run. Needs
            `pip install 'fgvc[lora]'`. None trains the whole network.
        maps: Number of last layers (stages of a CNN, blocks of a transformer) whose maps are concatenated along the
            channels, for hbp; those with a larger grid are averaged down to that of the last.
        options: Arguments of the timm model, e.g. {zero_init_last: false} or {drop_path_rate: 0.1}.
    """

    name: str = MISSING
    pretrained: bool = False
    weights: str | None = None
    frozen: bool = False
    trainable_stages: int | None = None
    last_stride: int | None = None
    grad_checkpointing: bool = False
    lora: int | None = None
    maps: int = 1
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.frozen |= self.trainable_stages is not None  # in part
        self.trainable_stages = self.trainable_stages or None


@dataclass
class MethodConfig:
    """The pooling head.

    Attributes:
        name: Name of the head, i.e. of its pooling, one of `fgvc.pooling.list_poolings()`.
        gradient: Gradient rule of the spectral layer; None means as published.
        reduction: Number of channels after the 1x1 convolution in front of a second-order pooling; None leaves it out.
            GAP, the first-order baseline, and hbp and mgcrp, which have projections of their own, have no reduction.
        hidden: Widths of fully connected layers between the descriptor and the classifier's last layer; only the
            papers' AlexNet has them.
        eigh_device: Device of eigendecompositions: "auto", "same" (that of the features) or "cpu", as in the papers.
        solver: Way to compute the spectral layer: "eigh", or "products" for mpn_cov and seb with `gradient` "exact" on
            feature maps with more locations than channels; see docs/spectral.md.
        spectral_dtype: Precision of the covariance and everything computed from it: "float64", as in the papers, or
            "float32"; see docs/precision.md for its cost.
        options: Options of the pooling, e.g. {iterations: 5}.
        class_token: Whether the logits of a linear classifier of the backbone's class token are added. It needs a
            transformer that has one and is trained (`backbone.frozen=false`).
    """

    name: str = MISSING
    gradient: str | None = None
    reduction: int | None = 256
    hidden: list[int] = field(default_factory=list)
    eigh_device: str = "auto"
    solver: str = "eigh"
    spectral_dtype: str = "float64"
    options: dict[str, Any] = field(default_factory=dict)
    class_token: bool = False

    @property
    def shown_options(self) -> dict[str, Any]:
        """Options in labels and run folders: those of the pooling, and precision and class token if not the default."""
        precision = {} if self.spectral_dtype == "float64" else {"dtype": self.spectral_dtype}
        return self.options | precision | ({"class_token": True} if self.class_token else {})


@dataclass
class HybridConfig:
    """Train with another pooling first and switch to `method` for the last stage (Song, Sebe, Wang, ICCV 2021).

    The weights carry over: both poolings read the same covariance and give a descriptor of the same width. `best` is
    selected among the epochs after the switch.

    Attributes:
        method: Pooling of the first stage, e.g. "isqrt_cov"; None trains with `RunConfig.method` only.
        options: Options of that pooling.
        switch_epoch: Number of epochs of the first stage; None means until the last learning-rate decay, the last of
            `schedule.milestones`.
    """

    method: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    switch_epoch: int | None = None


@dataclass
class OptimizerConfig:
    """The optimiser.

    Attributes:
        name: "sgd" or "adamw".
        lr: Learning rate: that of the head, and of the backbone and the classifier but for their factors.
        momentum: Momentum; for "sgd" only.
        weight_decay: Weight decay.
        classifier_factor: Factor on the learning rate of the classifier.
        backbone_factor: Factor on the learning rate of the backbone.
        layer_decay: Factor on the learning rate of the backbone from each layer, as timm counts them, to the one before
            it; the last layer has it once. 1 gives all layers one rate; for transformers 0.65 to 0.85 are common.
        reduction_gradient: Change of the gradient of the 1x1 convolution in front of the pooling, for covariances with
            a smaller condition number: "nog" (nearest orthogonal gradient), "olr" (a step of optimal length) or None.
    """

    name: str = "sgd"
    lr: float = 3e-3
    momentum: float = 0.9
    weight_decay: float = 1e-4
    classifier_factor: float = 1.0
    backbone_factor: float = 1.0
    layer_decay: float = 1.0
    reduction_gradient: str | None = None


@dataclass
class ScheduleConfig:
    """Learning rate over the run.

    Attributes:
        name: "constant", "step" (times `gamma` after each milestone) or "cosine" (to zero).
        milestones: Epochs after which "step" lowers the rate.
        gamma: Factor of "step".
        warmup_epochs: Number of epochs in which the rate first rises linearly from zero.
    """

    name: str = "step"
    milestones: list[int] = field(default_factory=list)
    gamma: float = 0.1
    warmup_epochs: float = 0.0


@dataclass
class TrainerConfig:
    """The training loop.

    Attributes:
        epochs: Number of epochs, i.e. of passes over the training images; 0 only evaluates the initial weights.
        min_steps: Smallest number of optimiser steps: with few images the run has more epochs. None means no minimum.
        max_steps: Largest number of optimiser steps; None means no limit.
        batch_size: Number of images per optimiser step, over all processes and accumulated batches. The result
            therefore does not depend on the number of processes.
        accumulation: Number of batches per process and step. More batches need less memory. Batch normalisation takes
            its statistics from one batch, not from the whole step, and so does DropCov its drop rate.
        eval_batch_size: Number of images per batch and process in evaluation and feature extraction.
        workers: Number of image-loading processes per training process; None means its share of the machine's cores, at
            most 8.
        sampler: Draw of the training images: "shuffle" takes each once an epoch. "class_balanced" draws as many with
            replacement, each from a class that is drawn first, all classes being equally likely.
        loss: Training loss: "cross_entropy", or "bce", timm's binary cross-entropy of each class against all others,
            the mean over the classes, so its gradient is smaller.
        label_smoothing: Label smoothing of the loss, 0 to 1.
        logit_adjustment: Factor tau of logit adjustment (Menon et al., ICLR 2021): in the training loss, tau times the
            logarithm of its share of the training images is added to the logit of each class. 0 for none.
        hierarchy: Beta of soft labels from coarser labels (Bertinetto et al., CVPR 2020): in the training loss a class
            has probability exp(-beta d) / sum; d is its distance to the true class in the tree, as a share of the
            largest possible one. 4 to 30 are common; the larger, the harder. None takes the class alone.
        clip_norm: Largest norm of the gradient; None means no clipping.
        mixup: Alpha of mixup, 0 for none; it mixes the inputs of a step: images or cached feature maps.
        cutmix: Alpha of CutMix, 0 for none; with both, each step draws one of them.
        ema_decay: Decay per step of an exponential moving average of the weights. The average is then evaluated and
            saved. None uses the weights themselves.
        val_fraction: Share of the training images of each class that is held out to select the best epoch. With 0 the
            best epoch is selected on the dataset's validation split. If it has none, it is selected on the test split,
            as for many published numbers, and the summary says so.
        save_minutes: Number of minutes between saves of the state within an epoch; None means never.
        save_steps: Number of optimiser steps between saves of the state within an epoch; None means never.
        on_non_finite: Reaction to NaN or infinity in a step's loss, gradient or eigenvalues: "stop" the run, or "skip"
            the step.
        max_skips: Largest number of skipped steps in a run.
        on_divergence: Reaction to a training loss that grew and stays high (see `LossWatch`): "stop" the run, "warn"
            or "ignore" it.
        divergence_factor: Ratio to the lowest loss so far above which the loss counts as grown.
        divergence_window: Number of steps for which it must stay grown.
        compile: Whether the trained backbone is compiled (`torch.compile`, which needs a C++ compiler on a CPU): the
            first steps take longer, the others less time.
        precision: Autocast: "no", "bf16" or "fp16" (not on a CPU). The spectral layers use `method.spectral_dtype`.
        on_bad_image: Reaction to an unreadable training image: "refuse" to train, or "skip" it.
        tracker: Tracker of metrics: "tensorboard", "wandb", "mlflow" or None.
        device: Device to train on: "auto" (a GPU if there is one), "cpu", or one GPU, e.g. "cuda:1".
        deterministic: Whether to use only bit-reproducible algorithms, see `set_deterministic`; slower on a GPU. On a
            CPU runs are reproducible anyway.
        probe_images: Number of test images whose spectra are saved after every epoch, always the same images; 0 saves
            none. A resumed run keeps the images of its history.
    """

    epochs: int = 1
    min_steps: int | None = None
    max_steps: int | None = None
    batch_size: int = 10
    accumulation: int = 1
    eval_batch_size: int = 50
    workers: int | None = None
    sampler: str = "shuffle"
    loss: str = "cross_entropy"
    label_smoothing: float = 0.0
    logit_adjustment: float = 0.0
    hierarchy: float | None = None
    clip_norm: float | None = 5.0
    mixup: float = 0.0
    cutmix: float = 0.0
    ema_decay: float | None = None
    val_fraction: float = 0.0
    save_minutes: float | None = 10.0
    save_steps: int | None = None
    on_non_finite: str = "stop"
    max_skips: int = 10
    on_divergence: str = "stop"
    divergence_factor: float = 5.0
    divergence_window: int = 50
    compile: bool = False
    precision: str = "no"
    on_bad_image: str = "refuse"
    tracker: str | None = None
    device: str = "auto"
    deterministic: bool = False
    probe_images: int = 32

    def planned_epochs(self, steps: int) -> int:
        """Return the number of epochs of a run with `steps` optimiser steps per epoch, see `min_steps`."""
        return max(self.epochs, math.ceil(self.min_steps / steps)) if self.epochs and self.min_steps else self.epochs


@dataclass
class CacheConfig:
    """The cache of feature maps of frozen backbones.

    Attributes:
        enabled: Whether maps are kept. Without, every epoch computes them, which needs no room on the disk and allows
            random crops and RandAugment; `dir` then holds small files only.
        dir: Folder; any number of runs may share it.
        dtype: "float16" or, twice as large, "float32".
        max_gb: Limit of all feature maps in `dir`, in 1e9 bytes; None for no limit. A run that adds maps evicts others,
            the least recently used first.
    """

    enabled: bool = True
    dir: str = "results/cache"
    dtype: str = "float16"
    max_gb: float | None = None


@dataclass
class RunConfig:
    """One training run.

    Attributes:
        name: Name of the experiment, part of the default run folder; by default that of the dataset.
        recipe: Name of the training recipe if it is not the experiment's own (`recipe=modern` sets it). It is part of
            the default run folder, and only runs with the same recipe are comparable.
        seed: Seed of everything random; 0 is a seed like any other.
        run_dir: Folder of the run; None means results/NAME[-RECIPE]/BACKBONE/METHOD/seedN.
        initial_weights: File of a whole model that training starts from (see `fgvc.models.load_checkpoint` for the
            formats). Its classifier is ignored if the number of classes differs.
        resume: Mode of resuming: "auto" continues an unfinished run in `run_dir`, "never" refuses a folder that holds
            one, a path continues the run in that folder.
    """

    name: str = MISSING
    recipe: str | None = None
    seed: int = 0
    run_dir: str | None = None
    initial_weights: str | None = None
    resume: str = "auto"
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    hybrid: HybridConfig = field(default_factory=HybridConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)

    @property
    def switch_epoch(self) -> int:
        """Number of epochs of the first stage of a hybrid run; 0 for a run with one stage."""
        if self.hybrid.method is None:
            return 0
        if self.hybrid.switch_epoch is not None:
            return self.hybrid.switch_epoch
        return int(self.schedule.milestones[-1])


def default_settings() -> dict[str, Any]:
    """Return every setting with its default, nested; "???" for one that must be given."""
    container = OmegaConf.to_container(OmegaConf.structured(RunConfig))
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def flatten(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a nested mapping to one level; keys are joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in node.items():
        name = f"{prefix}{key}"  # a key of a damaged file may be a number
        flat |= flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat


def to_run_config(composed: DictConfig) -> RunConfig:
    """Return the composed configuration as dataclasses; a name that is not given is that of the dataset or its folder.

    Raises ConfigError: a key without a default is unset, a key added with + is unknown, or a path begins with the name
    of a user who does not exist.
    """
    dataset = composed.dataset
    if OmegaConf.is_missing(dataset, "name") and not OmegaConf.is_missing(dataset, "root"):
        dataset.name = expanded(dataset.root).resolve().name
    if OmegaConf.is_missing(composed, "name") and not OmegaConf.is_missing(dataset, "name"):
        composed.name = dataset.name
    missing = sorted(str(key) for key in OmegaConf.missing_keys(composed))
    if missing:
        raise ConfigError(f"unset: {', '.join(missing)}; give it on the command line, e.g. {missing[0]}=VALUE")
    # check against the schema again, since Hydra's + can add any key
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunConfig), OmegaConf.to_container(composed)))
    assert isinstance(config, RunConfig)
    for place, key in ((config, "run_dir"), (config, "resume"), (config.cache, "dir")):  # others, where they are read
        path = getattr(place, key)
        if path is not None and path.startswith("~"):
            setattr(place, key, str(expanded(path)))
            if getattr(place, key).startswith("~"):
                raise ConfigError(f"{path}: there is no such user; for a folder of that name write ./{path}")
    return config


_TRACKERS = ("tensorboard", "wandb", "mlflow")  # each is also the name of its package


def check_config(config: RunConfig) -> None:
    """Raise ConfigError for values out of range, unknown choices, and settings that need a missing package."""
    for key, value in flatten(asdict(config)).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{key} must be a finite number, got {value}")
        if isinstance(value, int) and abs(value) >= 1 << 63:  # tables and generators take no larger ones
            raise ConfigError(f"{key} must be below 2^63, got {value}")
    schedule = config.schedule
    if list(schedule.milestones) != sorted(set(schedule.milestones)):
        raise ConfigError(f"schedule.milestones must ascend, got {list(schedule.milestones)}")
    trainer, optimizer = config.trainer, config.optimizer
    at_least = {
        "trainer.epochs": (trainer.epochs, 0),
        "trainer.batch_size": (trainer.batch_size, 1),
        "trainer.accumulation": (trainer.accumulation, 1),
        "trainer.eval_batch_size": (trainer.eval_batch_size, 1),
        "trainer.save_minutes": (trainer.save_minutes, 0),
        "trainer.save_steps": (trainer.save_steps, 1),
        "trainer.max_skips": (trainer.max_skips, 0),
        "trainer.divergence_window": (trainer.divergence_window, 1),
        "trainer.min_steps": (trainer.min_steps, 1),
        "trainer.max_steps": (trainer.max_steps, 1),
        "trainer.workers": (trainer.workers, 0),
        "trainer.probe_images": (trainer.probe_images, 0),
        "trainer.mixup": (trainer.mixup, 0),
        "backbone.lora": (config.backbone.lora, 1),
        "trainer.logit_adjustment": (trainer.logit_adjustment, 0),
        "trainer.cutmix": (trainer.cutmix, 0),
        "optimizer.momentum": (optimizer.momentum, 0),
        "optimizer.weight_decay": (optimizer.weight_decay, 0),
        "schedule.warmup_epochs": (config.schedule.warmup_epochs, 0),
        "seed": (config.seed, 0),
    }
    for key, (number, least) in at_least.items():
        if number is not None and not number >= least:
            raise ConfigError(f"{key} must be at least {least}, got {number}")
    for key in ("size", "resize_size"):
        side = getattr(config.dataset.transform, key)
        if side is not None and not 1 <= side <= LARGEST_SIDE:
            raise ConfigError(f"dataset.transform.{key} must be from 1 to {LARGEST_SIDE} pixels, got {side}")
    if not trainer.divergence_factor > 1:
        raise ConfigError(f"trainer.divergence_factor must be above 1, got {trainer.divergence_factor}")
    positive = {
        "optimizer.lr": optimizer.lr,
        "optimizer.classifier_factor": optimizer.classifier_factor,
        "optimizer.backbone_factor": optimizer.backbone_factor,
        "trainer.clip_norm": trainer.clip_norm,
        "trainer.hierarchy": trainer.hierarchy,
        "cache.max_gb": config.cache.max_gb,
    }
    for key, value in positive.items():
        if value is not None and not value > 0:
            raise ConfigError(
                f"{key} must be positive{'' if 'optimizer' in key else ', or null for none'}, got {value}"
            )
    if not 0 < optimizer.layer_decay <= 1:
        raise ConfigError(f"optimizer.layer_decay must be above 0 and at most 1, got {optimizer.layer_decay}")
    if trainer.ema_decay is not None and not 0 < trainer.ema_decay < 1:
        raise ConfigError(f"trainer.ema_decay must be between 0 and 1, or null for none, got {trainer.ema_decay}")
    check_mixing(config)
    shares = {"trainer.label_smoothing": trainer.label_smoothing}
    shares["dataset.transform.erasing"] = config.dataset.transform.erasing
    for key, share in shares.items():
        if not 0 <= share <= 1:
            raise ConfigError(f"{key} must be from 0 to 1, got {share}")
    choices = {
        "schedule.name": (schedule.name, ("constant", "step", "cosine")),
        "trainer.sampler": (trainer.sampler, ("shuffle", "class_balanced")),
        "trainer.loss": (trainer.loss, ("cross_entropy", "bce")),
        "trainer.precision": (trainer.precision, ("no", "bf16", "fp16")),
        "trainer.on_non_finite": (trainer.on_non_finite, ("stop", "skip")),
        "trainer.on_divergence": (trainer.on_divergence, ("stop", "warn", "ignore")),
        "trainer.on_bad_image": (trainer.on_bad_image, ("refuse", "skip")),
        "trainer.tracker": (trainer.tracker, (None, *_TRACKERS)),
        "optimizer.reduction_gradient": (optimizer.reduction_gradient, (None, "nog", "olr")),
        "method.spectral_dtype": (config.method.spectral_dtype, ("float64", "float32")),
        "cache.dtype": (config.cache.dtype, ("float16", "float32")),
    }
    for key, (value, valid) in choices.items():
        if value not in valid:
            raise ConfigError(f"unknown {key} {value!r}; choose one of {', '.join(map(str, valid))}")
    if config.method.class_token and config.backbone.frozen:
        raise ConfigError(
            "method.class_token=true needs backbone.frozen=false and backbone.trainable_stages=null: the feature maps "
            "of frozen stages hold no class token"
        )
    if trainer.loss == "bce" and trainer.logit_adjustment:
        raise ConfigError("trainer.logit_adjustment is for the cross-entropy; with trainer.loss=bce set it to 0")
    if trainer.hierarchy is not None and trainer.label_smoothing:
        raise ConfigError(f"trainer.hierarchy needs trainer.label_smoothing=0, got {trainer.label_smoothing}")
    if config.backbone.grad_checkpointing and config.backbone.frozen:
        raise ConfigError("backbone.grad_checkpointing=true needs backbone.frozen=false and no trainable_stages")
    if config.backbone.lora is not None and config.backbone.frozen:
        raise ConfigError("backbone.lora adapts a trained backbone: set backbone.frozen=false and no trainable_stages")
    if config.backbone.lora is not None and importlib.util.find_spec("peft") is None:
        raise ConfigError(f"backbone.lora={config.backbone.lora} needs the library peft: pip install 'fgvc[lora]'")
    if trainer.compile and config.backbone.frozen and config.backbone.trainable_stages is None:
        raise ConfigError("trainer.compile=true compiles a trained backbone; with backbone.frozen=true set it to false")
    if trainer.compile and config.method.class_token:
        raise ConfigError("trainer.compile=true has no effect with method.class_token=true; set one of them to false")
    if trainer.tracker is not None and importlib.util.find_spec(trainer.tracker) is None:
        raise ConfigError(f"trainer.tracker={trainer.tracker} needs a package: pip install {trainer.tracker}")
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", trainer.device):
        raise ConfigError(
            f"trainer.device={trainer.device}: choose auto, cpu, or one GPU such as cuda:0; accelerate launch "
            "trains on several, with trainer.device=auto"
        )
    if not 0 <= trainer.val_fraction < 1:
        raise ConfigError(f"trainer.val_fraction must be at least 0 and below 1, got {trainer.val_fraction}")


def check_switch(config: RunConfig) -> None:
    """Raise ConfigError if the switch between the stages of a hybrid run is undefined."""
    if config.hybrid.switch_epoch is None and not (config.schedule.name == "step" and config.schedule.milestones):
        raise ConfigError(
            f"hybrid.method={config.hybrid.method} switches at the last learning-rate decay, but "
            f"schedule={config.schedule.name} with milestones {list(config.schedule.milestones)} has none; "
            "set hybrid.switch_epoch"
        )


def check_mixing(config: RunConfig, processes: int = 1) -> None:
    """Raise ConfigError if images are mixed in pairs but a part of a step has an odd number of them."""
    trainer = config.trainer
    parts = trainer.accumulation * processes
    if (trainer.mixup or trainer.cutmix) and trainer.batch_size % (2 * parts):
        each = "" if parts == 1 else f" in each of the {parts} parts of a step"
        raise ConfigError(
            f"trainer.mixup and trainer.cutmix mix pairs: trainer.batch_size must be even{each}, got "
            f"{trainer.batch_size}; give a multiple of {2 * parts}"
        )


def check_steps(config: RunConfig, first_stage: int, processes: int) -> None:
    """Raise ConfigError if the number of processes, or `first_stage` steps of a hybrid run, do not fit the trainer."""
    check_mixing(config, processes)
    limit = config.trainer.max_steps
    if limit is not None and limit <= first_stage:
        raise ConfigError(
            f"trainer.max_steps={limit} ends before the hybrid protocol switches, after {first_stage} steps; "
            "raise it, or lower hybrid.switch_epoch"
        )
