"""Tiny random datasets in the official layout of each adapter: one writer a layout."""

import colorsys
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
from PIL import Image
from scipy.io import savemat

from fgvc.io import write_text_atomic

_BIRDS = ("Black_footed_Albatross", "Chuck-will's_Widow", "Le Conte's Sparrow")
_VARIANT_BIRDS = ("Northern Harrier (Adult male)", "Dark-eyed Junco (Slate-colored)", "Blue Grosbeak (Female/juvenile)")
_CARS = ("AM General Hummer SUV 2000", "Ram C/V Cargo Van Minivan 2012", "Mercedes-Benz 300-Class Convertible 1993")
_VARIANTS = ("707-320", "F/A-18", "Cessna 560")
_FAMILIES = ("Boeing 707", "F/A-18")
_MANUFACTURERS = ("McDonnell Douglas", "de Havilland/Boeing")
_BREEDS = ("Chihuahua", "black-and-tan_coonhound", "Saint_Bernard")
_SYNSETS = ("tench, Tinca tinca", "crane", "crane")  # two of the thousand classes have this name
_OWN = ("plain", "two words", "semi-detached")
_BANNER = 20
SPLITS = ("train", "test")


def write_miniature(
    name: str,
    root: Path,
    *,
    classes: int = 3,
    train_per_class: int = 4,
    test_per_class: int = 2,
    size: tuple[int, int] = (96, 80),
    seed: int = 0,
) -> Path:
    """Write a miniature to the new folder `root`, ready for `create_dataset`, and return it; the seed fixes everything.

    Every image is dark noise with a filled box in the colour of its class; the annotations give the box. Class names
    have blanks, dashes and slashes like the official ones. Images of aircraft have a white banner, 20 rows high, and
    their training images are divided into train and val. "cars_devkit" is the second layout of "cars".

    Args:
        classes: 2 or 3.
        size: width and height in pixels, with the banner, each at least 48.
    """
    root.mkdir(parents=True)
    _WRITERS[name](root, Plan(classes, {"train": train_per_class, "test": test_per_class}, size, seed))
    return root


@dataclass(frozen=True)
class Picture:
    """An image to draw: its split, class, number among all images, and box (left, top, right, bottom)."""

    split: str
    target: int
    serial: int
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class Plan:
    """What to draw: images of each class in "train" and "test", of a width and height in pixels."""

    classes: int
    per_class: Mapping[str, int]
    size: tuple[int, int]
    seed: int

    def pictures(self, banner: int = 0) -> list[Picture]:
        """All images, class by class, with boxes above the banner."""
        rng = np.random.default_rng(self.seed)
        kinds = [(split, target) for target in range(self.classes) for split in self.per_class]
        order = [kind for kind in kinds for _ in range(self.per_class[kind[0]])]
        width, height = self.size[0], self.size[1] - banner
        found = []
        for serial, (split, target) in enumerate(order, start=1):
            left, right = int(width * rng.uniform(0.1, 0.3)), int(width * rng.uniform(0.6, 0.9))
            top, bottom = int(height * rng.uniform(0.1, 0.3)), int(height * rng.uniform(0.6, 0.9))
            found.append(Picture(split, target, serial, (left, top, right, bottom)))
        return found

    def draw(self, picture: Picture, path: Path, banner: int = 0) -> None:
        """Save dark noise with a box in the colour of the class, and a white banner."""
        rng = np.random.default_rng([self.seed, picture.serial])
        pixels = rng.integers(0, 48, (self.size[1], self.size[0], 3), dtype=np.uint8)
        red, green, blue = colorsys.hsv_to_rgb(picture.target / self.classes, 1, rng.uniform(0.8, 1))
        left, top, right, bottom = picture.box
        pixels[top:bottom, left:right] = np.array([red, green, blue]) * 255
        if banner:
            pixels[-banner:] = 255
        path.parent.mkdir(parents=True, exist_ok=True)
        # a high quality keeps the colours at the edges of the box
        Image.fromarray(pixels).save(path, format="JPEG", quality=95, subsampling=0)


def write_cub(root: Path, plan: Plan) -> None:
    """CUB-200-2011."""
    names = [f"{index:03d}.{name}" for index, name in enumerate(_BIRDS[: plan.classes], start=1)]
    files = {str(p.serial): f"{names[p.target]}/{names[p.target][4:]}_{p.serial:04d}.jpg" for p in plan.pictures()}
    labels = {str(index): name for index, name in enumerate(names, start=1)}
    _write_birds(root, plan, files, labels, first_class=1, decimals=1)


