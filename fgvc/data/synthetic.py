"""A dataset made on the spot, in the CUB layout: classes share every mean and differ in how features co-vary."""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from fgvc.data.cub import read_cub
from fgvc.data.dataset import Samples
from fgvc.data.generated import write_once
from fgvc.data.synthetic_images import MAX_CLASSES, class_name, draw_image, draw_layout
from fgvc.errors import ConfigError
from fgvc.io import write_text_atomic

_RECIPE = "synthetic.json"


@dataclass(frozen=True)
class _Recipe:
    """What determines every byte of the set; kept in synthetic.json beside the images."""

    classes: int
    train_per_class: int
    test_per_class: int
    size: int
    agreement: float
    seed: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            kinds = int | float if name == "agreement" else int
            if not isinstance(value, kinds):
                raise ConfigError(f"synthetic: {name} must be a number (whole but for agreement), found {value!r}")
        if not 2 <= self.classes <= MAX_CLASSES:
            raise ConfigError(f"synthetic: classes must be 2 to {MAX_CLASSES}, found {self.classes}")
        if min(self.train_per_class, self.test_per_class) < 1:
            raise ConfigError("synthetic: train_per_class and test_per_class must be at least 1")
        if not 64 <= self.size <= 1024:
            raise ConfigError(f"synthetic: size must be 64 to 1024 pixels, found {self.size}")
        if not 0 <= self.agreement <= 1:
            raise ConfigError(f"synthetic: agreement must be 0 to 1, found {self.agreement}")
        if self.seed < 0:
            raise ConfigError(f"synthetic: seed must not be negative, found {self.seed}")


def write_synthetic(
    root: str | Path,
    *,
    classes: int = 12,
    train_per_class: int = 32,
    test_per_class: int = 20,
    size: int = 192,
    agreement: float = 0.7,
    seed: int = 0,
) -> Path:
    """Write the set to `root` in the CUB layout and return `root`; the same arguments give the same bytes.

    The folder appears whole or not at all, also with several processes at it. A folder that holds the same set already
    is left as it is.

    Args:
        root: folder to make; it must not exist, or be empty, or hold this set.
        classes: 2 to 20.
        train_per_class, test_per_class: images of each class in each split.
        size: height and width in pixels.
        agreement: probability that an element follows its class's matching of colours and shapes. At 0 the classes are
            the same.
        seed: of all random numbers.

    Raises:
        ConfigError: an argument is out of range.
        DatasetError: `root` holds something else, or a set made with other arguments.
    """
    recipe = _Recipe(classes, train_per_class, test_per_class, size, agreement, seed)
    return write_once(Path(root), _RECIPE, asdict(recipe), lambda folder: _write(folder, recipe))


def read_synthetic(
    root: Path,
    split: str,
    *,
    classes: int = 12,
    train_per_class: int = 32,
    test_per_class: int = 20,
    size: int = 192,
    agreement: float = 0.7,
    seed: int = 0,
) -> Samples:
    """Make the set where it is missing (see `write_synthetic` for the options), then read one split of it.

    Raises:
        As `write_synthetic` and `read_cub`.
    """
    folder = write_synthetic(
        root,
        classes=classes,
        train_per_class=train_per_class,
        test_per_class=test_per_class,
        size=size,
        agreement=agreement,
        seed=seed,
    )
    return read_cub(folder, split)


def _write(root: Path, recipe: _Recipe) -> None:
    names, labels, in_train = [], [], []
    folders = [f"{index + 1:03d}.{class_name(index)}" for index in range(recipe.classes)]
    counts = {"train": recipe.train_per_class, "test": recipe.test_per_class}
    for class_index, folder in enumerate(folders):
        (root / "images" / folder).mkdir(parents=True)
        for split_index, (split, count) in enumerate(counts.items()):
            for number in range(count):
                # one stream an image: an image does not depend on how many others there are
                rng = np.random.default_rng([recipe.seed, class_index, split_index, number])
                layout = draw_layout(rng, class_index, recipe.agreement)
                name = f"{folder}/{split}_{number:04d}.jpg"
                draw_image(rng, layout, recipe.size).save(root / "images" / name, quality=92)
                names.append(name)
                labels.append(str(class_index + 1))
                in_train.append(str(int(split == "train")))
    tables = {"images": names, "image_class_labels": labels, "train_test_split": in_train, "classes": folders}
    for table, values in tables.items():
        lines = [f"{number} {value}" for number, value in enumerate(values, start=1)]
        write_text_atomic(root / f"{table}.txt", "\n".join(lines) + "\n")
