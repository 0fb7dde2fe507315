"""What summary.json says of a run besides its course and result: what it is, and what it was made with."""

import hashlib
import json
import sys
from typing import Any

from fgvc.data import fingerprint, verified_content
from fgvc.pooling import is_second_order, pooling_label
from fgvc.provenance import source_state, versions
from fgvc.runs.config import RunConfig
from fgvc.runs.folder import fixed_settings
from fgvc.training.hybrid import switch_epoch
from fgvc.training.machine import machine_facts
from fgvc.training.setup import Images, Prepared


def describe_run(config: RunConfig, prepared: Prepared) -> dict[str, Any]:
    """What a table needs to know of a run besides its result, and what is needed to repeat it."""
    switch, method = switch_epoch(config), config.method
    label = pooling_label(method.name, method.gradient, method.shown_options)
    return {
        "name": config.name,
        "recipe": config.recipe,
        "method": config.method.name,
        "gradient": config.method.gradient,
        "options": method.options,
        "spectral_dtype": method.spectral_dtype,
        "label": label + (" (hybrid)" if switch else ""),
        "hybrid": {"method": config.hybrid.method, "switch_epoch": switch} if switch else None,
        "dataset": config.dataset.name,
        "backbone": config.backbone.name,
        "frozen": config.backbone.frozen,
        "reduction": config.method.reduction if is_second_order(config.method.name) else None,
        "image_size": config.dataset.transform.size,
        "seed": config.seed,
        "epochs": config.trainer.epochs,
        "num_classes": prepared.num_classes,
        "classes": prepared.images.train.classes,
        "train_images": len(prepared.images.train),
        "test_images": len(prepared.images.test),
        "out_features": prepared.head.pooling.out_features,
        "weights_digest": prepared.weights_digest,
        "dataset_fingerprint": _dataset_fingerprint(prepared.images),
        "config_hash": config_hash(config),
        "versions": versions(),
        **source_state(),
        "machine": machine_facts(),
        "command": " ".join(sys.argv),
    }


def config_hash(config: RunConfig) -> str:
    """SHA-256 over the settings that decide what a run computes: the same wherever its dataset lies and it is written.

    Of two versions of fgvc with other settings the hashes differ; `dataset_fingerprint` says which images were read.
    """
    settings = fixed_settings(config)
    settings.pop("dataset.root")
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _dataset_fingerprint(images: Images) -> dict[str, str | None]:
    """Which images were trained on, held out and tested on; the same on another machine with the same files.

    Lists are of paths, classes, regions and file sizes; `verified_content` is of what is in all image files of the
    dataset's folder, as scripts/prepare_data.py verified them.
    """
    validation = images.validation
    return {
        "train_list": fingerprint(images.train, times=False),
        "validation_list": None if validation is None else fingerprint(validation, times=False),
        "test_list": fingerprint(images.test, times=False),
        "verified_content": verified_content(images.test.root),
    }
