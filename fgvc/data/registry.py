"""The table of datasets by name: an adapter is one function (root, split, **options) -> Samples."""

import inspect
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from fgvc.data.aircraft import read_aircraft
from fgvc.data.birds import read_cub, read_nabirds
from fgvc.data.dataset import ImageDataset, Samples, Transform
from fgvc.data.folder import read_folder
from fgvc.data.hf import read_hf
from fgvc.data.imagenet import read_imagenet
from fgvc.data.inaturalist import read_inaturalist
from fgvc.data.layout import listing, reachable, say_once
from fgvc.data.stanford import read_cars, read_dogs
from fgvc.data.synthetic import read_synthetic
from fgvc.data.table import read_image_table
from fgvc.errors import ConfigError, DatasetError
from fgvc.io import expanded

_ADAPTERS: dict[str, Callable[..., Samples]] = {
    "cub": read_cub,
    "cars": read_cars,
    "aircraft": read_aircraft,
    "dogs": read_dogs,
    "nabirds": read_nabirds,
    "imagenet": read_imagenet,
    "inaturalist": read_inaturalist,
    "hf": read_hf,
    "folder": read_folder,
    "table": read_image_table,
    "synthetic": read_synthetic,
}
_WITH_VALIDATION = ("folder", "table")
"""Adapters that read a validation split where the dataset has one."""
_SPLITS = ("train", "val", "test")


def list_datasets() -> list[str]:
    """Names that `create_dataset` takes."""
    return list(_ADAPTERS)


def create_dataset(
    name: str,
    *,
    root: str | Path,
    split: str = "train",
    transform: Transform | None = None,
    crop: str | None = None,
    **options: Any,
) -> ImageDataset:
    """Read one split of a dataset.

    Args:
        name: one of `list_datasets()`.
        root: the dataset's folder; "~" is expanded.
        split: "train" or "test", those of the dataset's standard protocol, or "val": the images that select the best
            epoch. A dataset without a validation split has none of them.
        transform: a function of the RGB image, such as a `TransformSpec`.
        crop: "bbox" cuts each image to its bounding box before the transform; None takes the whole picture.
        options: keyword options of the adapter, see its function `read_<name>`. cub, cars, dogs, nabirds: boxes (True
            reads the bounding boxes into `.boxes` without cropping). aircraft: boxes, level, remove_banner,
            train_split, test_split. hf: path, config_name, revision, image_column, label_column, train_split,
            test_split. folder: levels, test_fraction, split_seed. table: file, image_column, label_column,
            split_column, coarse_columns, test_fraction, split_seed. inaturalist: year, train_split. synthetic: those of
            `fgvc.data.synthetic.Recipe`.

    Raises:
        ConfigError: unknown name, split or option, or a crop of a dataset that has no boxes.
        DatasetError: the folder or one of its files is missing, damaged or inconsistent.
    """
    known = _options(name)
    if split not in _SPLITS:
        raise ConfigError(f"unknown split {split!r} of dataset {name!r}; choose one of {', '.join(_SPLITS)}")
    options = _checked_options(name, known, options)
    if crop is not None:
        if "boxes" not in known:
            boxed = ", ".join(other for other in _ADAPTERS if "boxes" in _options(other))
            raise ConfigError(f"crop={crop!r}: dataset {name!r} has no bounding boxes (those that have: {boxed})")
        options = {**options, "boxes": crop == "bbox"}  # an unknown crop is refused below
    folder = expanded(root)
    if split == "val" and not reads_validation(name):
        samples = _ADAPTERS[name](folder, "test", **options).take([])
    else:
        samples = _ADAPTERS[name](folder, split, **options)
    return ImageDataset(samples, folder, transform, crop)


