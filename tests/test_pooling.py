"""Poolings by name: widths, precision, labels, refusals, and agreement with the published layers."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from fgvc.errors import ConfigError
from fgvc.pooling import create_pooling, list_poolings, pooling_label, pooling_spectrum
from fgvc.spectral import covariance

PUBLISHED = {"SEB": "seb", "SVD_Original": "mpn_cov", "MPNCOV": "isqrt_cov"}
TOLERANCE = {"full_rank": 1e-6, "rank_deficient": 5e-4}  # the released centring matrix is float32


def features(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", list_poolings())
@pytest.mark.parametrize("channels", [1, 6])
def test_descriptor_has_the_stated_width(name: str, channels: int) -> None:
    pool = create_pooling(name, channels=channels)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        descriptor = pool(features(3, channels, 4, 5).to(dtype))
        assert descriptor.shape == (3, pool.out_features)
        assert descriptor.dtype == torch.float32 and descriptor.isfinite().all()


@pytest.mark.parametrize("name", list_poolings())
def test_gradient_of_the_whole_layer(name: str) -> None:
    x = features(2, 4, 3, 3, dtype=torch.float64).requires_grad_()
    assert gradcheck(create_pooling(name, channels=4), x)


@pytest.mark.parametrize("name", list_poolings())
def test_channels_last_memory_and_one_location(name: str) -> None:
    pool, x = create_pooling(name, channels=4), features(2, 4, 3, 3)
    torch.testing.assert_close(pool(x.contiguous(memory_format=torch.channels_last)), pool(x))
    assert pool(x[..., :1, :1]).isfinite().all()


@pytest.mark.parametrize("case", TOLERANCE)
@pytest.mark.parametrize("layer", PUBLISHED)
def test_agrees_with_the_published_layer(golden_file: object, case: str, layer: str) -> None:
    golden = np.load(str(golden_file))
    x = torch.from_numpy(golden[f"{case}/x"]).requires_grad_()
    out = create_pooling(PUBLISHED[layer], channels=x.shape[1])(x)
    (grad,) = torch.autograd.grad((out * torch.from_numpy(golden[f"{case}/grad_out"])).sum(), x)
    for ours, key in ((out.detach(), "out"), (grad, "grad_x")):
        theirs = torch.from_numpy(golden[f"{case}/{layer}/{key}"])
        assert (ours - theirs).norm() / theirs.norm() < TOLERANCE[case], key


def test_labels_name_a_changed_gradient() -> None:
    assert [pooling_label(name) for name in ("gap", "isqrt_cov", "mpn_cov", "seb")] == [
        "GAP",
        "iSQRT-COV",
        "MPN-COV",
        "SEB",
    ]
    assert pooling_label("seb", "ordinary") == "SEB"
    assert pooling_label("seb", "exact") == "SEB (exact)"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sebb", {}, "gap, isqrt_cov, mpn_cov, seb"),
        ("seb", {"gradient": "magic"}, "exact, ordinary"),
        ("gap", {"gradient": "exact"}, "no choice of gradient"),
        ("isqrt_cov", {"iteration": 3}, "iterations"),
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
