"""Whitening over a batch, and whitening and colouring of one image by another."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck

from fgvc.pooling import ZCAWhitening2d, whiten_and_color
from fgvc.spectral import EigendecompositionError, covariance


def features(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    mixed = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (mixed.cumsum(dim=-3) + 1).to(dtype)  # neighbouring channels vary together


def by_eigh(cov: Tensor, eps: float, power: float) -> Tensor:
    values, vectors = torch.linalg.eigh(cov)
    return vectors @ torch.diag_embed((values + eps) ** power) @ vectors.mT


def grouped(x: Tensor, groups: int) -> Tensor:
    """(B, C, H, W) -> (groups, C / groups, B H W), one value after the other."""
    parts = [torch.cat([image.flatten(1) for image in part.unbind()], dim=1) for part in x.chunk(groups, dim=1)]
    return torch.stack(parts)


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_groups_are_whitened_but_for_the_ridge(groups: int) -> None:
    x = features(4, 6, 3, 2)
    values = grouped(x, groups)
    centred = values - values.mean(dim=2, keepdim=True)
    expected = by_eigh(centred @ centred.mT / values.shape[2], 0.05, -0.5) @ centred
    torch.testing.assert_close(grouped(ZCAWhitening2d(6, groups, eps=0.05)(x), groups), expected)
    found = covariance(grouped(ZCAWhitening2d(6, groups, eps=1e-9)(x), groups))
    torch.testing.assert_close(found, torch.eye(6 // groups).double().expand_as(found), rtol=0, atol=1e-6)


def test_a_channel_a_group_is_batch_normalisation() -> None:
    ours, norm = ZCAWhitening2d(5, groups=5, eps=1e-2), nn.BatchNorm2d(5, eps=1e-2, affine=False)
    for seed in range(3):
        x = features(4, 5, 3, 3, seed=seed, dtype=torch.float32)
        torch.testing.assert_close(ours(x), norm(x))
    torch.testing.assert_close(ours.running_mean.flatten(), norm.running_mean)
    # torch divides the running variance by M - 1
    torch.testing.assert_close((ours.running_cov.flatten() - 0.9**3) * 36 / 35, norm.running_var - 0.9**3)


def test_evaluation_uses_running_statistics_which_are_saved() -> None:
    layer, x = ZCAWhitening2d(6, groups=2, momentum=1.0), features(4, 6, 3, 3, dtype=torch.float32)
    white = layer(x)
    state = copy.deepcopy(layer.state_dict())
    assert set(state) == {"running_mean", "running_cov"} and not list(layer.parameters())
    other = ZCAWhitening2d(6, groups=2).eval()
    fresh = other(x)
    torch.testing.assert_close(fresh, x / 1.01**0.5)
    other.load_state_dict(state)
    for batch in (x, x[:1], x[:1, :, :1, :1]):  # any size, and nothing is remembered
        torch.testing.assert_close(other(batch), white[: len(batch), :, : batch.shape[2], : batch.shape[3]])
    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("training", [True, False])
def test_gradient_of_whitening(training: bool) -> None:
    layer = ZCAWhitening2d(4, groups=2).double().train(training)
    assert gradcheck(layer, features(2, 4, 2, 2).requires_grad_())
    same = torch.ones(2, 4, 2, 2, dtype=torch.float64, requires_grad=True)  # equal eigenvalues
    assert gradcheck(layer, same)


def test_half_precision_stays_and_loses_nothing() -> None:
    x = features(4, 4, 3, 3, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        white = ZCAWhitening2d(4)(x)
    assert white.dtype == torch.bfloat16 and torch.equal(white, ZCAWhitening2d(4)(x.float()).bfloat16())


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        ({"channels": 6, "groups": 4}, None, "groups must divide channels=6, got groups=4"),
        ({"channels": 6, "groups": 0}, None, "groups must divide"),
        ({"channels": 6, "eps": 0.0}, None, "eps must be above 0"),
        ({"channels": 6, "momentum": 5.0}, None, "momentum from 0 to 1"),
        ({"channels": 6}, (1, 6, 1, 1), r"more than 1 value per channel when training, got \(1, 6, 1, 1\)"),
        ({"channels": 6}, (2, 5, 3, 3), r"shape \(B, 6, H, W\), got \(2, 5, 3, 3\)"),
        ({"channels": 6}, (2, 6, 9), r"shape \(B, 6, H, W\)"),
    ],
)
def test_whitening_refuses_by_name(layer: dict[str, float], shape: tuple[int, ...] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ZCAWhitening2d(**layer)(torch.zeros(shape or (2, 6, 3, 3)))  # type: ignore[arg-type]


def test_a_batch_with_nan_leaves_the_running_statistics() -> None:
    layer, x = ZCAWhitening2d(4), torch.randn(2, 4, 3, 3)
    layer(x)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    x[0, 0, 0, 0] = torch.nan
    with pytest.raises(EigendecompositionError):
        layer(x)
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())


def test_the_content_gets_mean_and_covariance_of_the_style() -> None:
    content, style = features(2, 4, 5, 6), 3 * features(2, 4, 7, 3, seed=1) - 2
    moved = whiten_and_color(content, style, alpha=1.0, eps=1e-9)
    assert moved.shape == content.shape
    torch.testing.assert_close(covariance(moved), covariance(style), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(moved.mean(dim=(2, 3)), style.mean(dim=(2, 3)))
    mean_c, mean_s = (x.mean(dim=(2, 3), keepdim=True) for x in (content, style))
    matrix = by_eigh(covariance(style), 1e-5, 0.5) @ by_eigh(covariance(content), 1e-5, -0.5)
    whole = (matrix @ (content - mean_c).flatten(2)).view_as(content) + mean_s
    torch.testing.assert_close(whiten_and_color(content, style), 0.6 * whole + 0.4 * content)


def test_style_of_its_own_changes_nothing_even_with_fewer_locations_than_channels() -> None:
    content = features(2, 9, 2, 2, dtype=torch.float32)
    torch.testing.assert_close(whiten_and_color(content, content, alpha=1.0), content, rtol=1e-4, atol=1e-4)


def test_one_image_and_one_style_for_many() -> None:
    content, style = features(3, 4, 3, 3), features(1, 4, 5, 5, seed=1)
    together = whiten_and_color(content, style)
    for image, expected in zip(content, together, strict=True):
        torch.testing.assert_close(whiten_and_color(image, style[0]), expected)


def test_gradient_of_content_and_style() -> None:
    content, style = (features(2, 3, 2, 3, seed=seed).requires_grad_() for seed in (0, 1))
    assert gradcheck(lambda c, s: whiten_and_color(c, s, eps=1e-2), (content, style))


@pytest.mark.parametrize(
    ("content", "style", "options", "message"),
    [
        ((2, 4, 3, 3), (2, 5, 3, 3), {}, "do not fit"),
        ((2, 4, 3, 3), (3, 4, 3, 3), {}, "do not fit"),
        ((2, 4, 3, 3), (2, 4, 3, 3), {"alpha": 1.5}, "alpha must be from 0 to 1"),
        ((2, 4, 3, 3), (2, 4, 3, 3), {"eps": 0.0}, "eps above 0"),
        ((4, 3, 3), (2, 4, 3, 3), {}, "expected features of shape"),
    ],
)
def test_colouring_refuses_by_name(
    content: tuple[int, ...], style: tuple[int, ...], options: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        whiten_and_color(torch.ones(content), torch.ones(style), **options)
