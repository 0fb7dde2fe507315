"""The section of attributions: pictures that `fgvc attribute` wrote, as many as a page can carry."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fgvc.errors import RunError
from fgvc.io import read_json_object
from fgvc.reporting.report.collect import Collected, run_name
from fgvc.reporting.report.content import GalleryPart, GroupPart, Made, Part, Picture, Runs, TextPart
from fgvc.reporting.report.pictures import read_picture

MAX_PICTURES, MAX_BYTES = 96, 4_000_000
"""Of the whole page; what is beyond is counted, not shown."""
_GRID_WIDTH, _MAP_WIDTH = 1400, 320


@dataclass
class _Room:
    """What is still free on the page."""

    pictures: int = MAX_PICTURES
    size: int = MAX_BYTES
    left_out: int = 0

    def add(self, picture: Picture) -> bool:
        """Take the picture in, if it fits."""
        if self.pictures < 1 or len(picture.data) > self.size:
            self.left_out += 1
            return False
        self.pictures -= 1
        self.size -= len(picture.data)
        return True


def attribution(collected: Collected) -> Made:
    """Grids first, then the maps of each image."""
    parts: list[Part] = []
    room = _Room()
    records, notes = collected.read_each("attribution.json", "attribution", lambda file, _: _record(file))
    for file, run, record in records:
        runs = None if run is None else collected.of([run])
        name = str(file.parent) if run is None else run_name(run)
        parts += _grids(file, record, name, runs, room, notes)
        maps = _maps(file, record, runs, room, notes)
        if maps:
            parts.append(GroupPart(f"Maps of {name}, image by image", maps, runs))
    if not parts:
        return [], notes
    used = MAX_PICTURES - room.pictures
    text = f"{used} pictures, {(MAX_BYTES - room.size) / 1e6:.1f} MB, made smaller and compressed for this page"
    if room.left_out:
        most = f"{MAX_PICTURES} and {MAX_BYTES / 1e6:g} MB"
        text += f"; {room.left_out} more lie in the runs' folders (a page carries {most})"
    return [TextPart([f"{text}."]), *parts], notes


def _record(file: Path) -> dict[str, Any]:
    try:
        record = read_json_object(file)
    except (OSError, ValueError) as error:
        raise RunError(f"{file}: cannot be read ({error}); run fgvc attribute again") from error
    if record.get("schema") != 1:
        raise RunError(f"{file}: schema {record.get('schema')!r}, this version reads 1; run fgvc attribute again")
    for key in ("items", "grids"):
        if not isinstance(record.get(key, []), list):
            raise RunError(f"{file}: {key!r} is no list; run fgvc attribute again")
    if not any(record.get(key) for key in ("items", "grids")):
        raise RunError(f"{file}: names no picture; run fgvc attribute again")
    return record


def _picture(file: Path, name: object, width: int, text: str, caption: str) -> Picture:
    """One that attribution.json names. Raises RunError where it is none, or lies outside its folder."""
    path = file.parent / str(name)
    if not path.resolve().is_relative_to(file.parent.resolve()):
        raise RunError(f"{file}: {str(name)!r} lies outside the folder; run fgvc attribute again")
    return read_picture(path, width, text, caption)


def _fitting(
    file: Path, wanted: list[tuple[object, str, str]], width: int, room: _Room, notes: list[str]
) -> Iterator[Picture]:
    """Those of the wanted pictures (file name, text, caption) that there is room for."""
    for name, text, caption in wanted:
        if room.pictures < 1:
            room.left_out += 1
            continue
        try:
            picture = _picture(file, name, width, text, caption)
        except RunError as error:
            notes.append(str(error))
            continue
        if room.add(picture):
            yield picture


def _grids(
    file: Path, record: dict[str, Any], name: str, runs: Runs | None, room: _Room, notes: list[str]
) -> list[Part]:
    wanted = []
    for grid in record.get("grids", []):
        title = Path(str(grid)).stem.removeprefix("grid_")
        text = f"Grid of attributions by {title} of {name}: a row an image, a column a part of the spectrum"
        wanted.append((grid, text, title))
    pictures = list(_fitting(file, wanted, _GRID_WIDTH, room, notes))
    return [GalleryPart(f"Attributions of {name}", pictures, runs, wide=True)] if pictures else []


def _maps(file: Path, record: dict[str, Any], runs: Runs | None, room: _Room, notes: list[str]) -> list[Part]:
    images: dict[str, list[dict[str, Any]]] = {}
    for item in record.get("items", []):
        if isinstance(item, dict) and "file" in item:
            images.setdefault(str(item.get("image")), []).append(item)
        else:
            notes.append(f"{file}: an item without a file is left out")
    parts: list[Part] = []
    for image, items in images.items():
        first = items[0]
        wanted = [(item["file"], *_words(item)) for item in items]
        pictures = list(_fitting(file, wanted, _MAP_WIDTH, room, notes))
        if pictures:
            true = "not known" if first.get("class") is None else first["class"]
            title = f"{image}: true {true}, predicted {first.get('predicted')}"
            parts.append(GalleryPart(title, pictures, runs))
    return parts


def _words(item: dict[str, Any]) -> tuple[str, str]:
    """The alternative text and the caption of a map."""
    method, band, explained = (str(item.get(key)) for key in ("method", "band", "explained"))
    score = item.get("score")
    number = f", logit {score:.2f}" if isinstance(score, (int, float)) else ""
    caption = f"{method}, eigenvalues {band}{number}"
    return f"Attribution by {method} for the class {explained} from the eigenvalues {band}", f"{caption}: {explained}"
