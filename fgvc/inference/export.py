"""Export of a trained model as safetensors, ONNX, a PyTorch program, or a folder of the hub or of timm, with a card.

Each writer compares its output with the given model. Weights files are read again and must hold the same tensors; what
is loaded from them, programs and timm's models must compute the same outputs. For ONNX this needs onnxruntime. If the
run removed the last stride of the backbone, timm's model has another feature map, and only its weights are compared.
"""

import hashlib
import html
import importlib.util
import io
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from safetensors.torch import load_file, save_file
from timm.models import resolve_model_input_args, save_for_hf
from torch import Tensor, nn

from fgvc.data import effective_options, normalization_from_timm
from fgvc.data.aircraft import BANNER
from fgvc.data.cards import list_cards, load_card
from fgvc.errors import ConfigError, RunError, one_line
from fgvc.foreign import read_json_object
from fgvc.inference.calibrate import read_calibration
from fgvc.inference.restore import load_model, read_classes, restored_method
from fgvc.io import plain_mode, replaced_folder, sha256, to_json, write_json_atomic, write_text_atomic
from fgvc.models import Backbone, FineGrainedModel, create_model, load_checkpoint
from fgvc.models.hub import WEIGHTS, Architecture, FittedTemperature, ModelConfig
from fgvc.models.transformers_backbone import PREFIX
from fgvc.pooling import CholeskyPooling, SpectralPooling, is_reduced
from fgvc.provenance import commit_label, versions
from fgvc.runs.config import MethodConfig, RunConfig, TransformConfig
from fgvc.runs.folder import RunFolder

Facts = dict[str, Any]

_FACTS_FILE = "export.json"
_TOLERANCE = 1e-4  # relative difference of logits on random images: the exporters reorder float32 operations


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
        to: "safetensors": the whole model for `fgvc.models.load_checkpoint`, facts in its header; "hub": for
            `fgvc.load_run`, as a folder or on the Hugging Face hub; "onnx": for onnxruntime, any batch size; "timm":
            the backbone in timm's folder layout, with the classifier if timm's model then gives the same logits;
            "pt2": a program of `torch.export`, any batch size.
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
    run = sha256(folder.config_file) if folder.config_file.is_file() else ""

    def check(found: Path) -> None:
        _require_free(found, output, run, overwrite)

    model = load_model(path, checkpoint)
    facts: Facts = {"format": to, "checkpoint": checkpoint, "run": run} | _describe(folder, model, checkpoint)
    with replaced_folder(output, check) as temporary:
        facts |= WRITERS[to](model, facts, temporary)
        for file in temporary.iterdir():
            plain_mode(file)
        write_text_atomic(temporary / "README.md", model_card(facts, cards))
        files = {file.name: sha256(file) for file in sorted(temporary.iterdir())}
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
        changed = [name for name in there if sha256(found / name) != files[name]]
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
    calibration = read_calibration(folder.path, checkpoint)
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
        "temperature": None if calibration is None else calibration.temperature,
        "calibrated_on": None
        if calibration is None or calibration.temperature is None
        else {"split": calibration.split, "images": calibration.images},
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
    known = [] if cards is None else list_cards(cards)
    name = next((name for name in (facts["dataset"], facts["adapter"]) if name in known), None)
    environment = Environment(loader=PackageLoader(__package__, "assets"), undefined=StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = environment.keep_trailing_newline = True
    environment.filters["repr"] = repr
    return environment.get_template("model_card.md").render(
        facts,
        card=None if cards is None or name is None else load_card(cards, name),
        reduced=is_reduced(facts["method"]),
        arguments=model_arguments(facts),
        banner=BANNER,
    )


_MARKUP = re.compile(r"[|`*~$]|(?<!\w)_|_(?!\w)|(?<=\])(?=[(\[:])|(?<=:)(?=//)")


def _plain(value: Any) -> Any:
    """Return facts in which no text can be markup of Markdown or HTML."""
    if isinstance(value, str):
        return _MARKUP.sub(r"\\\g<0>", html.escape(one_line(value), quote=False))
    if isinstance(value, dict):
        return {_plain(key): _plain(member) for key, member in value.items()}
    return [_plain(member) for member in value] if isinstance(value, list) else value


def _images(facts: Facts, batch: int) -> Tensor:
    """Return random images (batch, 3, size, size) for tracing and comparing."""
    size = facts["preprocessing"]["size"]
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch))


def _difference(function: Callable[[Tensor], Tensor], model: nn.Module, facts: Facts) -> float:
    """Return the largest output difference on three images, relative to the largest output; inf if shapes differ."""
    images = _images(facts, 3)
    with torch.no_grad():
        expected, found = model(images), function(images)
    if found.shape != expected.shape:
        return math.inf
    return float((found - expected).abs().max() / expected.abs().max())


