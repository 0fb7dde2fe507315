"""ImageNet (ILSVRC 2012) as class folders [Russakovsky et al., IJCV 2015].

Its validation images come in one flat folder; the development kit says which class each belongs to.
"""

import os
import re
from dataclasses import replace
from pathlib import Path

from fgvc.data.dataset import Samples
from fgvc.data.folder import is_litter, read_class_folders
from fgvc.data.layout import find_folder, listing, reachable, read_table, read_text, unique_names
from fgvc.data.mat import field, integers, read_mat, texts
from fgvc.errors import DatasetError

_NAMES = "LOC_synset_mapping.txt"
_FLAT = "ILSVRC2012_val_"
_KIT, _META, _LABELS = "ILSVRC2012_devkit_t12", "meta.mat", "ILSVRC2012_validation_ground_truth.txt"


def read_imagenet(root: Path, split: str) -> Samples:
    """Read one split; classes are in the order of their WordNet ids, as in pretrained weights.

    The name of a class is the first word in LOC_synset_mapping.txt, if that file is in `root` ("tench"; with the id
    added where two classes share it, "crane (n02012849)"); otherwise it is the id.

    Args:
        root: folder with train/<WordNet id>/*.JPEG and val/<WordNet id>/*.JPEG. A subset of the classes is fine.
        split: "train", or "test" for val/; the official test images have no public labels.

    Raises:
        DatasetError: a folder is missing or empty, a class is in one split only or not in the list of names, or the
            images of val/ are not sorted into classes.
    """
    folder = find_folder("imagenet", root, ("train", "val"))
    with reachable(), os.scandir(folder / "val") as entries:
        flat = next((entry.name for entry in entries if entry.name.startswith(_FLAT)), None)
    if flat is not None:
        raise DatasetError(
            f"{folder / 'val'}: {flat} and other images are not sorted into classes. Move each into the folder of its "
            f"class, {folder / 'val'}/<WordNet id>/; the ids are in LOC_val_solution.csv of the Kaggle copy or in the "
            "development kit, see datasets/imagenet.yaml"
        )
    samples = read_class_folders({"train": folder / "train", "test": folder / "val"}, split)
    if not (folder / _NAMES).is_file():
        return samples
    words = {wnid: line.split(",")[0].strip() for wnid, line in read_table(folder / _NAMES).items()}
    names = unique_names(words)
    unnamed = [wnid for wnid in samples.classes if wnid not in names]
    if unnamed:
        raise DatasetError(f"{folder / _NAMES}: no name for {listing(unnamed)}; add the lines or remove the file")
    return replace(samples, classes=[names[wnid] for wnid in samples.classes])


def sort_validation(root: Path) -> None:
    """Move `root`/val/*.JPEG into `root`/val/<WordNet id>/, by the development kit in `root`.

    Line i of the ground truth is the ILSVRC2012_ID of the i-th image by name.

    Raises DatasetError: a file is missing or malformed, or there are more or fewer labels than images.
    """
    kit = root / _KIT / "data"
    for path in (kit / _META, kit / _LABELS):
        if not path.is_file():
            raise DatasetError(f"{path}: missing; {_KIT}.tar.gz must be among the archives")
    wordnet_ids = _wordnet_ids(kit / _META)
    with reachable():
        images = sorted(path for path in (root / "val").iterdir() if path.is_file() and not is_litter(path.name))
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
    strange = [name for name in names if not re.fullmatch(r"n[0-9]{1,18}", name)]  # they become folder names
    if strange:
        raise DatasetError(f"{path}: {strange[0]!r} is no WordNet id, n and digits; unpack the kit again")
    return {str(number): name for number, name, count in zip(numbers, names, children, strict=True) if count == 0}
