"""Tiny random datasets in the official layout of each adapter, for dry runs and tests."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from fgvc.data import miniature_layouts as layouts
from fgvc.data.generated import write_once
from fgvc.data.miniature_layouts import Plan
from fgvc.errors import ConfigError

_WRITERS: dict[str, Callable[[Path, Plan], None]] = {
    "cub": layouts.write_cub,
    "cars": layouts.write_cars,
    "cars_devkit": layouts.write_cars_devkit,
    "aircraft": layouts.write_aircraft,
    "dogs": layouts.write_dogs,
    "nabirds": layouts.write_nabirds,
    "imagenet": layouts.write_imagenet,
    "folder": layouts.write_folder,
}
_RECORD = "miniature.json"
_SMALLEST = 48  # pixels a side: room for a box above the banner


@dataclass(frozen=True)
class _Recipe:
    """What determines the content; kept in miniature.json beside the images."""

    name: str
    classes: int
    train_per_class: int
    test_per_class: int
    width: int
    height: int
    seed: int

    def __post_init__(self) -> None:
        if self.name not in _WRITERS:
            raise ConfigError(f"no miniature of dataset {self.name!r}; choose one of {', '.join(_WRITERS)}")
        smallest = {"classes": 2, "train_per_class": 1, "test_per_class": 1, "seed": 0}
        for key, least in {**smallest, "width": _SMALLEST, "height": _SMALLEST}.items():
            value = getattr(self, key)
            if not isinstance(value, int) or value < least:
                raise ConfigError(f"miniature: {key} must be a whole number, at least {least}, found {value!r}")


def write_miniature(
    name: str,
    root: str | Path,
    *,
    classes: int = 3,
    train_per_class: int = 4,
    test_per_class: int = 2,
    size: tuple[int, int] = (96, 80),
    seed: int = 0,
) -> Path:
    """Write a miniature to `root`, ready for `create_dataset`, and return `root`; the seed fixes all of it.

    Every image is dark noise with a filled box in a colour of its class; the annotations give the box. Class names have
    the blanks, dashes and slashes of the official ones. Images of aircraft have a white banner, 20 rows high.

    Args:
        name: dataset, e.g. "cub"; "cars_devkit" is the second layout of "cars".
        root: folder to make; it must not exist, or be empty, or hold this miniature.
        classes: at least 2.
        train_per_class, test_per_class: images of each class in each split; aircraft divides the first into train and
            val.
        size: width and height in pixels, with the banner.
        seed: of all random numbers.

    Raises:
        ConfigError: unknown name, or an argument out of range.
        DatasetError: `root` holds something else.
    """
    recipe = _Recipe(name, classes, train_per_class, test_per_class, *size, seed=seed)
    plan = Plan(classes, {"train": train_per_class, "test": test_per_class}, size, seed)
    return write_once(Path(root), _RECORD, asdict(recipe), lambda folder: _WRITERS[name](folder, plan))
