"""The model card of an export: README.md beside the model, with a snippet that loads it."""

from pathlib import Path
from typing import Any

from fgvc.data.aircraft import BANNER
from fgvc.data.cards import list_cards, load_card
from fgvc.pooling import is_second_order

Facts = dict[str, Any]


def model_card(facts: Facts, cards: Path | None) -> str:
    """Markdown from what is known of a model.

    Args:
        facts: as `fgvc.training.export.export_run` writes them to export.json.
        cards: folder of the dataset cards; None, or one without a card of this dataset, leaves its licence open.
    """
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


def _summary(facts: Facts, cards: Path | None) -> str:
    dataset, licence = facts["dataset"], "see the dataset's own terms"
    known = list_cards(cards) if cards is not None else []
    name = next((name for name in (facts["dataset"], facts["adapter"]) if name in known), None)
    if cards is not None and name is not None:
        card = load_card(cards, name)
        dataset, licence = f"{dataset}: {card.title}", card.licence
    hybrid = facts["hybrid"]
    stages = "`{first}` until epoch {switch_epoch}, then `{then}`".format_map(hybrid) if hybrid else "one"
    reduced = facts["reduction"] is not None and is_second_order(facts["method"])
    rows = {
        "architecture": facts["backbone"] + (", last stage without stride" if facts["last_stride"] == 1 else ""),
        "started from": facts["started_from"] + (", kept frozen" if facts["frozen"] else ""),
        "pooling": f"`{facts['method']}`" + "".join(f", {key}={value}" for key, value in facts["options"].items()),
        "stages of the training": stages,
        "gradient in training": facts["gradient"] or "as published",
        "channels before pooling": str(facts["reduction"]) if reduced else "the backbone's own",
        "classifier": "linear" if not facts["hidden"] else f"hidden layers of {', '.join(map(str, facts['hidden']))}",
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
    text = "Per cent, of the test images; the exported weights are the {} ones.\n\n".format(facts["checkpoint"])
    text += "| weights | epoch | top-1 | top-5 | mean over classes |\n| :-- | --: | --: | --: | --: |\n"
    for which in ("final", "best"):
        found = facts[which]
        if found:
            numbers = " | ".join(f"{found[key]:.2f}" for key in ("top1", "top5", "mean_class"))
            text += f"| {which} | {found['epoch']} | {numbers} |\n"
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
    arguments = {
        "method": facts["method"],
        "num_classes": len(facts["classes"]),
        "reduction": facts["reduction"],
        "hidden": facts["hidden"],
        "gradient": facts["gradient"],
        "last_stride": facts["last_stride"],
        "image_size": facts["preprocessing"]["size"],
        **facts["options"],
    }
    listed = "".join(f"    {key}={value!r},\n" for key, value in arguments.items())
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
        f"Any image is answered with one of these {len(facts['classes'])} classes, whatever it shows.",
        "The accuracies are of one run and one seed on the test images of this dataset; others differ.",
        "The licence of the images and of the weights the training started from may limit the use.",
    ]
    if facts["best"] and facts["best"].get("selected_on", "test") == "test" and facts["checkpoint"] == "best":
        lines.append("The weights were selected on the test images, so their accuracy is optimistic.")
    if facts["format"] in ("onnx", "pt2"):
        lines.append(f"For batches of any size, of images of {size} x {size} pixels only; not for training.")
    if facts["format"] == "pt2":
        lines.append(
            "An eigendecomposition that fails is not tried again, and features that are not finite not refused."
        )
    if facts["format"] == "onnx" and not facts["compared"]:
        lines.append("onnxruntime was not installed at the export: the logits have not been compared with the model's.")
    if facts["format"] == "timm":
        if not facts["classifier"]:
            lines.append("The backbone alone: timm's model has no place for the pooling and its classifier.")
        if not facts["same_map"]:
            lines.append("timm's model keeps the stride of its last stage: its feature map is not that of the run.")
    return lines
