"""Deletion and insertion, shares inside boxes, agreement of maps: by hand, and where the truth is planted."""

from pathlib import Path

import numpy as np
import pytest
import torch
from miniature import write_miniature
from PIL import Image
from scipy.stats import spearmanr
from torch import Tensor

from fgvc.data import TransformSpec, boxes_in_view, create_dataset
from fgvc.data.image_file import Region
from fgvc.errors import DatasetError
from fgvc.models import PoolingHead
from fgvc.studies.attribution import measure

MEAN = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "interpolation": "bilinear"}


def square(image: Tensor) -> Tensor:
    return image[..., 8:16, 4:12]


def head(features: Tensor) -> Tensor:
    """Sees one square only: the brighter it is, the more likely is class 1."""
    seen = 8 * square(features).mean(dim=(1, 2, 3))
    return torch.stack([torch.full_like(seen, 4), seen], dim=1)


def perfect(size: int = 24) -> Tensor:
    found = torch.zeros(size, size)
    square(found)[:] = 1
    return found


def curves(maps: Tensor, **options: int) -> measure.Curves:
    """Of white images under maps (K, H, W), black where deleted."""
    images = torch.ones(2, 3, 24, 24)
    several = maps[:, None].expand(-1, 2, -1, -1)
    ones = torch.ones(2, dtype=torch.int64)
    settings = {"steps": 9, "cell": 4, **options}
    return measure.deletion_insertion(lambda x: x, [head], images, ones, several, reference=images * 0, **settings)


def test_the_map_of_what_the_model_sees_beats_a_random_and_a_reversed_one() -> None:
    found = curves(torch.stack([perfect(), measure.random_maps(1, (24, 24))[0], -perfect()]))
    assert found.deletion.shape == found.insertion.shape == (1, 3, 2, 10)
    best, chance, worst = found.auc("deletion")[0, :, 0].tolist()
    assert best + 0.1 < chance < worst - 0.1
    best, chance, worst = found.auc("insertion")[0, :, 0].tolist()
    assert best - 0.1 > chance > worst + 0.1
    assert torch.equal(found.deletion[:, :, 0], found.deletion[:, :, 1])
    # deleting what counts last is inserting it first, read backwards
    assert torch.allclose(found.deletion[0, 0], found.insertion[0, 2].flip(-1))


