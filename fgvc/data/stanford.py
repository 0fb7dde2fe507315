"""Stanford Cars and Stanford Dogs in their official layouts, whose lists are MATLAB files; Cars also as Kaggle has it.

Cars: [Krause, Stark, Deng, Fei-Fei, 3dRR 2013]. Dogs: [Khosla, Jayadevaprakash, Yao, Fei-Fei, FGVC workshop at CVPR
2011].
"""

import itertools
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from xml.etree import ElementTree

from fgvc.data.dataset import Samples
from fgvc.data.image_file import Box
from fgvc.data.layout import find_folder, image_paths, reachable, read_text, require_inside, unique_names
from fgvc.data.mat import field, integers, read_mat, texts
from fgvc.errors import DatasetError

_JOINT = ("car_ims", "cars_annos.mat")
_KITS = ("devkit", "car_devkit/devkit", "car_devkit")
_IMAGES = ("cars_train", "cars_test")
_TEST_LABELS = "cars_test_annos_withlabels.mat"
_CORNERS = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")


class _Source(NamedTuple):
    """The source of one split: annotation file, its structs, class names, and the folder that paths are relative to."""

    path: Path
    annotations: dict[str, list[Any]]
    class_names: list[Any]
    images: Path
    path_field: str


def read_cars(root: Path, split: str, *, boxes: bool = False) -> Samples:
    """Read one split, in the order of its annotation file; classes are in the order of their ids.

    Both layouts give the same classes, targets and boxes: car_ims/ with cars_annos.mat, or cars_train/ and cars_test/
    with devkit/ and cars_test_annos_withlabels.mat, which may lie in devkit/ or next to it. As in the copies of Kaggle,
    the devkit may be named car_devkit/ or car_devkit/devkit/, and the images may lie one folder deeper,
    cars_train/cars_train/.

    Args:
        root: folder with one of the layouts, or its parent where the folder is named stanford_cars.
        split: "train" or "test".
        boxes: also read the bounding boxes.

    Raises:
        DatasetError: neither layout is there, a file is missing or damaged, a class id has no name, an image is
            missing, or the split is empty.
    """
    with reachable():
        if all((root / name).exists() for name in (*_IMAGES, _JOINT[1])) and _kit(root) is None:
            raise DatasetError(
                f"{root}: the devkit is missing; {_JOINT[1]} names images of car_ims/, which are numbered in another "
                f"way than those of cars_train/. Unpack car_devkit.tgz into {root}, so that {root / 'devkit'} is "
                f"there, and put {_TEST_LABELS} next to it. datasets/cars.yaml shows the layout"
            )
    folder = find_folder("cars", root, _JOINT, *((kit, *_IMAGES) for kit in _KITS), nested="stanford_cars")
    joint = all((folder / name).exists() for name in _JOINT)
    source = _joint(folder, split) if joint else _devkit(folder, split)
    path = source.path
    classes = texts(path, source.class_names)
    class_ids = integers(path, field(path, source.annotations, "class"))
    for number in class_ids:
        if not 1 <= number <= len(classes):
            raise DatasetError(
                f"{path}: class id {number} has no name, there are {len(classes)}; is it the official file?"
            )
    if not class_ids:
        raise DatasetError(f"{path}: no image belongs to split {split!r}; unpack the archive again")
    return Samples(
        classes=list(unique_names({str(number): name for number, name in enumerate(classes, start=1)}).values()),
        paths=image_paths(source.images, texts(path, field(path, source.annotations, source.path_field)), path),
        targets=[number - 1 for number in class_ids],
        boxes=_boxes(path, source.annotations) if boxes else None,
    )


def is_cars(root: Path) -> bool:
    """Whether a folder looks like this dataset, whole or not. Raises OSError."""
    places = (root, root / "stanford_cars")
    return any(all((place / name).exists() for name in names) for place in places for names in (_JOINT, _IMAGES))


def _kit(folder: Path) -> Path | None:
    """The folder of the devkit."""
    return next((folder / kit for kit in _KITS if (folder / kit / "cars_meta.mat").is_file()), None)


def _joint(folder: Path, split: str) -> _Source:
    path = folder / "cars_annos.mat"
    content = read_mat(path, "annotations", "class_names")
    annotations = content["annotations"]
    chosen = [(flag == 1) == (split == "test") for flag in integers(path, field(path, annotations, "test"))]
    annotations = {name: list(itertools.compress(column, chosen)) for name, column in annotations.items()}
    return _Source(path, annotations, content["class_names"], folder, "relative_im_path")


def _devkit(folder: Path, split: str) -> _Source:
    devkit = _kit(folder) or folder
    path = devkit / "cars_train_annos.mat" if split == "train" else _test_labels(folder, devkit)
    names = read_mat(devkit / "cars_meta.mat", "class_names")["class_names"]
    images = folder / f"cars_{split}"
    images = images / images.name if (images / images.name).is_dir() else images
    return _Source(path, read_mat(path, "annotations")["annotations"], names, images, "fname")


def _test_labels(folder: Path, devkit: Path) -> Path:
    with reachable():
        for place in (devkit, folder, devkit.parent):
            # a browser adds " (1)" to a second download, and Kaggle kept it
            found = sorted(place.glob(f"{_TEST_LABELS.removesuffix('.mat')}*.mat"))
            if found:
                return place / _TEST_LABELS if place / _TEST_LABELS in found else found[0]
    raise DatasetError(
        f"{folder}: {_TEST_LABELS} missing; put it into {folder} or {devkit}. The devkit's own cars_test_annos.mat "
        "holds no classes. datasets/cars.yaml shows the source"
    )


def _boxes(path: Path, annotations: dict[str, list[Any]]) -> list[Box]:
    """The file counts pixels from 1 and includes the last one."""
    x1, y1, x2, y2 = (integers(path, field(path, annotations, name)) for name in _CORNERS)
    return [(a - 1, b - 1, c, d) for a, b, c, d in zip(x1, y1, x2, y2, strict=True)]


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