def write_nabirds(root: Path, plan: Plan) -> None:
    """NABirds: ids are text, and classes.txt also lists inner nodes of the hierarchy."""
    names = _VARIANT_BIRDS[: plan.classes]
    ids = {p.serial: f"{p.serial:08x}-21dc-4d0c-bfe1-4cae3c85c829" for p in plan.pictures()}
    files = {ids[p.serial]: f"{295 + p.target:04d}/{ids[p.serial].replace('-', '')}.jpg" for p in plan.pictures()}
    inner = {"0": "Birds", "1": "Ducks, Geese, and Swans", "22": names[0]}
    labels = {**inner, **{str(295 + index): name for index, name in enumerate(names)}}
    _write_birds(root, plan, files, labels, first_class=295, decimals=0)
    width, height = plan.size
    _write_table(root / "sizes.txt", {image_id: f"{width} {height}" for image_id in files})
    leaves = [key for key in labels if key not in ("0", "1")]
    _write_table(root / "hierarchy.txt", {"1": "0", **dict.fromkeys(leaves, "1")})


def _write_birds(
    root: Path, plan: Plan, files: Mapping[str, str], classes: Mapping[str, str], first_class: int, decimals: int
) -> None:
    pictures = dict(zip(files, plan.pictures(), strict=True))
    for image_id, picture in pictures.items():
        plan.draw(picture, root / "images" / files[image_id])
    corners = {i: (p.box[0], p.box[1], p.box[2] - p.box[0], p.box[3] - p.box[1]) for i, p in pictures.items()}
    _write_table(root / "images.txt", files)
    _write_table(root / "image_class_labels.txt", {i: str(first_class + p.target) for i, p in pictures.items()})
    _write_table(root / "train_test_split.txt", {i: str(int(p.split == "train")) for i, p in pictures.items()})
    _write_table(root / "classes.txt", classes)
    boxes = {i: " ".join(f"{value:.{decimals}f}" for value in box) for i, box in corners.items()}
    _write_table(root / "bounding_boxes.txt", boxes)


def write_cars(root: Path, plan: Plan) -> None:
    """Stanford Cars, all in one: car_ims/ and cars_annos.mat."""
    rows = []
    for picture in plan.pictures():
        name = f"car_ims/{picture.serial:06d}.jpg"
        plan.draw(picture, root / name)
        values = {"class": np.uint8(picture.target + 1), "test": np.uint8(picture.split == "test")}
        rows.append({"relative_im_path": name, **_car_box(picture), **values})
    savemat(
        root / "cars_annos.mat", {"annotations": _structs(rows), "class_names": _cells(_CARS[: plan.classes], row=True)}
    )


def write_cars_devkit(root: Path, plan: Plan) -> None:
    """Stanford Cars in parts: cars_train/, cars_test/, devkit/ and cars_test_annos_withlabels.mat."""
    devkit = root / "devkit"
    devkit.mkdir(parents=True)
    savemat(devkit / "cars_meta.mat", {"class_names": _cells(_CARS[: plan.classes], row=True)})
    for split, path in (("train", devkit / "cars_train_annos.mat"), ("test", root / "cars_test_annos_withlabels.mat")):
        rows = []
        for number, picture in enumerate((p for p in plan.pictures() if p.split == split), start=1):
            plan.draw(picture, root / f"cars_{split}" / f"{number:05d}.jpg")
            rows.append({**_car_box(picture), "class": np.uint8(picture.target + 1), "fname": f"{number:05d}.jpg"})
        savemat(path, {"annotations": _structs(rows)})
    for row in rows:
        del row["class"]
    savemat(devkit / "cars_test_annos.mat", {"annotations": _structs(rows)})


def write_cars_kaggle(root: Path, plan: Plan) -> None:
    """Stanford Cars as Kaggle has them: folders in folders of the same name, and a file downloaded twice."""
    write_cars_devkit(root, plan)
    for name, place in (("devkit", "car_devkit/devkit"), *((f"cars_{s}", f"cars_{s}/cars_{s}") for s in SPLITS)):
        (root / name).rename(root / "moved")
        (root / place).parent.mkdir()
        (root / "moved").rename(root / place)
    (root / "cars_test_annos_withlabels.mat").rename(root / "cars_test_annos_withlabels (1).mat")
    savemat(root / "cars_annos.mat", {"annotations": _structs([{"class": 1}]), "class_names": _cells(_CARS)})


