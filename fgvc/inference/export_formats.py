"""Writers of the formats a trained model is exported to.

Each compares what it wrote with the model it was given: files of weights are read again and must hold the same tensors,
programs and timm's models must compute the same. Of ONNX this needs onnxruntime; timm's model of a backbone whose last
stride was removed has another feature map, and only its weights are compared.
"""

import importlib.util
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
from fgvc.models import Backbone, FineGrainedModel
from fgvc.pooling import SpectralPooling

_TOLERANCE = 1e-4  # relative, of logits on random images: the exporters reorder float32 operations

Facts = dict[str, Any]


def _images(facts: Facts, batch: int) -> Tensor:
    """Random images (batch, 3, size, size) for tracing and comparing."""
    size = facts["preprocessing"]["size"]
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch))


def _difference(function: Callable[[Tensor], Tensor], model: nn.Module, facts: Facts) -> float:
    """Largest difference of the outputs on three images, relative to the largest output; infinite for other shapes."""
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
            f"exported to {facts['format']}, the model gives other outputs than the run (relative difference "
            f"{difference:.1e}, at most {_TOLERANCE:g} is rounding); nothing was written, please report this"
        )


def _require_saved(state: Mapping[str, Tensor], file: Path) -> None:
    """Raise RunError unless a .safetensors file holds exactly these tensors."""
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
    return {}


def _write_onnx(model: FineGrainedModel, facts: Facts, folder: Path) -> Facts:
    if isinstance(model.head.pooling, SpectralPooling):
        raise ConfigError(
            f"method.name={facts['method']} has no ONNX export: ONNX has no operator for an eigendecomposition. "
            "Export to pt2 or safetensors, or train isqrt_cov, whose iteration is made of matrix products"
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
    model.requires_grad_(False)  # a forward pass alone: the gradients of the spectral layers are not exported
    with torch.no_grad():
        program = torch.export.export(
            model, (_images(facts, 2),), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False
        )
    file = folder / "model.pt2"
    torch.export.save(program, file, extra_files={"fgvc.json": json.dumps(facts)})
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
    # tag and licence are those of the weights that timm publishes
    described: dict[str, Any] = {"pretrained_cfg": {"tag": None, "license": None}}
    if classifier:
        described["label_names"] = facts["classes"]
    save_for_hf(network, str(folder), model_config=described, safe_serialization=True, data_config=data_config)
    _require_saved(network.state_dict(), folder / "model.safetensors")
    same_map = facts["last_stride"] != 1  # timm's model has that stride
    if same_map:
        timms_backbone = Backbone(network, name=facts["backbone"], image_size=recipe["size"]).eval()
        _require_same(timms_backbone, model.backbone, facts)
    return {"classifier": classifier, "same_map": same_map}


def crop_pct(size: int, resize_size: int) -> float:
    """size / resize_size, rounded so that timm, which computes floor(size / crop_pct), resizes to `resize_size`."""
    share = size / resize_size
    return share if math.floor(size / share) == resize_size else math.nextafter(share, 0)


def _timm_classifier(model: FineGrainedModel, facts: Facts) -> nn.Module | None:
    """timm's model with backbone and classifier of a gap run; None where it would not give the same logits."""
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
    """timm's model without classifier, with the weights of the backbone."""
    network, state = _timm_model(facts, 0), model.backbone.model.state_dict()
    behind = [name for name in network.state_dict() if name not in state]
    if behind:
        raise ConfigError(
            f"backbone.name={facts['backbone']} has no export to timm: timm's model has layers behind the feature map "
            f"that the run has not ({', '.join(behind[:3])}{', ...' if len(behind) > 3 else ''}); choose safetensors"
        )
    network.load_state_dict(state)
    return network


def _timm_model(facts: Facts, num_classes: int) -> nn.Module:
    size = {"img_size": facts["preprocessing"]["size"]}
    arguments = resolve_model_input_args(facts["backbone"], size, num_classes=num_classes)
    network: nn.Module = timm.create_model(**arguments)
    return network.eval()


WRITERS: dict[str, Callable[[FineGrainedModel, Facts, Path], Facts]] = {
    "safetensors": _write_safetensors,
    "onnx": _write_onnx,
    "timm": _write_timm,
    "pt2": _write_pt2,
}
"""By format: write a model and what `Facts` say of it into a folder, and say how that went."""
