"""ImageNet's validation images come in one flat folder; the development kit says which class each belongs to."""

from pathlib import Path
from typing import Any

from scipy.io import loadmat

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
            raise DatasetError(f"{path}: missing; ILSVRC2012_devkit_t12.tar.gz must be among the archives")
    wordnet_ids = _wordnet_ids(kit / _META)
    images = sorted(path for path in (root / "val").iterdir() if path.is_file())
    labels = (kit / _LABELS).read_text(encoding="utf-8").split()
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
    try:
        synsets: Any = loadmat(path, squeeze_me=True)["synsets"]
        return {str(int(row["ILSVRC2012_ID"])): str(row["WNID"]) for row in synsets if int(row["num_children"]) == 0}
    except Exception as error:  # scipy raises many types on damaged files
        raise DatasetError(f"{path}: not the expected table of synsets ({error}); unpack the kit again") from error
