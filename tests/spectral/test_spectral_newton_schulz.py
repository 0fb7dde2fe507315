"""The Newton-Schulz square root against the published iteration under autograd, and at its edges."""

import pytest
import torch
from spectral_contract import random, relative, rotated
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


@pytest.mark.parametrize("size", [2, 3])  # thin and full
def test_constant_image_among_others(size: int) -> None:
    x = random(2, 6, size, size)
    x[0] = 7.0
    x.requires_grad_()
    result = newton_schulz_descriptor(x)
    weights = random(2, 21, seed=1)
    (gradient,) = torch.autograd.grad((result * weights).sum(), x)
    assert result[0].abs().max() == 0 and gradient[0].abs().max() == 0
    (alone,) = torch.autograd.grad((newton_schulz_descriptor(x[1:]) * weights[1:]).sum(), x)
    torch.testing.assert_close(gradient[1], alone[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [2, 3])
def test_narrow_input_is_computed_in_float64(dtype: torch.dtype, size: int) -> None:
    x = random(2, 6, size, size).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = newton_schulz_descriptor(x)
    same = x.detach().double().requires_grad_()
    wide = newton_schulz_descriptor(same)
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow, wide.float(), rtol=0, atol=0)
    of_narrow, of_wide = torch.autograd.grad(narrow.sum(), x)[0], torch.autograd.grad(wide.sum(), same)[0]
    torch.testing.assert_close(of_narrow, of_wide.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("size", [2, 3])
def test_layouts_empty_batch_and_one_graph_used_twice(size: int) -> None:
    x = random(3, 6, size, size)
    for other in (x.contiguous(memory_format=torch.channels_last), torch.stack([x, x], dim=-1)[..., 0]):
        torch.testing.assert_close(newton_schulz_descriptor(other), newton_schulz_descriptor(x))
    empty = x[:0].requires_grad_()
    assert torch.autograd.grad(newton_schulz_descriptor(empty).sum(), empty)[0].shape == (0, 6, size, size)
    leaf = x.clone().requires_grad_()
    loss = newton_schulz_descriptor(leaf).pow(2).sum()
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    (second,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_large_batch_in_parts_is_each_image_alone() -> None:
    x = random(7, 300, 1, 310).requires_grad_()  # parts of two images
    weights = random(7, 300 * 301 // 2, seed=1)
    result = newton_schulz_descriptor(x, iterations=3)
    (gradient,) = torch.autograd.grad((result * weights).sum(), x)
    for item in (0, 6):
        alone = newton_schulz_descriptor(x[item : item + 1], iterations=3)
        assert relative(result[item].detach(), alone[0].detach()) < 1e-14
        (of_alone,) = torch.autograd.grad((alone * weights[item]).sum(), x)
        assert relative(gradient[item], of_alone[item]) < 1e-13


def test_refusals() -> None:
    for function, x in (
        (newton_schulz_sqrt, covariance(random(1, 4, 3, 3))),
        (newton_schulz_descriptor, random(1, 4, 3, 3)),
    ):
        leaf = x.requires_grad_()
        (gradient,) = torch.autograd.grad(function(leaf).pow(2).sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()
        with pytest.raises(ValueError, match="at least 1, got 0"):
            function(x, 0)
    with pytest.raises(ValueError, match=r"\(B, d, d\)"):
        newton_schulz_sqrt(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match=r"\(B, C, H, W\)"):
        newton_schulz_descriptor(torch.zeros(3, 4))
    with pytest.raises(TypeError, match="floating-point"):
        newton_schulz_descriptor(torch.zeros(2, 3, 4, dtype=torch.int64))
