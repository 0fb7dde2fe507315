"""What every adapter keeps to, checked on a miniature of its dataset."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from miniature import write_miniature
from torch.utils.data import DataLoader

from fgvc.data import ImageDataset, TransformSpec, create_dataset, list_datasets, read_splits, split_validation
from fgvc.data.verify import examine_images
from fgvc.errors import DatasetError

BOXED = ["cub", "cars", "cars_devkit", "cars_kaggle", "aircraft", "dogs", "nabirds"]
MINIATURES = [*BOXED, "imagenet", "inaturalist", "folder", "table"]
CARS = ["AM General Hummer SUV 2000", "Ram C/V Cargo Van Minivan 2012", "Mercedes-Benz 300-Class Convertible 1993"]
HARRIER, JUNCO = "Northern Harrier (Adult male)", "Dark-eyed Junco (Slate-colored)"
# names of the classes, and the second image of the test split: the sixth of all
READ = {
    "cub": (["001.Black_footed_Albatross", "002.Chuck-will's_Widow", "003.Le Conte's Sparrow"], "_Albatross_0006.jpg"),
    "cars": (CARS, "car_ims/000006.jpg"),
    "cars_devkit": (CARS, "cars_test/00002.jpg"),
    "cars_kaggle": (CARS, "cars_test/cars_test/00002.jpg"),
    "aircraft": (["707-320", "F/A-18", "Cessna 560"], "data/images/0000006.jpg"),
    "dogs": (["Chihuahua", "black-and-tan coonhound", "Saint Bernard"], "Images/n02085620-Chihuahua/n02085620_6.jpg"),
    # which has inner nodes among its classes, without images
    "nabirds": (
        [HARRIER, JUNCO, "Blue Grosbeak (Female/juvenile)"],
        "images/0295/0000000621dc4d0cbfe14cae3c85c829.jpg",
    ),
    # named by the first word, and told apart by their ids
    "imagenet": (["tench", "crane (n01440765)", "crane (n01440766)"], "val/n01440764/n01440764_6.JPEG"),
    "inaturalist": (["Turdus merula", "Turdus pilaris", "Corvus corax"], "val/00000_Animalia_Turdus_merula/000006.jpg"),
    "table": (["plain", "semi-detached", "two words"], "images/0006.jpg"),
    "folder": (["plain", "semi-detached", "two words"], "test/plain/0006.jpg"),
}
UNPACKED = {
    "cub": "CUB_200_2011",
    "cars_devkit": "stanford_cars",
    "aircraft": "fgvc-aircraft-2013b",
    "nabirds": "nabirds",
}
"""Names of the folders that the archives unpack to, where the folder around them is accepted too."""


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("miniatures")
    return {name: write_miniature(name, folder / name / UNPACKED.get(name, "root")) for name in MINIATURES}


def read(roots: dict[str, Path], name: str, **options: object) -> ImageDataset:
    return create_dataset(name.partition("_")[0], root=roots[name], **options)  # type: ignore[arg-type]


def test_every_adapter_is_covered() -> None:
    assert {name.partition("_")[0] for name in MINIATURES} | {"hf", "synthetic"} == set(list_datasets())


@pytest.mark.parametrize("name", MINIATURES)
def test_splits_are_whole_disjoint_and_in_a_fixed_order(roots: dict[str, Path], name: str) -> None:
    splits = read_splits(name.partition("_")[0], roots[name])
    train, test = splits["train"], splits["test"]
    assert train.classes == test.classes == READ[name][0]
    assert (train.targets, test.targets) == ([0] * 4 + [1] * 4 + [2] * 4, [0, 0, 1, 1, 2, 2])
    assert test.relative_paths()[1].endswith(READ[name][1])
    assert not set(train.paths) & set(test.paths)
    again = read(roots, name)
    assert (again.paths, again.targets, again.classes) == (train.paths, train.targets, train.classes)
    assert not examine_images(train)[0]
    assert all(path.is_relative_to(roots[name]) for path in train.paths)
    if name in UNPACKED:
        assert read({name: roots[name].parent}, name).paths == train.paths


@pytest.mark.parametrize("name", MINIATURES)
def test_pickles_workers_and_validation(roots: dict[str, Path], name: str) -> None:
    transform = TransformSpec(size=16, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear", training=False)
    dataset = read(roots, name, transform=transform)
    copy: ImageDataset = pickle.loads(pickle.dumps(dataset))
    images, targets = next(iter(DataLoader(copy, batch_size=12, num_workers=1)))
    assert torch.equal(images, torch.stack([image for image, _ in dataset]))  # type: ignore[misc]
    assert targets.tolist() == dataset.targets
    train, validation = split_validation(dataset, 0.25, seed=0)
    assert sorted(train.paths + validation.paths) == sorted(dataset.paths)
    assert sorted(validation.targets) == [0, 1, 2]


@pytest.mark.parametrize("name", BOXED)
def test_boxes_are_exact_and_follow_the_images(roots: dict[str, Path], name: str) -> None:
    assert read(roots, name).boxes is None
    dataset = read(roots, name, crop="bbox")
    assert dataset.boxes is not None
    assert len(dataset.boxes) == 12
    whole = read(roots, name)
    for i, (left, top, right, bottom) in enumerate(dataset.boxes):
        image, target = dataset[i]
        assert image.size == (right - left, bottom - top)
        # all of the box in the colour of the class, red, green or blue, and nothing but the box
        pixels, around = (np.asarray(picture)[..., target] for picture in (image, whole[i][0]))
        assert pixels.min() > 150 and (around > 150).sum() == pixels.size
    part = dataset.subset([7, 2]).with_transform(lambda image: image.size)
    assert part.boxes == [dataset.boxes[7], dataset.boxes[2]]
    assert part[0][0] == dataset[7][0].size
    held_out = split_validation(dataset, 0.25, seed=0)[1]
    assert held_out.boxes == [dataset.boxes[dataset.paths.index(path)] for path in held_out.paths]


@pytest.mark.parametrize("name", MINIATURES)
def test_an_unknown_layout_is_described(tmp_path: Path, name: str) -> None:
    (tmp_path / "holiday").mkdir()
    with pytest.raises(DatasetError) as caught:
        read({name: tmp_path}, name)
    assert str(tmp_path) in str(caught.value)
    assert name in ("folder", "table") or ("holiday" in str(caught.value) and "datasets/" in str(caught.value))
