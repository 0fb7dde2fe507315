"""One image file: decoding it, and which part of it is the image."""

import math
from pathlib import Path
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels from the file's top left corner; right and bottom are the first outside."""


class UnreadableImageError(Exception):
    """An image file cannot be decoded, or its region is empty; the message is the reason, without the path."""


class Region(NamedTuple):
    """The part of a file that is the image: what lies within `box` (None: everywhere) and above the banner.

    `banner` counts the rows at the bottom of the file that are no picture.
    """

    box: Box | None = None
    banner: int = 0

    def cut(self, image: Image.Image) -> Image.Image:
        """The region, clipped to the picture; a box keeps every pixel that it touches.

        Raises:
            UnreadableImageError: nothing is left.
        """
        picture = (0, 0, image.width, image.height - self.banner)
        left, top, right, bottom = picture if self.box is None else self.box
        pixels = (
            max(math.floor(left), 0),
            max(math.floor(top), 0),
            min(math.ceil(right), picture[2]),
            min(math.ceil(bottom), picture[3]),
        )
        if left >= right or top >= bottom or pixels[0] >= pixels[2] or pixels[1] >= pixels[3]:
            what = "the picture" if self.box is None else f"box {self.box} (left, top, right, bottom)"
            below = f" without the {self.banner} rows of its banner" if self.banner else ""
            raise UnreadableImageError(f"{what} is empty in an image of {image.width} x {image.height} pixels{below}")
        return image if pixels == (0, 0, *image.size) else image.crop(pixels)


def decode_rgb(path: Path, region: Region | None = None) -> Image.Image:
    """Decode a whole image file to RGB and cut out the region.

    Raises:
        UnreadableImageError: missing, empty, truncated, not an image, more pixels than Pillow's limit against
            decompression bombs, or nothing left of the region.
    """
    try:
        with Image.open(path) as image:
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and image.width * image.height > limit:  # Pillow itself refuses only twice the limit
                raise UnreadableImageError(
                    f"{image.width} x {image.height} pixels, more than Pillow's limit of {limit}"
                )
            rgb: Image.Image = image.convert("RGB")
            return rgb if region is None else region.cut(rgb)
    except UnreadableImageError:
        raise
    except (
        Exception
    ) as error:  # Pillow's decoders raise many types on damaged files (OSError, SyntaxError, struct.error)
        raise UnreadableImageError(_reason(path, error)) from error


def _reason(path: Path, error: Exception) -> str:
    if path.is_file() and path.stat().st_size == 0:
        return "empty file (0 bytes)"
    if isinstance(error, UnidentifiedImageError):
        return "not an image in a format that Pillow knows"
    return str(error) or type(error).__name__
