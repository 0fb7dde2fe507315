"""Matches and loads the weights of a backbone from a file."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from fgvc.errors import WeightsError
from fgvc.models.files import Layout, State, listed, locate_weights, not_floating, read_tensors, renamed, unfilled

_PREFIXES = ("backbone.model.", "backbone.")  # of fgvc, of other wrappers


@dataclass(frozen=True)
class WeightsReport:
    """Result of `load_backbone_weights`.

    Attributes:
        source: Path of the file.
        how: Way of matching tensors: by "names" or by "order".
        loaded: Number of loaded tensors.
        ignored: Names of the file's other tensors, which belong to its head.
    """

    source: str
    how: Literal["names", "order"]
    loaded: int
    ignored: tuple[str, ...]


def load_backbone_weights(model: nn.Module, source: str | Path, *, layout: Layout | None = None) -> WeightsReport:
    """Load the weights at `source` into `model`, all or none.

    First by name: containers (`state_dict`, ...) and prefixes (`module.`, ...) are removed, and timm's conversion for
    the architecture is applied (names of the official releases; position embeddings resized to another image size).
    Then every tensor of `model` must be in the file with its shape. Tensors of a head that `model` lacks are ignored.
    Otherwise by order: file and `layout` must have the same number of tensors, with the same shape and kind (`weight`,
    `bias`, `running_mean`, ...) at each place.

    Args:
        model: a timm model, with or without its head.
        source: a path or `package:NAME`.
        layout: ordered names and shapes of the whole architecture, if `model` lacks its head; None means those of
            `model`.

    Raises:
        WeightsError: the file is missing, unreadable, holds more than tensors, or does not fit `model`.
    """
    path = locate_weights(source, "backbone.weights")
    tensors = renamed(path, read_tensors(path), _bare)
    needed = {name: tensor.shape for name, tensor in model.state_dict().items()}
    layout = needed if layout is None else layout
    named = convert_as_timm(tensors, model)
    problems = _name_problems(named, needed, layout)
    how: Literal["names", "order"]
    if not problems:
        how, state = "names", named
        ignored = [name for name in named if name not in needed]
    elif _same_order(tensors, layout):
        how, state = "order", dict(zip(layout, tensors.values(), strict=True))
        ignored = [name for name, own in zip(tensors, layout, strict=True) if own not in needed]
    else:
        architecture = getattr(model, "pretrained_cfg", {}).get("architecture") or type(model).__name__
        raise WeightsError(
            f"{path} does not fit {architecture}: {'; '.join(problems)}; choose a file of its own weights"
        )
    chosen = {name: state[name] for name in needed if name in state}
    if wrong := not_floating(chosen, model.state_dict()):
        raise WeightsError(f"{path}: {len(wrong)} tensors are no floating numbers{listed(wrong)}; save them as float32")
    model.load_state_dict(chosen, strict=False)  # missing names are checked above
    return WeightsReport(str(path), how, len(chosen), tuple(ignored))


def _bare(name: str) -> str:
    while prefix := next((prefix for prefix in _PREFIXES if name.startswith(prefix)), ""):
        name = name.removeprefix(prefix)
    return name


def convert_as_timm(tensors: State, model: nn.Module) -> State:
    """Apply timm's conversion of published weights; by timm's convention it is in the module of the model's class."""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return tensors
    try:
        converted: State = convert(dict(tensors), model)
    except Exception:  # it fails for files of another architecture; the check of the names reports them
        return tensors
    return converted


def _name_problems(state: State, needed: Layout, layout: Layout) -> list[str]:
    """Return reasons why `state` does not fill `needed` by name; empty if it does."""
    missing, reshaped = unfilled(state, needed)
    # a head may be left over, but an extra block of a stage means that the file is from a deeper architecture
    stages = {name.partition(".")[0] for name in needed if "." in name}
    unexpected = [name for name in state if name not in layout and name.partition(".")[0] in stages]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
    return [f"{len(names)} {kind}{listed(names)}" for kind, names in kinds.items() if names]


def _same_order(tensors: State, layout: Layout) -> bool:
    def kind(name: str) -> str:
        return name.rpartition(".")[2]

    return len(tensors) == len(layout) and all(
        tensor.shape == shape and kind(name) == kind(own)
        for (name, tensor), (own, shape) in zip(tensors.items(), layout.items(), strict=True)
    )
