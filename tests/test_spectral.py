"""The spectral layers: values by definition, gradients by finite differences, defined behaviour at the edges."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from fgvc.spectral import (
    GRADIENTS,
    EigendecompositionError,
    covariance,
    matrix_sqrt,
    newton_schulz_sqrt,
    scaling_eigen_branch,
    upper_triangle,
)

LAYERS = {
    "sqrt_exact": lambda s: matrix_sqrt(s, gradient="exact"),
    "sqrt_ordinary": lambda s: matrix_sqrt(s, gradient="ordinary"),
    "seb_exact": lambda s: scaling_eigen_branch(s, gradient="exact"),
    "seb_ordinary": lambda s: scaling_eigen_branch(s, gradient="ordinary"),
    "newton_schulz": newton_schulz_sqrt,
}
EXACT = ["sqrt_exact", "seb_exact", "newton_schulz"]
each_layer = pytest.mark.parametrize("name", LAYERS)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def with_spectrum(eigenvalues: list[float], seed: int = 0) -> Tensor:
    """One symmetric matrix (1, d, d) with these eigenvalues and random eigenvectors."""
    u = torch.linalg.qr(random(len(eigenvalues), len(eigenvalues), seed=seed)).Q
    return (u * torch.tensor(eigenvalues, dtype=torch.float64) @ u.T)[None]


def definition_of_seb(s: Tensor) -> Tensor:
    """(1 + ||Q E^T||_F) Q with Q and E formed as matrices."""
    eigenvalues, u = torch.linalg.eigh(s)
    q = u * eigenvalues.clamp(min=0).sqrt()[:, None, :] @ u.mT
    e = u * torch.exp(-eigenvalues)[:, None, :] @ u.mT
    return (1 + (q @ e.mT).flatten(1).norm(dim=1))[:, None, None] * q


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


@pytest.mark.parametrize("shape", [(4, 5), (1, 2, 3, 4, 5), (2, 3, 0, 4)])
def test_covariance_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="shape"):
        covariance(torch.zeros(shape))


def test_upper_triangle_reads_row_by_row() -> None:
    matrix = torch.arange(9.0).reshape(1, 3, 3)
    assert upper_triangle(matrix).tolist() == [[0, 1, 2, 4, 5, 8]]


def test_square_root_squares_to_the_covariance() -> None:
    s = covariance(random(3, 6, 5, 5))
    root = matrix_sqrt(s)
    torch.testing.assert_close(root @ root, s)
    torch.testing.assert_close(root, root.mT)


def test_seb_is_its_definition() -> None:
    s = covariance(random(3, 6, 5, 5))
    torch.testing.assert_close(scaling_eigen_branch(s), definition_of_seb(s))


def test_newton_schulz_converges_to_the_square_root() -> None:
    s = with_spectrum([1.0, 0.7, 0.5, 0.4])
    torch.testing.assert_close(newton_schulz_sqrt(s, iterations=15), matrix_sqrt(s))


@each_layer
def test_gradient_full_rank(name: str) -> None:
    # the random weights of gradcheck's loss touch eigenvectors, not only eigenvalues
    assert gradcheck(LAYERS[name], covariance(random(2, 4, 3, 3)).requires_grad_())


@pytest.mark.parametrize("name", EXACT)
def test_gradient_at_repeated_eigenvalues(name: str) -> None:
    assert gradcheck(LAYERS[name], with_spectrum([2.0, 2.0, 2.0, 0.5, 0.5]).requires_grad_())


def thin_root(x: Tensor) -> Tensor:
    """sqrt(S) from the singular values of the features: no eigenvalue of S is ever near zero here."""
    centred = x.flatten(2) - x.flatten(2).mean(dim=-1, keepdim=True)
    u, sigma, _ = torch.linalg.svd(centred / centred.shape[-1] ** 0.5, full_matrices=False)
    u, sigma = u[..., :-1], sigma[:, None, :-1]  # centring makes the last one zero
    return u * sigma @ u.mT


def thin_seb(x: Tensor) -> Tensor:
    root = thin_root(x)
    variances = torch.linalg.eigvalsh(root)[:, None] ** 2
    return (1 + (variances * torch.exp(-2 * variances)).sum(-1, keepdim=True).sqrt()) * root


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "newton_schulz"])
def test_gradient_from_rank_deficient_features(name: str) -> None:
    # 3 locations, 5 channels: at most 2 non-zero eigenvalues, so the slope of sqrt is infinite in 3 directions.
    # Finite differences of the layer itself drown there in the rounding noise of sqrt(1e-16) = 1e-8: they are taken
    # of a reference that never forms the zero eigenvalues.
    x, step = random(2, 5, 1, 3), 1e-5
    reference = thin_root if name.startswith("sqrt") else thin_seb
    torch.testing.assert_close(LAYERS[name](covariance(x)), reference(x), rtol=0, atol=1e-7)
    jacobian = torch.autograd.functional.jacobian(lambda x: LAYERS[name](covariance(x)), x).flatten(3)
    for i, unit in enumerate(torch.eye(x.numel(), dtype=x.dtype)):
        shift = step * unit.reshape(x.shape)
        difference = (reference(x + shift) - reference(x - shift)) / (2 * step)
        torch.testing.assert_close(jacobian[..., i], difference, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("iterations", [1, 2, 3, 7])
def test_newton_schulz_gradient_for_any_number_of_iterations(iterations: int) -> None:
    s = covariance(random(2, 4, 3, 3)).requires_grad_()
    assert gradcheck(lambda s: newton_schulz_sqrt(s, iterations), s)


def test_newton_schulz_gradient_from_rank_deficient_features() -> None:
    assert gradcheck(lambda x: newton_schulz_sqrt(covariance(x)), random(2, 5, 1, 3).requires_grad_())


def test_ordinary_gradient_loses_what_a_tie_carries() -> None:
    s = with_spectrum([2.0, 2.0, 0.5]).requires_grad_()
    weights = random(1, 3, 3)
    (exact,) = torch.autograd.grad((matrix_sqrt(s, "exact") * weights).sum(), s)
    (ordinary,) = torch.autograd.grad((matrix_sqrt(s, "ordinary") * weights).sum(), s)
    assert (exact - ordinary).norm() / exact.norm() > 0.01


@each_layer
def test_constant_image_gives_zero_and_a_zero_gradient(name: str) -> None:
    x = torch.full((2, 4, 3, 3), 7.0, dtype=torch.float64, requires_grad=True)
    result = LAYERS[name](covariance(x))
    result.sum().backward()
    assert result.abs().max() < 1e-7
    assert x.grad is not None and x.grad.abs().max() == 0


@each_layer
def test_zero_matrix_among_others_leaves_them_alone(name: str) -> None:
    s = torch.cat([torch.zeros(1, 4, 4, dtype=torch.float64), covariance(random(1, 4, 3, 3))]).requires_grad_()
    weights = random(2, 4, 4, seed=1)
    (gradient,) = torch.autograd.grad((LAYERS[name](s) * weights).sum(), s)
    (alone,) = torch.autograd.grad((LAYERS[name](s[1:]) * weights[1:]).sum(), s)
    torch.testing.assert_close(gradient[1], alone[1])
    if name.endswith("ordinary"):  # lets the slope of sqrt at the floor through, 3e7, as published
        assert gradient[0].isfinite().all() and gradient[0].abs().max() > 1e6
    else:
        assert gradient[0].abs().max() == 0


@pytest.mark.parametrize("name", ["sqrt_exact", "seb_exact"])
def test_exact_gradient_vanishes_on_clamped_eigenvalues(name: str) -> None:
    s = torch.diag_embed(torch.tensor([[1.0, 0.5, 0.0, 0.0]], dtype=torch.float64)).requires_grad_()
    (gradient,) = torch.autograd.grad((LAYERS[name](s) * random(1, 4, 4)).sum(), s)
    assert gradient[0, 2:, 2:].abs().max() == 0
    assert gradient[0, :2, :2].abs().min() > 0


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-16, 2), min_size=1, max_size=6), st.integers(0, 99))
def test_exact_gradient_is_the_lyapunov_solution(exponents: list[float], seed: int) -> None:
    """For R = sqrt(S), dLoss/dS = X solves R X + X R = sym(G): a check that knows nothing of eigenvalues."""
    eigenvalues = [10**e for e in exponents]
    s = torch.diag_embed(torch.tensor([eigenvalues], dtype=torch.float64)).requires_grad_()
    g = random(1, len(eigenvalues), len(eigenvalues), seed=seed)
    root = matrix_sqrt(s)
    (x,) = torch.autograd.grad((root * g).sum(), s)
    kept = torch.tensor([eigenvalues]) > torch.finfo(torch.float64).eps
    residual = (root @ x + x @ root - (g + g.mT) / 2)[kept[:, :, None] & kept[:, None, :]]
    assert residual.numel() == 0 or residual.abs().max() < 1e-9


@each_layer
def test_half_precision_and_autocast_change_nothing_inside(name: str) -> None:
    s = covariance(random(2, 4, 3, 3)).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = LAYERS[name](s)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, LAYERS[name](s), rtol=0, atol=0)
    assert LAYERS[name](s.bfloat16()).dtype == torch.float32


@each_layer
def test_non_contiguous_input_and_empty_batch(name: str) -> None:
    s = covariance(random(2, 4, 3, 3))
    strided = torch.stack([s, s], dim=-1)[..., 0]
    assert not strided.is_contiguous()
    torch.testing.assert_close(LAYERS[name](strided), LAYERS[name](s))
    assert LAYERS[name](s[:0]).shape == (0, 4, 4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_matrix_is_named(value: float) -> None:
    s = covariance(random(3, 4, 3, 3))
    s[1, 2, 0] = value
    with pytest.raises(EigendecompositionError, match=r"1 of 3 .* \[1\]"):
        matrix_sqrt(s)


@each_layer
def test_wrong_shape_and_dtype_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"\(B, d, d\)"):
        LAYERS[name](torch.zeros(2, 3, 4))
    with pytest.raises(TypeError, match="floating-point"):
        LAYERS[name](torch.zeros(2, 3, 3, dtype=torch.int64))


def test_unknown_gradient_lists_the_known() -> None:
    with pytest.raises(ValueError, match=", ".join(GRADIENTS)):
        matrix_sqrt(torch.eye(3)[None], gradient="magic")


@each_layer
def test_second_derivative_is_refused_not_wrong(name: str) -> None:
    s = covariance(random(1, 3, 3, 3)).requires_grad_()
    (gradient,) = torch.autograd.grad(LAYERS[name](s).pow(2).sum(), s, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