def _require_same(function: Callable[[Tensor], Tensor], model: nn.Module, facts: Facts) -> None:
    difference = _difference(function, model, facts)
    if not difference <= _TOLERANCE:
        raise RunError(
            f"the model exported to {facts['format']} differs from the run's model (relative difference of outputs "
            f"{difference:.1e}; rounding explains at most {_TOLERANCE:g}); nothing was written, please report this"
        )


def _require_saved(state: Mapping[str, Tensor], file: Path) -> None:
    """Raise RunError unless the .safetensors file holds exactly these tensors."""
    saved = load_file(file)
    wrong = [name for name in state.keys() | saved.keys() if not _equal(state.get(name), saved.get(name))]
    if wrong:
        raise RunError(
            f"{file.name} does not hold the weights of the run ({min(wrong)} differs); nothing was written, "
            "please report this"
        )


def _equal(left: Tensor | None, right: Tensor | None) -> bool:
    return left is not None and right is not None and left.dtype == right.dtype and torch.equal(left, right)


def _write_safetensors(model: FineGrainedModel, facts: Facts, folder: Path) -> Facts:
    metadata = {"format": "pt", "fgvc": json.dumps(facts)}
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    file = folder / "model.safetensors"
    save_file(tensors, file, metadata=metadata)
    _require_saved(model.state_dict(), file)
    again = create_model(facts["backbone"], **model_arguments(facts)).eval()
    load_checkpoint(again, file)
    _require_same(again, model, facts)
    return {"compared": True}


def _write_hub(model: FineGrainedModel, facts: Facts, folder: Path) -> Facts:
    backbone = Architecture(facts["backbone"], facts["last_stride"], facts["maps"], facts["backbone_options"])
    same = ("gradient", "reduction", "hidden", "solver", "spectral_dtype", "options", "class_token")
    calibrated, options = facts["calibrated_on"], facts["dataset_options"]
    model.config = ModelConfig(
        backbone=backbone,
        method=MethodConfig(name=facts["method"], **{key: facts[key] for key in same}),
        transform=TransformConfig(**{key: facts["preprocessing"][key] for key in ("size", "resize", "resize_size")}),
        classes=facts["classes"],
        calibration=None if calibrated is None else FittedTemperature(facts["temperature"], **calibrated),
        cut_to_box=options.get("crop") == "bbox",
        banner_removed=bool(options.get("remove_banner")),
    )
    model.save_pretrained(folder)
    again = FineGrainedModel.from_pretrained(folder)
    _require_saved(model.state_dict(), folder / WEIGHTS)
    _require_same(again, model, facts)
    # the others may name folders and files of this machine
    shared = {key: value for key, value in options.items() if key in ("crop", "remove_banner")}
    return {"compared": True, "dataset_options": shared}


def model_arguments(facts: Facts) -> dict[str, Any]:
    """The arguments of `create_model` behind the name of the backbone that build the model again."""
    return {
        "method": facts["method"],
        "num_classes": len(facts["classes"]),
        "reduction": facts["reduction"],
        "hidden": facts["hidden"],
        "gradient": facts["gradient"],
        "solver": facts["solver"],
        "spectral_dtype": facts["spectral_dtype"],
        "class_token": facts["class_token"],
        "last_stride": facts["last_stride"],
        "maps": facts["maps"],
        "image_size": facts["preprocessing"]["size"],
        "backbone_options": facts["backbone_options"],
        **facts["options"],
    }


