"""What every spectral layer must do, against a dense reference at 60 digits that shares no code with the package.

A method states its map and its gradient in mpmath (`Reference`); `SpectralContract` is inherited by one test class a
method and checks the layer against the definition S = U diag(l) U^T, F = U diag(f) U^T, dLoss/dS = U inner U^T.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import mpmath
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mpmath import mpf
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError, gradcheck, gradgradcheck

from fgvc.spectral import GRADIENTS, EigenvalueMap, covariance, spectral_descriptor, spectral_map, upper_triangle
from fgvc.spectral.rules import PublishedChain

FLOOR = torch.finfo(torch.float64).eps
DIGITS = 60
Values = Sequence[mpf]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rotated(eigenvalues: Sequence[float], seed: int = 0) -> Tensor:
    """One symmetric matrix (1, d, d) with these eigenvalues and random eigenvectors."""
    u = torch.linalg.qr(random(len(eigenvalues), len(eigenvalues), seed=seed)).Q
    return (u * torch.tensor(eigenvalues, dtype=torch.float64) @ u.T)[None]


def relative(ours: Tensor, reference: Tensor) -> float:
    return float((ours - reference).norm() / reference.norm())


def coupled_iteration(s: Tensor, iterations: int = 5) -> Tensor:
    """The coupled iteration of Li et al. (CVPR 2018), step by step, for autograd to differentiate."""
    trace = s.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    y, z = s / trace, torch.eye(s.shape[-1], dtype=s.dtype).expand_as(s)
    for _ in range(iterations):
        t = (3 * torch.eye(s.shape[-1], dtype=s.dtype) - z @ y) / 2
        y, z = y @ t, t @ z
    return trace.sqrt() * y


@dataclass(frozen=True)
class Reference:
    """A layer in mpmath."""

    f: Callable[[Values], Values]  # eigenvalues, clipped -> their images
    reciprocal_gap: Callable[[mpf, mpf], mpf] | None = None  # K~(high, low) of the published chain; None: exact
    keep: int | tuple[int, int | None] | None = None  # number of largest ones, or (start, stop) in descending order
    leak: bool = False  # the published SVD-TopN: K~ on clipped eigenvalues, every slope let through
    backward_f: Callable[[Values], Values] | None = None  # whose exact derivative is taken instead (SVD-Newton)

    def clip(self, found: Values) -> Values:
        """Ascending eigenvalues as the map sees them."""
        start, stop = self.keep if isinstance(self.keep, tuple) else (0, self.keep)
        place = range(len(found) - 1, -1, -1)  # 0 for the largest
        return [
            max(lam, mpf(FLOOR)) if start <= i < (len(found) if stop is None else stop) else mpf(FLOOR)
            for i, lam in zip(place, found, strict=True)
        ]

    def value(self, found: Values) -> Values:
        return self.f(self.clip(found))

    def derivative(self, found: Values) -> tuple[list[list[mpf]], list[list[mpf]]]:
        """L off the diagonal and the Jacobian that stands on it: inner_ii = sum_k J[k][i] P_kk."""
        clipped, f = self.clip(found), self.backward_f or self.f
        jacobian = [list(column) for column in zip(*[_slope(f, clipped, j) for j in range(len(found))], strict=True)]
        passes_all = self.backward_f is not None or (self.reciprocal_gap is not None and (self.leak or not self.keep))
        for column, (lam, seen) in enumerate(zip(found, clipped, strict=True)):
            if not passes_all and (lam <= FLOOR or seen != lam):
                for row in jacobian:
                    row[column] = mpf(0)
        n = len(found)
        return [[self._loewner(found, clipped, f, i, j) for j in range(n)] for i in range(n)], jacobian

    def _loewner(self, found: Values, clipped: Values, f: Callable[[Values], Values], i: int, j: int) -> mpf:
        low, high = min(i, j), max(i, j)
        values = f(clipped)
        if self.reciprocal_gap is not None:
            gaps = clipped if self.leak else [max(lam, mpf(FLOOR)) for lam in found]
            return self.reciprocal_gap(gaps[high], gaps[low]) * (values[high] - values[low])
        points = clipped if self.backward_f is not None else found
        if points[high] != points[low]:
            return (values[high] - values[low]) / (points[high] - points[low])
        if self.backward_f is None and any(found[k] <= FLOOR or clipped[k] != found[k] for k in (low, high)):
            return mpf(0)
        # the limit on a tie of a map that treats all eigenvalues alike
        slope = _slope(f, clipped, low)
        return slope[low] - slope[high] if high != low else mpf(0)


def _slope(f: Callable[[Values], Values], lam: Values, j: int) -> Values:
    """df/dlam_j at 60 digits: a central difference is exact to about 1e-20 there."""
    step = lam[j] * mpf(10) ** -20
    up, down = ([x + sign * step if i == j else x for i, x in enumerate(lam)] for sign in (1, -1))
    return [(a - b) / (2 * step) for a, b in zip(f(up), f(down), strict=True)]


spectra = st.one_of(
    st.lists(st.floats(-16, 2), min_size=2, max_size=5).map(lambda e: [10**x for x in e]),  # down to 1e-16
    st.lists(st.integers(0, 3), min_size=2, max_size=5).map(lambda k: [0.25 * x for x in k]),  # degenerate, zeros
    st.lists(st.floats(0, 1e-6), min_size=2, max_size=5).map(lambda e: [0.5 + x for x in e]),  # clustered
)


class DescriptorContract:
    """What holds of every layer on covariances: of matrices (B, d, d), and fused, of features."""

    def layer(self, matrix: Tensor) -> Tensor:
        raise NotImplementedError

    def descriptor(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def test_memory_layouts_and_an_empty_batch(self) -> None:
        for size in (2, 4):  # thin and full
            x = random(3, 6, size, size)
            for other in (x.contiguous(memory_format=torch.channels_last), torch.stack([x, x], dim=-1)[..., 0]):
                torch.testing.assert_close(self.descriptor(other), self.descriptor(x))
            empty = x[:0].requires_grad_()
            assert self.descriptor(empty).shape == (0, 21)
            assert torch.autograd.grad(self.descriptor(empty).sum(), empty)[0].shape == (0, 6, size, size)
        assert self.layer(random(0, 4, 4)).shape == (0, 4, 4)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_narrow_input_is_computed_in_float64(self, dtype: torch.dtype) -> None:
        for size in (2, 4):
            x = random(2, 6, size, size).to(dtype).requires_grad_()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                narrow = self.descriptor(x)
            same = x.detach().double().requires_grad_()
            wide = self.descriptor(same)
            assert narrow.dtype == torch.float32
            torch.testing.assert_close(narrow, wide.float(), rtol=0, atol=0)
            of_narrow, of_wide = torch.autograd.grad(narrow.sum(), x)[0], torch.autograd.grad(wide.sum(), same)[0]
            torch.testing.assert_close(of_narrow, of_wide.to(dtype), rtol=0, atol=0)
        s = covariance(random(2, 4, 3, 3)).to(dtype)
        assert self.layer(s).dtype == torch.float32

    def test_the_graph_can_be_used_twice(self) -> None:
        for size in (2, 4):
            x = random(2, 6, size, size).requires_grad_()
            loss = (self.descriptor(x) * random(2, 21)).sum()
            (first,) = torch.autograd.grad(loss, x, retain_graph=True)
            (second,) = torch.autograd.grad(loss, x)
            torch.testing.assert_close(first, second, rtol=0, atol=0)

    def test_second_derivative_is_refused_not_wrong(self) -> None:
        for function, x in ((self.layer, covariance(random(1, 4, 3, 3))), (self.descriptor, random(1, 4, 3, 3))):
            for loss in (torch.Tensor.sum, torch.Tensor.norm):  # the gradient of a sum depends on nothing
                with pytest.raises(RuntimeError, match="differentiable once"):
                    torch.autograd.functional.hessian(lambda z, f=function, loss=loss: loss(f(z)), x)

    def test_functional_gradient_is_that_of_autograd(self) -> None:
        for function, x in ((self.layer, covariance(random(1, 4, 3, 3))), (self.descriptor, random(1, 4, 3, 3))):
            functional = torch.func.grad(lambda z, f=function: f(z).norm())(x)
            (plain,) = torch.autograd.grad(function(x.requires_grad_()).norm(), x)
            torch.testing.assert_close(functional, plain, rtol=0, atol=0)


class SpectralContract(DescriptorContract):
    """Inherited by one test class for each method."""

    f: ClassVar[EigenvalueMap]
    gradient: ClassVar[str]
    keep: ClassVar[int | tuple[int, int | None] | None] = None
    reference: ClassVar[Reference]
    tolerance: ClassVar[float] = 1e-12
    """Relative, of each entry of L against the reference at any spectrum."""
    gap_rounding: ClassVar[float] = 0
    """Relative error of L_ij in units of u / (1 - r), u = 2^-53, r = lam_j / lam_i: of a difference of neighbours."""
    differentiable_twice: ClassVar[bool] = False
    """Whether the layer of a matrix has a second derivative."""
    is_derivative: ClassVar[bool] = True
    """Whether the gradient is the derivative of the layer wherever the eigenvalues are well apart."""

    def test_second_derivative_is_refused_not_wrong(self) -> None:
        if not self.differentiable_twice:
            super().test_second_derivative_is_refused_not_wrong()
            return
        close, far = [1.0, 1.0, 1.0 + 1e-7, 2.0], [0.1, 0.35, 0.8, 2.0]
        s = torch.cat([rotated(far), rotated(close, seed=1)]).requires_grad_()
        assert gradgradcheck(self.layer, s)
        gradient = torch.autograd.grad(self.layer(s).norm(), s, create_graph=True)[0]
        second = torch.autograd.grad(gradient.norm(), s, create_graph=True)[0]
        with pytest.raises(RuntimeError, match="differentiable once"):
            second.norm().backward()

    def layer(self, matrix: Tensor) -> Tensor:
        return spectral_map(matrix, self.f, self.gradient, keep=self.keep)

    def descriptor(self, x: Tensor) -> Tensor:
        return spectral_descriptor(x, self.f, self.gradient, keep=self.keep)

    def expected(self, eigenvalues: Sequence[float], weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """f (d,), the gradient in the eigenbasis (d, d), and the error that each entry of it may have."""
        with mpmath.workdps(DIGITS):
            found = [mpf(lam) for lam in eigenvalues]
            loewner, jacobian = self.reference.derivative(found)
            value = torch.tensor([float(v) for v in self.reference.value(found)], dtype=torch.float64)
            matrices = [
                torch.tensor([[float(v) for v in row] for row in m], dtype=torch.float64) for m in (loewner, jacobian)
            ]
        symmetric = (weights + weights.T) / 2
        inner = matrices[0].fill_diagonal_(0) * symmetric
        inner += torch.diag(matrices[1].T @ symmetric.diagonal())
        lam = torch.tensor(eigenvalues, dtype=torch.float64).clamp(min=FLOOR)
        high, gap = torch.maximum(lam[:, None], lam), (lam[:, None] - lam).abs()
        of_gap = self.gap_rounding * FLOOR / 2 * torch.where(gap == 0, 0, high / gap)
        error = matrices[0].abs() * symmetric.abs() * (self.tolerance + of_gap)
        error += self.tolerance * torch.diag(matrices[1].abs().T @ symmetric.diagonal().abs())
        return value, inner, error

    # inherited by classes that differ in nothing but the layer
    @settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
    @given(spectra, st.integers(0, 99))
    def test_value_and_gradient_are_the_definition(self, eigenvalues: list[float], seed: int) -> None:
        # a diagonal matrix: LAPACK finds its eigenvalues exactly, however small
        eigenvalues = sorted(eigenvalues)
        weights = random(len(eigenvalues), len(eigenvalues), seed=seed)
        value, inner, error = self.expected(eigenvalues, weights)
        s = torch.diag(torch.tensor(eigenvalues, dtype=torch.float64))[None].requires_grad_()
        result = self.layer(s)
        torch.testing.assert_close(result[0], torch.diag(value), rtol=1e-13, atol=0)
        (gradient,) = torch.autograd.grad((result * weights).sum(), s)
        assert gradient.isfinite().all()
        assert ((gradient[0] - inner).abs() <= error).all(), (eigenvalues, gradient[0], inner)

    def test_any_eigenvectors_and_a_batch(self) -> None:
        spectra = [[0.1, 0.35, 0.8, 2.0], [0.2, 0.5, 1.1, 1.9]]
        s = torch.cat([rotated(lam, seed=i) for i, lam in enumerate(spectra)]).requires_grad_()
        weights = random(2, 4, 4, seed=7)
        result = self.layer(s)
        (gradient,) = torch.autograd.grad((result * weights).sum(), s)
        for i, lam in enumerate(spectra):
            u = torch.linalg.qr(random(4, 4, seed=i)).Q
            value, inner, _ = self.expected(lam, u.T @ weights[i] @ u)
            assert relative(result[i].detach(), u * value @ u.T) < 1e-13
            assert relative(gradient[i], u @ inner @ u.T) < 1e-10

    def test_gradcheck(self) -> None:
        # the random weights of gradcheck's loss touch eigenvectors, not only eigenvalues
        s = torch.cat([rotated([0.1, 0.35, 0.8, 2.0]), rotated([0.2, 0.5, 1.1, 1.9], seed=1)]).requires_grad_()
        if self.is_derivative:
            assert gradcheck(self.layer, s)
        else:
            with pytest.raises(GradcheckError):
                gradcheck(self.layer, s)

    def test_repeated_and_zero_eigenvalues_give_finite_gradients(self) -> None:
        for eigenvalues in ([0.0] * 4, [0.7] * 4, [0.0, 0.0, 0.5, 0.5], [0.0, 1e-16, 1.0, 1e16]):
            s = rotated(eigenvalues).requires_grad_()
            (gradient,) = torch.autograd.grad((self.layer(s) * random(1, 4, 4)).sum(), s)
            assert gradient.isfinite().all()

    @pytest.mark.parametrize("shape", [(3, 5, 4, 4), (3, 6, 2, 2), (2, 5, 1, 5), (2, 6, 1, 1), (2, 1, 3, 3)])
    def test_fused_layer_is_the_chain_of_its_parts(self, shape: tuple[int, ...]) -> None:
        # variances of 1e-2: rounding noise in null eigenvalues (1e-18) stays below the floor of 2e-16
        x, weights = (0.1 * random(*shape)).requires_grad_(), random(shape[0], shape[1] * (shape[1] + 1) // 2, seed=1)
        fused, chain = self.descriptor(x), upper_triangle(self.layer(covariance(x)))
        assert relative(fused.detach(), chain.detach()) < 1e-9
        of_fused, of_chain = (torch.autograd.grad((y * weights).sum(), x)[0] for y in (fused, chain))
        empty_band = isinstance(self.keep, tuple) and self.keep[0] >= shape[1]
        if shape[-2:] == (1, 1) or (empty_band and self.is_derivative):
            assert of_fused.abs().max() == of_chain.abs().max() == 0
        else:
            # the published rules multiply what null eigenvectors have of the range, some eps, by the slope at the floor
            published = isinstance(GRADIENTS[self.gradient], PublishedChain)
            slope = 0.5 * FLOOR**-0.5 if published else 1
            assert relative(of_fused, of_chain) < max(1e-9, 20 * slope * FLOOR)
