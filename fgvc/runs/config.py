"""The configuration of a run as typed dataclasses; Hydra fills them from `configs/` and the command line."""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf

from fgvc.errors import ConfigError


@dataclass
class TransformConfig:
    """How an image becomes the input tensor; normalisation comes from the backbone's own data config.

    Attributes:
        size: height and width of the input in pixels.
        resize: "short" scales the shorter side to `resize_size`, "square" both sides.
        resize_size: pixels; None means `size`.
        crop: crop in training, "center" (as published), "random", "random_resized" or "none"; evaluation always takes
            the centre.
        min_scale: least share of an image's area that "random_resized" takes.
        hflip: mirror training images at random.
        randaugment: RandAugment of training images in timm's notation, e.g. "rand-m9-mstd0.5-inc1"; None for none.
    """

    size: int = 224
    resize: str = "short"
    resize_size: int | None = None
    crop: str = "center"
    min_scale: float = 0.08
    hflip: bool = True
    randaugment: str | None = None


@dataclass
class DatasetConfig:
    """Which images.

    Attributes:
        name: name in tables and run folders, e.g. "cub80".
        adapter: one of `fgvc.data.list_datasets()`; None means `name`.
        root: folder of the dataset.
        options: of the adapter.
    """

    name: str = MISSING
    adapter: str | None = None
    root: str = MISSING
    options: dict[str, Any] = field(default_factory=dict)
    transform: TransformConfig = field(default_factory=TransformConfig)


@dataclass
class BackboneConfig:
    """Which network makes the feature maps.

    Attributes:
        name: any timm name.
        pretrained: load timm's weights from its hub.
        weights: load these instead: a .safetensors or .pth file, or package:NAME for a file in an installed package.
        frozen: compute the feature maps once, cache them, and train the head on them.
        last_stride: 1 removes the stride of a ResNet's last stage, as the papers do; None leaves it.
    """

    name: str = MISSING
    pretrained: bool = False
    weights: str | None = None
    frozen: bool = False
    last_stride: int | None = None


@dataclass
class MethodConfig:
    """Which pooling head.

    Attributes:
        name: one of `fgvc.pooling.list_poolings()`.
        gradient: rule of the spectral layer, None means as published.
        reduction: channels after the 1x1 convolution in front of a second-order pooling; None leaves it out. GAP, the
            first-order baseline, reads the backbone's channels as they are.
        hidden: widths of fully connected layers between the descriptor and the classifier's last layer; none, but for
            the papers' AlexNet.
        eigh_device: where eigendecompositions run: "auto", "same" (where the features are) or "cpu", as in the papers.
        spectral_dtype: precision of the covariance and all that is made of it, "float64", as in the papers, or
            "float32"; docs/precision.md says what that costs.
        options: of the pooling, e.g. {iterations: 5}.
    """

    name: str = MISSING
    gradient: str | None = None
    reduction: int | None = 256
    hidden: list[int] = field(default_factory=list)
    eigh_device: str = "auto"
    spectral_dtype: str = "float64"
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def shown_options(self) -> dict[str, Any]:
        """What labels and run folders name beside the gradient: options of the pooling, and another precision."""
        return self.options | ({} if self.spectral_dtype == "float64" else {"dtype": self.spectral_dtype})


@dataclass
class HybridConfig:
    """Train with another pooling first and switch to `method` for the last stage (Song, Sebe, Wang, ICCV 2021).

    The weights carry over: both poolings read the same covariance and hand on a descriptor of the same width. `best` is
    selected among the epochs after the switch.

    Attributes:
        method: pooling of the first stage, e.g. "isqrt_cov"; None trains with `method` throughout.
        options: of that pooling.
        switch_epoch: epochs of the first stage; None: until the last learning-rate decay, the last of
            `schedule.milestones`.
    """

    method: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    switch_epoch: int | None = None


@dataclass
class OptimizerConfig:
    """Optimiser. `classifier_factor` multiplies the learning rate of the classifier; `momentum` is for SGD only."""

    name: str = "sgd"
    lr: float = 3e-3
    momentum: float = 0.9
    weight_decay: float = 1e-4
    classifier_factor: float = 1.0


@dataclass
class ScheduleConfig:
    """Learning rate over the run: "constant", "step" (times `gamma` after each milestone epoch) or "cosine" (to zero).

    `warmup_epochs` raises it linearly from zero first, in any of them.
    """

    name: str = "step"
    milestones: list[int] = field(default_factory=list)
    gamma: float = 0.1
    warmup_epochs: float = 0.0


