"""Poolings by name: widths, precision, labels, refusals, and agreement with the published layers."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from fgvc.errors import ConfigError
from fgvc.pooling import CovariancePooling, Pooling, create_pooling, list_poolings, pooling_label, pooling_spectrum
from fgvc.spectral import covariance, upper_triangle

PUBLISHED = {
    "SEB": "seb",
    "SVD_Pade": "svd_pade",
    "SVD_Taylor": "svd_taylor",
    "SVD_Trunc": "svd_trunc",
    "SVD_TopN": "svd_topn",
    "SVD_Original": "mpn_cov",
    "SVD_Newton": "svd_newton",
    "SVD_PI": "svd_pi",
    "MPNCOV": "isqrt_cov",
}
OPTIONS = {"svd_topn": {"keep": 2}, "compact_bilinear": {"out_features": 64}}
"""For few channels."""
each_method = pytest.mark.parametrize("name", list_poolings())


def small(name: str, channels: int) -> Pooling:
    return create_pooling(name, channels=channels, **OPTIONS.get(name, {}))


def features(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


@each_method
@pytest.mark.parametrize("channels", [1, 6])
def test_descriptor_has_the_stated_width(name: str, channels: int) -> None:
    pool = small(name, channels)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        descriptor = pool(features(3, channels, 4, 5).to(dtype))
        assert descriptor.shape == (3, pool.out_features)
        assert descriptor.dtype == torch.float32 and descriptor.isfinite().all()


@each_method
@pytest.mark.parametrize("locations", [2, 3])  # fewer locations than channels, and more
def test_gradient_of_the_whole_layer(name: str, locations: int) -> None:
    x = features(2, 5, locations, locations, dtype=torch.float64).requires_grad_()
    # the published gradient of these two is not the derivative
    gradient = "exact" if name in ("svd_topn", "svd_pi") else None
    assert gradcheck(create_pooling(name, channels=5, gradient=gradient, **OPTIONS.get(name, {})), x)


@each_method
def test_channels_last_memory_and_one_location(name: str) -> None:
    pool, x = small(name, 4), features(2, 4, 3, 3)
    torch.testing.assert_close(pool(x.contiguous(memory_format=torch.channels_last)), pool(x))
    assert pool(x[..., :1, :1]).isfinite().all()


def relative(ours: Tensor, theirs: np.ndarray) -> float:
    reference = torch.from_numpy(theirs)
    return float((ours - reference).norm() / reference.norm())


@pytest.mark.parametrize("case", ["full_rank", "rank_deficient"])
@pytest.mark.parametrize("layer", PUBLISHED)
def test_agrees_with_the_published_layer(golden_file: object, case: str, layer: str) -> None:
    golden = np.load(str(golden_file))
    x = torch.from_numpy(golden[f"{case}/x"]).requires_grad_()
    out = create_pooling(PUBLISHED[layer], channels=x.shape[1])(x)
    (grad,) = torch.autograd.grad((out * torch.from_numpy(golden[f"{case}/grad_out"])).sum(), x)
    # the released code centres with a float32 matrix; it moves eigenvalues below 1e-7, and the directions between
    # which SVD-TopN cuts, by which its gradient is amplified
    tolerance = 5e-4 if case == "rank_deficient" else 5e-6 if layer == "SVD_TopN" else 1e-6
    assert relative(out.detach(), golden[f"{case}/{layer}/out"]) < tolerance
    if layer != "SVD_PI":  # deflates by all eigenvectors at once: its released gradient is numerically zero
        assert relative(grad, golden[f"{case}/{layer}/grad_x"]) < tolerance


@pytest.mark.parametrize("layer", [layer for layer in PUBLISHED if layer != "MPNCOV"])
def test_agrees_with_the_published_layer_under_its_own_centring(golden_file: object, layer: str) -> None:
    """With their float32 centring matrix in place of ours, every layer agrees to the rounding of their output."""
    case = "full_rank"
    golden = np.load(str(golden_file))
    x = torch.from_numpy(golden[f"{case}/x"]).requires_grad_()
    flat = x.flatten(2).double()
    locations = flat.shape[-1]
    centring = ((torch.eye(locations) - torch.ones(locations, locations) / locations) / locations).double()
    pool = create_pooling(PUBLISHED[layer], channels=x.shape[1])
    assert isinstance(pool, CovariancePooling)
    out = upper_triangle(pool.normalise(flat @ centring @ flat.mT))
    (grad,) = torch.autograd.grad((out * torch.from_numpy(golden[f"{case}/grad_out"])).sum(), x)
    assert relative(out.detach(), golden[f"{case}/{layer}/out"]) < 1e-6
    if layer != "SVD_PI":
        assert relative(grad, golden[f"{case}/{layer}/grad_x"]) < 1e-6


def test_labels_name_a_changed_gradient() -> None:
    assert [pooling_label(name) for name in ("gap", "isqrt_cov", "mpn_cov", "seb")] == [
        "GAP",
        "iSQRT-COV",
        "MPN-COV",
        "SEB",
    ]
    assert pooling_label("seb", "ordinary") == "SEB"
    assert pooling_label("seb", "exact") == "SEB (exact)"


def test_labels_name_options() -> None:
    assert pooling_label("mpn_cov", None, {"scale": 2.0, "alpha": 0.25}) == "MPN-COV [alpha=0.25, scale=2.0]"
    assert pooling_label("svd_topn", "exact", {"keep": [16, None]}) == "SVD-TopN (exact) [keep=16:]"


def test_the_smallest_eigenvalues_alone_and_a_constant_scale() -> None:
    x = features(2, 4, 6, 6)
    before, after = pooling_spectrum(create_pooling("svd_topn", channels=4, keep=[2, None]), x)
    assert after is not None
    torch.testing.assert_close(after[:, :2] ** 2, before[:, 2:])
    scaled, root = (create_pooling("mpn_cov", channels=4, **options) for options in ({"scale": 2.5}, {}))
    torch.testing.assert_close(scaled(x), 2.5 * root(x))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sebb", {}, "gap, bilinear, .*, seb"),
        ("seb", {"gradient": "magic"}, "exact, ordinary"),
        ("gap", {"gradient": "exact"}, "no choice of gradient"),
        ("isqrt_cov", {"iteration": 3}, "iterations"),
        ("isqrt_cov", {"iterations": 0}, "at least 1"),
        ("isqrt_cov", {"iterations": 2.5}, "whole number"),
        ("svd_topn", {"keep": 2.5}, "whole number"),
        ("svd_taylor", {"gradient": "exact", "degree": 5}, "takes none"),
        ("svd_taylor", {"degree": -1}, "at least 0"),
        ("svd_topn", {}, "give it keep=N"),
        ("svd_topn", {"keep": 0}, "at least 1"),
        ("svd_topn", {"keep": "many"}, "svd_topn"),
        ("svd_topn", {"keep": [3, 3]}, "stop of keep must be a whole number of at least 4, got 3"),
        ("svd_topn", {"keep": [-1, 3]}, "start of keep"),
        ("svd_topn", {"keep": [4, None]}, "drops all 4 eigenvalues"),
        ("svd_topn", {"keep": [1, 2, 3]}, "pair"),
        ("seb", {"gradient": "newton"}, "square root of all eigenvalues"),
        ("mpn_cov", {"gradient": "topn_published"}, "give keep=N"),
        ("mpn_cov", {"alpha": 0}, "other than 0"),
        ("log_cov", {"ridge": -1.0}, "at least 0"),
        ("seb", {"eigh_device": "gpu"}, "auto, "),
        ("seb", {"channels": 0}, "at least 1"),
    ],
)
def test_refusals_list_what_is_valid(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_pooling(name, **{"channels": 4, **options})


def test_spectrum_before_and_after_the_square_root() -> None:
    x = features(2, 5, 4, 4)
    before, after = pooling_spectrum(create_pooling("mpn_cov", channels=5), x)
    assert after is not None and (before.diff(dim=-1) <= 0).all()
    torch.testing.assert_close(before.sum(-1), covariance(x).diagonal(dim1=1, dim2=2).sum(-1))
    torch.testing.assert_close(after**2, before)
    assert pooling_spectrum(create_pooling("gap", channels=5), x)[1] is None
