"""Export of a trained model as safetensors, ONNX, a timm folder or a PyTorch program, each with a model card."""

import hashlib
import html
import os
import re
from pathlib import Path
from typing import Any

from fgvc.data import effective_options, normalization_from_timm
from fgvc.data.aircraft import BANNER
from fgvc.data.cards import list_cards, load_card
from fgvc.errors import ConfigError, RunError, one_line
from fgvc.foreign import read_json_object
from fgvc.inference.export_formats import WRITERS, Facts, model_arguments
from fgvc.inference.restore import load_model, read_classes, restored_method
from fgvc.io import file_digests, plain_mode, replaced_folder, to_json, write_json_atomic, write_text_atomic
from fgvc.models import FineGrainedModel
from fgvc.pooling import is_reduced
from fgvc.provenance import commit_label, versions
from fgvc.runs.config import RunConfig
from fgvc.runs.folder import RunFolder

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
    """Export the model of a run into a folder, completely or not at all; the run's dataset is not needed.

    The folder holds the model, export.json (classes, preprocessing, method, accuracies, versions) and README.md, a
    model card with a snippet that loads it. The folder gets its name only after the export matches the run's model:
    weights tensor by tensor, programs by their logits on random images (ONNX only if onnxruntime is installed).

    Args:
        path: the run folder.
        to: "safetensors": the whole model for `fgvc.models.load_checkpoint`, facts in its header; "onnx": for
            onnxruntime, any batch size; "timm": the backbone in timm's folder layout, with the classifier if timm's
            model then gives the same logits; "pt2": a program of `torch.export`, any batch size.
        checkpoint: "last" or "best".
        output: the folder to write; None means exports/TO-CHECKPOINT in the run folder. An export of the same run in
            this folder is replaced, unless one of its files was changed.
        overwrite: whether to replace an export of another run, or one with changed files, too.
        cards: folder of the dataset cards, for the licence of the images.

    Returns:
        The folder.

    Raises:
        RunError: not a run, its weights are missing or damaged, `output` holds something else, or the export differs
            from the run's model.
        ConfigError: the format is unknown or impossible for this method, or a package is missing.
        WeightsError: the weights of a frozen backbone are missing or differ.
    """
    if to not in WRITERS:
        raise ConfigError(f"unknown format {to!r}; choose one of {', '.join(WRITERS)}")
    folder = RunFolder(path)
    output = path / "exports" / f"{to}-{checkpoint}" if output is None else output
    run = file_digests(folder.config_file, ["sha256"])["sha256"] if folder.config_file.is_file() else ""

    def check(found: Path) -> None:
        _require_free(found, output, run, overwrite)

    model = load_model(path, checkpoint)
    facts: Facts = {"format": to, "checkpoint": checkpoint, "run": run} | _describe(folder, model, checkpoint)
    with replaced_folder(output, check) as temporary:
        facts |= WRITERS[to](model, facts, temporary)
        for file in temporary.iterdir():
            plain_mode(file)
        write_text_atomic(temporary / "README.md", model_card(facts, cards))
        files = {file.name: file_digests(file, ["sha256"])["sha256"] for file in sorted(temporary.iterdir())}
        facts["files"] = files
        write_json_atomic(temporary / _FACTS_FILE, facts | {"digest": _digest(facts)})
    return output


def _digest(facts: Facts) -> str:
    return hashlib.sha256(to_json(facts).encode("utf-8")).hexdigest()


def _require_free(found: Path, output: Path, run: str, overwrite: bool) -> None:
    """Raise RunError unless `found`, which lies at `output`, is empty or an export that may be replaced."""
    if found.is_dir() and not found.is_symlink() and not any(found.iterdir()):
        return
    try:
        facts = read_json_object(found / _FACTS_FILE)
        owner, digest = facts["run"], facts.pop("digest", None)
        files = dict(facts["files"])  # earlier versions have none
        others = [path for path in found.iterdir() if path.name not in {*files, _FACTS_FILE} or path.is_symlink()]
        if found.is_symlink() or others:
            raise ValueError("not of an export alone")
        there = [name for name in files if os.path.lexists(found / name)]
        changed = [name for name in there if file_digests(found / name, ["sha256"])["sha256"] != files[name]]
    except (OSError, ValueError, KeyError, TypeError):
        raise RunError(
            f"{output} exists and is no export of a run, or of an earlier version, or holds another file too; "
            "give another --output, or delete it"
        ) from None
    if owner != run and not overwrite:
        raise RunError(f"{output} holds the export of another run; give another --output, or replace it: --overwrite")
    changed += [] if digest == _digest(facts) else [_FACTS_FILE]
    if changed and not overwrite:
        raise RunError(
            f"{output / changed[0]} was changed since the export; give another --output, or replace it: --overwrite"
        )