@dataclass
class TrainerConfig:
    """The loop.

    Attributes:
        epochs: passes over the training images; 0 only evaluates the weights the run starts from.
        max_steps: stop after that many optimiser steps in all; None means no limit.
        batch_size: images of an optimiser step, over all processes and rounds of accumulation: the number of processes
            does not change what is computed.
        accumulation: batches that each process makes of its images of a step, one after the other, for want of memory.
            Batch normalisation takes its statistics from one of these, not from the whole step.
        eval_batch_size: images in a batch, of each process, in evaluation and feature extraction.
        workers: processes that load images, for each process that trains.
        label_smoothing: of the cross-entropy, 0 to 1.
        clip_norm: largest norm of the gradient, None means no clipping.
        mixup: alpha of mixup, 0 for none; the inputs of a step are mixed, their images or their cached feature maps.
        cutmix: alpha of CutMix, 0 for none; with both, each step draws one of them.
        ema_decay: decay a step of an exponential moving average of the weights, which is then what is evaluated and
            saved; None keeps the weights themselves.
        val_fraction: share of the training images of each class held out to select the best epoch; with 0 it is
            selected on the test split, as many published numbers are, and the summary says so.
        save_minutes: minutes after which the state is saved within an epoch, too; None: never.
        save_steps: the same in optimiser steps.
        on_non_finite: NaN or infinity in a step's loss, gradient or eigenvalues: "stop" the run, or "skip" the step.
        max_skips: steps that "skip" may leave out in a run.
        on_divergence: a training loss that has grown and stays grown (see `LossWatch`): "stop" the run, "warn" or
            "ignore" it.
        divergence_factor: times the lowest loss so far is grown.
        divergence_window: steps that it must stay so.
        precision: "no", "bf16" or "fp16" (not on a CPU) autocast; the spectral layers stay in `method.spectral_dtype`.
        on_bad_image: "refuse" to train with an unreadable image, or "skip" it.
        tracker: "tensorboard" or None.
        deterministic: use only algorithms that repeat themselves bit for bit, see `set_deterministic`; slower on a GPU.
            On a CPU runs repeat themselves anyway.
        probe_images: test images whose spectra are kept after every epoch, always the same; 0 keeps none. A continued
            run goes on with the images of its history.
    """

    epochs: int = 1
    max_steps: int | None = None
    batch_size: int = 10
    accumulation: int = 1
    eval_batch_size: int = 50
    workers: int = 2
    label_smoothing: float = 0.0
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
    precision: str = "no"
    on_bad_image: str = "refuse"
    tracker: str | None = None
    deterministic: bool = False
    probe_images: int = 32


@dataclass
class CacheConfig:
    """Where feature maps of frozen backbones are kept.

    Attributes:
        dir: folder; any number of runs may share it.
        dtype: "float32" or "float16".
        max_gb: most that all feature maps in `dir` may take (in 1e9 bytes) when a run adds some: those that it does not
            use are evicted, the least recently used first. None means no limit.
    """

    dir: str = "results/cache"
    dtype: str = "float32"
    max_gb: float | None = None


