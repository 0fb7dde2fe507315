"""Views of a test image: which crops, in which order, by the one recipe."""

import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms import TenCrop

from fgvc.data import VIEWS, TransformSpec, ViewTransform, resized_spec
from fgvc.errors import ConfigError


def recipe(training: bool = False, **changes: Any) -> TransformSpec:
    base = {"size": 16, "resize_size": 20, "mean": (0.5, 0.4, 0.3), "std": (0.5, 0.25, 0.2)}
    return TransformSpec(**{**base, "interpolation": "bilinear", "training": training, **changes})


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("views", VIEWS)
def test_shape_and_pickle(views: str) -> None:
    transform = ViewTransform(recipe(), views)
    result = pickle.loads(pickle.dumps(transform))(noise(30, 24))
    assert result.shape == (VIEWS[views], 3, 16, 16) and result.dtype == torch.float32
    assert torch.equal(result, transform(noise(30, 24)))


def test_single_is_the_recipe_in_testing() -> None:
    spec, image = recipe(training=True, crop="random"), noise(30, 24)
    (view,) = ViewTransform(spec, "single")(image)
    assert torch.equal(view, spec.deterministic()(image))


def test_mirror_adds_the_centre_crop_of_the_mirrored_image() -> None:
    spec, image = recipe(resize_size=19), noise(19, 19)  # an odd margin: not the mirrored centre crop
    plain, mirrored = ViewTransform(spec, "mirror")(image)
    assert torch.equal(plain, spec(image))
    assert torch.equal(mirrored, spec(ImageOps.mirror(image)))
    assert not torch.equal(mirrored, plain.flip(-1))


def test_mirror_of_a_symmetric_image_is_the_same_view_twice() -> None:
    half = np.random.default_rng(0).integers(0, 256, (20, 10, 3), dtype=np.uint8)
    image = Image.fromarray(np.concatenate([half, half[:, ::-1]], axis=1))
    plain, mirrored = ViewTransform(recipe(), "mirror")(image)
    assert torch.equal(plain, mirrored)


def test_ten_crop_is_that_of_torchvision_of_the_resized_image() -> None:
    spec, image = recipe(), noise(40, 20)
    views = ViewTransform(spec, "ten_crop")(image)
    exact = replace(spec, resize_size=16)  # of a crop of the right size: only to a normalised tensor
    assert torch.equal(views, torch.stack([exact(crop) for crop in TenCrop(16)(image)]))
    assert torch.equal(views[4], spec(image))
    assert not any(torch.equal(views[i], views[j]) for i in range(10) for j in range(i))


def test_crops_of_a_constant_image_are_equal() -> None:
    views = ViewTransform(recipe(), "ten_crop")(Image.new("RGB", (50, 30), (10, 200, 90)))
    assert torch.equal(views, views[:1].expand_as(views))


def test_ten_crop_needs_room() -> None:
    with pytest.raises(ConfigError, match=r"dataset\.transform\.resize_size.*size=16, found 16.*--resize-size"):
        ViewTransform(recipe(resize="square", resize_size=16), "ten_crop")
    # the longer side has room even then
    transform = ViewTransform(recipe(resize="short", resize_size=None), "ten_crop")
    assert not transform.has_room
    assert len({view.sum().item() for view in transform(noise(32, 16))[:5]}) == 3
    assert ViewTransform(recipe(), "ten_crop").has_room


def test_another_resize_keeps_the_rest_of_the_recipe() -> None:
    spec = recipe(training=True, resize="square", resize_size=16, crop="none")
    assert resized_spec(spec, None) == resized_spec(spec, 16) == spec.deterministic()
    assert resized_spec(spec, 24) == recipe(resize="square", resize_size=24, hflip=False)
    with pytest.raises(ConfigError, match=r"size=16 .* resize_size=8"):
        resized_spec(spec, 8)


def test_unknown_views_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'five_crop'.*single, mirror, ten_crop"):
        ViewTransform(recipe(), "five_crop")