def _describe(folder: RunFolder, model: FineGrainedModel, checkpoint: str) -> Facts:
    """Return the facts that a user of the model needs, as JSON."""
    config, summary = folder.read_config(), folder.read_summary()
    method = restored_method(config, folder, checkpoint)
    adapter, transform = config.dataset.reader, config.dataset.transform
    normalization = normalization_from_timm(model.backbone.data_config)
    return {
        "name": config.name,
        "backbone": config.backbone.name,
        "last_stride": config.backbone.last_stride,
        "maps": config.backbone.maps,
        "backbone_options": dict(config.backbone.options),
        "method": method.name,
        "label": summary.get("label"),
        "gradient": method.gradient,
        "solver": method.solver,
        "spectral_dtype": method.spectral_dtype,
        "reduction": method.reduction,
        "hidden": list(method.hidden),
        "options": dict(method.options),
        "class_token": method.class_token,
        # the two stages of a hybrid run; `method` is one of them
        "hybrid": None
        if config.hybrid.method is None
        else {"first": config.hybrid.method, "switch_epoch": config.switch_epoch, "then": config.method.name},
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
        "trainable_stages": config.backbone.trainable_stages,
        "seed": config.seed,
        "status": summary.get("status"),
        "epochs": summary.get("epochs"),
        "final": summary.get("final"),
        "best": summary.get("best"),
        "commit": commit_label(summary),
        "trained_with": summary.get("versions"),
        "exported_with": versions(),
    }


def _started_from(config: RunConfig) -> str:
    file = config.initial_weights if config.initial_weights is not None else config.backbone.weights
    if file is not None:
        return Path(file).name
    return f"timm's weights of {config.backbone.name}" if config.backbone.pretrained else "random weights"


def model_card(facts: Facts, cards: Path | None) -> str:
    """Return the model card, in Markdown.

    Args:
        facts: content of export.json, as `export_run` writes it.
        cards: folder of the dataset cards; with None, or without a card of this dataset, the card names no licence.
    """
    facts = _plain(facts)
    sections = {
        f"{facts['label']} on {facts['backbone']}, {facts['dataset']}": _summary(facts, cards),
        "Accuracy": _accuracy(facts),
        "Preprocessing": _preprocessing(facts),
        "Loading": f"In this folder:\n\n```python\n{_SNIPPETS[facts['format']](facts)}```\n",
        "Limitations": "".join(f"- {line}\n" for line in _limitations(facts)),
    }
    front = "---\nlibrary_name: {}\ntags:\n- image-classification\n- fgvc\n---\n".format(
        "timm" if facts["format"] == "timm" else "fgvc"
    )
    first, *others = sections.items()
    body = [f"# {first[0]}\n\n{first[1]}", *(f"## {title}\n\n{text}" for title, text in others)]
    return front + "\n" + "\n".join(body)


_MARKUP = re.compile(r"[|`*~$]|(?<!\w)_|_(?!\w)|(?<=\])(?=[(\[:])|(?<=:)(?=//)")


def _plain(value: Any) -> Any:
    """Return facts in which no text can be markup of Markdown or HTML."""
    if isinstance(value, str):
        return _MARKUP.sub(r"\\\g<0>", html.escape(one_line(value), quote=False))
    if isinstance(value, dict):
        return {_plain(key): _plain(member) for key, member in value.items()}
    return [_plain(member) for member in value] if isinstance(value, list) else value


def _summary(facts: Facts, cards: Path | None) -> str:
    dataset, licence = facts["dataset"], "see the dataset's own terms"
    known = list_cards(cards) if cards is not None else []
    name = next((name for name in (facts["dataset"], facts["adapter"]) if name in known), None)
    if cards is not None and name is not None:
        card = load_card(cards, name)
        dataset, licence = f"{dataset}: {card.title}", card.licence
    hybrid = facts["hybrid"]
    stages = "`{first}` until epoch {switch_epoch}, then `{then}`".format_map(hybrid) if hybrid else "one"
    reduced = facts["reduction"] is not None and is_reduced(facts["method"])
    last = f" except the last {facts['trainable_stages']} stages" if facts["trainable_stages"] else ""
    rows = {
        "architecture": facts["backbone"]
        + (", last stage without stride" if facts["last_stride"] == 1 else "")
        + (f", maps of its last {facts['maps']} layers" if facts["maps"] > 1 else ""),
        "started from": facts["started_from"] + (", kept frozen" if facts["frozen"] else "") + last,
        "pooling": f"`{facts['method']}`" + "".join(f", {key}={value}" for key, value in facts["options"].items()),
        "stages of the training": stages,
        "gradient in training": facts["gradient"] or "as published",
        "channels before pooling": str(facts["reduction"]) if reduced else "the backbone's own",
        "classifier": ("linear" if not facts["hidden"] else f"hidden layers of {', '.join(map(str, facts['hidden']))}")
        + (", and a linear one of the class token, whose logits are added" if facts["class_token"] else ""),
        "dataset": dataset,
        "licence of the images": licence,
        "classes": str(len(facts["classes"])),
        "weights": f"the {facts['checkpoint']} ones, seed {facts['seed']}",
        "commit": facts["commit"] or "not recorded",
        "versions in training": _versions(facts["trained_with"]),
        "versions at the export": _versions(facts["exported_with"]),
    }
    return "| | |\n| :-- | :-- |\n" + "".join(f"| {key} | {value} |\n" for key, value in rows.items())


