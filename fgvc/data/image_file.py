"""One image file: decoding it, and which part of it is the image."""

import contextlib
import functools
import importlib
import importlib.util
import itertools
import math
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError
from PIL.TiffImagePlugin import TILELENGTH, TILEWIDTH
from torch import Tensor

from fgvc.foreign import open_foreign

MAX_BYTES = 1 << 30
"""Largest image file; Pillow reads some kinds whole."""

HEIF_ENDINGS, HEIF_FIX = (".heic", ".heif", ".hif"), "pip install 'fgvc[heif]'"
# those of photographs; others of Pillow's run programs, open a second image inside or decode pixel by pixel in Python
_FORMATS = {"AVIF", "BMP", "DIB", "GIF", "HEIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP"}
_MAX_PROPORTION = 100  # to a short side of 448 pixels, that is 80 MB
_MAX_COSTLY = 20_000_000  # pixels of JPEG 2000, which takes 25 bytes for each, or of a decoder in Python
_MAX_TILE = 1 << 24  # pixels of a tile of a TIFF, which is decoded whole
_MAX_SCANS = 100  # of a JPEG; each goes over the whole picture, and files have 10
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # pixels have a zero or a restart (0xd0 to 0xd7) after each 0xff
_CHUNK = 1 << 12  # bytes; small, since a file may have millions of markers
_LARGE = 20_000_000  # pixels; threads decode larger pictures one after the other
_one_large = threading.Lock()
_STRIP = 1 << 20  # pixels made opaque at once
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

        Raises UnreadableImageError: nothing is left, or one side is more than 100 times the other: enlarging the
        shorter one would take memory out of proportion.
        """
        picture = (0, 0, image.width, image.height - self.banner)
        left, top, right, bottom = picture if self.box is None else self.box
        pixels = (*self.corner, min(math.ceil(right), picture[2]), min(math.ceil(bottom), picture[3]))
        if left >= right or top >= bottom or pixels[0] >= pixels[2] or pixels[1] >= pixels[3]:
            what = "the picture" if self.box is None else f"box {self.box} (left, top, right, bottom)"
            below = f" without the {self.banner} rows of its banner" if self.banner else ""
            raise UnreadableImageError(f"{what} is empty in an image of {image.width} x {image.height} pixels{below}")
        sides = pixels[2] - pixels[0], pixels[3] - pixels[1]
        if max(sides) > _MAX_PROPORTION * min(sides):
            size = f"{sides[0]} x {sides[1]} pixels"
            raise UnreadableImageError(f"{size}, one side more than {_MAX_PROPORTION} times the other; cut it")
        return image if pixels == (0, 0, *image.size) else image.crop(pixels)


def decode_rgb(
    source: Path | BinaryIO, region: Region | None = None, *, upright: bool = False, side: int = 0
) -> Image.Image:
    """Decode a whole image file to RGB and cut out the region.

    The content tells the format, not the name. The first of several frames or pages counts. Transparent parts become
    white, as on a page, because the colour stored there is arbitrary. Channels of 16 bits keep their upper eight.

    Args:
        source: the path of the file, or the file opened for reading.
        region: None for the whole picture.
        upright: turn the picture by its EXIF orientation.
        side: number of pixels that the shorter side will be scaled to. A whole JPEG whose sides are at least four times
            as long is decoded at a half, a quarter or an eighth of its size, to no less than two times `side`, in a
            fraction of the time. With 0 it never is.

    Raises:
        UnreadableImageError: missing, empty, truncated, not an image, more pixels than Pillow's limit against
            decompression bombs (of JPEG 2000, RLE in BMP and plain PPM, than 20 million), a TIFF with tiles far larger
            than the picture, a JPEG of more than 100 scans, one side more than 100 times the other, pixels of
            unknown range, or an empty region.
    """
    region = region or Region()
    try:
        opened = open_foreign(source, MAX_BYTES) if isinstance(source, Path) else contextlib.nullcontext(source)
        with opened as file, Image.open(file, formats=image_formats()) as image:
            _require_pixels(image)
            _require_few_scans(image)
            if side and region == Region():
                image.draft(None, (2 * side, 2 * side))  # of no effect but for JPEG
            with _one_large if image.width * image.height > _LARGE else contextlib.nullcontext():
                return region.cut(_to_rgb(image, _clear_colour(image), upright=upright))
    except UnreadableImageError:
        raise
    except Exception as error:  # Pillow's decoders raise many types on damaged files
        raise UnreadableImageError(_reason(source, error)) from error


def to_pixels(image: Image.Image) -> Tensor:
    """An RGB picture as a tensor, (3, height, width) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def copy_rgb(image: Image.Image) -> Image.Image:
    """An upright RGB copy of an open image, equal to the one that `decode_rgb` makes from its file.

    Raises UnreadableImageError as `decode_rgb`.
    """
    try:
        _require_pixels(image)
        _require_few_scans(image)
        clear, own = _clear_colour(image), image.copy()
        own.format = image.format  # a copy has none, and in mode I the format decides which value is white
        return Region().cut(_to_rgb(own, clear, upright=True))
    except UnreadableImageError:
        raise
    except Exception as error:  # as in `decode_rgb`: Pillow may not have read the whole file yet
        raise UnreadableImageError(str(error) or type(error).__name__) from error


