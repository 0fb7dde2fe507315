"""DropCov: the covariance in evaluation; in training weighted channels, dropped at the rate of the formula."""

import math

import torch
from torch import Tensor

from fgvc.pooling import DropCovPooling
from fgvc.spectral import covariance, symmetric_from_triangle, upper_triangle


def features(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def channel_weights(x: Tensor, taps: list[float]) -> Tensor:
    """Number by number: the neighbours' means times the taps, and a softmax."""
    padded = [[0.0, *means, 0.0] for means in x.flatten(2).mean(dim=2).tolist()]
    sums = [[sum(t * row[c + i] for i, t in enumerate(taps)) for c in range(len(row) - 2)] for row in padded]
    powers = torch.tensor(sums, dtype=torch.float64).exp()
    return powers / powers.sum(dim=1, keepdim=True)


def pooling(channels: int, taps: list[float]) -> DropCovPooling:
    pool = DropCovPooling(channels)
    with torch.no_grad():
        pool.attention.weight.copy_(torch.tensor(taps).view(1, 1, 3))
    return pool


def test_evaluation_is_the_covariance_alone() -> None:
    x = features(3, 5, 4, 4)
    torch.testing.assert_close(DropCovPooling(5).eval()(x), upper_triangle(covariance(x)))


def test_training_weights_the_channels_and_learns_the_weights() -> None:
    # channels that vary together: the cosine is large, and with few channels nothing is dropped
    x, taps = (
        features(2, 1, 4, 4) * torch.tensor([1.0, 2.0, 1.5, 1.0])[:, None, None] + 0.1 * features(2, 4, 4, 4),
        [0.5, -1.0, 2.0],
    )
    pool, weights = pooling(4, taps), channel_weights(x, taps)
    expected = upper_triangle(covariance(x * (1 + weights[..., None, None])))
    descriptor = pool(x)
    torch.testing.assert_close(descriptor, expected)
    descriptor.square().sum().backward()
    assert pool.attention.weight.grad is not None and pool.attention.weight.grad.abs().min() > 0


def test_channels_are_dropped_at_the_rate_of_the_formula() -> None:
    x, channels = features(4, 64, 5, 5), 64
    x = x - 0.7 * x.mean(dim=1, keepdim=True)  # channels that vary against each other: a small cosine
    weighted = x * (1 + 1 / channels)  # without taps all weights are equal
    cov = covariance(weighted)
    rows = cov.sum(dim=2)
    cosine = float((rows.sum(dim=1) / (math.sqrt(channels) * rows.norm(dim=1))).mean())
    rate = 1 - 10 / math.log2(channels) * cosine
    assert 0.2 < rate < 0.8
    torch.manual_seed(0)
    pool, drops = pooling(channels, [0.0, 0.0, 0.0]), []
    for _ in range(50):
        found = symmetric_from_triangle(pool(x), channels)
        kept = found.diagonal(dim1=1, dim2=2) > 0
        both = kept[:, :, None] & kept[:, None, :]
        torch.testing.assert_close(found, torch.where(both, cov / (1 - rate) ** 2, 0.0))
        drops.append(~kept)
    share = torch.stack(drops).double().mean(dim=(0, 2))  # of each image
    assert (share - rate).abs().max() < 5 * math.sqrt(rate * (1 - rate) / (50 * channels))


def test_where_nothing_varies_all_is_dropped_and_the_gradient_is_zero() -> None:
    x = torch.ones(2, 6, 3, 3, requires_grad=True)
    descriptor = DropCovPooling(6)(x)
    descriptor.sum().backward()
    assert x.grad is not None and descriptor.abs().max() == 0 and x.grad.abs().max() == 0