def _car_box(picture: Picture) -> dict[str, Any]:
    left, top, right, bottom = picture.box
    corners = {"bbox_x1": left + 1, "bbox_y1": top + 1, "bbox_x2": right, "bbox_y2": bottom}
    return {name: np.uint16(value) for name, value in corners.items()}


def write_aircraft(root: Path, plan: Plan) -> None:
    """FGVC-Aircraft 2013b; the first half of the training images of a class is train, the others val."""
    data = root / "data"
    variants = _VARIANTS[: plan.classes]
    levels = {
        "variant": variants,
        "family": [_FAMILIES[0] if index < 2 else _FAMILIES[1] for index in range(plan.classes)],
        "manufacturer": [_MANUFACTURERS[index % 2] for index in range(plan.classes)],
    }
    pictures = {f"{picture.serial:07d}": picture for picture in plan.pictures(_BANNER)}
    members: dict[str, list[str]] = {"train": [], "val": [], "trainval": [], "test": []}
    for image_id, picture in pictures.items():
        plan.draw(picture, data / "images" / f"{image_id}.jpg", _BANNER)
        if picture.split == "test":
            members["test"].append(image_id)
            continue
        place = (picture.serial - 1) % sum(plan.per_class.values())
        members["train" if place < (plan.per_class["train"] + 1) // 2 else "val"].append(image_id)
        members["trainval"].append(image_id)
    for level, file in (("variant", "variants"), ("family", "families"), ("manufacturer", "manufacturers")):
        write_text_atomic(data / f"{file}.txt", "".join(f"{name}\n" for name in dict.fromkeys(levels[level])))
        for split, ids in members.items():
            _write_table(data / f"images_{level}_{split}.txt", {i: levels[level][pictures[i].target] for i in ids})
    for split, ids in members.items():
        write_text_atomic(data / f"images_{split}.txt", "".join(f"{image_id}\n" for image_id in ids))
    corners = {i: (p.box[0] + 1, p.box[1] + 1, p.box[2], p.box[3]) for i, p in pictures.items()}
    _write_table(data / "images_box.txt", {i: " ".join(map(str, box)) for i, box in corners.items()})


def write_dogs(root: Path, plan: Plan) -> None:
    """Stanford Dogs: Images/, Annotation/ and the lists."""
    breeds = [f"n{2085620 + 100 * index:08d}-{name}" for index, name in enumerate(_BREEDS[: plan.classes])]
    for split in ("train", "test"):
        pictures = [picture for picture in plan.pictures() if picture.split == split]
        stems = [f"{breeds[p.target]}/{breeds[p.target].partition('-')[0]}_{p.serial}" for p in pictures]
        for picture, stem in zip(pictures, stems, strict=True):
            plan.draw(picture, root / "Images" / f"{stem}.jpg")
            write_text_atomic(root / "Annotation" / stem, _annotation(picture, breeds[picture.target], plan.size))
        content = {
            "file_list": _cells([f"{stem}.jpg" for stem in stems]),
            "annotation_list": _cells(stems),
            "labels": np.array([[picture.target + 1] for picture in pictures], dtype=np.uint8),
        }
        savemat(root / f"{split}_list.mat", content)


def _annotation(picture: Picture, breed: str, size: tuple[int, int]) -> str:
    sides = zip(("xmin", "ymin", "xmax", "ymax"), picture.box, strict=True)
    box = "".join(f"<{side}>{value}</{side}>" for side, value in sides)
    name = escape(breed.partition("-")[2])
    return (
        f"<annotation><folder>{breed[1:9]}</folder><filename>{picture.serial}</filename>"
        f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
        f"<object><name>{name}</name><bndbox>{box}</bndbox></object></annotation>\n"
    )


def write_imagenet(root: Path, plan: Plan) -> None:
    """ImageNet as class folders, with the list of class names."""
    wnids = [f"n{1440764 + index:08d}" for index in range(plan.classes)]
    for picture in plan.pictures():
        split = "train" if picture.split == "train" else "val"
        plan.draw(picture, root / split / wnids[picture.target] / f"{wnids[picture.target]}_{picture.serial}.JPEG")
    _write_table(root / "LOC_synset_mapping.txt", dict(zip(wnids, _SYNSETS[: plan.classes], strict=True)))


def write_inaturalist(root: Path, plan: Plan) -> None:
    """iNaturalist 2021: JSON as of COCO, categories with their taxonomy in an order of their own."""
    species = [("Turdus merula", "Turdus"), ("Turdus pilaris", "Turdus"), ("Corvus corax", "Corvus")][: plan.classes]
    folders = [f"{number:05d}_Animalia_{name.replace(' ', '_')}" for number, (name, _) in enumerate(species)]
    ranks = {"family": ["Turdidae", "Turdidae", "Corvidae"], "kingdom": ["Animalia"] * 3}
    categories = [
        {"id": target, "name": name, "genus": genus, "image_dir_name": folders[target]}
        | {rank: names[target] for rank, names in ranks.items()}
        for target, (name, genus) in enumerate(species)
    ]
    for split, name in (("train", "train"), ("test", "val")):
        images, annotations = [], []
        for picture in plan.pictures():
            if picture.split == split:
                file = f"{name}/{folders[picture.target]}/{picture.serial:06d}.jpg"
                plan.draw(picture, root / file)
                images.append({"id": picture.serial, "file_name": file, "latitude": float("nan")})
                annotations.append({"id": 7, "image_id": picture.serial, "category_id": picture.target})
        content = {"info": {}, "images": images[::-1], "annotations": annotations, "categories": categories[::-1]}
        (root / f"{name}.json").write_text(json.dumps(content))


def write_imagenet_kit(root: Path, labels: Sequence[object], synsets: Sequence[tuple[int, str, int]]) -> None:
    """The two files of ImageNet's development kit that matter; synsets are (ILSVRC2012_ID, WNID, num_children)."""
    data = root / "ILSVRC2012_devkit_t12" / "data"
    data.mkdir(parents=True)
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")]
    savemat(data / "meta.mat", {"synsets": np.array(list(synsets), dtype=kinds).reshape(-1, 1)})
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{label}\n" for label in labels))


def write_folder(root: Path, plan: Plan) -> None:
    """Class folders under train/ and test/."""
    names = _OWN[: plan.classes]
    for picture in plan.pictures():
        plan.draw(picture, root / picture.split / names[picture.target] / f"{picture.serial:04d}.jpg")


def write_table(root: Path, plan: Plan) -> None:
    """A CSV file of paths, labels and splits, and images in one folder."""
    rows, names = [], sorted(_OWN[: plan.classes])
    for picture in plan.pictures():
        plan.draw(picture, root / "images" / f"{picture.serial:04d}.jpg")
        rows.append(f"images/{picture.serial:04d}.jpg,{names[picture.target]},{picture.split.title()}")
    write_text_atomic(root / "labels.csv", "\n".join(["File Name,Label,Split", *rows, ""]))


def _write_table(path: Path, table: Mapping[str, str]) -> None:
    write_text_atomic(path, "".join(f"{key} {value}\n" for key, value in table.items()))


def _structs(rows: Sequence[Mapping[str, Any]]) -> np.ndarray[Any, np.dtype[Any]]:
    """A struct array of shape (1, N), as MATLAB writes it."""
    array = np.zeros((1, len(rows)), dtype=[(name, object) for name in rows[0]])
    for column, row in enumerate(rows):
        array[0, column] = tuple(row.values())
    return array


def _cells(values: Sequence[str], row: bool = False) -> np.ndarray[Any, np.dtype[Any]]:
    """A cell array of shape (N, 1), or (1, N)."""
    array = np.empty((len(values), 1), dtype=object)
    array[:, 0] = values
    return array.T if row else array


_WRITERS: dict[str, Callable[[Path, Plan], None]] = {
    "cub": write_cub,
    "cars": write_cars,
    "cars_devkit": write_cars_devkit,
    "cars_kaggle": write_cars_kaggle,
    "aircraft": write_aircraft,
    "dogs": write_dogs,
    "nabirds": write_nabirds,
    "imagenet": write_imagenet,
    "inaturalist": write_inaturalist,
    "table": write_table,
    "folder": write_folder,
}


def write_coloured(root: Path, classes: Sequence[str]) -> None:
    """Class folders of 4 training and 3 test images of 64 x 80 pixels; each of three classes has its own colour."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("test", 3)):
        for target, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                blocks = rng.integers(0, 120, (4, 5, 3))
                blocks[..., target] += 130
                pixels = blocks.repeat(16, axis=0).repeat(16, axis=1).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