def _versions(versions: dict[str, str] | None) -> str:
    return ", ".join(f"{name} {version}" for name, version in (versions or {}).items()) or "not recorded"


def _accuracy(facts: Facts) -> str:
    text = "In per cent, on the test images. The exported weights are the {} ones.\n\n".format(facts["checkpoint"])
    text += "| weights | epoch | top-1 | top-5 | mean of classes with images |\n| :-- | --: | --: | --: | --: |\n"
    for which in ("final", "best"):
        found = facts[which]
        if found:
            shares = (found.get(key) for key in ("top1", "top5", "mean_class"))
            numbers = " | ".join("not measured" if share is None else f"{share:.2f}" for share in shares)
            text += f"| {which} | {found.get('epoch', 'not recorded')} | {numbers} |\n"
    if facts["best"]:
        text += f"\nThe best epoch was selected on the {facts['best'].get('selected_on', 'test')} images.\n"
    if facts["status"] != "finished":
        text += f"\nThe run is not finished (status: {facts['status']}).\n"
    return text


def _preprocessing(facts: Facts) -> str:
    recipe, options = facts["preprocessing"], facts["dataset_options"]
    cut = f", without the {BANNER} rows of the banner at the bottom" if options.get("remove_banner") else ""
    cut += ", cut to the object's bounding box" if options.get("crop") == "bbox" else ""
    resize = "the shorter side" if recipe["resize"] == "short" else "both sides"
    mean, std = (", ".join(f"{number:g}" for number in recipe[key]) for key in ("mean", "std"))
    return (
        f"RGB{cut}, {resize} resized to {recipe['resize_size']} pixels ({recipe['interpolation']}), the centre of "
        f"{recipe['size']} x {recipe['size']} pixels, scaled to 0..1, minus ({mean}), divided by ({std}).\n"
    )


def _images(facts: Facts, module: str) -> str:
    size = facts["preprocessing"]["size"]
    array = "np.zeros((1, 3, {0}, {0}), np.float32)" if module == "numpy" else "torch.zeros(1, 3, {0}, {0})"
    return f"images = {array.format(size)}  # preprocessed as above\n"


def _fgvc_snippet(facts: Facts) -> str:
    listed = "".join(f"    {key}={value!r},\n" for key, value in model_arguments(facts).items())
    return (
        "import torch\nfrom fgvc.models import create_model, load_checkpoint\n\n"
        f"model = create_model(\n    {facts['backbone']!r},\n{listed}).eval()\n"
        'load_checkpoint(model, "model.safetensors")\n'
        f"{_images(facts, 'torch')}logits = model(images)\n"
    )


def _onnx_snippet(facts: Facts) -> str:
    return (
        "import json\nimport numpy as np\nimport onnxruntime\n\n"
        'session = onnxruntime.InferenceSession("model.onnx")\n'
        'classes = json.loads(session.get_modelmeta().custom_metadata_map["classes"])\n'
        f'{_images(facts, "numpy")}(logits,) = session.run(None, {{"images": images}})\n'
    )


def _pt2_snippet(facts: Facts) -> str:
    return (
        f'import torch\n\nmodel = torch.export.load("model.pt2").module()\n{_images(facts, "torch")}'
        "logits = model(images)\n"
    )


def _timm_snippet(facts: Facts) -> str:
    adds = "import fgvc.models  # adds this architecture to timm\n" if facts["backbone"].startswith("alexnet") else ""
    classes, result = ("", "logits") if facts["classifier"] else (", num_classes=0", "features")
    return (
        f"import timm\nimport torch\n{adds}\n"
        f'model = timm.create_model("local-dir:."{classes}, pretrained=True).eval()\n'
        f"{_images(facts, 'torch')}{result} = model(images)\n"
    )


_SNIPPETS = {"safetensors": _fgvc_snippet, "onnx": _onnx_snippet, "pt2": _pt2_snippet, "timm": _timm_snippet}


def _limitations(facts: Facts) -> list[str]:
    size = facts["preprocessing"]["size"]
    lines = [
        f"The model answers with one of these {len(facts['classes'])} classes, whatever the image shows.",
        "The accuracies are from one run, one seed and the test images of this dataset; other runs and images differ.",
        "The licences of the images and of the weights that training started from may limit the use.",
    ]
    if facts["best"] and facts["best"].get("selected_on", "test") == "test" and facts["checkpoint"] == "best":
        lines.append("The weights were selected on the test images, so their accuracy is optimistic.")
    if facts["format"] in ("onnx", "pt2"):
        lines.append(f"Batches of any size, but only images of {size} x {size} pixels; not for training.")
    if facts["format"] == "pt2":
        lines.append("A failed eigendecomposition is not retried. Features that are not finite raise no error.")
    if facts["format"] == "onnx" and not facts["compared"]:
        lines.append("onnxruntime was not installed at the export: the logits were not compared with the run's model.")
    if facts["format"] == "timm":
        if not facts["classifier"]:
            lines.append("Only the backbone: timm's model has no place for the pooling and its classifier.")
        if not facts["same_map"]:
            lines.append("timm's model keeps the stride of its last stage: its feature map differs from the run's.")
    return lines