def test_curves_by_hand() -> None:
    """Four cells, the square covers 2, 1, 1 and none of them; one goes in each step."""
    images = torch.ones(1, 3, 2, 2)

    def weighed(features: Tensor) -> Tensor:
        logit = (features[:, 0] * torch.tensor([[2.0, 1.0], [1.0, 0.0]])).sum(dim=(1, 2))
        return torch.stack([logit, torch.zeros_like(logit)], dim=1)

    maps = torch.tensor([[[[4.0, 2.0], [3.0, 1.0]]]])
    zero = torch.zeros(1, dtype=torch.int64)
    found = measure.deletion_insertion(
        lambda x: x, [weighed, lambda x: -weighed(x)], images, zero, maps, reference=images * 0, steps=9, cell=1
    )
    assert found.shares.tolist() == [0, 0.25, 0.5, 0.75, 1]  # no more steps than cells
    logits = torch.tensor([4.0, 2.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    assert torch.allclose(found.deletion[0, 0, 0], logits.sigmoid())
    assert torch.allclose(found.insertion[0, 0, 0], torch.tensor([0.0, 2, 3, 4, 4], dtype=torch.float64).sigmoid())
    assert torch.allclose(found.deletion[1, 0, 0], (-logits).sigmoid())
    p = logits.sigmoid()
    assert found.auc("deletion")[0, 0, 0] == pytest.approx((p[0] / 2 + p[1] + p[2] + p[3] + p[4] / 2) / 4)


def test_heads_together_and_images_in_any_batch_are_as_one_by_one() -> None:
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(3, 6, 5, stride=4).eval()
    heads = [PoolingHead(6, method=name, num_classes=3, reduction=4).eval() for name in ("mpn_cov", "gap")]
    images, maps = torch.rand(3, 3, 22, 30), torch.rand(2, 3, 22, 30)  # no multiple of a cell
    classes = torch.tensor([2, 0, 1])
    settings = {"steps": 4, "cell": 8}
    calls = []

    def backbone(x: Tensor) -> Tensor:
        calls.append(len(x))
        return convolution(x)

    both = measure.deletion_insertion(backbone, heads, images, classes, maps, batch_size=64, **settings)
    # the two ends of an image once, the three steps between them for each kind and map; never once a head
    assert sum(calls) == 3 * (2 + 2 * 2 * 3)
    for j, head in enumerate(heads):
        for b in range(3):
            alone = slice(b, b + 1)
            one = measure.deletion_insertion(
                convolution, [head], images[alone], classes[alone], maps[:, alone], batch_size=1, **settings
            )
            for kind in measure.KINDS:
                ours, theirs = getattr(both, kind)[j, :, alone], getattr(one, kind)[0]
                assert torch.allclose(ours, theirs, atol=1e-5), (kind, j, b)


def test_cells_at_the_edge_average_what_is_there() -> None:
    maps = torch.arange(15.0).reshape(1, 3, 5)
    assert measure.cell_means(maps, 2).tolist() == [[[3.0, 5.0, 6.5], [10.5, 12.5, 14.0]]]
    assert measure.cell_ranks(maps, 2).tolist() == [[[5, 4, 3], [2, 1, 0]]]
    assert measure.step_counts(6, 4).tolist() == [0, 2, 3, 4, 6] and measure.step_counts(3, 100).tolist() == [
        0,
        1,
        2,
        3,
    ]


def test_ties_go_in_one_random_order_that_no_map_profits_from() -> None:
    flat = torch.zeros(2, 12, 12)
    first, second = measure.cell_ranks(flat, 2)
    assert torch.equal(first, second) and sorted(first.flatten().tolist()) == list(range(36))
    assert not torch.equal(first.flatten(), torch.arange(36))
    assert not torch.equal(first, measure.cell_ranks(flat, 2, seed=1)[0])
    flat[0, :2, :2] = 1
    assert measure.cell_ranks(flat, 2)[0, 0, 0] == 0


def test_share_inside_counts_parts_of_pixels() -> None:
    maps = torch.tensor([[[1.0, 2.0], [3.0, -9.0]], [[0.0, 0.0], [0.0, -1.0]]])
    boxes = torch.tensor([[0.5, 0.0, 2.0, 1.5], [0.0, 0.0, 2.0, 2.0]])
    inside, nothing = measure.share_inside(maps, boxes)
    assert inside == pytest.approx((0.5 * 1 + 2 + 0.25 * 3) / 6) and nothing.isnan()
    even = measure.share_inside(torch.ones(1, 10, 20), torch.tensor([[5.0, 0.0, 15.0, 10.0]]))
    assert even.item() == pytest.approx(0.5)


def test_half_mass_area_and_maps_that_know_nothing() -> None:
    maps = torch.zeros(4, 4, 5)
    maps[0, 0, 0], maps[1] = 1, 1
    maps[2, 0] = torch.tensor([4.0, 1, 1, 1, 1])
    found = measure.half_mass_area(maps)
    assert found[:3].tolist() == pytest.approx([1 / 20, 1 / 2, 1 / 20]) and found[3].isnan()
    centre = measure.centre_maps(2, (10, 20))
    assert centre.shape == (2, 10, 20) and centre[1].argmax() % 20 in (9, 10)
    assert torch.allclose(centre, centre.flip(1)) and torch.allclose(centre, centre.flip(2))
    first, again = measure.random_maps(3, (8, 8), seed=1), measure.random_maps(3, (8, 8), seed=1)
    assert torch.equal(first, again) and not torch.equal(first[0], first[1])


def test_rank_correlation_is_spearmans() -> None:
    a, b = torch.rand(3, 4, 5).mul(4).round(), torch.rand(3, 4, 5)  # with ties
    b[2] = a[2].exp()
    found = measure.rank_correlation(a, b)
    for i in range(3):
        assert found[i] == pytest.approx(spearmanr(a[i].flatten(), b[i].flatten()).statistic)
    assert found[2] == pytest.approx(1)
    assert measure.rank_correlation(torch.zeros(1, 3, 3), b[:1, :3, :3]).isnan().all()


@pytest.mark.parametrize("crop", [None, "bbox"])
@pytest.mark.parametrize("recipe", [{"resize_size": 70}, {"resize": "square", "crop": "none"}, {}])
def test_boxes_are_cropped_and_resized_with_images(tmp_path: Path, crop: str | None, recipe: dict[str, object]) -> None:
    """Every image is dark noise with a bright box: where the box is after the transform, it is bright."""
    root = write_miniature("cub", tmp_path / "cub", size=(120, 90))
    spec = TransformSpec(size=60, training=False, **MEAN, **recipe)
    data = create_dataset("cub", root=root, split="test", transform=spec, crop=crop, boxes=True)
    boxes = boxes_in_view(data, range(len(data)))
    assert (boxes >= 0).all() and (boxes <= 60).all()
    maps = torch.stack([data[i][0] for i in range(len(data))]).amax(dim=1) + 1
    maps = torch.where(maps > 0.9, 1.0, 0.0)  # of the box's colour
    assert (maps.mean(dim=(1, 2)) > 0.02).all()
    assert (measure.share_inside(maps, boxes) > 0.93).all()
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    assert torch.allclose(maps.sum(dim=(1, 2)).double(), area, rtol=0.12, atol=30)
    if crop == "bbox" and recipe.get("resize") == "square":
        assert torch.allclose(boxes, torch.tensor([0.0, 0, 60, 60], dtype=torch.float64), atol=2)


def test_a_box_by_hand(tmp_path: Path) -> None:
    spec = TransformSpec(size=40, training=False, resize_size=50, **MEAN)
    # 200 x 100 becomes 100 x 50, and its middle 40 x 40 stay: 30 and 5 go on the left and at the top
    assert spec.box((100, 20, 140, 60), (200, 100)) == (20, 5, 40, 25)
    assert spec.box((-50, -10, 100, 900), (200, 100)) == (0, 0, 20, 40)
    left, top, right, bottom = spec.box((0, 0, 30, 40), (200, 100))
    assert left == right and bottom > top  # cut off: no area
    root = write_miniature("cub", tmp_path / "cub")
    without = create_dataset("cub", root=root, split="test", transform=spec)
    with pytest.raises(DatasetError, match=r"no bounding boxes.*boxes=true"):
        boxes_in_view(without, [0])
    assert Region((2.7, -3.0, 9.0, 9.0)).corner == (2, 0) and Region().corner == (0, 0)
    assert Region((2.7, 1.2, 9.0, 9.0)).cut(Image.fromarray(np.zeros((20, 20, 3), np.uint8))).size == (7, 8)