@dataclass
class RunConfig:
    """One training run.

    Attributes:
        name: the experiment's name, part of the default run folder.
        recipe: name of the training recipe where it is not the experiment's own (`recipe=modern` sets it), part of the
            default run folder and of what runs must share to be compared.
        seed: fixes everything random; 0 is a seed like any other.
        run_dir: folder of the run; None means results/NAME/BACKBONE/METHOD/seedN.
        initial_weights: file of a whole model that training starts from (`fgvc.models.load_checkpoint` says which
            kinds); its classifier is left out where it is of another number of classes.
        resume: "auto" continues an unfinished run in `run_dir`, "never" refuses a folder that holds one, a path
            continues the run found there.
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
        """Number of epochs of the first stage of a hybrid run; 0 for a run of one stage."""
        if self.hybrid.method is None:
            return 0
        if self.hybrid.switch_epoch is not None:
            return self.hybrid.switch_epoch
        return int(self.schedule.milestones[-1])


def flatten(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping as one level, its keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in node.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def to_run_config(composed: DictConfig) -> RunConfig:
    """The composed configuration as dataclasses.

    Raises:
        ConfigError: a key without a default is unset, or one that was added with + is unknown.
    """
    missing = sorted(str(key) for key in OmegaConf.missing_keys(composed))
    if missing:
        raise ConfigError(f"unset: {', '.join(missing)}; give it on the command line, e.g. {missing[0]}=VALUE")
    # the schema once more: Hydra's + adds any key, wherever it likes
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunConfig), OmegaConf.to_container(composed)))
    assert isinstance(config, RunConfig)
    return config


def check_config(config: RunConfig) -> None:
    """Raise ConfigError for values out of range, unknown choices, and settings that need a package that is missing."""
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
        "trainer.max_steps": (trainer.max_steps, 1),
        "trainer.workers": (trainer.workers, 0),
        "trainer.probe_images": (trainer.probe_images, 0),
        "trainer.mixup": (trainer.mixup, 0),
        "trainer.cutmix": (trainer.cutmix, 0),
        "optimizer.momentum": (optimizer.momentum, 0),
        "optimizer.weight_decay": (optimizer.weight_decay, 0),
        "schedule.warmup_epochs": (config.schedule.warmup_epochs, 0),
        "seed": (config.seed, 0),
    }
    for key, (number, least) in at_least.items():
        if number is not None and not number >= least:
            raise ConfigError(f"{key} must be at least {least}, got {number}")
    if not trainer.divergence_factor > 1:
        raise ConfigError(f"trainer.divergence_factor must be above 1, got {trainer.divergence_factor}")
    if trainer.clip_norm is not None and not trainer.clip_norm > 0:
        raise ConfigError(f"trainer.clip_norm must be positive, or null for no clipping, got {trainer.clip_norm}")
    if config.cache.max_gb is not None and not config.cache.max_gb > 0:
        raise ConfigError(f"cache.max_gb must be positive, or null for no limit, got {config.cache.max_gb}")
    if trainer.ema_decay is not None and not 0 < trainer.ema_decay < 1:
        raise ConfigError(f"trainer.ema_decay must be between 0 and 1, or null for none, got {trainer.ema_decay}")
    check_mixing(config)
    if not 0 <= trainer.label_smoothing <= 1:
        raise ConfigError(f"trainer.label_smoothing must be from 0 to 1, got {trainer.label_smoothing}")
    choices = {
        "schedule.name": (schedule.name, ("constant", "step", "cosine")),
        "trainer.precision": (trainer.precision, ("no", "bf16", "fp16")),
        "trainer.on_non_finite": (trainer.on_non_finite, ("stop", "skip")),
        "trainer.on_divergence": (trainer.on_divergence, ("stop", "warn", "ignore")),
        "trainer.on_bad_image": (trainer.on_bad_image, ("refuse", "skip")),
        "trainer.tracker": (trainer.tracker, (None, "tensorboard")),
        "method.spectral_dtype": (config.method.spectral_dtype, ("float64", "float32")),
        "cache.dtype": (config.cache.dtype, ("float32", "float16")),
    }
    for key, (value, valid) in choices.items():
        if value not in valid:
            raise ConfigError(f"unknown {key} {value!r}; choose one of {', '.join(map(str, valid))}")
    if trainer.tracker == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError("trainer.tracker=tensorboard needs a package: pip install tensorboard")
    if not 0 <= trainer.val_fraction < 1:
        raise ConfigError(f"trainer.val_fraction must be at least 0 and below 1, got {trainer.val_fraction}")


def check_mixing(config: RunConfig, processes: int = 1) -> None:
    """Raise ConfigError where images are to be mixed in pairs and a part of a step has an odd number of them."""
    trainer = config.trainer
    parts = trainer.accumulation * processes
    if (trainer.mixup or trainer.cutmix) and trainer.batch_size % (2 * parts):
        each = "" if parts == 1 else f" in each of the {parts} parts of a step"
        raise ConfigError(
            f"trainer.mixup and trainer.cutmix mix pairs: trainer.batch_size must be even{each}, got "
            f"{trainer.batch_size}; give a multiple of {2 * parts}"
        )


def check_steps(config: RunConfig, first_stage: int, processes: int) -> None:
    """Raise ConfigError for what the steps of the hybrid protocol's first stage, or the processes, make impossible."""
    check_mixing(config, processes)
    limit = config.trainer.max_steps
    if limit is not None and limit <= first_stage:
        raise ConfigError(
            f"trainer.max_steps={limit} ends before the hybrid protocol switches, after {first_stage} steps; "
            "raise it, or lower hybrid.switch_epoch"
        )
