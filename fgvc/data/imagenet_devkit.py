"""ImageNet's validation images come in one flat folder; the development kit says which class each belongs to."""

import re
from pathlib import Path

from fgvc.data.layout import reachable, read_text
from fgvc.data.mat import field, integers, read_mat, texts
from fgvc.errors import DatasetError

_KIT, _META, _LABELS = "ILSVRC2012_devkit_t12", "meta.mat", "ILSVRC2012_validation_ground_truth.txt"


def sort_validation(root: Path) -> None:
    """Move `root`/val/*.JPEG into `root`/val/<WordNet id>/, by the development kit in `root`.

    Line i of the ground truth is the ILSVRC2012_ID of the i-th image by name.

    Raises:
        DatasetError: a file is missing or malformed, or there are more or fewer labels than images.
    """
    kit = root / _KIT / "data"
    for path in (kit / _META, kit / _LABELS):
        if not path.is_file():
            raise DatasetError(f"{path}: missing; {_KIT}.tar.gz must be among the archives")
    wordnet_ids = _wordnet_ids(kit / _META)
    with reachable():
        images = sorted(path for path in (root / "val").iterdir() if path.is_file())
    labels = read_text(kit / _LABELS).split()
    if len(labels) != len(images):
        raise DatasetError(f"{kit / _LABELS}: {len(labels)} labels for {len(images)} images in val; unpack them again")
    for image, label in zip(images, labels, strict=True):
        if label not in wordnet_ids:
            raise DatasetError(f"{kit / _LABELS}: {label!r} is no ILSVRC2012_ID of {_META}; unpack the kit again")
        folder = image.parent / wordnet_ids[label]
        folder.mkdir(exist_ok=True)
        image.replace(folder / image.name)


def _wordnet_ids(path: Path) -> dict[str, str]:
    """WordNet id by ILSVRC2012_ID (as text), for the synsets without children: those are the classes."""
    synsets = read_mat(path, "synsets")["synsets"]
    numbers = integers(path, field(path, synsets, "ILSVRC2012_ID"))
    children = integers(path, field(path, synsets, "num_children"))
    names = texts(path, field(path, synsets, "WNID"))
    strange = [name for name in names if not re.fullmatch(r"n[0-9]{1,18}", name)]  # they become names of folders
    if strange:
        raise DatasetError(f"{path}: {strange[0]!r} is no WordNet id, n and digits; unpack the kit again")
    return {str(number): name for number, name, count in zip(numbers, names, children, strict=True) if count == 0}
