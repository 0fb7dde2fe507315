"""Transforms: the published recipe, its variations, keys, refusals, and the views of a test image."""

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.utils import set_seed
from PIL import Image, ImageOps
from torchvision.transforms import TenCrop

from fgvc.data import VIEWS, ImageDataset, TransformSpec, ViewTransform, decode_rgb, resized_spec
from fgvc.data.dataset import Samples, Transform
from fgvc.data.image_file import Region
from fgvc.errors import ConfigError

BASE: dict[str, Any] = {"size": 16, "mean": (0.5, 0.4, 0.3), "std": (0.5, 0.25, 0.2), "interpolation": "bilinear"}


def gradient_image(width: int, height: int) -> Image.Image:
    """Red grows from left to right, green from top to bottom."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 0 * x], axis=-1).astype(np.uint8))


def dataset_of(file: Path, transform: Transform) -> ImageDataset:
    return ImageDataset(Samples(["auk"], [file], [0]), file.parent, transform)


def test_normalisation_is_per_channel() -> None:
    result = TransformSpec(**BASE, training=False)(Image.new("RGB", (20, 30), (255, 0, 51)))
    assert (result.shape, result.dtype) == ((3, 16, 16), torch.float32)
    assert result.mean((1, 2)).tolist() == pytest.approx([1.0, -1.6, -0.5], abs=1e-5)
    assert result.std((1, 2)).max() == pytest.approx(0, abs=1e-6)


def test_the_short_side_keeps_proportions_and_the_square_the_whole_image() -> None:
    """A 64 x 32 image scaled to 32 x 16 loses a quarter of its width on either side and nothing of its height."""
    result = TransformSpec(**BASE, training=False)(gradient_image(64, 32))
    red, green = (result[channel] * BASE["std"][channel] + BASE["mean"][channel] for channel in (0, 1))
    assert (red[:, 0].mean().item(), red[:, -1].mean().item()) == pytest.approx((0.25, 0.75), abs=0.03)
    assert (green[0].mean().item(), green[-1].mean().item()) == pytest.approx((0, 1), abs=0.06)
    square = TransformSpec(**BASE, training=False, resize="square", crop="none")(gradient_image(64, 32))
    red = square[0] * BASE["std"][0] + BASE["mean"][0]
    assert (red[:, 0].mean().item(), red[:, -1].mean().item()) == pytest.approx((0, 1), abs=0.06)


def test_training_only_mirrors_and_testing_is_fixed() -> None:
    image = gradient_image(32, 32)
    test = TransformSpec(**BASE, training=False)
    train = TransformSpec(**BASE, training=True)
    torch.manual_seed(0)
    views = torch.stack([train(image) for _ in range(40)])
    mirrored = [torch.equal(view, test(image).flip(-1)) for view in views]
    plain = [torch.equal(view, test(image)) for view in views]
    assert all(a != b for a, b in zip(mirrored, plain, strict=True))
    assert 8 <= sum(mirrored) <= 32
    still = TransformSpec(**BASE, training=True, hflip=False)
    assert all(torch.equal(still(image), test(image)) for _ in range(10))


def test_random_crop_moves_in_training_only() -> None:
    image = gradient_image(64, 64)
    spec = TransformSpec(**BASE, training=True, resize_size=32, crop="random", hflip=False)
    torch.manual_seed(0)
    assert len({spec(image).sum().item() for _ in range(8)}) > 4
    center = TransformSpec(**BASE, training=False, resize_size=32)
    assert torch.equal(spec.deterministic()(image), center(image))
    assert torch.equal(replace(spec, training=False)(image), center(image))


def test_random_resized_crop_takes_a_part_in_training_and_the_centre_in_testing() -> None:
    image = gradient_image(64, 48)
    recipe: dict[str, Any] = {**BASE, "resize_size": 20, "crop": "random_resized", "hflip": False}
    train = TransformSpec(**recipe, min_scale=0.2, training=True)
    torch.manual_seed(0)
    views = torch.stack([train(image) for _ in range(60)])
    red = views[:, 0] * BASE["std"][0] + BASE["mean"][0]
    widths = red[:, :, -1].mean(1) - red[:, :, 0].mean(1)  # the share of the image's width that a view spans
    assert widths.min() < 0.5 < 0.8 < widths.max()
    whole = TransformSpec(**recipe, min_scale=1.0, training=True)
    assert min((whole(image)[1][-1] - whole(image)[1][0]).mean().item() for _ in range(5)) > 3.5
    center = TransformSpec(**BASE, resize_size=20, training=False)
    assert torch.equal(train.deterministic()(image), center(image))
    assert train.deterministic() == TransformSpec(**{**recipe, "crop": "center"}, training=False)
    assert not train.repeats and center.repeats


def test_randaugment_changes_images_in_training_only_and_by_the_seed() -> None:
    image = gradient_image(32, 32)
    train = TransformSpec(**BASE, training=True, hflip=False, randaugment="rand-m9-mstd0.5-inc1")

    def views(spec: TransformSpec) -> torch.Tensor:
        set_seed(3)
        return torch.stack([spec(image) for _ in range(20)])

    plain = TransformSpec(**BASE, training=False)(image)
    assert sum(torch.equal(view, plain) for view in views(train)) < 15
    assert torch.equal(views(train), views(pickle.loads(pickle.dumps(train))))
    assert torch.equal(train.deterministic()(image), plain)
    assert not train.repeats


@pytest.mark.parametrize("notation", ["rand-m10-inc1", "rand-m0", "rand-m10"])
def test_randaugment_at_its_ends_neither_fails_nor_blackens(notation: str) -> None:
    train = TransformSpec(**BASE, training=True, hflip=False, randaugment=f"{notation}-p1.0-n1")
    set_seed(0)
    assert all(train(gradient_image(32, 32)).std() > 0 for _ in range(150))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_pixels_are_those_of_pillow_but_for_the_last_bit_of_a_few(interpolation: str) -> None:
    image = Image.effect_noise((300, 200), 60).convert("RGB")
    spec = TransformSpec(**{**BASE, "interpolation": interpolation}, resize="square", crop="none", training=False)
    kind = getattr(Image.Resampling, interpolation.upper())
    expected = torch.from_numpy(np.array(image.resize((16, 16), kind), dtype=np.float32)).permute(2, 0, 1)
    found = 255 * spec.picture(spec(image)).permute(2, 0, 1)
    assert (found - expected).abs().max() < 1.01 and (found - expected).abs().mean() < 0.1


def test_a_jpeg_of_four_times_the_size_that_is_wanted_is_decoded_smaller(tmp_path: Path) -> None:
    rng, file = np.random.default_rng(0), tmp_path / "large.jpg"
    coarse = Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8))
    coarse.resize((1200, 800), Image.Resampling.BICUBIC).save(file, quality=95)
    sizes = [decode_rgb(file, side=side).height for side in (0, 201, 200, 100, 50, 10)]
    assert sizes == [800, 800, 400, 200, 100, 100]
    assert decode_rgb(file, Region(banner=10), side=50).size == (1200, 790)
    spec = TransformSpec(**{**BASE, "size": 100}, training=False)
    (small, _), (whole, _) = dataset_of(file, spec)[0], dataset_of(file, spec.__call__)[0]
    assert 0 < (spec.picture(small) - spec.picture(whole)).abs().mean() < 2 / 255
    assert replace(spec, training=True, crop="random_resized").shorter_side == 0  # may enlarge a small part


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"interpolation": "cubic"}, "'cubic'.*bicubic"),
        ({"resize": "long"}, "'long'.*short, square"),
        ({"crop": "centre"}, "'centre'.*center, random, random_resized, none"),
        ({"resize_size": 8}, "size=16 .* resize_size=8"),
        ({"min_scale": 0.0}, "min_scale=0.0 must be above 0"),
        ({"training": True, "randaugment": "auto"}, "'auto'.*rand-m9-mstd0.5-inc1"),
        ({"crop": "none"}, "needs resize='square'"),
        ({"std": (0.5, 0.5, 0.0)}, "std above 0"),
        ({"mean": (0.5,)}, "three numbers"),
    ],
)
def test_contradictions_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TransformSpec(**{**BASE, "training": False, **change})


def recipe(training: bool = False, **changes: Any) -> TransformSpec:
    return TransformSpec(**{**BASE, "resize_size": 20, "training": training, **changes})


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("views", VIEWS)
def test_shape_and_pickle(views: str) -> None:
    transform = ViewTransform(recipe(), views)
    result = pickle.loads(pickle.dumps(transform))(noise(30, 24))
    assert result.shape == (VIEWS[views], 3, 16, 16) and result.dtype == torch.float32
    assert torch.equal(result, transform(noise(30, 24)))
    if views == "single":  # the recipe as it is in testing
        assert torch.equal(ViewTransform(recipe(training=True, crop="random"), views)(noise(30, 24)), result)


def test_mirror_adds_the_centre_crop_of_the_mirrored_image() -> None:
    spec, image = recipe(resize_size=19), noise(19, 19)  # an odd margin: not the mirrored centre crop
    plain, mirrored = ViewTransform(spec, "mirror")(image)
    assert torch.equal(plain, spec(image))
    assert torch.equal(mirrored, spec(ImageOps.mirror(image)))
    assert not torch.equal(mirrored, plain.flip(-1))


def test_ten_crop_is_that_of_torchvision_of_the_resized_image() -> None:
    spec, image = recipe(), noise(40, 20)
    views = ViewTransform(spec, "ten_crop")(image)
    exact = replace(spec, resize_size=16)  # of a crop of the right size: only to a normalised tensor
    assert torch.equal(views, torch.stack([exact(crop) for crop in TenCrop(16)(image)]))
    assert torch.equal(views[4], spec(image))
    assert not any(torch.equal(views[i], views[j]) for i in range(10) for j in range(i))


def test_ten_crop_needs_room_and_views_a_name() -> None:
    with pytest.raises(ConfigError, match=r"dataset\.transform\.resize_size.*size=16, found 16.*--resize-size"):
        ViewTransform(recipe(resize="square", resize_size=16), "ten_crop")
    # the longer side has room even then
    transform = ViewTransform(recipe(resize="short", resize_size=None), "ten_crop")
    assert not transform.has_room
    assert len({view.sum().item() for view in transform(noise(32, 16))[:5]}) == 3
    assert ViewTransform(recipe(), "ten_crop").has_room
    with pytest.raises(ConfigError, match=r"'five_crop'.*single, mirror, ten_crop"):
        ViewTransform(recipe(), "five_crop")


def test_another_resize_keeps_the_rest_of_the_recipe() -> None:
    spec = recipe(training=True, resize="square", resize_size=16, crop="none")
    assert resized_spec(spec, None) == resized_spec(spec, 16) == spec.deterministic()
    assert resized_spec(spec, 24) == recipe(resize="square", resize_size=24, hflip=False)
    with pytest.raises(ConfigError, match=r"size=16 .* resize_size=8"):
        resized_spec(spec, 8)
