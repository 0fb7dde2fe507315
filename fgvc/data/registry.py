"""The table of datasets by name: an adapter is one function (root, split, **options) -> Samples."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fgvc.data.cub import read_cub
from fgvc.data.dataset import ImageDataset, Samples, Transform
from fgvc.data.folder import read_folder
from fgvc.data.synthetic import read_synthetic
from fgvc.errors import ConfigError

_ADAPTERS: dict[str, Callable[..., Samples]] = {
    "cub": read_cub,
    "folder": read_folder,
    "synthetic": read_synthetic,
}
_SPLITS = ("train", "test")


def list_datasets() -> list[str]:
    """Names that `create_dataset` takes."""
    return list(_ADAPTERS)


def create_dataset(
    name: str, *, root: str | Path, split: str = "train", transform: Transform | None = None, **options: Any
) -> ImageDataset:
    """Read one split of a dataset.

    Args:
        name: one of `list_datasets()`.
        root: the dataset's folder; "~" is expanded.
        split: "train" or "test".
        transform: applied to each RGB image, see `create_transform`.
        options: keyword options of the adapter; only "synthetic" has any, see `read_synthetic`.

    Raises:
        ConfigError: unknown name, split or option.
        DatasetError: the folder or one of its files is missing, damaged or inconsistent.
    """
    if name not in _ADAPTERS:
        raise ConfigError(f"unknown dataset {name!r}; choose one of {', '.join(_ADAPTERS)}")
    if split not in _SPLITS:
        raise ConfigError(f"unknown split {split!r} of dataset {name!r}; choose one of {', '.join(_SPLITS)}")
    adapter = _ADAPTERS[name]
    known = [option for option in inspect.signature(adapter).parameters if option not in ("root", "split")]
    for option in options:
        if option not in known:
            raise ConfigError(f"dataset {name!r} has no option {option!r}; its options: {', '.join(known) or 'none'}")
    folder = Path(root).expanduser()
    return ImageDataset(adapter(folder, split, **options), folder, transform)
