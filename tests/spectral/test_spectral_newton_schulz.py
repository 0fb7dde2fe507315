"""The Newton-Schulz square root against the published iteration under autograd, and at its edges."""

from collections.abc import Callable

import pytest
import torch
from spectral_contract import DescriptorContract, random, relative, rotated
from torch import Tensor
from torch.autograd import gradcheck

from fgvc.spectral import (
    covariance,
    matrix_sqrt,
    newton_schulz_descriptor,
    newton_schulz_sqrt,
    upper_triangle,
)


def published(s: Tensor, iterations: int) -> Tensor:
    """The coupled iteration of Li et al. (CVPR 2018), step by step, for autograd to differentiate."""
    trace = s.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    y, z = s / trace, torch.eye(s.shape[-1], dtype=s.dtype).expand_as(s)
    for _ in range(iterations):
        t = (3 * torch.eye(s.shape[-1], dtype=s.dtype) - z @ y) / 2
        y, z = y @ t, t @ z
    return trace.sqrt() * y


class TestNewtonSchulz(DescriptorContract):
    def layer(self, matrix: Tensor) -> Tensor:
        return newton_schulz_sqrt(matrix)

    def descriptor(self, x: Tensor) -> Tensor:
        return newton_schulz_descriptor(x)


@pytest.mark.parametrize("iterations", [1, 2, 3, 5, 10])
@pytest.mark.parametrize("shape", [(2, 4, 3, 3), (3, 6, 2, 2), (2, 5, 1, 5)])  # more, fewer, as many locations
def test_value_and_gradient_are_those_of_the_published_iteration(iterations: int, shape: tuple[int, ...]) -> None:
    x = random(*shape).requires_grad_()
    weights = random(shape[0], shape[1] * (shape[1] + 1) // 2, seed=1)
    expected = upper_triangle(published(covariance(x), iterations))
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), x)
    for ours in (
        newton_schulz_descriptor(x, iterations),
        upper_triangle(newton_schulz_sqrt(covariance(x), iterations)),
    ):
        assert relative(ours.detach(), expected.detach()) < 1e-13
        (gradient,) = torch.autograd.grad((ours * weights).sum(), x)
        assert relative(gradient, expected_gradient) < 1e-12


@pytest.mark.parametrize("eigenvalues", [[2.0, 2.0, 2.0, 0.5, 0.5], [0.0, 0.0, 1.0], [1e-12, 1e-6, 1.0], [3.0]])
def test_gradient_at_repeated_and_small_eigenvalues(eigenvalues: list[float]) -> None:
    assert gradcheck(newton_schulz_sqrt, rotated(eigenvalues).requires_grad_())


def test_many_iterations_converge_and_stay() -> None:
    s = rotated([1.0, 0.7, 0.5, 0.4, 1e-4])
    for iterations in (20, 60):
        torch.testing.assert_close(newton_schulz_sqrt(s, iterations), matrix_sqrt(s))


@pytest.mark.parametrize("function", [newton_schulz_sqrt, newton_schulz_descriptor])
def test_refusals(function: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        function(covariance(random(1, 4, 3, 3)), 0)
    with pytest.raises(ValueError, match=r"\(B, d, d\)|\(B, C, H, W\)"):
        function(torch.zeros(3, 4))
    with pytest.raises(TypeError, match="floating-point"):
        function(torch.zeros(2, 3, 3, dtype=torch.int64))
