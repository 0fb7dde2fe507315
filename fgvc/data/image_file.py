"""One image file: decoding it, and which part of it is the image."""

import contextlib
import functools
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from fgvc.io import open_foreign

MAX_BYTES = 1 << 30
"""Largest image file; Pillow reads some kinds whole."""

_PROGRAMS = ("EPS", "WMF")  # formats that Pillow passes to another program (Ghostscript) or to the system
_WIDE_GREY = ("PNG", "PPM")  # formats whose grey values have 16 bits in Pillow's mode I

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels from the file's top left corner; right and bottom are the first outside."""


class UnreadableImageError(Exception):
    """An image file cannot be decoded, or its region is empty; the message is the reason, without the path."""


class Region(NamedTuple):
    """The part of a file that is the image: inside `box` (None: everywhere) and above the banner.

    Attributes:
        box: Bounding box in pixels of the file.
        banner: Number of rows at the bottom of the file that are not part of the picture.
    """

    box: Box | None = None
    banner: int = 0

    @property
    def corner(self) -> tuple[int, int]:
        """Left and top of the region in pixels of the file."""
        left, top = (0, 0) if self.box is None else self.box[:2]
        return max(math.floor(left), 0), max(math.floor(top), 0)

    def cut(self, image: Image.Image) -> Image.Image:
        """The region, clipped to the picture; a box keeps every pixel that it touches.

        Raises:
            UnreadableImageError: nothing is left.
        """
        picture = (0, 0, image.width, image.height - self.banner)
        left, top, right, bottom = picture if self.box is None else self.box
        pixels = (*self.corner, min(math.ceil(right), picture[2]), min(math.ceil(bottom), picture[3]))
        if left >= right or top >= bottom or pixels[0] >= pixels[2] or pixels[1] >= pixels[3]:
            what = "the picture" if self.box is None else f"box {self.box} (left, top, right, bottom)"
            below = f" without the {self.banner} rows of its banner" if self.banner else ""
            raise UnreadableImageError(f"{what} is empty in an image of {image.width} x {image.height} pixels{below}")
        return image if pixels == (0, 0, *image.size) else image.crop(pixels)


def decode_rgb(path: Path, region: Region | None = None, *, upright: bool = False) -> Image.Image:
    """Decode a whole image file to RGB and cut out the region.

    The content tells the format, not the name. The first of several frames or pages counts. Transparent parts become
    white, as on a page, because the colour stored there is arbitrary. Channels of 16 bits keep their upper eight.

    Args:
        path: the file.
        region: None for the whole picture.
        upright: turn the picture by its EXIF orientation.

    Raises:
        UnreadableImageError: missing, empty, truncated, not an image, more pixels than Pillow's limit against
            decompression bombs, pixels of unknown range, or an empty region.
    """
    try:
        with open_foreign(path, MAX_BYTES) as file, Image.open(file, formats=_formats()) as image:
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and image.width * image.height > limit:  # Pillow itself refuses only twice the limit
                size = f"{image.width} x {image.height} pixels"
                raise UnreadableImageError(f"{size}, more than Pillow's limit of {limit}")
            rgb = _to_rgb(image, upright=upright)
            return rgb if region is None else region.cut(rgb)
    except UnreadableImageError:
        raise
    except Exception as error:  # Pillow's decoders raise many types on damaged files
        raise UnreadableImageError(_reason(path, error)) from error


def copy_rgb(image: Image.Image) -> Image.Image:
    """An upright RGB copy of an open image, equal to the one that `decode_rgb` makes from its file.

    Raises:
        UnreadableImageError: pixels of unknown range, or the file behind the image is damaged.
    """
    try:
        own = image.copy()
        own.format = image.format  # a copy has none, and in mode I the format decides which value is white
        return _to_rgb(own, upright=True)
    except UnreadableImageError:
        raise
    except Exception as error:  # as in `decode_rgb`: Pillow may not have read the whole file yet
        raise UnreadableImageError(str(error) or type(error).__name__) from error


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in Image.ID if name not in _PROGRAMS)


def _to_rgb(image: Image.Image, *, upright: bool) -> Image.Image:
    image.load()
    if upright:
        with contextlib.suppress(Exception):  # damaged metadata do not spoil the picture
            ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in _WIDE_GREY):
        # as Pillow converts 16-bit colour; its conversion of 16-bit grey would make all values above 255 white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise UnreadableImageError("pixels are 32-bit numbers with unknown black and white; save it with 8 bits")
    if not image.has_transparency_data:
        return image.convert("RGB")
    paper = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(paper, image.convert("RGBA")).convert("RGB")


def _reason(path: Path, error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        if path.stat().st_size == 0:  # the file exists: it has been read
            return "empty file (0 bytes)"
        return "not an image in a format that Pillow knows"
    return str(error) or type(error).__name__
