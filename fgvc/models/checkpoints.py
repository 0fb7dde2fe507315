"""Loads whole published models into ours: a table of rules translates names, and every tensor is accounted for."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fgvc.errors import WeightsError
from fgvc.models.files import Layout, State, listed, locate_weights, not_floating, read_tensors, unfilled
from fgvc.models.formats import TIMM, CheckpointFormat, list_formats, recognise, translate
from fgvc.models.model import FineGrainedModel
from fgvc.models.weights import convert_as_timm
from fgvc.spectral import upper_triangle


@dataclass(frozen=True)
class CheckpointReport:
    """Result of `load_checkpoint`.

    Attributes:
        source: Path of the file.
        format: Title of the file's format.
        loaded: Number of loaded tensors.
        left_out: Names of the file's tensors that were ignored on purpose.
        kept: Names of the model's tensors that did not change.
        folded: Whether a classifier of the whole matrix was folded into one of the upper triangle.
    """

    source: str
    format: str
    loaded: int
    left_out: tuple[str, ...]
    kept: tuple[str, ...]
    folded: bool


def load_checkpoint(
    model: FineGrainedModel,
    source: str | Path,
    *,
    backbone: bool = True,
    reduction: bool = True,
    classifier: bool | None = True,
) -> CheckpointReport:
    """Load a whole published model, or parts of it, into `model`: all requested parts or nothing.

    The names determine the format, see `fgvc.models.formats`. Each tensor of the file needs a place in the model and
    vice versa, except counters of batch normalisation, which old files lack.

    Args:
        model: model with the published architecture, method, reduction and last stride.
        source: a path or `package:NAME`; a state dict, bare or in a training checkpoint, with or without the
            prefixes of wrappers.
        backbone: whether to load the backbone; otherwise the model's does not change and the file's is ignored.
        reduction: whether to load the channel reduction.
        classifier: whether to load the classifier; None loads it if it has the model's number of classes.

    Raises:
        WeightsError: the file is missing, unreadable, of no known format, or does not fit `model`; the message lists
            tensors that are left over, missing and of another shape.
    """
    path = locate_weights(source, "initial_weights")
    tensors = read_tensors(path)
    form = recognise(tensors, model.backbone.model)
    if form is None:
        raise WeightsError(
            f"{path} has no known format{listed(tensors)}; known formats: {'; '.join(list_formats())}. "
            "A backbone with other names may fit by order: backbone.weights"
        )
    if form.title == TIMM:
        tensors = convert_as_timm(tensors, model.backbone.model)
    names = translate(tensors, form)
    state = {ours: tensors[name] for name, ours in names.items() if ours}
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    folded = _fold_classifier(state, shapes)
    if classifier is None:
        classifier = _classes(state) == _classes(model.state_dict())
    # random tensors of a pooling belong to the classifier that was trained on them
    chosen = {
        "backbone.": backbone,
        "head.reduction.": reduction,
        "head.pooling.": classifier,
        "head.classifier.": classifier,
        "head.token_classifier.": classifier,
    }
    parts = tuple(part for part, requested in chosen.items() if requested)
    problems = _problems(names, state, shapes, parts)
    if problems:
        raise WeightsError(
            f"{path}, read as {form.title}, does not fit this model on {model.backbone.name}: {'; '.join(problems)}. "
            "Build the model with the file's architecture, method, reduction and number of classes, or leave a part "
            "out (in Python: backbone=False, reduction=False or classifier=False)"
        )
    _check_function(path, form, model, parts)
    loaded = {name: tensor for name, tensor in state.items() if name.startswith(parts)}
    if wrong := not_floating(loaded, model.state_dict()):
        raise WeightsError(f"{path}: {len(wrong)} tensors are no floating numbers{listed(wrong)}; save them as float32")
    model.load_state_dict(loaded, strict=False)  # missing names are checked above
    return CheckpointReport(
        source=str(path),
        format=form.title,
        loaded=len(loaded),
        left_out=tuple(name for name, ours in names.items() if ours not in loaded),
        kept=tuple(name for name in shapes if name not in loaded),
        folded=folded and "head.classifier." in parts,
    )


def _problems(names: Mapping[str, str | None], state: State, shapes: Layout, parts: tuple[str, ...]) -> list[str]:
    """Return reasons why `state` does not fill these parts of the model; empty if it does."""
    needed = {name: shape for name, shape in shapes.items() if name.startswith(parts)}
    missing, reshaped = unfilled(state, needed)
    kinds = {
        "in the file have no place in the model": [
            name for name, ours in names.items() if ours is None or (ours.startswith(parts) and ours not in needed)
        ],
        "of the model are missing in the file": missing,
        "are of another shape": reshaped,
    }
    return [f"{len(found)} {kind}{listed(found)}" for kind, found in kinds.items() if found]


def _check_function(path: Path, form: CheckpointFormat, model: FineGrainedModel, parts: tuple[str, ...]) -> None:
    """Raise WeightsError for weights that fit by names and shapes but belong to another computation."""
    network = model.backbone.model
    if form.last_stride == 1 and "backbone." in parts:
        first_block = network.layer4[0]  # exists, since the names fit a ResNet
        if any(isinstance(m, nn.Conv2d) and m.stride == (2, 2) for m in first_block.modules()):
            raise WeightsError(
                f"{path} is from a ResNet without the stride of its last stage; build the model with last_stride=1 "
                "(backbone.last_stride=1)"
            )
    # timm's VGG has the same names
    if form.unpooled and "backbone." in parts and isinstance(network.features[-1], nn.MaxPool2d):
        raise WeightsError(
            f"{path} is from a network that ends before its last max-pooling, but {model.backbone.name} ends after it; "
            "choose alexnet, alexnet_bn or a ResNet"
        )
    if form.title == TIMM and "head.classifier." in parts and getattr(network, "cls_token", None) is not None:
        raise WeightsError(
            f"the classifier of {path} reads the class token of {model.backbone.name}, not a pooling of the feature "
            "map; leave it out: classifier=False"
        )


def _fold_classifier(state: State, shapes: Layout) -> bool:
    """Fold a classifier of the whole symmetric matrix into one of its upper triangle, if the model has that one.

    w'_ij = w_ij + w_ji off the diagonal, w'_ii = w_ii, so the logits are the same. Returns whether it was folded.
    """
    name = next((n for n in ("head.classifier.weight", "head.classifier.0.weight") if n in state), None)
    if name is None or name not in shapes or state[name].ndim != 2:
        return False
    weight, width = state[name], shapes[name][1]
    d = math.isqrt(weight.shape[-1])
    if d * d != weight.shape[-1] or width != d * (d + 1) // 2 or d == 1:
        return False
    matrix = weight.reshape(-1, d, d)
    state[name] = upper_triangle(matrix + matrix.mT - torch.diag_embed(matrix.diagonal(dim1=1, dim2=2)))
    return True


def _classes(state: Mapping[str, Tensor]) -> int | None:
    """Return the width of the logits of a state with our names; None if it has no classifier."""
    biases = [name for name, tensor in state.items() if name.startswith("head.classifier.") and tensor.ndim == 1]
    return len(state[max(biases, key=lambda name: (len(name), name))]) if biases else None  # ...10.bias after ...8.bias
