"""Images whose classes differ only in how local features co-vary: what is drawn, element by element.

An image is a jittered grid of 5 x 5 elements, each with one of 5 colours and one of 5 equally large shapes. In every
image each colour and each shape appears exactly five times, so no average of colour or of shape carries the class. The
class is a matching: the permutation that says which colour goes with which shape.
"""

import colorsys
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

COLOURS = ("red", "yellow", "green", "blue", "purple")
SHAPES = ("disc", "square", "triangle", "cross", "ring")
MAX_CLASSES = len(COLOURS) * (len(COLOURS) - 1)

_GRID = 5  # elements a side; 25 elements give each of the 5 colours and 5 shapes the same count
_HUES = (0.0, 0.15, 0.36, 0.58, 0.79)  # of COLOURS, in turns; about equally far apart to the eye
_SUPERSAMPLING = 4
_UNIT_AREA = 1.4  # of every shape, in squared radii: equal areas, or the mean colour would tell the matching

Points = NDArray[np.float64]  # (vertices, 2), x and y in radii


@dataclass(frozen=True)
class Layout:
    """Which element goes where: `colours` and `shapes` (25,) int64 index COLOURS and SHAPES, row by row."""

    colours: NDArray[np.int64]
    shapes: NDArray[np.int64]


def class_matching(class_index: int) -> tuple[int, ...]:
    """Colour index for each shape index: x -> a x + b modulo 5.

    The 20 affine permutations are the classical set in which any two agree on at most one shape, so that all classes
    are about equally far apart.
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

    The colours of the others are shuffled among themselves, which keeps the count of every colour.
    """
    shapes = rng.permutation(np.repeat(np.arange(len(SHAPES)), _GRID * _GRID // len(SHAPES)))
    colours = np.asarray(class_matching(class_index))[shapes]
    free = np.flatnonzero(rng.random(shapes.size) >= agreement)
    colours[free] = rng.permutation(colours[free])
    return Layout(colours, shapes)


def draw_image(rng: np.random.Generator, layout: Layout, size: int) -> Image.Image:
    """Draw the elements (size x size, RGB) with nuisance: texture, tint, brightness, position, scale and rotation."""
    image = _background(rng, size)
    hue_shift, brightness = rng.uniform(-0.025, 0.025), rng.uniform(0.75, 1.0)
    cell = size / _GRID
    for index, (colour, shape) in enumerate(zip(layout.colours, layout.shapes, strict=True)):
        row, column = divmod(index, _GRID)
        x, y = (np.array([column, row]) + 0.5 + rng.uniform(-0.03, 0.03, 2)) * cell
        radius = cell * rng.uniform(0.38, 0.45)
        value = brightness * rng.uniform(0.85, 1.0)
        rgb = colorsys.hsv_to_rgb((_HUES[colour] + hue_shift) % 1, rng.uniform(0.75, 0.95), value)
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
    for fill, points in zip((255, 0), _outlines(shape), strict=False):
        vertices = (points @ turn.T * radius + middle) * _SUPERSAMPLING
        draw.polygon([(float(x), float(y)) for x, y in vertices], fill=fill)
    image.paste(tuple(round(255 * c) for c in rgb), (left, top), mask.reduce(_SUPERSAMPLING))


def _outlines(shape: str) -> tuple[Points, ...]:
    """Outer outline, and the hole where there is one, scaled so that the filled area is `_UNIT_AREA`."""
    outlines = _SHAPE_OUTLINES[shape]
    areas = [_area(points) for points in outlines]
    scale = math.sqrt(_UNIT_AREA / (areas[0] - sum(areas[1:])))
    return tuple(points * scale for points in outlines)


def _area(points: Points) -> float:
    """Area within a polygon (shoelace formula)."""
    x, y = points.T
    return float(abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2)


def _regular(vertices: int, phase: float = 0.0) -> Points:
    angles = phase + 2 * math.pi * np.arange(vertices) / vertices
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _cross() -> Points:
    arm, width = 1.0, 0.36
    corner = [(width, arm), (width, width), (arm, width)]
    quarters = [corner, [(y, -x) for x, y in corner], [(-x, -y) for x, y in corner], [(-y, x) for x, y in corner]]
    return np.array([point for quarter in quarters for point in quarter])


_SHAPE_OUTLINES: dict[str, tuple[Points, ...]] = {
    "disc": (_regular(48),),
    "square": (_regular(4, phase=math.pi / 4),),
    "triangle": (_regular(3, phase=-math.pi / 2),),
    "cross": (_cross(),),
    "ring": (_regular(48), 0.6 * _regular(48)),
}
