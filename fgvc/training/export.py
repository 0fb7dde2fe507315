"""A trained model for others: as safetensors, ONNX, a timm folder or a PyTorch program, each with a model card."""

import hashlib
from pathlib import Path

from fgvc.data import effective_options, normalization_from_timm
from fgvc.errors import ConfigError, RunError
from fgvc.files import atomic_folder, write_json_atomic, write_text_atomic
from fgvc.models import FineGrainedModel
from fgvc.provenance import commit_label, versions
from fgvc.reading import read_json
from fgvc.training.config import RunConfig
from fgvc.training.export_formats import WRITERS, Facts
from fgvc.training.hybrid import switch_epoch
from fgvc.training.model_card import model_card
from fgvc.training.model_of_run import load_model, read_classes, restored_method
from fgvc.training.run_folder import RunFolder

_FACTS_FILE = "export.json"


def export_run(
    path: Path,
    *,
    to: str,
    checkpoint: str = "last",
    output: Path | None = None,
    overwrite: bool = False,
    cards: Path | None = None,
) -> Path:
    """Export the model of a run into a folder, whole or not at all; the run's dataset is not needed.

    The folder holds the model, export.json (classes, preprocessing, method, accuracies, versions) and README.md, a
    model card with a snippet that loads it. What was written is compared with the run's model before the folder gets
    its name: weights tensor by tensor, programs by their logits on random images (ONNX where onnxruntime is installed).

    Args:
        path: the run folder.
        to: "safetensors": the whole model for `fgvc.models.load_checkpoint`, facts in its header; "onnx": for
            onnxruntime, any batch size; "timm": the backbone in timm's folder layout, with the classifier where timm's
            model then gives the same logits; "pt2": a program of `torch.export`, any batch size.
        checkpoint: "last" or "best".
        output: the folder to write; None: exports/TO-CHECKPOINT in the run folder. An export of the same run there is
            replaced.
        overwrite: replace an export of another run too.
        cards: folder of the dataset cards, for the licence of the images.

    Returns:
        The folder.

    Raises:
        RunError: not a run, its weights are missing or damaged, `output` holds something else, or what was
            written differs from the run's model.
        ConfigError: unknown format, one that the method cannot be exported to, or a package is missing.
        WeightsError: the weights of a frozen backbone are missing or others.
    """
    if to not in WRITERS:
        raise ConfigError(f"unknown format {to!r}; choose one of {', '.join(WRITERS)}")
    folder = RunFolder(path)
    output = path / "exports" / f"{to}-{checkpoint}" if output is None else output
    run = hashlib.sha256(folder.config_file.read_bytes()).hexdigest() if folder.config_file.is_file() else ""
    _require_free(output, run, overwrite)
    model = load_model(path, checkpoint)
    facts = {"format": to, "checkpoint": checkpoint, "run": run} | _describe(folder, model, checkpoint)
    with atomic_folder(output, replace=True) as temporary:
        facts |= WRITERS[to](model, facts, temporary)
        write_json_atomic(temporary / _FACTS_FILE, facts)
        write_text_atomic(temporary / "README.md", model_card(facts, cards))
    return output


def _require_free(output: Path, run: str, overwrite: bool) -> None:
    """Raise RunError unless nothing is at `output`, or an export that may be replaced."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    try:
        owner = read_json(output / _FACTS_FILE)["run"]
    except (OSError, ValueError, KeyError, TypeError):
        raise RunError(f"{output} exists and is no export of a run; give another --output") from None
    if owner != run and not overwrite:
        raise RunError(f"{output} holds the export of another run; give another --output, or replace it: --overwrite")


def _describe(folder: RunFolder, model: FineGrainedModel, checkpoint: str) -> Facts:
    """What a user of the model must know, as JSON."""
    config, summary = folder.read_config(), folder.read_summary()
    method = restored_method(config, summary, checkpoint)
    adapter, transform = config.dataset.adapter or config.dataset.name, config.dataset.transform
    normalization = normalization_from_timm(model.backbone.data_config)
    return {
        "name": config.name,
        "backbone": config.backbone.name,
        "last_stride": config.backbone.last_stride,
        "method": method.name,
        "label": summary.get("label"),
        "gradient": method.gradient,
        "reduction": method.reduction,
        "hidden": list(method.hidden),
        "options": dict(method.options),
        "hybrid": _hybrid(config),
        "dataset": config.dataset.name,
        "adapter": adapter,
        "dataset_options": effective_options(adapter, config.dataset.options),
        "classes": read_classes(folder),
        "preprocessing": {
            "resize": transform.resize,
            "resize_size": transform.resize_size or transform.size,
            "size": transform.size,
            **{key: list(value) if isinstance(value, tuple) else value for key, value in normalization.items()},
        },
        "started_from": _started_from(config),
        "frozen": config.backbone.frozen,
        "seed": config.seed,
        "status": summary.get("status"),
        "epochs": summary.get("epochs"),
        "final": summary.get("final"),
        "best": summary.get("best"),
        "commit": commit_label(summary),
        "trained_with": summary.get("versions"),
        "exported_with": versions(),
    }


def _hybrid(config: RunConfig) -> Facts | None:
    """The two stages of a hybrid run, of which `method` in the facts is one."""
    if config.hybrid.method is None:
        return None
    return {"first": config.hybrid.method, "switch_epoch": switch_epoch(config), "then": config.method.name}


def _started_from(config: RunConfig) -> str:
    if config.initial_weights is not None:
        return Path(config.initial_weights).name
    if config.backbone.weights is not None:
        return Path(config.backbone.weights).name
    return f"timm's weights of {config.backbone.name}" if config.backbone.pretrained else "random weights"
