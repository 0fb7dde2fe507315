"""Every spectral layer under the contract of `spectral_contract.py`, and what distinguishes the gradient rules."""

import itertools
import math
import runpy
import warnings
from collections.abc import Callable
from functools import partial
from typing import ClassVar

import mpmath
import numpy as np
import pytest
import torch
from command_line import ROOT
from mpmath import mpf
from spectral_contract import (
    FLOOR,
    DescriptorContract,
    Reference,
    SpectralContract,
    Values,
    coupled_iteration,
    random,
    relative,
    rotated,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck

from fgvc.pooling import create_pooling  # adds the gradient rules of its methods to GRADIENTS
from fgvc.spectral import (
    GRADIENTS,
    LOG,
    SCALED_SQRT,
    SQRT,
    AmplifiedSquareRoot,
    EigenvalueMap,
    LogCholesky,
    MatrixMap,
    PadeRoot,
    Power,
    Reciprocal,
    Rescaled,
    SparseInverse,
    TaylorRoot,
    covariance,
    matrix_descriptor,
    matrix_inverse_sqrt,
    matrix_log,
    matrix_map,
    matrix_power,
    matrix_sqrt,
    newton,
    newton_schulz_descriptor,
    newton_schulz_sqrt,
    power_iteration,
    scaling_eigen_branch,
    seb_spectral,
    spectral_descriptor,
    spectral_map,
    taylor,
    trunc,
    upper_triangle,
)
from fgvc.spectral.pade_coefficients import DENOMINATOR, NUMERATOR
from fgvc.spectral.products import ConditionWarning, products_descriptor, products_map
from fgvc.spectral.rules import pade_ratio
from fgvc.spectral.spectral_map import second_differences, spectral_layer


def square_root(lam: Values) -> Values:
    return [mpmath.sqrt(x) for x in lam]


def seb(lam: Values) -> Values:
    """(1 + ||Q E^T||_F) Q of [T-PAMI 2022], entrywise in the common eigenbasis of Q and E."""
    t = mpmath.norm([mpmath.sqrt(x) * mpmath.exp(-x) for x in lam])
    return [(1 + t) * mpmath.sqrt(x) for x in lam]


def amplified(lam: Values) -> Values:
    end = mpmath.fsum(lam) / len(lam) / 2
    return [mpmath.sqrt(x) * (1 + 2 * mpmath.exp(-x / end)) for x in lam]


def iterated(lam: Values) -> Values:
    """Ten steps of the coupled iteration of [CVPR 2018] on each eigenvalue."""
    tau = mpmath.fsum(lam)
    images = []
    for x in lam:
        y, z = x / tau, mpf(1)
        for _ in range(10):
            t = (3 - z * y) / 2
            y, z = y * t, t * z
        images.append(mpmath.sqrt(tau) * y)
    return images


def pade_root(lam: Values) -> Values:
    """p / q of [ICLR 2022]: ((1 + w)^11 + (1 - w)^11) / ((1 + w)^11 - (1 - w)^11) w, w = sqrt(lam / n), n = ||lam||."""
    n = mpmath.norm(lam)
    p, q = ([math.comb(11, 2 * k + odd) for k in range(5, -1, -1)] for odd in (0, 1))
    return [mpmath.sqrt(n) * mpmath.polyval(p, x / n) / mpmath.polyval(q, x / n) for x in lam]


def taylor_root(lam: Values) -> Values:
    n = mpmath.norm(lam)
    coefficients = [(-1) ** k * mpmath.binomial(mpf(1) / 2, k) for k in range(10, -1, -1)]
    return [mpmath.sqrt(n) * mpmath.polyval(coefficients, 1 - x / n) for x in lam]


def plain(high: mpf, low: mpf) -> mpf:
    return 1 / (high - low) if high != low else mpf(0)


def geometric(terms: int) -> object:
    return lambda high, low: mpmath.fsum((low / high) ** k for k in range(terms)) / high


class TestExactSquareRoot(SpectralContract):
    differentiable_twice = True
    f, gradient, reference = SQRT, "exact", Reference(square_root)


class TestExactScalingEigenBranch(SpectralContract):
    f, gradient, reference = SCALED_SQRT, "exact", Reference(seb)


class TestExactAmplifiedRoot(SpectralContract):
    f, gradient, reference = AmplifiedSquareRoot(2.0, temperature=0.5), "exact", Reference(amplified)


class TestExactInverse(SpectralContract):
    differentiable_twice = True
    f, gradient, reference = Power(-1.0, 1e-3), "exact", Reference(lambda lam: [1 / (x + mpf(1e-3)) for x in lam])


class TestExactReciprocal(SpectralContract):
    f, gradient, reference = Reciprocal(PadeRoot()), "exact", Reference(lambda lam: [1 / x for x in pade_root(lam)])


class TestExactShifted(SpectralContract):
    differentiable_twice = True
    f, gradient = Rescaled(SQRT, 2.0, shift=1.5), "exact"
    reference = Reference(lambda lam: [2 * x + mpf(1.5) for x in square_root(lam)])


class TestExactRescaled(SpectralContract):
    f, gradient = Rescaled(SCALED_SQRT, 1.7), "exact"
    reference = Reference(lambda lam: [mpf(1.7) * x for x in seb(lam)])


class TestExactPower(SpectralContract):
    differentiable_twice = True
    f, gradient, reference = Power(0.3), "exact", Reference(lambda lam: [x ** mpf(0.3) for x in lam])


class TestExactNegativePower(SpectralContract):
    differentiable_twice = True
    f, gradient, reference = Power(-0.5), "exact", Reference(lambda lam: [1 / mpmath.sqrt(x) for x in lam])


class TestExactLogarithm(SpectralContract):
    differentiable_twice = True
    f, gradient, reference = LOG, "exact", Reference(lambda lam: [mpmath.log(x) for x in lam])


class TestExactTruncation(SpectralContract):
    f, gradient, keep, reference = SQRT, "exact", 2, Reference(square_root, keep=2)
    gap_rounding = 8  # the last kept against the first dropped eigenvalue


class TestExactBand(SpectralContract):
    f, gradient, keep, reference = SQRT, "exact", (1, 3), Reference(square_root, keep=(1, 3))
    gap_rounding = 8


class TestExactSmallestOfScalingEigenBranch(SpectralContract):
    f, gradient, keep, reference = SCALED_SQRT, "exact", (1, None), Reference(seb, keep=(1, None))
    gap_rounding = 8


class TestOrdinary(SpectralContract):
    f, gradient, reference, gap_rounding = SQRT, "ordinary", Reference(square_root, plain), 8


class TestOrdinaryScalingEigenBranch(SpectralContract):
    f, gradient, reference, gap_rounding = SCALED_SQRT, "ordinary", Reference(seb, plain), 8


class TestTrunc(SpectralContract):
    f, gradient, gap_rounding = SQRT, "trunc", 8
    reference = Reference(square_root, lambda high, low: min(plain(high, low), mpf(1e10)))


class TestTaylor(SpectralContract):
    f, gradient, reference, gap_rounding = SQRT, "taylor", Reference(square_root, geometric(101)), 8


class TestTruncatedTaylor(SpectralContract):
    f, gradient, keep, gap_rounding = SQRT, "taylor", 2, 8
    reference = Reference(square_root, geometric(101), keep=2)


class TestPade(SpectralContract):
    # the approximant is 1 / (1 - r) itself up to 1e-20; in float64 P and Q are known to about 1e-16 / (1 - r)
    f, gradient, reference, gap_rounding = SQRT, "pade", Reference(square_root, plain), 100


class TestPowerIteration(SpectralContract):
    f, gradient, reference, gap_rounding = SQRT, "power_iteration", Reference(square_root, geometric(20)), 8


class TestNewton(SpectralContract):
    f, gradient, reference = SQRT, "newton", Reference(square_root, backward_f=iterated)


class TestExactPadeRoot(SpectralContract):
    f, gradient, reference = PadeRoot(), "exact", Reference(pade_root)


class TestExactTaylorRoot(SpectralContract):
    f, gradient, reference = TaylorRoot(), "exact", Reference(taylor_root)


class SignReference(Reference):
    def derivative(self, found: Values) -> tuple[list[list[mpf]], list[list[mpf]]]:
        """Eight steps of the sign iteration for [[b, G], [0, -b]] from b = F / sqrt(n), entry by entry."""
        clipped = self.clip(found)
        n, values = len(found), self.f(clipped)
        scale = mpmath.sqrt(mpmath.norm(clipped))
        b, c = [v / scale for v in values], [[1 / scale] * n for _ in values]
        for _ in range(8):
            for i, j in itertools.product(range(n), range(n)):
                c[i][j] = (c[i][j] * (3 - b[j] ** 2) - b[i] ** 2 * c[i][j] + b[i] * c[i][j] * b[j]) / 2
            b = [x * (3 - x**2) / 2 for x in b]
        return [[x / 2 for x in row] for row in c], [[c[i][i] / 2 * (i == j) for i in range(n)] for j in range(n)]


class TestLyapunovOfPadeRoot(SpectralContract):
    f, gradient, reference, is_derivative = PadeRoot(), "lyapunov", SignReference(pade_root), False


class TestLyapunovOfTaylorRoot(SpectralContract):
    f, gradient, reference, is_derivative = TaylorRoot(), "lyapunov", SignReference(taylor_root), False


class InverseSignReference(Reference):
    def derivative(self, found: Values) -> tuple[list[list[mpf]], list[list[mpf]]]:
        """Eight steps from b = F / ||F||, c = -F^2 G F^2 / ||F||, entry by entry."""
        values = self.f(self.clip(found))
        n, norm = len(found), mpmath.norm(values)
        b, c = [v / norm for v in values], [[-(v**2) * w**2 / norm for v in values] for w in values]
        for _ in range(8):
            for i, j in itertools.product(range(n), range(n)):
                c[i][j] = (c[i][j] * (3 - b[j] ** 2) - b[i] ** 2 * c[i][j] + b[i] * c[i][j] * b[j]) / 2
            b = [x * (3 - x**2) / 2 for x in b]
        return [[x / 2 for x in row] for row in c], [[c[i][i] / 2 * (i == j) for i in range(n)] for j in range(n)]


class TestLyapunovOfInverseRoot(SpectralContract):
    f, gradient, is_derivative = Reciprocal(PadeRoot()), "lyapunov", False
    reference = InverseSignReference(lambda lam: [1 / x for x in pade_root(lam)])


class TestTopNPublished(SpectralContract):
    f, gradient, keep, gap_rounding = SQRT, "topn_published", 2, 8
    reference = Reference(square_root, plain, keep=2, leak=True)
    is_derivative = False


class TestBandPublished(SpectralContract):
    # the released layer's treatment of what it drops, for a band that it does not know
    f, gradient, keep, gap_rounding = SQRT, "topn_published", (1, 3), 8
    reference = Reference(square_root, plain, keep=(1, 3), leak=True)
    is_derivative = False


def test_every_rule_is_under_the_contract() -> None:
    assert {contract.gradient for contract in SpectralContract.__subclasses__()} == set(GRADIENTS)


@pytest.mark.parametrize("gap", [0.0, 1e-12, 1e-8, 1e-6, 1e-5, 1e-3, 1.0])
def test_second_differences_of_the_square_root_far_from_ties_and_near(gap: float) -> None:
    lam = torch.tensor([0.3, 0.3 + gap, 0.3 + 2.5 * gap, 5.0], dtype=torch.float64)
    sums = lam.sqrt()[:, None] + lam.sqrt()
    expected = -1 / (sums[:, :, None] * sums[:, None, :] * sums[None, :, :])
    found = second_differences(lam, spectral_layer(SQRT, "exact"))
    assert ((found - expected) / expected).abs().max() < 1e-9


def test_pade_ratio_against_the_function_it_approximates() -> None:
    r = torch.tensor([0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999], dtype=torch.float64)
    error = (pade_ratio(r) * (1 - r) - 1).abs()
    assert (error < 20 * 2**-53 / (1 - r)).all()
    # around the common root of P and Q within [0, 1] the error grows as 1 / distance, and no faster
    distance = torch.tensor([1e-4, 1e-6, 1e-8, 1e-10], dtype=torch.float64)
    r = 0.99729869940144953 + distance
    error = (pade_ratio(r) * (1 - r) - 1).abs()
    assert (error < 5e-15 / distance).all() and (error > 1e-18 / distance).all()
    # the common factor of P and Q is lost at r = 1: Q(1) is zero in float64, and the rule must not divide by it
    assert pade_ratio(torch.ones(2, 3, dtype=torch.float64)).tolist() == [[0.0] * 3] * 2


def test_pade_coefficients_are_those_of_the_script() -> None:
    path = ROOT / "tools" / "pade_coefficients.py"
    tool = runpy.run_path(str(path))
    numerator, denominator = tool["coefficients"]()
    assert (tuple(numerator), tuple(denominator)) == (NUMERATOR, DENOMINATOR)


def test_named_powers_and_the_logarithm() -> None:
    s = rotated([0.1, 0.35, 0.8, 2.0])
    torch.testing.assert_close(matrix_power(s, 0.5), matrix_sqrt(s))
    white = matrix_power(s, -0.5)
    torch.testing.assert_close(white @ s @ white, torch.eye(4, dtype=torch.float64)[None])
    torch.testing.assert_close(matrix_log(torch.linalg.matrix_exp(s)), s)
    ridged = s + 0.2 * torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(matrix_power(s, -1, ridge=0.2) @ ridged, torch.eye(4, dtype=torch.float64)[None])
    torch.testing.assert_close(matrix_inverse_sqrt(s, ridge=0.2), matrix_power(ridged, -0.5))


def test_a_ridge_makes_the_gradient_of_a_singular_matrix_exact() -> None:
    s = rotated([0.0, 0.0, 0.5, 2.0]).requires_grad_()
    assert gradcheck(partial(matrix_inverse_sqrt, ridge=0.1), s)
    (without,) = torch.autograd.grad(matrix_inverse_sqrt(s).diagonal(dim1=1, dim2=2).sum(), s)
    assert without.isfinite().all()


@pytest.mark.parametrize("case", ["full_rank", "rank_deficient"])
def test_inverse_root_of_the_released_code(golden_since_2022: object, case: str) -> None:
    golden = np.load(str(golden_since_2022))
    s = torch.from_numpy(golden[f"{case}/cov"]).requires_grad_()
    result = matrix_inverse_sqrt(s, "lyapunov", ridge=1e-2)
    (gradient,) = torch.autograd.grad((result * torch.from_numpy(golden[f"{case}/grad_matrix"])).sum(), s)
    # the released code holds its Padé coefficients in float32: symmetric to 1e-5 only; the contract above is exact
    assert relative(result.detach(), torch.from_numpy(golden[f"{case}/MPA_Lya_Inv/out"])) < 5e-5
    assert relative(gradient, torch.from_numpy(golden[f"{case}/MPA_Lya_Inv/grad_cov"])) < 1e-4


@pytest.mark.parametrize(
    "function",
    [
        *(matrix_sqrt, matrix_inverse_sqrt, matrix_log, scaling_eigen_branch, seb_spectral, newton_schulz_sqrt),
        *(products_map, partial(matrix_power, alpha=0.3, ridge=0.1), partial(matrix_map, f=LogCholesky())),
    ],
)
def test_any_number_of_leading_dimensions(function: Callable[[Tensor], Tensor]) -> None:
    s = torch.cat([rotated([0.1, 0.35, 0.8, 2.0], seed=i) for i in range(6)])
    one_by_one = torch.cat([function(item[None]) for item in s])
    for shape in ((2, 3), (6, 1, 1), (6,)):
        torch.testing.assert_close(function(s.reshape(*shape, 4, 4)), one_by_one.reshape(*shape, 4, 4))
    torch.testing.assert_close(function(s[0]), one_by_one[0])
    assert function(s.reshape(2, 3, 4, 4)[:0].half()).shape == (0, 3, 4, 4)


def test_spectral_branch_amplifies_small_eigenvalues_and_ignores_the_scale() -> None:
    s = rotated([0.1, 0.35, 0.8, 2.0])
    ours = torch.linalg.eigvalsh(seb_spectral(s))[0]
    root = torch.linalg.eigvalsh(matrix_sqrt(s))[0]
    released = torch.linalg.eigvalsh(scaling_eigen_branch(s))[0]
    assert ((ours / root).diff() < -0.01).all()
    torch.testing.assert_close(released / root, (released / root)[:1].expand(4))  # one scalar times the square root
    torch.testing.assert_close(seb_spectral(9 * s), 3 * seb_spectral(s))


@pytest.mark.parametrize(
    ("factory", "value"),
    [
        *((trunc, 0.0), (trunc, float("nan"))),
        *((taylor, -1), (taylor, 2.5), (power_iteration, 0), (newton, 0)),
        *((Power, 0.0), (Power, float("inf"))),
        (AmplifiedSquareRoot, -1.0),
        (partial(AmplifiedSquareRoot, 1.0), 0.0),
        (partial(Rescaled, SQRT), 0.0),
        (partial(Rescaled, SQRT, 1.0), float("inf")),
    ],
)
def test_factories_refuse_values_out_of_range(factory: object, value: float) -> None:
    with pytest.raises(ValueError, match=r"must be .*got"):
        factory(value)  # type: ignore[operator]


def test_rules_with_other_parameters_are_taken_as_they_are() -> None:
    s = rotated([0.1, 1.0]).requires_grad_()
    weights = random(1, 2, 2)
    few, many, exact = (
        torch.autograd.grad((matrix_sqrt(s, gradient) * weights).sum(), s)[0]
        for gradient in (taylor(degree=1), taylor(degree=30), "exact")
    )
    assert relative(few, exact) > 1e-4 > 1e-12 > relative(many, exact)


def test_combinations_without_meaning_are_refused() -> None:
    s = rotated([0.1, 1.0])
    with pytest.raises(ValueError, match="square root of all eigenvalues"):
        matrix_sqrt(s, "newton", keep=1)
    with pytest.raises(ValueError, match=", ".join(GRADIENTS)):
        spectral_map(s, SQRT, "magic")


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
    expected = upper_triangle(coupled_iteration(covariance(x), iterations))
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


class MatrixContract(DescriptorContract):
    f: ClassVar[MatrixMap]

    def layer(self, matrix: Tensor) -> Tensor:
        return matrix_map(matrix, self.f)

    def descriptor(self, x: Tensor) -> Tensor:
        return matrix_descriptor(x, self.f)

    def published(self, s: Tensor) -> Tensor:
        raise NotImplementedError

    @pytest.mark.parametrize("shape", [(2, 5, 4, 4), (2, 6, 2, 2)])  # more locations than channels, and fewer
    def test_value_and_gradient_are_those_of_the_published_steps(self, shape: tuple[int, ...]) -> None:
        x = random(*shape).requires_grad_()
        weights = random(shape[0], shape[1] * (shape[1] + 1) // 2, seed=1)
        expected = upper_triangle(self.published(covariance(x)))
        (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), x)
        for ours in (self.descriptor(x), upper_triangle(self.layer(covariance(x)))):
            assert relative(ours.detach(), expected.detach()) < 1e-9
            (gradient,) = torch.autograd.grad((ours * weights).sum(), x)
            assert relative(gradient, expected_gradient) < 1e-7

    def test_gradcheck(self) -> None:
        s = torch.cat([rotated([0.1, 0.35, 0.8, 2.0]), rotated([0.2, 0.5, 1.1, 1.9], seed=1)]).requires_grad_()
        assert gradcheck(self.layer, s)

    def test_constant_image_among_others(self) -> None:
        x = random(2, 6, 3, 3)
        x[0] = 7.0
        x.requires_grad_()
        result, weights = self.descriptor(x), random(2, 21, seed=1)
        (of_both,) = torch.autograd.grad((result * weights).sum(), x)
        assert result.isfinite().all() and of_both[0].abs().max() == 0
        (alone,) = torch.autograd.grad((self.descriptor(x[1:]) * weights[1:]).sum(), x)
        torch.testing.assert_close(of_both[1], alone[1])

    def test_what_is_not_finite_stays_in_its_image(self) -> None:
        x = random(3, 6, 3, 3)
        x[1, 2, 0, 0] = math.nan
        finite = self.descriptor(x).isfinite().all(dim=1)
        assert finite.tolist() == [True, False, True]


class TestLogCholesky(MatrixContract):
    f = LogCholesky()

    def published(self, s: Tensor) -> Tensor:
        factor = torch.linalg.cholesky(s + 1e-6 * torch.eye(s.shape[-1], dtype=s.dtype))
        lower = factor.tril(-1) + torch.diag_embed(factor.diagonal(dim1=1, dim2=2).log())
        return lower + lower.mT

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_a_factor_for_every_rank(self, dtype: torch.dtype) -> None:
        # 3 locations, ten times each, of large features: rounding noise is far above the ridge
        x = (1e4 * random(4, 64, 3).repeat(1, 1, 10)).to(dtype).requires_grad_()
        result = matrix_descriptor(x, self.f, dtype=dtype)
        assert result.isfinite().all()
        assert torch.autograd.grad(result.sum(), x)[0].isfinite().all()


class TestSparseInverse(MatrixContract):
    f: ClassVar[SparseInverse] = SparseInverse()

    def published(self, s: Tensor) -> Tensor:
        def inverse(matrix: Tensor) -> Tensor:
            tau = matrix.diagonal(dim1=1, dim2=2).sum(-1)[:, None, None]
            y, z = matrix / tau, torch.eye(matrix.shape[-1], dtype=s.dtype).expand_as(matrix)
            for _ in range(7):
                t = (3 * torch.eye(s.shape[-1], dtype=s.dtype) - z @ y) / 2
                y, z = y @ t, t @ z
            return z @ z / tau

        c = s / s.diagonal(dim1=1, dim2=2).sum(-1)[:, None, None]
        theta = inverse(c)
        for step in range(self.f.steps):
            slope, size = c - inverse(theta), self.f.rate * (1 - step / (self.f.steps - 1))
            plus = torch.relu(torch.relu(theta) - size * (slope + self.f.sparsity))
            theta = plus - torch.relu(torch.relu(-theta) - size * (self.f.sparsity - slope))
        return theta / theta.diagonal(dim1=1, dim2=2).sum(-1)[:, None, None].sqrt()


class TestSparserInverse(TestSparseInverse):
    f = SparseInverse(steps=3, sparsity=0.7, rate=15.0)  # entries vanish, come back and change their sign


def test_more_sparsity_gives_more_zeros() -> None:
    s = covariance(random(1, 12, 6, 6))
    zeros = [int((matrix_map(s, SparseInverse(20, sparsity)) == 0).sum()) for sparsity in (0.0, 0.1, 1.0)]
    assert zeros[0] == 0 < zeros[1] < zeros[2]


def test_what_is_kept_for_the_backward_pass_does_not_grow_with_the_steps() -> None:
    x = random(2, 6, 3, 3).requires_grad_()
    kept: list[int] = []

    def count(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    for steps in (2, 20):
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            matrix_descriptor(x, SparseInverse(steps))
    assert kept == [x.numel()] * 2


class TestProducts(DescriptorContract):
    def layer(self, matrix: Tensor) -> Tensor:
        return matrix_sqrt(matrix, solver="products")

    def descriptor(self, x: Tensor) -> Tensor:
        return create_pooling("mpn_cov", channels=x.shape[1], gradient="exact", solver="products")(x)


class TestProductsOfScalingEigenBranch(DescriptorContract):
    def layer(self, matrix: Tensor) -> Tensor:
        return scaling_eigen_branch(matrix, "exact", solver="products")

    def descriptor(self, x: Tensor) -> Tensor:
        return create_pooling("seb", channels=x.shape[1], gradient="exact", solver="products")(x)


def features_of_condition(condition: float, channels: int = 12, locations: int = 30) -> Tensor:
    """(2, channels, locations) with eigenvalues of the covariance from 1 to 1 / condition, even on a log scale."""
    x = random(2, locations, channels)
    basis = torch.linalg.qr(x - x.mean(dim=1, keepdim=True)).Q.mT * locations**0.5
    eigenvalues = torch.logspace(0, -math.log10(condition), channels, dtype=torch.float64)
    return torch.linalg.qr(random(2, channels, channels, seed=1)).Q * eigenvalues.sqrt() @ basis


each_of_products = pytest.mark.parametrize("f", [SQRT, SCALED_SQRT])


@each_of_products
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4, 1e6, 1e8])
def test_products_are_the_eigendecomposition(f: EigenvalueMap, condition: float, scale: float) -> None:
    x = (scale * features_of_condition(condition)).requires_grad_()
    s = covariance(x).detach().requires_grad_()
    weights, symmetric = random(2, 78, seed=2), random(2, 12, 12, seed=3)
    # in the gradient of S itself the rounding of S, some eps, grows by the condition number, whatever the solver
    for ours, theirs, leaf, w, rounding in (
        (products_descriptor(x, f), spectral_descriptor(x, f), x, weights, 0),
        (products_map(s, f), spectral_map(s, f), s, symmetric, FLOOR * condition),
    ):
        assert relative(ours.detach(), theirs.detach()) < 1e-11
        of_ours, of_theirs = (torch.autograd.grad((y * w).sum(), leaf)[0] for y in (ours, theirs))
        assert relative(of_ours, of_theirs) < max(1e-9, rounding)


