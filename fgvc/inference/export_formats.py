"""Writers of the export formats of a trained model.

Each writer compares its output with the given model. Weights files are read again and must hold the same tensors; what
is loaded from them, programs and timm's models must compute the same outputs. For ONNX this needs onnxruntime. If the
run removed the last stride of the backbone, timm's model has another feature map, and only its weights are compared.
"""

import importlib.util
import io
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import resolve_model_input_args, save_for_hf
from torch import Tensor, nn

from fgvc.errors import ConfigError, RunError
from fgvc.models import Backbone, FineGrainedModel, create_model, load_checkpoint
from fgvc.pooling import CholeskyPooling, SpectralPooling

_TOLERANCE = 1e-4  # relative difference of logits on random images: the exporters reorder float32 operations

Facts = dict[str, Any]


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
    size = {"img_size": facts["preprocessing"]["size"]}
    arguments = resolve_model_input_args(facts["backbone"], size, num_classes=num_classes)
    network: nn.Module = timm.create_model(**arguments, **facts["backbone_options"])
    return network.eval()


WRITERS: dict[str, Callable[[FineGrainedModel, Facts, Path], Facts]] = {
    "safetensors": _write_safetensors,
    "onnx": _write_onnx,
    "timm": _write_timm,
    "pt2": _write_pt2,
}
"""Writer by format: writes a model and its facts into a folder and returns facts about the comparison."""
