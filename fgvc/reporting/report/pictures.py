"""Pictures of the report, few and small enough to carry: grids and maps that `fgvc attribute` wrote."""

import base64
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from fgvc.data.image_file import UnreadableImageError, decode_rgb
from fgvc.errors import RunError
from fgvc.io import read_json_object

MAX_PICTURES, MAX_BYTES = 96, 4_000_000
"""Limits of the attributions of a page; what is beyond is counted, not shown."""
_GRID_WIDTH, _MAP_WIDTH = 1400, 320  # pixels
_QUALITY = 80  # of WebP


@dataclass(frozen=True)
class Picture:
    """An image in the page.

    Attributes:
        data: WebP.
        size: Width and height in pixels.
        text: What it shows, in words.
        caption: Line under it.
    """

    data: bytes
    size: tuple[int, int]
    text: str
    caption: str = ""

    @property
    def url(self) -> str:
        return f"data:image/webp;base64,{base64.b64encode(self.data).decode('ascii')}"


@dataclass(frozen=True)
class Gallery:
    """Pictures of one thing next to each other; wide ones below each other."""

    title: str
    pictures: list[Picture]
    wide: bool = False


def read_picture(path: Path, width: int, text: str, caption: str = "") -> Picture:
    """An image file at no more than `width` pixels, without metadata. Raises RunError where it is no image."""
    try:
        image = decode_rgb(path)
    except UnreadableImageError as error:
        raise RunError(f"{path}: cannot be shown ({error}); make it again") from error
    image.thumbnail((width, 4 * width), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=_QUALITY, method=4)
    return Picture(buffer.getvalue(), image.size, text, caption)


def read_attribution(file: Path) -> dict[str, list[Any]]:
    """The lists "items" and "grids" of attribution.json. Raises OSError or ValueError where it is damaged or empty."""
    record = read_json_object(file)
    if record.get("schema") != 1:
        raise ValueError(f"schema {record.get('schema')!r}, this version reads 1")
    lists = {key: record.get(key, []) for key in ("items", "grids")}
    for key, value in lists.items():
        if not isinstance(value, list):
            raise ValueError(f"{key!r} is no list")
    if not any(lists.values()):
        raise ValueError("it names no picture")
    return lists


@dataclass
class AttributionPictures:
    """Galleries of attributions, as long as the page has room.

    Attributes:
        shown: Number of pictures.
        size: Bytes of the pictures.
        left_out: Number of pictures without room.
        notes: A line for each file that cannot be shown.
    """

    shown: int = 0
    size: int = 0
    left_out: int = 0
    notes: list[str] = field(default_factory=list)

    def grids(self, file: Path, record: dict[str, list[Any]], name: str) -> list[Gallery]:
        """The grids of one attribution.json, below each other."""
        pictures = []
        for grid in record["grids"]:
            title = Path(str(grid)).stem.removeprefix("grid_")
            text = f"Grid of attributions by {title} of {name}: a row an image, a column a part of the spectrum"
            pictures += self._read(file, grid, _GRID_WIDTH, text, title)
        return [Gallery(f"Attributions of {name}", pictures, wide=True)] if pictures else []

    def maps(self, file: Path, record: dict[str, list[Any]]) -> list[Gallery]:
        """The maps of one attribution.json, a gallery an image."""
        galleries: dict[str, Gallery] = {}
        for item in record["items"]:
            if not isinstance(item, dict) or "file" not in item:
                self.notes.append(f"{file}: an item without a file is left out")
                continue
            method, band, explained, image = (str(item.get(key)) for key in ("method", "band", "explained", "image"))
            score = item.get("score")
            number = f", logit {score:.2f}" if isinstance(score, (int, float)) else ""
            text = f"Attribution by {method} for the class {explained} from the eigenvalues {band}"
            caption = f"{method}, eigenvalues {band}{number}: {explained}"
            true = "not known" if item.get("class") is None else item["class"]
            gallery = galleries.setdefault(
                image, Gallery(f"{image}: true {true}, predicted {item.get('predicted')}", [])
            )
            gallery.pictures.extend(self._read(file, item["file"], _MAP_WIDTH, text, caption))
        return [gallery for gallery in galleries.values() if gallery.pictures]

    def _read(self, file: Path, name: object, width: int, text: str, caption: str) -> list[Picture]:
        """A picture that attribution.json names; none where there is no room, or it is not in the folder."""
        path = file.parent / str(name)
        if self.shown == MAX_PICTURES:
            self.left_out += 1
            return []
        if not path.resolve().is_relative_to(file.parent.resolve()):
            self.notes.append(f"{file}: {str(name)!r} lies outside the folder; run fgvc attribute again")
            return []
        try:
            picture = read_picture(path, width, text, caption)
        except RunError as error:
            self.notes.append(str(error))
            return []
        if self.size + len(picture.data) > MAX_BYTES:
            self.left_out += 1
            return []
        self.shown += 1
        self.size += len(picture.data)
        return [picture]

    @property
    def summary(self) -> str:
        """How many pictures the page shows, and how many it does not."""
        text = f"{self.shown} pictures, {self.size / 1e6:.1f} MB, made smaller and compressed for this page"
        most = f"{MAX_PICTURES} and {MAX_BYTES / 1e6:g} MB"
        more = f"; {self.left_out} more lie in the runs' folders (a page carries {most})" if self.left_out else ""
        return f"{text}{more}."