def read_splits(name: str, root: str | Path, **options: Any) -> dict[str, ImageDataset]:
    """Read all splits of a dataset, as training does: "train", "test", and "val" of adapters that read it.

    Classes without images in "val" or "test" are noted.

    Args:
        name, root, options: as of `create_dataset`.

    Raises:
        ConfigError, DatasetError: as `create_dataset`.
        DatasetError: the splits differ in their classes, a class has no training image, or a file is listed twice, also
            through links.
    """
    names = _SPLITS if reads_validation(name) else ("train", "test")
    splits = {split: create_dataset(name, root=root, split=split, **options) for split in names}
    classes, folder = splits["train"].classes, splits["train"].root
    if any(dataset.classes != classes for dataset in splits.values()):
        raise DatasetError(f"{folder}: training and test split differ in their classes")
    _refuse_repeated(folder, splits)
    if taken := sorted({"path", "label", "split"} & set(splits["train"].samples.coarse)):
        raise DatasetError(
            f"{folder}: a level of coarser labels is called {taken[0]!r}, as a column of a run's split.csv; rename it"
        )
    present = {split: set(dataset.targets) for split, dataset in splits.items()}
    for split, targets in present.items():
        lonely = [classes[target] for target in sorted(targets - present["train"])]
        if lonely:
            found = f"no training image of {len(lonely)} classes of the {split} split: {listing(lonely)}"
            raise DatasetError(f"{folder}: {found}; add some")
        absent = [classes[target] for target in sorted(present["train"] - targets)]
        if absent and targets and not splits[split].samples.own_split:
            note = f"no {split} images of {len(absent)} classes, which means over classes leave out: {listing(absent)}"
            say_once(logging.WARNING, f"{folder}: {note}")
    return splits


def _refuse_repeated(root: Path, splits: Mapping[str, ImageDataset]) -> None:
    files = [(split, path) for split, dataset in splits.items() for path in dataset.paths]
    folders: dict[str, str] = {}  # to resolve the folders of each of a million files would take a minute
    first: dict[str, int] = {}
    repeated = []
    with reachable():
        for number, (_, path) in enumerate(files):
            folder, name = os.path.split(path)
            if folder not in folders:
                folders[folder] = os.path.realpath(folder)
            place = f"{folders[folder]}{os.sep}{name}"
            if path.is_symlink():
                place = os.path.realpath(place)
            if first.setdefault(place, number) != number:
                repeated.append((place, number))
    if repeated:
        place, number = repeated[0]
        both = " and ".join(
            f"{path.relative_to(root).as_posix()} ({split})" for split, path in (files[first[place]], files[number])
        )
        raise DatasetError(f"{root}: {len(repeated)} image files are listed twice, first {both}; keep one of each")


def reads_validation(name: str) -> bool:
    """Whether an adapter reads a validation split where the dataset has one; of others, "val" is always empty."""
    return name in _WITH_VALIDATION


def effective_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """All options of a dataset: the given `options`, and the defaults of the others.

    Raises ConfigError: unknown name.
    """
    defaults = {option: parameter.default for option, parameter in _options(name).items()}
    if "boxes" in defaults:
        defaults["crop"] = None
    return {option: value for option, value in defaults.items() if value is not inspect.Parameter.empty} | dict(options)


def _options(name: str) -> Mapping[str, inspect.Parameter]:
    """The keyword options of an adapter. Raises ConfigError for an unknown name."""
    if name not in _ADAPTERS:
        raise ConfigError(f"unknown dataset {name!r}; choose one of {', '.join(_ADAPTERS)}")
    parameters = inspect.signature(_ADAPTERS[name]).parameters
    return {option: parameters[option] for option in parameters if option not in ("root", "split")}


def _checked_options(name: str, known: Mapping[str, inspect.Parameter], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, numbers as text where a name is asked for: a column may be called 0. Raises ConfigError."""
    checked = dict(options)
    for option, value in options.items():
        if option not in known:
            its_options = ", ".join([*known, *(["crop"] if "boxes" in known else [])]) or "none"
            raise ConfigError(f"dataset {name!r} has no option {option!r}; its options: {its_options}")
        # a word such as "no" would count as true
        if isinstance(known[option].default, bool) and not isinstance(value, bool):
            raise ConfigError(f"dataset {name!r}: {option} must be true or false, found {value!r}")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        kind = known[option].annotation
        kinds = get_args(kind) or (kind,)
        if (kind is float and not number) or (kind is int and not (number and isinstance(value, int))):
            raise ConfigError(f"dataset {name!r}: {option} must be a number, found {value!r}")
        if str in kinds and int not in kinds and number:
            checked[option] = str(value)
        if Sequence[str] in kinds and isinstance(value, list):
            checked[option] = [str(item) for item in value]
    required = [option for option in known if known[option].default is inspect.Parameter.empty]
    missing = [option for option in required if option not in options]
    if missing:
        raise ConfigError(f"dataset {name!r} needs the option {missing[0]!r}; give it to create_dataset")
    return checked