@functools.cache
def image_formats() -> tuple[str, ...]:
    """Names of the formats that are decoded, for Pillow's `Image.open`."""
    Image.init()
    if importlib.util.find_spec("pillow_heif") is not None:  # the extra "heif"
        importlib.import_module("pillow_heif").register_heif_opener()
    return tuple(name for name in Image.ID if name in _FORMATS)


def image_endings() -> set[str]:
    """The endings of files that can be decoded, lower-case, with their dot."""
    formats = image_formats()  # first, as this may register more
    return {ending for ending, name in Image.registered_extensions().items() if name in formats}


def _require_pixels(image: Image.Image) -> None:
    pixels, size, limit = image.width * image.height, f"{image.width} x {image.height} pixels", Image.MAX_IMAGE_PIXELS
    if limit is not None and pixels > limit:  # Pillow itself refuses only twice the limit
        raise UnreadableImageError(f"{size}, more than Pillow's limit of {limit}")
    in_python = any(part[0] in Image.DECODERS for part in getattr(image, "tile", []))
    if pixels > _MAX_COSTLY and (in_python or image.format == "JPEG2000"):
        kind = "JPEG 2000" if image.format == "JPEG2000" else f"this kind of {image.format}"
        raise UnreadableImageError(f"{size} of {kind}, more than {_MAX_COSTLY}; save it as another format")
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        width, height = (image.tag_v2.get(tag, 1) for tag in (TILEWIDTH, TILELENGTH))
        if width * height > max(4 * pixels, _MAX_TILE):
            raise UnreadableImageError(f"{size} in tiles of {width} x {height}; save it again")
    if not pixels:
        raise UnreadableImageError(f"{size}: it is empty")


def _require_few_scans(image: Image.Image) -> None:
    """Raise UnreadableImageError for a JPEG that a decoder would go over again and again."""
    file = getattr(image, "fp", None)  # None of a picture that is decoded already
    if file is None or image.format not in ("JPEG", "MPO"):
        return
    place = file.tell()
    count = sum(1 for _ in itertools.islice(_scans(file), _MAX_SCANS + 1))
    file.seek(place)
    if count > _MAX_SCANS:
        raise UnreadableImageError(f"a JPEG of more than {_MAX_SCANS} scans; save it again")


def _scans(file: BinaryIO) -> Iterator[int]:
    """The places of the scans of a JPEG; what comes behind its end, such as the video of a phone, has none."""
    place = 0
    while True:
        file.seek(place)
        chunk = file.read(_CHUNK)
        found = _MARKER.search(chunk)
        if found is None:
            if len(chunk) < _CHUNK:
                return
            place += len(chunk) - 1  # the last byte may be the first half of a marker
            continue
        place, marker = place + found.end(), found[0][1]
        if marker == 0xD9:  # end of the image
            return
        if marker == 0xDA:
            yield place
        if marker not in (0xD8, 0x01):  # these two stand alone; a length follows the others
            file.seek(place)
            place += max(int.from_bytes(file.read(2), "big"), 2)


def _clear_colour(image: Image.Image) -> Any:
    """The transparent colour of an image that is not loaded yet, on the scale of Pillow's pixels.

    Pillow brings pixels of 2, 4 and 16 bits to 8 (except grey of 16), but not this colour.
    """
    clear, tiles = image.info.get("transparency"), getattr(image, "tile", None)
    stored = str(tiles[0][3]) if tiles else ""
    if stored in ("L;2", "L;4") and isinstance(clear, int):
        return clear * 255 // (2 ** int(stored[-1]) - 1)
    if isinstance(clear, tuple) and (stored.startswith("RGB;16") or max(clear) > 255):
        return tuple(channel >> 8 for channel in clear)
    return clear


def _to_rgb(image: Image.Image, clear: Any, *, upright: bool) -> Image.Image:
    image.load()
    if clear is not None:
        image.info["transparency"] = clear
    if upright:
        with contextlib.suppress(Exception):  # damaged metadata do not spoil the picture
            ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in _WIDE_GREY):
        # as Pillow converts 16-bit colour; its conversion of 16-bit grey would make all values above 255 white
        values = np.asarray(image)
        grey = (values >> 8).astype(np.uint8)
        if clear is not None:
            grey[values == clear] = 255
        image = Image.fromarray(grey)
    elif image.mode in ("I", "F"):
        raise UnreadableImageError("pixels are 32-bit numbers with unknown black and white; save it with 8 bits")
    if not image.has_transparency_data:
        return image.convert("RGB")
    result = Image.new("RGB", image.size)
    rows = max(_STRIP // image.width, 1)
    for top in range(0, image.height, rows):  # in strips, since the whole takes three copies of four channels
        strip = image.crop((0, top, image.width, min(top + rows, image.height))).convert("RGBA")
        result.paste(Image.alpha_composite(Image.new("RGBA", strip.size, "white"), strip).convert("RGB"), (0, top))
    return result


def _reason(source: Path | BinaryIO, error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        if isinstance(source, Path) and source.stat().st_size == 0:  # the file exists: it has been read
            return "empty file (0 bytes)"
        if isinstance(source, Path) and source.suffix.lower() in HEIF_ENDINGS and "HEIF" not in image_formats():
            return f"an image of this kind needs another library: {HEIF_FIX}"
        return "not an image in a format that fgvc reads (JPEG, PNG, WebP, TIFF, ...)"
    return str(error) or type(error).__name__
