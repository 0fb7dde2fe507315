"""What the types of the configuration cannot say: ranges, choices, and settings that need a package."""

import importlib.util

from fgvc.errors import ConfigError
from fgvc.pooling import pooling_label
from fgvc.runs.config import RunConfig
from fgvc.spectral.precision import SPECTRAL_DTYPES
from fgvc.training.hybrid import check_hybrid, switch_epoch
from fgvc.training.optim import check_schedule


def check(config: RunConfig) -> None:
    """Raise ConfigError for settings that cannot work, before any data is read."""
    check_schedule(config.schedule)
    pooling_label(config.method.name)
    trainer, optimizer = config.trainer, config.optimizer
    at_least = {
        "trainer.epochs": (trainer.epochs, 0),
        "trainer.batch_size": (trainer.batch_size, 1),
        "trainer.accumulation": (trainer.accumulation, 1),
        "trainer.eval_batch_size": (trainer.eval_batch_size, 1),
        "trainer.save_minutes": (trainer.save_minutes, 0),
        "trainer.save_steps": (trainer.save_steps, 1),
        "trainer.max_skips": (trainer.max_skips, 0),
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
    if trainer.clip_norm is not None and not trainer.clip_norm > 0:
        raise ConfigError(f"trainer.clip_norm must be positive, or null for no clipping, got {trainer.clip_norm}")
    if config.cache.max_gb is not None and not config.cache.max_gb > 0:
        raise ConfigError(f"cache.max_gb must be positive, or null for no limit, got {config.cache.max_gb}")
    if trainer.ema_decay is not None and not 0 < trainer.ema_decay < 1:
        raise ConfigError(f"trainer.ema_decay must be between 0 and 1, or null for none, got {trainer.ema_decay}")
    check_mixing(config)
    check_hybrid(config)
    if not 0 <= trainer.label_smoothing <= 1:
        raise ConfigError(f"trainer.label_smoothing must be from 0 to 1, got {trainer.label_smoothing}")
    choices = {
        "trainer.precision": (trainer.precision, ("no", "bf16", "fp16")),
        "trainer.on_non_finite": (trainer.on_non_finite, ("stop", "skip")),
        "trainer.on_divergence": (trainer.on_divergence, ("stop", "warn", "ignore")),
        "trainer.on_bad_image": (trainer.on_bad_image, ("refuse", "skip")),
        "trainer.tracker": (trainer.tracker, (None, "tensorboard")),
        "method.spectral_dtype": (config.method.spectral_dtype, tuple(SPECTRAL_DTYPES)),
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


def check_steps(config: RunConfig, steps: int, processes: int) -> None:
    """Raise ConfigError for what `steps` an epoch, or the number of processes, make impossible."""
    check_mixing(config, processes)
    first_stage, limit = switch_epoch(config) * steps, config.trainer.max_steps
    if limit is not None and limit <= first_stage:
        raise ConfigError(
            f"trainer.max_steps={limit} ends before the hybrid protocol switches, after {first_stage} steps; "
            "raise it, or lower hybrid.switch_epoch"
        )