def _write_onnx(model: FineGrainedModel, facts: Facts, folder: Path) -> Facts:
    pooling = model.head.pooling
    with torch.no_grad():
        by_products = isinstance(pooling, SpectralPooling) and pooling.by_products(
            model.pooling_input(_images(facts, 1))
        )
    if isinstance(pooling, SpectralPooling | CholeskyPooling) and not by_products:
        raise ConfigError(
            f"method.name={facts['method']} has no ONNX export: ONNX has no operator for an eigendecomposition or a "
            "Cholesky factor. Export to pt2 or safetensors, or train isqrt_cov, which uses matrix products only (as "
            "method.solver=products does where there are more locations than channels)"
        )
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"an export to ONNX needs packages: pip install {' '.join(missing)}")
    program = torch.onnx.export(
        model,
        (_images(facts, 2),),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        input_names=["images"],
        output_names=["logits"],
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props.update(classes=json.dumps(facts["classes"]), fgvc=json.dumps(facts))
    file = folder / "model.onnx"
    program.save(file)
    compared = importlib.util.find_spec("onnxruntime") is not None
    if compared:
        _require_same(_onnx_session(file), model, facts)
    return {"compared": compared}


def _onnx_session(file: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime  # type: ignore[import-untyped]  # optional

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _write_pt2(model: FineGrainedModel, facts: Facts, folder: Path) -> Facts:
    model.requires_grad_(False)  # forward pass only: the gradients of the spectral layers are not exported
    with torch.no_grad():
        program = torch.export.export(
            model, (_images(facts, 2),), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False
        )
    file = folder / "model.pt2"
    content = io.BytesIO()  # on a full disk torch's own writer ends the process
    torch.export.save(program, content, extra_files={"fgvc.json": json.dumps(facts)})
    file.write_bytes(content.getbuffer())
    _require_same(torch.export.load(file).module(), model, facts)
    return {"compared": True}


def _write_timm(model: FineGrainedModel, facts: Facts, folder: Path) -> Facts:
    network = _timm_classifier(model, facts) if facts["method"] == "gap" else None
    classifier = network is not None
    if network is None:
        network = _timm_backbone(model, facts)
    recipe = facts["preprocessing"]
    data_config = {
        "input_size": (3, recipe["size"], recipe["size"]),
        "crop_pct": crop_pct(recipe["size"], recipe["resize_size"]),
        "crop_mode": "center" if recipe["resize"] == "short" else "squash",
        **{key: recipe[key] for key in ("mean", "std", "interpolation")},
    }
    # timm's tag and licence describe the weights that timm publishes, not these
    described: dict[str, Any] = {"pretrained_cfg": {"tag": None, "license": None}}
    if classifier:
        described["label_names"] = facts["classes"]
    save_for_hf(
        network,
        str(folder),
        model_config=described,
        model_args=facts["backbone_options"] or None,
        safe_serialization=True,
        data_config=data_config,
    )
    _require_saved(network.state_dict(), folder / "model.safetensors")
    same_map = facts["last_stride"] != 1 and facts["maps"] == 1  # timm's model keeps its last stride
    if same_map:
        timms_backbone = Backbone(network, name=facts["backbone"], image_size=recipe["size"]).eval()
        _require_same(timms_backbone, model.backbone, facts)
    return {"classifier": classifier, "same_map": same_map}


def crop_pct(size: int, resize_size: int) -> float:
    """Return size / resize_size, rounded such that timm's floor(size / crop_pct) is `resize_size`."""
    share = size / resize_size
    return share if math.floor(size / share) == resize_size else math.nextafter(share, 0)


def _timm_classifier(model: FineGrainedModel, facts: Facts) -> nn.Module | None:
    """Return timm's model with backbone and classifier of a gap run; None if its logits differ from the run's."""
    network = _timm_model(facts, len(facts["classes"]))
    name = getattr(network, "pretrained_cfg", {})["classifier"]
    state = dict(model.backbone.model.state_dict())
    state |= {f"{name}.{key}": tensor for key, tensor in model.head.classifier.state_dict().items()}
    shapes = {key: tensor.shape for key, tensor in state.items()}
    if shapes != {key: tensor.shape for key, tensor in network.state_dict().items()}:
        return None
    network.load_state_dict(state)
    return network if _difference(network, model, facts) <= _TOLERANCE else None


def _timm_backbone(model: FineGrainedModel, facts: Facts) -> nn.Module:
    """Return timm's model without classifier, with the weights of the backbone."""
    network, state = _timm_model(facts, 0), model.backbone.model.state_dict()
    extra = [name for name in network.state_dict() if name not in state]
    if extra:
        raise ConfigError(
            f"backbone.name={facts['backbone']} has no export to timm: timm's model has layers after the feature map "
            f"that the run lacks ({', '.join(extra[:3])}{', ...' if len(extra) > 3 else ''}); choose safetensors"
        )
    network.load_state_dict(state)
    return network


def _timm_model(facts: Facts, num_classes: int) -> nn.Module:
    if facts["backbone"].startswith(PREFIX):
        raise ConfigError(f"{facts['backbone']} is no model of timm; export to safetensors, hub, onnx or pt2")
    size = {"img_size": facts["preprocessing"]["size"]}
    arguments = resolve_model_input_args(facts["backbone"], size, num_classes=num_classes)
    network: nn.Module = timm.create_model(**arguments, **facts["backbone_options"])
    return network.eval()


WRITERS: dict[str, Callable[[FineGrainedModel, Facts, Path], Facts]] = {
    "safetensors": _write_safetensors,
    "hub": _write_hub,
    "onnx": _write_onnx,
    "timm": _write_timm,
    "pt2": _write_pt2,
}
"""Writer by format: writes a model and its facts into a folder and returns facts about the comparison."""
