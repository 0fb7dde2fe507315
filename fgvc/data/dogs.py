"""Stanford Dogs in its official layout [Khosla, Jayadevaprakash, Yao, Fei-Fei, FGVC workshop at CVPR 2011]."""

from pathlib import Path, PurePosixPath
from xml.etree import ElementTree

from fgvc.data.dataset import Samples
from fgvc.data.image_file import Box
from fgvc.data.layout import find_folder, image_paths, read_text, require_inside, unique_names
from fgvc.data.mat import integers, read_mat, texts
from fgvc.errors import DatasetError

_LISTS = ("train_list.mat", "test_list.mat")
_SIDES = ("xmin", "ymin", "xmax", "ymax")


def read_dogs(root: Path, split: str, *, boxes: bool = False) -> Samples:
    """Read one split, in the order of its list; classes are in the order of their labels.

    A class is named after its folder without the WordNet id and with spaces: "n02085782-Japanese_spaniel" is "Japanese
    spaniel".

    Args:
        root: folder with Images/, train_list.mat and test_list.mat, the lists also in lists/.
        split: "train" or "test".
        boxes: also read Annotation/, one file for each image. Where an image has several dogs, the box is the
            smallest one around all of them. Coordinates are taken as the edges of the box; the authors do not say
            whether they count from 0 or 1.

    Raises:
        DatasetError: a file or an image is missing or damaged, or the lists contradict each other.
    """
    layouts = [("Images", *(f"{prefix}{name}" for name in _LISTS)) for prefix in ("", "lists/")]
    folder = find_folder("dogs", root, *layouts)
    lists = folder if all((folder / name).is_file() for name in _LISTS) else folder / "lists"
    entries = {name: _read_list(lists / name) for name in _LISTS}
    folders = _class_folders(lists, [entry for name in _LISTS for entry in entries[name]])
    names = unique_names({breed: (breed.partition("-")[2] or breed).replace("_", " ") for breed in folders.values()})
    index = {label: position for position, label in enumerate(folders)}
    path = lists / f"{split}_list.mat"
    chosen = entries[path.name]
    if not chosen:
        raise DatasetError(f"{path}: no entries; unpack the archive again")
    files = [name for name, _ in chosen]
    return Samples(
        classes=list(names.values()),
        paths=image_paths(folder / "Images", files, path),
        targets=[index[label] for _, label in chosen],
        boxes=[_read_box(folder / "Annotation", name, path) for name in files] if boxes else None,
    )


def _read_list(path: Path) -> list[tuple[str, int]]:
    """Path below Images/ and label of each image."""
    content = read_mat(path, "file_list", "labels")
    names, labels = texts(path, content["file_list"]), integers(path, content["labels"])
    if len(names) != len(labels):
        raise DatasetError(f"{path}: {len(names)} files but {len(labels)} labels; unpack the archive again")
    return list(zip(names, labels, strict=True))


def _class_folders(lists: Path, entries: list[tuple[str, int]]) -> dict[int, str]:
    """Folder of each label, in the order of the labels."""
    folders: dict[int, str] = {}
    for name, label in entries:
        breed = PurePosixPath(name).parent.name
        if folders.setdefault(label, breed) != breed:
            raise DatasetError(
                f"{lists}: label {label} belongs to {folders[label]!r} and to {breed!r} in {' and '.join(_LISTS)}; "
                "unpack the archive again"
            )
    return dict(sorted(folders.items()))


def _read_box(folder: Path, name: str, source: Path) -> Box:
    path = require_inside(folder, PurePosixPath(name).with_suffix("").as_posix(), source)
    text = read_text(path)
    # only a document type declaration can declare entities; the official files have none
    if "<!DOCTYPE" in text:
        raise DatasetError(f"{path}: holds a document type declaration, which is refused; unpack the archive again")
    try:
        objects = ElementTree.fromstring(text).findall(".//bndbox")
        corners = [[int(box.findtext(side, "")) for side in _SIDES] for box in objects]
    except (ElementTree.ParseError, ValueError) as error:
        raise DatasetError(f"{path}: not a readable annotation ({error}); unpack the archive again") from error
    if not corners:
        raise DatasetError(f"{path}: no <bndbox> in it; unpack the archive again")
    left, top, right, bottom = zip(*corners, strict=True)
    return min(left), min(top), max(right), max(bottom)
