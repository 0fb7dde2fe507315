"""A generated dataset in the CUB layout: classes share every mean and differ in how local features co-vary.

An image is a jittered grid of 5 x 5 elements, each with one of 5 colours and one of 5 equally large shapes. In every
image each colour and each shape appears exactly five times, so no average of colour or of shape carries the class. The
class is a matching: the permutation that says which colour goes with which shape.
"""

import colorsys
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from fgvc.data.birds import read_cub
from fgvc.data.dataset import Samples
from fgvc.data.layout import write_once
from fgvc.errors import ConfigError
from fgvc.io import write_text_atomic

_RECIPE = "synthetic.json"
COLOURS = ("red", "yellow", "green", "blue", "purple")
SHAPES = ("disc", "square", "triangle", "cross", "ring")
MAX_CLASSES = len(COLOURS) * (len(COLOURS) - 1)

_GRID = 5  # elements a side; 25 elements give each of the 5 colours and 5 shapes the same count
HUES = (0.0, 0.15, 0.36, 0.58, 0.79)  # of COLOURS, in turns; the eye sees about equal distances
_SUPERSAMPLING = 4
_UNIT_AREA = 1.4  # of every shape, in squared radii: with unequal areas the mean colour would tell the matching

Points = NDArray[np.float64]  # (vertices, 2), x and y in radii


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the bytes of the set; stored in synthetic.json.

    Attributes:
        classes: Number of classes, 2 to 20.
        train_per_class, test_per_class: Number of images of each class in each split.
        size: Height and width in pixels.
        agreement: Probability that an element follows its class's matching of colours and shapes. At 0 the classes are
            the same.
        seed: Seed of all random numbers.

    Raises:
        ConfigError: a number is out of range.
    """

    classes: int = 12
    train_per_class: int = 32
    test_per_class: int = 20
    size: int = 192
    agreement: float = 0.7
    seed: int = 0

    def __post_init__(self) -> None:
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


def write_synthetic(root: str | Path, recipe: Recipe) -> Path:
    """Write the set to `root` in the CUB layout and return `root`; the same recipe gives the same bytes.

    The folder appears whole or not at all, even if several processes write it. A folder that holds the same set already
    is not changed.

    Raises DatasetError: `root` holds something else, or a set of another recipe.
    """
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
    """Make the set where it is missing (see `Recipe` for the options), then read one split of it.

    Raises:
        As `Recipe`, `write_synthetic` and `read_cub`.
    """
    recipe = Recipe(classes, train_per_class, test_per_class, size, agreement, seed)
    return read_cub(write_synthetic(root, recipe), split)


def _write(root: Path, recipe: Recipe) -> None:
    names, labels, in_train = [], [], []
    folders = [f"{index + 1:03d}.{class_name(index)}" for index in range(recipe.classes)]
    counts = {"train": recipe.train_per_class, "test": recipe.test_per_class}
    for class_index, folder in enumerate(folders):
        (root / "images" / folder).mkdir(parents=True)
        for split_index, (split, count) in enumerate(counts.items()):
            for number in range(count):
                # one generator for each image: an image does not depend on the number of others
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


@dataclass(frozen=True)
class Layout:
    """Which element goes where: `colours` and `shapes` (25,) int64 index COLOURS and SHAPES, row by row."""

    colours: NDArray[np.int64]
    shapes: NDArray[np.int64]


def class_matching(class_index: int) -> tuple[int, ...]:
    """Colour index for each shape index: x -> a x + b modulo 5.

    Any two of these 20 affine permutations agree on at most one shape, so all classes are about equally far apart.
    """
    count = len(COLOURS)
    slope, offset = 1 + class_index // count, class_index % count
    return tuple((slope * shape + offset) % count for shape in range(count))


def class_name(class_index: int) -> str:
    """Name from the colours of the first two shapes, which fix the matching: "red_disc_blue_square"."""
    matching = class_matching(class_index)
    return f"{COLOURS[matching[0]]}_{SHAPES[0]}_{COLOURS[matching[1]]}_{SHAPES[1]}"


def draw_layout(rng: np.random.Generator, class_index: int, agreement: float) -> Layout:
    """A random arrangement: each element follows the class's matching with probability `agreement`.

    The colours of the others are shuffled, which keeps the count of every colour.
    """
    shapes = rng.permutation(np.repeat(np.arange(len(SHAPES)), _GRID * _GRID // len(SHAPES)))
    colours = np.asarray(class_matching(class_index))[shapes]
    free = np.flatnonzero(rng.random(shapes.size) >= agreement)
    colours[free] = rng.permutation(colours[free])
    return Layout(colours, shapes)


def draw_image(rng: np.random.Generator, layout: Layout, size: int) -> Image.Image:
    """Draw the elements (size x size, RGB) with random texture, tint, brightness, position, scale and rotation."""
    image = _background(rng, size)
    hue_shift, brightness = rng.uniform(-0.025, 0.025), rng.uniform(0.75, 1.0)
    cell = size / _GRID
    for index, (colour, shape) in enumerate(zip(layout.colours, layout.shapes, strict=True)):
        row, column = divmod(index, _GRID)
        x, y = (np.array([column, row]) + 0.5 + rng.uniform(-0.03, 0.03, 2)) * cell
        radius = cell * rng.uniform(0.38, 0.45)
        value = brightness * rng.uniform(0.85, 1.0)
        rgb = colorsys.hsv_to_rgb((HUES[colour] + hue_shift) % 1, rng.uniform(0.75, 0.95), value)
        _paste(image, SHAPES[shape], (float(x), float(y)), radius, rng.uniform(-0.2, 0.2), rgb)
    return image


def _background(rng: np.random.Generator, size: int) -> Image.Image:
    """Grey texture of smooth noise at two scales, with a slight random tint."""
    texture = np.zeros((size, size))
    for cells, strength in ((4, 25.0), (size // 4, 18.0)):
        noise = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
        texture += strength * np.asarray(noise.resize((size, size), Image.Resampling.BICUBIC))
    tinted = rng.uniform(70, 170) + texture[:, :, None] + rng.uniform(-12, 12, 3)
    return Image.fromarray(tinted.clip(0, 255).astype(np.uint8))


def _paste(
    image: Image.Image,
    shape: str,
    centre: tuple[float, float],
    radius: float,
    angle: float,
    rgb: tuple[float, float, float],
) -> None:
    """Draw one element antialiased: a mask at four times the resolution, averaged down."""
    half = math.ceil(radius * 1.2) + 1
    left, top = round(centre[0]) - half, round(centre[1]) - half
    middle = np.array([centre[0] - left, centre[1] - top])
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    side = 2 * half * _SUPERSAMPLING
    mask = Image.new("L", (side, side))
    draw = ImageDraw.Draw(mask)
    for fill, points in zip((255, 0), _OUTLINES[shape], strict=False):
        vertices = (points @ turn.T * radius + middle) * _SUPERSAMPLING
        draw.polygon([(float(x), float(y)) for x, y in vertices], fill=fill)
    image.paste(tuple(round(255 * c) for c in rgb), (left, top), mask.reduce(_SUPERSAMPLING))


def _regular(vertices: int, phase: float = 0.0) -> Points:
    angles = phase + 2 * math.pi * np.arange(vertices) / vertices
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _cross() -> Points:
    arm, width = 1.0, 0.36
    corner = [(width, arm), (width, width), (arm, width)]
    quarters = [corner, [(y, -x) for x, y in corner], [(-x, -y) for x, y in corner], [(-y, x) for x, y in corner]]
    return np.array([point for quarter in quarters for point in quarter])


def _with_unit_area(*outlines: Points) -> tuple[Points, ...]:
    """Outer outline, and the hole where there is one, scaled so that the filled area is `_UNIT_AREA`."""
    x_y = [points.T for points in outlines]
    areas = [float(abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2) for x, y in x_y]  # shoelace formula
    scale = math.sqrt(_UNIT_AREA / (areas[0] - sum(areas[1:])))
    return tuple(points * scale for points in outlines)


_OUTLINES = {
    "disc": _with_unit_area(_regular(48)),
    "square": _with_unit_area(_regular(4, phase=math.pi / 4)),
    "triangle": _with_unit_area(_regular(3, phase=-math.pi / 2)),
    "cross": _with_unit_area(_cross()),
    "ring": _with_unit_area(_regular(48), 0.6 * _regular(48)),
}
