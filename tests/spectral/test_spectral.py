"""Covariance, triangle and the named layers: values by definition, defined behaviour at the edges.

Gradients and all that every layer has in common are in `spectral_contract.py`.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from spectral_contract import random
from torch import Tensor

from fgvc.spectral import (
    GRADIENTS,
    SQRT,
    EigendecompositionError,
    covariance,
    covariance_eigenvalues,
    matrix_sqrt,
    newton_schulz_descriptor,
    spectral_descriptor,
    symmetric_from_triangle,
    upper_triangle,
)


def test_covariance_is_the_biased_sample_covariance() -> None:
    x = random(3, 4, 5, 6)
    for item, s in zip(x, covariance(x), strict=True):
        torch.testing.assert_close(s, torch.cov(item.flatten(1), correction=0))


def test_covariance_accepts_flat_features_and_any_precision() -> None:
    x = random(2, 4, 3, 5)
    torch.testing.assert_close(covariance(x), covariance(x.flatten(2)))
    assert covariance(x.half()).dtype == torch.float64
    assert covariance(x, dtype=torch.float32).dtype == torch.float32


def test_covariance_survives_a_mean_that_dwarfs_the_spread() -> None:
    x = random(1, 3, 4, 4)
    torch.testing.assert_close(covariance(x + 1e6), covariance(x), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("shape", [(4, 5), (1, 2, 3, 4, 5), (2, 3, 0, 4), (2, 0, 3, 3)])
def test_covariance_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="shape"):
        covariance(torch.zeros(shape))


@pytest.mark.parametrize("locations", [6, 9, 12])
def test_eigenvalues_are_those_of_the_covariance_on_both_paths(locations: int) -> None:
    x = random(3, 9, locations)
    found = covariance_eigenvalues(x)
    assert found.shape == (3, 9) and found.dtype == torch.float64
    torch.testing.assert_close(found, torch.linalg.eigvalsh(covariance(x)).flip(-1), rtol=1e-12, atol=1e-14)
    if locations < 9:  # null ones are 0, not rounding noise
        assert ((found > 0).sum(dim=1) == locations - 1).all() and (found[:, locations:] == 0).all()
    with pytest.raises(EigendecompositionError, match=r"items \[1\]"):
        covariance_eigenvalues(x.index_fill(0, torch.tensor([1]), torch.nan))


def test_other_shapes_and_precisions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"square matrices \(B, d, d\), got \(1, 4, 3\)"):
        upper_triangle(torch.zeros(1, 4, 3))
    with pytest.raises(ValueError, match="3 entries of a triangle for d=2"):
        symmetric_from_triangle(torch.zeros(1, 6), 2)
    with pytest.raises(ValueError, match=r"unknown dtype torch\.float16"):
        covariance(torch.ones(1, 2, 9), torch.float16)
    assert covariance(torch.ones(1, 2, 9), "float32").dtype == torch.float32


def test_upper_triangle_reads_row_by_row() -> None:
    matrix = torch.arange(9.0).reshape(1, 3, 3)
    assert upper_triangle(matrix).tolist() == [[0, 1, 2, 4, 5, 8]]
    symmetric = symmetric_from_triangle(upper_triangle(matrix), 3)
    assert symmetric.tolist() == [[[0, 1, 2], [1, 4, 5], [2, 5, 8]]]


ROOTS: dict[str, Callable[..., Tensor]] = {
    "newton_schulz": partial(newton_schulz_descriptor, iterations=3),
    **{name: partial(spectral_descriptor, f=SQRT, gradient=name) for name in GRADIENTS if name != "topn_published"},
}


@pytest.mark.parametrize("size", [2, 4])  # thin and full
@pytest.mark.parametrize("name", ROOTS)
def test_constant_image_among_others(name: str, size: int) -> None:
    x = random(2, 6, size, size)
    x[0] = 7.0
    x.requires_grad_()
    result, weights = ROOTS[name](x), random(2, 21, seed=1)
    (of_both,) = torch.autograd.grad((result * weights).sum(), x)
    assert result[0].abs().max() < 1e-7 and of_both[0].abs().max() == 0
    (alone,) = torch.autograd.grad((ROOTS[name](x[1:]) * weights[1:]).sum(), x)
    torch.testing.assert_close(of_both[1], alone[1])


def test_thin_layer_ignores_rounding_noise_in_null_directions() -> None:
    # eigenvalues of 1e4: their rounding noise, 1e-12, is far above the floor, and its square root would be 1e-6
    x = 100 * random(2, 8, 2, 2)
    result = symmetric_from_triangle(spectral_descriptor(x, SQRT), 8)
    assert torch.linalg.eigvalsh(result)[:, :5].abs().max() < 1e-12 * 100 + 2e-8
    torch.testing.assert_close(result @ result, covariance(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["exact", "newton_schulz"])
def test_large_batch_in_parts_is_each_image_alone(name: str) -> None:
    x = random(7, 300, 1, 310).requires_grad_()  # parts of two images
    weights = random(7, 300 * 301 // 2, seed=1)
    result = ROOTS[name](x)
    (gradient,) = torch.autograd.grad((result * weights).sum(), x)
    for item in (0, 6):
        alone = ROOTS[name](x[item : item + 1])
        torch.testing.assert_close(result[item], alone[0])
        torch.testing.assert_close(gradient[item], torch.autograd.grad((alone * weights[item]).sum(), x)[0][item])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_numbers_are_named(value: float) -> None:
    x = random(3, 6, 4, 4)
    s = covariance(x)
    s[1, 2, 0] = value
    with pytest.raises(EigendecompositionError, match=r"1 of 3 .* \[1\]"):
        matrix_sqrt(s)
    for size in (2, 4):
        features = x[..., :size, :size].clone()
        features[1, 0, 0, 0] = value
        with pytest.raises(EigendecompositionError, match=r"1 of 3 .* \[1\]"):
            spectral_descriptor(features, SQRT)


def test_wrong_shape_and_dtype_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(B, d, d\)"):
        matrix_sqrt(torch.zeros(2, 3, 4))
    with pytest.raises(TypeError, match="floating-point"):
        matrix_sqrt(torch.zeros(2, 3, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\(B, C, H, W\)"):
        spectral_descriptor(torch.zeros(3, 4), SQRT)
    with pytest.raises(TypeError, match="floating-point"):
        spectral_descriptor(torch.zeros(2, 3, 3, dtype=torch.int64), SQRT)
