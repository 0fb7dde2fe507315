"""B-CNN and CBP: their definitions term by term, gradients, precision, seeds, and what the sketch approximates."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fgvc.errors import ConfigError
from fgvc.pooling import BilinearPooling, CompactBilinearPooling, Pooling

BUILD: dict[str, Callable[[int], Pooling]] = {
    "bilinear": BilinearPooling,
    "compact": lambda channels: CompactBilinearPooling(channels, out_features=24, seed=3),
    "compact, more bins than pairs": lambda channels: CompactBilinearPooling(channels, out_features=211, seed=3),
}
every_layer = pytest.mark.parametrize("build", BUILD.values(), ids=BUILD.keys())


def features(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def signed_root_and_norm(values: list[float]) -> Tensor:
    """The two last steps number by number, on a vector that is not zero."""
    roots = [math.copysign(math.sqrt(abs(y) + 1e-8), y) if y else 0.0 for y in values]
    return torch.tensor(roots, dtype=torch.float64) / math.sqrt(sum(root * root for root in roots))


def bilinear_by_loops(x: Tensor) -> Tensor:
    """(C, H, W) -> (C^2,): the mean over locations of the outer products."""
    columns = x.flatten(1).T.tolist()
    pairs = [(i, j) for i in range(len(x)) for j in range(len(x))]
    return signed_root_and_norm([sum(v[i] * v[j] for v in columns) / len(columns) for i, j in pairs])


def sketch_by_loops(x: Tensor, pool: CompactBilinearPooling) -> list[float]:
    """(C, H, W) -> D numbers: the sum over locations of the circular convolution of the two count sketches."""
    bins = pool.out_features
    total = [0.0] * bins
    for location in x.flatten(1).T.tolist():
        counts = [[0.0] * bins, [0.0] * bins]
        for count, hashes, signs in zip(counts, pool.hashes.tolist(), pool.signs.tolist(), strict=True):
            for value, place, sign in zip(location, hashes, signs, strict=True):
                count[place] += sign * value
        for k in range(bins):
            total[k] += sum(counts[0][n] * counts[1][(k - n) % bins] for n in range(bins) if counts[0][n])
    return total


# The second scale makes the products about as large as the 1e-8 under the root, which shows whether they are averaged
# or summed over the locations; at the first scale the norm hides that.
@pytest.mark.parametrize("scale", [1.0, 1e-4])
@pytest.mark.parametrize("channels", [1, 5])
def test_bilinear_is_the_mean_of_outer_products(scale: float, channels: int) -> None:
    x = scale * features(3, channels, 2, 3)
    expected = torch.stack([bilinear_by_loops(image) for image in x])
    torch.testing.assert_close(BilinearPooling(channels)(x), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 1e-4])
@pytest.mark.parametrize(("channels", "bins"), [(1, 8), (5, 1), (5, 7), (5, 8), (6, 64)])
def test_compact_is_the_sum_of_circular_convolutions(scale: float, channels: int, bins: int) -> None:
    pool, x = CompactBilinearPooling(channels, bins, seed=1), scale * features(3, channels, 2, 3)
    sketches = [sketch_by_loops(image, pool) for image in x]
    expected = torch.tensor(sketches, dtype=torch.float64)
    torch.testing.assert_close(pool.sketch(x), expected, rtol=1e-10, atol=1e-14 * scale**2)
    torch.testing.assert_close(pool(x), torch.stack([signed_root_and_norm(sketch) for sketch in sketches]))


@every_layer
def test_half_precision_input_and_autocast_lose_nothing(build: Callable[[int], Pooling]) -> None:
    pool = build(6)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        x = features(2, 6, 4, 5, dtype=dtype)
        expected = pool(x.float())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            under_autocast = pool(x)
        assert torch.equal(pool(x), expected) and torch.equal(under_autocast, expected)


@every_layer
def test_image_of_zeros_gives_zeros_and_a_zero_gradient(build: Callable[[int], Pooling]) -> None:
    pool = build(4)
    for dtype in (torch.float32, torch.float64):
        x = features(3, 4, 3, 3, dtype=dtype)
        x[1] = 0
        x.requires_grad_()
        out = pool(x)
        (out * features(*out.shape, dtype=dtype)).sum().backward()
        assert x.grad is not None and torch.equal(out[1], torch.zeros_like(out[1]))
        assert torch.equal(x.grad[1], torch.zeros_like(x.grad[1]))
        assert x.grad.isfinite().all() and x.grad[0].abs().max() > 0 and x.grad[2].abs().max() > 0
        torch.testing.assert_close(out[::2], pool(x[::2]))


@every_layer
def test_silent_channel_keeps_the_gradient_finite(build: Callable[[int], Pooling]) -> None:
    x = features(2, 4, 3, 3)
    x[:, 2] = 0  # its products are exactly zero, where the slope of the root without its 1e-8 is infinite
    x.requires_grad_()
    build(4)(x).square()[:, ::2].sum().backward()
    assert x.grad is not None and x.grad.isfinite().all() and x.grad.abs().max() > 0


@every_layer
def test_empty_batch(build: Callable[[int], Pooling]) -> None:
    pool = build(5)
    empty = features(0, 5, 3, 3).requires_grad_()
    out = pool(empty)
    out.sum().backward()
    assert out.shape == (0, pool.out_features) and empty.grad is not None and empty.grad.shape == empty.shape


def test_seed_alone_decides_the_sketch() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = CompactBilinearPooling(64, 100, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    same, other = CompactBilinearPooling(64, 100, seed=5), CompactBilinearPooling(64, 100, seed=6)
    assert torch.equal(one.hashes, same.hashes) and torch.equal(one.signs, same.signs)
    assert not torch.equal(one.hashes, other.hashes) and not torch.equal(one.signs, other.signs)


def test_hashes_fill_the_bins_and_signs_are_fair() -> None:
    pool = CompactBilinearPooling(4000, out_features=10)
    for hashes, signs in zip(pool.hashes, pool.signs, strict=True):
        counts = torch.bincount(hashes, minlength=10)
        assert len(counts) == 10
        assert (counts - 400).abs().max() < 5 * math.sqrt(4000 * 0.1 * 0.9)
        assert signs.unique().tolist() == [-1, 1] and abs(signs.sum(dtype=torch.int64)) < 5 * math.sqrt(4000)
    # the two sketches are drawn apart, otherwise the estimate below is biased
    assert (pool.hashes[0] == pool.hashes[1]).sum() < 600 and (pool.signs[0] == pool.signs[1]).sum() < 2400


def test_state_dict_carries_the_sketch_to_another_seed() -> None:
    x = features(2, 5, 3, 3)
    saved, loaded = CompactBilinearPooling(5, 32, seed=0), CompactBilinearPooling(5, 32, seed=1)
    assert not torch.allclose(saved(x), loaded(x))
    loaded.load_state_dict(saved.state_dict())
    assert torch.equal(saved(x), loaded(x))
    assert not list(saved.parameters()) and set(saved.state_dict()) == {"hashes", "signs"}
    for convert in (torch.nn.Module.half, torch.nn.Module.bfloat16, torch.nn.Module.double):
        assert torch.equal(convert(loaded)(x), saved(x))


@pytest.mark.parametrize("bins", [16, 64])
def test_inner_product_of_sketches_estimates_that_of_the_second_moments(bins: int) -> None:
    x, y = features(2, 4, 2, 3).abs()  # positive, so that a sketch without signs would be far too large
    moments = [(z.flatten(1) @ z.flatten(1).T) for z in (x, y)]
    exact = (moments[0] * moments[1]).sum()
    draws = 2000
    estimates = torch.stack(
        [
            (a * b).sum()
            for a, b in (CompactBilinearPooling(4, bins, seed).sketch(torch.stack([x, y])) for seed in range(draws))
        ]
    )
    # Avron, Nguyen, Woodruff, NIPS 2014: for degree 2 the variance is at most (2 + 3^2) / D times the squared norms
    variance = 11 / bins * moments[0].square().sum() * moments[1].square().sum()
    tolerance = 4 * math.sqrt(variance / draws)
    assert tolerance < 0.1 * exact
    assert abs(estimates.mean() - exact) < tolerance
    assert 0 < estimates.var() < variance


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: BilinearPooling(0), "channels .* at least 1, got 0"),
        (lambda: BilinearPooling(2.0), "channels .* got 2.0"),  # type: ignore[arg-type]
        (lambda: BilinearPooling(True), "channels .* got True"),
        (lambda: CompactBilinearPooling(4, out_features=0), "out_features .* at least 1, got 0"),
        (lambda: CompactBilinearPooling(4, seed=-1), "seed .* at least 0, got -1"),
        (lambda: CompactBilinearPooling(4, seed=2**64), "seed must be below"),
    ],
)
def test_settings_out_of_range_are_named(build: Callable[[], Pooling], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()
