"""What every adapter keeps to, checked on a miniature of its dataset."""

import pickle
from pathlib import Path

import pytest
import torch
from miniature import write_miniature
from torch.utils.data import DataLoader

from fgvc.data import ImageDataset, TransformSpec, create_dataset, list_datasets, split_validation
from fgvc.data.checks import check_images
from fgvc.errors import DatasetError

BOXED = ["cub", "cars", "cars_devkit", "aircraft", "dogs", "nabirds"]
MINIATURES = [*BOXED, "imagenet", "folder"]


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("miniatures")
    return {name: write_miniature(name, folder / name) for name in MINIATURES}


def read(roots: dict[str, Path], name: str, **options: object) -> ImageDataset:
    return create_dataset(name.partition("_")[0], root=roots[name], **options)  # type: ignore[arg-type]


def test_every_adapter_is_covered() -> None:
    assert {name.partition("_")[0] for name in MINIATURES} | {"hf", "synthetic"} == set(list_datasets())


@pytest.mark.parametrize("name", MINIATURES)
def test_splits_are_whole_disjoint_and_in_a_fixed_order(roots: dict[str, Path], name: str) -> None:
    train, test = (read(roots, name, split=split) for split in ("train", "test"))
    assert (len(train), len(test)) == (12, 6)
    assert train.classes == test.classes
    assert len(set(train.classes)) == 3
    assert [train.targets.count(target) for target in range(3)] == [4] * 3
    assert [test.targets.count(target) for target in range(3)] == [2] * 3
    assert not set(train.paths) & set(test.paths)
    again = read(roots, name)
    assert (again.paths, again.targets, again.classes) == (train.paths, train.targets, train.classes)
    assert not check_images(train)
    assert all(path.is_relative_to(roots[name]) for path in train.paths)


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
def test_boxes_are_inside_and_follow_the_images(roots: dict[str, Path], name: str) -> None:
    assert read(roots, name).boxes is None
    dataset = read(roots, name, crop="bbox")
    assert dataset.boxes is not None
    assert len(dataset.boxes) == 12
    for (image, _), (left, top, right, bottom) in zip(dataset, dataset.boxes, strict=True):  # type: ignore[call-overload]
        assert image.size == (right - left, bottom - top)
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
    assert name == "folder" or ("holiday" in str(caught.value) and "datasets/" in str(caught.value))