@each_of_products
def test_products_of_constant_images_and_channels(f: EigenvalueMap) -> None:
    x = random(3, 6, 4, 4)
    x[0], x[1, 2], x[1, 4] = 0.1, 0.0, 0.1  # 0.1 is not exact: some of its noise is left
    results = []
    for layer in (products_descriptor, spectral_descriptor):
        leaf = x.clone().requires_grad_()
        y = layer(leaf, f)
        results.append((y.detach(), *torch.autograd.grad((y * random(3, 21, seed=1)).sum(), leaf)))
    # the square root of the floor, 1.5e-8, stands for 0 in the other layer
    torch.testing.assert_close(*results, rtol=0, atol=1e-7)


def test_singular_covariances_are_reported_by_the_next_call() -> None:
    good, singular = features_of_condition(1e8), features_of_condition(1e10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConditionWarning)
        products_descriptor(good)  # hears of the call of an earlier test
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConditionWarning)
        products_descriptor(good)
        products_descriptor(good, SCALED_SQRT)
        products_descriptor(singular)  # no value of this call is looked at
    for beyond in (good.index_fill(0, torch.tensor([1]), math.nan), good.clone()):
        with pytest.warns(ConditionWarning, match="solver 'eigh'"):
            products_map(covariance(beyond))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConditionWarning)
        products_descriptor(1e4 * good, SCALED_SQRT)
    with pytest.warns(ConditionWarning, match="norm"):
        products_descriptor(good)


