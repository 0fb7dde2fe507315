"""Pictures of the report, few and small enough to carry: grids and maps that `fgvc attribute` wrote."""

import base64
import io
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from fgvc.errors import RunError
from fgvc.foreign import read_json_object
from fgvc.presentation.style import class_name

MAX_PICTURES, MAX_BYTES = 96, 5_000_000
"""Attributions of a page: no more pictures than that, and none after so many bytes; the rest is counted, not shown."""


@dataclass(frozen=True)
class Picture:
    """An image in the page: content as an address, size in pixels, what it shows in words, the line under it."""

    url: str
    size: tuple[int, int]
    text: str
    caption: str


@dataclass(frozen=True)
class Gallery:
    """Pictures of one thing next to each other; wide ones below each other."""

    title: str
    pictures: list[Picture]
    wide: bool = False


def read_picture(path: Path, width: int, text: str, caption: str) -> Picture:
    """An image file at no more than `width` pixels, without metadata. Raises RunError where it is no image."""
    from fgvc.data.image_file import UnreadableImageError, decode_rgb  # here, since a page without pictures is quick

    try:
        image = decode_rgb(path)
    except UnreadableImageError as error:
        raise RunError(f"{path}: cannot be shown ({error}); make it again") from error
    image.thumbnail((width, 4 * width), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=80, method=4)
    content = base64.b64encode(buffer.getvalue()).decode("ascii")
    return Picture(f"data:image/webp;base64,{content}", image.size, text, caption)


def read_attribution(file: Path) -> dict[str, list[Any]]:
    """The lists "items" and "grids" of attribution.json. Raises OSError or ValueError where it is damaged or empty."""
    record = read_json_object(file)
    if record.get("schema") != 1:
        raise ValueError(f"schema {record.get('schema')!r}, this version reads 1")
    lists = {key: record.get(key, []) for key in ("items", "grids")}
    for key, value in lists.items():
        if not isinstance(value, list):
            raise ValueError(f"{key!r} is no list")
    if not any(lists.values()) or not all(isinstance(item, dict) and "file" in item for item in lists["items"]):
        raise ValueError("it names no picture, or has an item without one")
    if any("\0" in str(name) for name in (*lists["grids"], *(item["file"] for item in lists["items"]))):
        raise ValueError("it names a file with a NUL byte")
    return lists


@dataclass
class Attributions:
    """Galleries of attributions, as long as the page has room; a file that cannot be shown is noted."""

    notes: list[str]
    shown: int = 0
    failed: int = 0
    size: int = 0
    left_out: int = 0
    read: dict[tuple[Path, int], Picture | RunError] = field(default_factory=dict)

    def grids(self, file: Path, names: list[Any], run: str) -> list[Gallery]:
        """The grids of one attribution.json, below each other."""
        gallery = Gallery(f"Attributions of {run}", [], wide=True)
        for name in map(str, names):
            title = Path(name).stem.removeprefix("grid_")
            text = f"Grid of attributions by {title} of {run}: a row an image, a column a part of the spectrum"
            self._add(gallery, file, name, 1400, text, title)
        return [gallery] if gallery.pictures else []

    def maps(self, file: Path, items: list[Any]) -> list[Gallery]:
        """The maps of one attribution.json, a gallery an image."""
        galleries: dict[str, Gallery] = {}
        for item in items:
            method, band, image = (str(item.get(key)) for key in ("method", "band", "image"))
            true, predicted, explained = (
                class_name(str(item.get(key) or "not known")) for key in ("class", "predicted", "explained")
            )
            title = f"{image}: true {true}, predicted {predicted}"
            text = f"Attribution by {method} for the class {explained} from the eigenvalues {band}"
            score = item.get("score")
            number = f", logit {score:.2f}" if isinstance(score, (int, float)) else ""
            caption = f"{method}, eigenvalues {band}{number}: {explained}"
            self._add(galleries.setdefault(image, Gallery(title, [])), file, str(item["file"]), 320, text, caption)
        return [gallery for gallery in galleries.values() if gallery.pictures]

    def _add(self, gallery: Gallery, file: Path, name: str, width: int, text: str, caption: str) -> None:
        """Add a picture that attribution.json names, if there is room and it lies in the folder."""
        if self.shown == MAX_PICTURES or self.failed == MAX_PICTURES or self.size > MAX_BYTES:
            self.left_out += 1
            return
        path = file.parent / name
        try:
            if not path.resolve().is_relative_to(file.parent.resolve()):
                raise RunError(f"{file}: {name!r} lies outside the folder; run fgvc attribute again")
            picture = self._read(path, width)
            gallery.pictures.append(replace(picture, text=text, caption=caption))
        except RunError as error:
            self.notes.append(str(error))
            self.failed += 1
        else:
            self.shown += 1
            self.size += len(gallery.pictures[-1].url)

    def _read(self, path: Path, width: int) -> Picture:
        """A picture without words; a file that is named often is read once."""
        if (path, width) not in self.read:
            try:
                self.read[path, width] = read_picture(path, width, "", "")
            except RunError as error:
                self.read[path, width] = error
        found = self.read[path, width]
        if isinstance(found, RunError):
            raise found
        return found

    @property
    def summary(self) -> str:
        """How many pictures the page shows, and how many it does not."""
        text = f"{self.shown} pictures, {self.size / 1e6:.1f} MB, made smaller and compressed for this page"
        limits = f"a page carries {MAX_PICTURES} and {MAX_BYTES / 1e6:g} MB"
        return text + (f"; {self.left_out} more lie in the runs' folders ({limits})." if self.left_out else ".")
