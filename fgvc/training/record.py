"""What a run says of itself: its first lines, the entries of its summary, and its split."""

import hashlib
import json
import logging
import sys
from typing import Any

import pandas as pd
import torch
from accelerate import Accelerator

from fgvc.data import verified_content
from fgvc.errors import RunError
from fgvc.io import to_csv, write_text_atomic
from fgvc.pooling import is_reduced, pooling_label
from fgvc.provenance import machine_facts, peak_memory_mb, source_state, versions
from fgvc.runs.config import RunConfig
from fgvc.runs.folder import RunFolder, fixed_settings
from fgvc.training.setup import Prepared
from fgvc.training.states import Progress

_log = logging.getLogger(__name__)


def run_header(config: RunConfig, prepared: Prepared, accelerator: Accelerator, folder: RunFolder) -> str:
    """Return a few lines on what is trained, on what, how long, and where the results go."""
    trainer, method, steps = config.trainer, config.method, prepared.loaders.batches.steps
    epochs = trainer.planned_epochs(steps)
    device = accelerator.device
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else device
    several = f" x {accelerator.num_processes}" if accelerator.num_processes > 1 else ""
    held_out = "" if prepared.validation is None else f"{len(prepared.validation.paths):,} validation, "
    label = pooling_label(method.name, method.gradient, method.shown_options)
    reduced = f", reduction {method.reduction}" if method.reduction and is_reduced(method.name) else ""
    trained = sum(parameter.numel() for parameter in prepared.trained.parameters() if parameter.requires_grad)
    rows = {
        "images": f"{config.dataset.name}: {len(prepared.train.paths):,} training, {held_out}"
        f"{len(prepared.test.paths):,} test, {len(prepared.train.classes):,} classes; "
        f"{config.dataset.transform.size} px",
        "model": f"{config.backbone.name} ({_trained_stages(config)}), {label}{reduced}, "
        f"{trained:,} parameters to train",
        "steps": f"{min(epochs * steps, trainer.max_steps or epochs * steps):,} of {trainer.batch_size} images in "
        f"{epochs:,} epochs, {config.optimizer.name}, learning rate {config.optimizer.lr:g}, {config.schedule.name}, "
        f"seed {config.seed}",
        "device": f"{place}{several}, {'float32' if trainer.precision == 'no' else trainer.precision}",
        "results": str(folder.path),
    }
    return "\n".join(f"{name:8} {text}" for name, text in rows.items())


def _trained_stages(config: RunConfig) -> str:
    """Return which part of the backbone is trained, in words."""
    if config.backbone.trainable_stages is not None:
        return f"frozen except its last {config.backbone.trainable_stages} stages"
    if config.backbone.lora is not None:
        return f"frozen except adapters of rank {config.backbone.lora}"
    return "frozen" if config.backbone.frozen else "trained"


def describe_run(config: RunConfig, prepared: Prepared) -> dict[str, Any]:
    """Return the summary's entries that do not change during the run: its settings, data, versions and machine."""
    switch, method = config.switch_epoch, config.method
    label = pooling_label(method.name, method.gradient, method.shown_options)
    return {
        "name": config.name,
        "recipe": config.recipe,
        "method": method.name,
        "gradient": method.gradient,
        "options": method.options,
        "spectral_dtype": method.spectral_dtype,
        "label": label + (" (hybrid)" if switch else ""),
        "hybrid": {"method": config.hybrid.method, "switch_epoch": switch} if switch else None,
        "dataset": config.dataset.name,
        "backbone": config.backbone.name,
        "frozen": config.backbone.frozen and config.backbone.trainable_stages is None,
        "reduced": is_reduced(method.name),
        "reduction": method.reduction if is_reduced(method.name) else None,
        "image_size": config.dataset.transform.size,
        "seed": config.seed,
        "epochs": config.trainer.planned_epochs(prepared.loaders.batches.steps),
        "num_classes": len(prepared.train.classes),
        "classes": prepared.train.classes,
        "coarse": {level: list(names) for level, names in prepared.train.coarse.items()} or None,
        "train_images": len(prepared.train.paths),
        "class_sizes": prepared.train.class_sizes,
        "test_images": len(prepared.test.paths),
        "validation_images": 0 if prepared.validation is None else len(prepared.validation.paths),
        "test_classes": len(set(prepared.test.targets)),
        "out_features": prepared.head.pooling.out_features,
        "weights_digest": prepared.digests["weights"],
        "initial_weights_digest": prepared.digests.get("initial_weights"),
        "head_digest": prepared.digests["head"],
        "dataset_fingerprint": {
            **{
                f"{split}_{what}": prepared.digests.get(f"{split}_{what}")
                for split in ("train", "validation", "test")
                for what in ("list", "content")
            },
            "listed": prepared.digests["listed"],
            "verified_content": verified_content(prepared.test.root),
        },
        "config_hash": config_hash(config),
        "versions": versions(),
        **source_state(),
        "machine": machine_facts(),
        "command": " ".join(sys.argv),
    }


def config_hash(config: RunConfig) -> str:
    """Return the SHA-256 of the settings that a resumed run must keep.

    Versions of fgvc with different settings give different hashes. `dataset_fingerprint` identifies the images.
    """
    return hashlib.sha256(json.dumps(fixed_settings(config), sort_keys=True).encode()).hexdigest()


SESSION = ("commit", "dirty", "versions", "machine")


def sessions_of(folder: RunFolder) -> list[dict[str, Any]]:
    """Code, versions and machine of the sessions that trained a run so far; of a damaged summary none."""
    try:
        summary = folder.read_summary()
    except RunError:
        return []
    last = {key: summary.get(key) for key in SESSION}
    earlier: list[dict[str, Any]] = summary.get("earlier_sessions") or []
    return [*(session for session in earlier if session != last), last]


def progress_summary(progress: Progress) -> dict[str, Any]:
    """Return the summary's entries that change during the run: the selected epoch, seconds by phase, peak memory."""
    best = progress.best and {key: value for key, value in progress.best.items() if key != "selected_by"}
    seconds = {key: round(value, 3) for key, value in progress.seconds.items()}
    return {"best": best, "seconds": seconds, "peak_memory_mb": round(peak_memory_mb(), 1)}


def write_split(folder: RunFolder, prepared: Prepared) -> None:
    """Write which images were in which split, as a table that dataset=table reads; "val" are held-out images."""
    parts = {"train": prepared.train, "val": prepared.validation, "test": prepared.test}
    rows = [
        {"path": path, "label": images.classes[target], "split": split}
        | {level: names[target] for level, names in images.coarse.items()}
        for split, images in parts.items()
        if images is not None
        for path, target in zip(images.relative_paths(), images.targets, strict=True)
    ]
    write_text_atomic(folder.split_file, to_csv(pd.DataFrame(rows), None))
    _log.info("the split is written to %s", folder.split_file)