@each_of_products
def test_products_never_wait_for_the_device(f: EigenvalueMap) -> None:
    with FakeTensorMode(
        allow_non_fake_inputs=True
    ):  # has no values to look at; the tables of `upper_triangle` are real
        assert products_descriptor(torch.empty(2, 6, 4, 4, device="cuda"), f).device.type == "cuda"
        x = torch.empty(2, 6, 4, 4, requires_grad=True)
        assert torch.autograd.grad(products_descriptor(x, f).sum(), x)[0].shape == x.shape


def test_products_compile_to_one_graph() -> None:
    torch._dynamo.reset()
    x = random(2, 6, 4, 4).requires_grad_()
    compiled = torch.compile(products_descriptor, fullgraph=True, backend="eager")
    # few steps: their number changes nothing but the time
    results = [
        (y, *torch.autograd.grad(y.norm(), x)) for y in (f(x, condition=1.0) for f in (products_descriptor, compiled))
    ]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("condition", [0.5, math.inf, math.nan])
def test_condition_numbers_out_of_range_are_refused(condition: float) -> None:
    with pytest.raises(ValueError, match="at least 1, got"):
        products_map(rotated([0.1, 1.0]), condition=condition)


@pytest.mark.filterwarnings("ignore::fgvc.spectral.products.ConditionWarning")  # of another test's call
def test_more_steps_for_a_larger_condition_number() -> None:
    x = features_of_condition(1e10)
    exact = spectral_descriptor(x, SQRT)
    assert relative(products_descriptor(x), exact) > 1e-7
    with pytest.warns(ConditionWarning):
        assert relative(products_descriptor(x, condition=1e10), exact) < 1e-11
