"""ImageNet (ILSVRC 2012) as class folders [Russakovsky et al., IJCV 2015]."""

import os
from dataclasses import replace
from pathlib import Path

from fgvc.data.dataset import Samples
from fgvc.data.folder import read_class_folders
from fgvc.data.layout import find_folder, listing, reachable, read_table, unique_names
from fgvc.errors import DatasetError

_NAMES = "LOC_synset_mapping.txt"
_FLAT = "ILSVRC2012_val_"


def read_imagenet(root: Path, split: str) -> Samples:
    """Read one split; classes are in the order of their WordNet ids, the one that pretrained weights have, too.

    A class is named by the first word of LOC_synset_mapping.txt where that file lies in `root` ("tench"; with the id
    added where two share it, "crane (n02012849)"), else by its id.

    Args:
        root: folder with train/<WordNet id>/*.JPEG and val/<WordNet id>/*.JPEG. A subset of the classes is fine.
        split: "train", or "test" for val/; the official test images have no public labels.

    Raises:
        DatasetError: a folder is missing or empty, a class is in one split only or not in the list of names, or the
            images of val/ are not sorted into classes.
    """
    folder = find_folder("imagenet", root, ("train", "val"))
    _refuse_flat(folder / "val")
    samples = read_class_folders({"train": folder / "train", "test": folder / "val"}, split)
    if not (folder / _NAMES).is_file():
        return samples
    words = {wnid: line.split(",")[0].strip() for wnid, line in read_table(folder / _NAMES).items()}
    names = unique_names(words)
    unnamed = [wnid for wnid in samples.classes if wnid not in names]
    if unnamed:
        raise DatasetError(f"{folder / _NAMES}: no name for {listing(unnamed)}; add the lines or remove the file")
    return replace(samples, classes=[names[wnid] for wnid in samples.classes])


def _refuse_flat(folder: Path) -> None:
    with reachable(), os.scandir(folder) as entries:
        flat = next((entry.name for entry in entries if entry.name.startswith(_FLAT)), None)
    if flat is not None:
        raise DatasetError(
            f"{folder}: images as the archive has them, such as {flat}, not sorted into classes. Move each into the "
            f"folder of its class, {folder}/<WordNet id>/; the ids are in LOC_val_solution.csv of the Kaggle copy or "
            "in the development kit, see datasets/imagenet.yaml"
        )
