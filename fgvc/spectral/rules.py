"""Gradient rules of a spectral map: how the derivative is assembled from the eigenvalues.

For S = U diag(lam) U^T, F(S) = U diag(f(lam)) U^T and G = dLoss/dF the gradient is (Daleckii-Krein)

    dLoss/dS = U inner U^T,   inner_ij = L_ij P_ij (i != j),   inner_ii = (J_f^T diag P)_i,   P = U^T sym(G) U.

A rule says what L is off the diagonal and which pullback stands on it. The published methods replace
1 / (lam_i - lam_j) by an approximation K~ and so have L_ij = K~_ij (f_i - f_j): such a method is one function
(high, low) -> K~.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fgvc.spectral.covariance import symmetric_from_triangle, upper_triangle
from fgvc.spectral.maps import (
    SQRT,
    EigenvalueMap,
    Eigenvalues,
    NewtonSchulzRoot,
    PadeRoot,
    Reciprocal,
    TaylorRoot,
    high_and_low,
)
from fgvc.spectral.pade_coefficients import DENOMINATOR, NUMERATOR
from fgvc.spectral.precision import check_whole_number, is_number


class Loewner(NamedTuple):
    """The derivative of a spectral map in the eigenbasis, n = d - eigenvalues.first.

    Attributes:
        off_diagonal: L, (B, n, n); its diagonal is not used. The caller may overwrite it.
        pullback: Function v -> J_f^T v, (B, d) -> (B, d), applied to the diagonal of P.
    """

    off_diagonal: Tensor
    pullback: Callable[[Tensor], Tensor]


GradientRule = Callable[[EigenvalueMap, Eigenvalues], Loewner]
"""(map, eigenvalues) -> the derivative in the eigenbasis. Raises ValueError where it does not apply to the map."""


def exact(f: EigenvalueMap, eigenvalues: Eigenvalues) -> Loewner:
    """The derivative of the layer as it is computed: finite at repeated eigenvalues, zero for one set to the floor.

    For f = sqrt this is the Lyapunov gradient of Lin and Maji (BMVC 2017), L_ij = 1 / (sqrt lam_i + sqrt lam_j); with
    `keep`, sqrt(lam_i) / (lam_i - lam_j) between a kept and a dropped eigenvalue and 0 between dropped ones. Where the
    last kept and the first dropped eigenvalue are equal the layer has no derivative: 0 stands there.
    """
    lam, kept, first = eigenvalues.clipped, eigenvalues.kept, eigenvalues.first
    divided = f.divided_differences(lam, first)
    # chain rule through the clipping: its divided difference is 1 between kept eigenvalues, 0 between clipped ones
    seen, found, window = lam[:, first:], eigenvalues.found[:, first:], kept[:, first:].to(lam.dtype)
    run = found[:, :, None] - found[:, None, :]
    slope = (seen[:, :, None] - seen[:, None, :]).div_(run)
    divided.mul_(torch.where(run == 0, window[:, :, None] * window[:, None, :], slope))
    return Loewner(divided, lambda v: f.pullback(lam, v) * kept)


ReciprocalGap = Callable[[Tensor, Tensor], Tensor]
"""K~: (high, low), symmetric matrices (B, n, n) of the larger and the smaller of each two eigenvalues, high >= low > 0
-> approximation of 1 / (high - low), (B, n, n). For a tie it must be finite; f(high) - f(low) = 0 multiplies it."""


@dataclass(frozen=True)
class PublishedChain:
    """The published chain: K~ off the diagonal, the slope of f at eigenvalues below the floor let through as it is.

    With `leak` the eigenvalues that `keep` drops are treated in the same way, as the released SVD-TopN does (which
    knows the N largest only): the slope of sqrt at the floor, 0.5 eps^(-1/2) = 3.4e7, reaches the features from each.
    """

    reciprocal_gap: ReciprocalGap
    leak: bool = False

    def __call__(self, f: EigenvalueMap, eigenvalues: Eigenvalues) -> Loewner:
        if self.leak and eigenvalues.keep is None:
            raise ValueError("gradient 'topn_published' belongs to a truncation: give keep=N")
        lam = eigenvalues.clipped
        points = (lam if self.leak else eigenvalues.clamped)[:, eigenvalues.first :]
        value = f.value(lam)[:, eigenvalues.first :]
        high, low = high_and_low(points)
        if self.leak and eigenvalues.drops_largest:
            sign = torch.sign(points[:, :, None] - points[:, None, :])
        else:  # the points ascend: below the diagonal the row's is the higher
            sign = points.new_ones(points.shape[-1], points.shape[-1]).tril_().mul_(2).sub_(1)
        rise = (value[:, :, None] - value[:, None, :]).mul_(sign)  # f(high) - f(low)
        off_diagonal = self.reciprocal_gap(high, low).mul_(rise)
        if self.leak or eigenvalues.keep is None:
            return Loewner(off_diagonal, lambda v: f.pullback(lam, v))
        return Loewner(off_diagonal, lambda v: f.pullback(lam, v) * eigenvalues.kept)


def _plain(high: Tensor, low: Tensor) -> Tensor:
    gap = high - low
    return torch.where(gap == 0, 0, gap.reciprocal())


def _geometric(high: Tensor, low: Tensor, terms: int) -> Tensor:
    """(1 / high) sum_{k < terms} r^k, r = low / high, as (1 - r^terms) / (high - low)."""
    gap = high - low
    tie = gap == 0
    log_r = torch.log1p(-gap / high)
    return torch.where(tie, terms / high, -torch.expm1(terms * log_r) / torch.where(tie, 1, gap))


def _truncated(high: Tensor, low: Tensor, limit: float) -> Tensor:
    return (high - low).reciprocal_().clamp_(max=limit)


def pade_ratio(r: Tensor) -> Tensor:
    """P(r) / Q(r) by Horner's scheme, the approximation of 1 / (1 - r) for r in [0, 1]; 0 where Q(r) = 0 (r = 1).

    The coefficients are those of `tools/pade_coefficients.py`. P and Q share 49 roots up to 1e-20, so that in float64
    the ratio is 1 / (1 - r) with a relative error of about 1e-16 / (1 - r), and Q(1) is exactly 0. One shared root lies
    within [0, 1], at r = 0.9972987: the error is about 2e-16 / |r - 0.9972987| around it.
    """
    # (51, 2, 1): of both polynomials, the highest power last
    coefficients = torch.tensor([NUMERATOR, DENOMINATOR], dtype=r.dtype, device=r.device).T[:, :, None]
    *lower, highest = coefficients.unbind()
    ratio = torch.empty_like(r, memory_format=torch.contiguous_format)
    # the scheme passes 50 times over its numbers: on a CPU in pieces that stay in the cache
    size = 1 << 15 if r.device.type == "cpu" else max(r.numel(), 1)
    for part, out in zip(torch.split(r.flatten()[None], size, dim=1), torch.split(ratio.view(-1), size), strict=True):
        both = highest.repeat(1, part.shape[1])
        for column in reversed(lower):
            torch.addcmul(column, both, part, out=both)
        numerator, denominator = both.unbind()
        out.copy_(torch.where(denominator == 0, 0, numerator / denominator))
    return ratio


def _pade(high: Tensor, low: Tensor) -> Tensor:
    # one triangle is enough: this is the one approximation that costs more than a pass or two over its numbers
    ratio = pade_ratio(upper_triangle(low / high))
    return symmetric_from_triangle(ratio, high.shape[-1]).div_(high)


def trunc(limit: float = 1e10) -> GradientRule:
    """SVD-Trunc: K~ = min(1 / (lam_i - lam_j), limit). [Song, Sebe, Wang, ICCV 2021]

    Raises:
        ValueError: `limit` is not a positive number.
    """
    if not (is_number(limit) and limit > 0):
        raise ValueError(f"limit must be a number above 0, got {limit!r}")
    return PublishedChain(partial(_truncated, limit=limit))


def taylor(degree: int = 100) -> GradientRule:
    """SVD-Taylor: K~ = (1 / lam_i) sum_{k = 0 ... degree} r^k, r = lam_j / lam_i. [Song, Sebe, Wang, ICCV 2021]

    Raises:
        ValueError: `degree` below 0.
    """
    check_whole_number("degree", degree, least=0)
    return PublishedChain(partial(_geometric, terms=degree + 1))


def power_iteration(iterations: int = 20) -> GradientRule:
    """SVD-PI: the gradient of power iteration with deflation, K~ = (1 / lam_i) sum_{k < iterations} r^k.

    [Wang, Dang, Hu, Fua, Salzmann, NeurIPS 2019]. The released layer of Song et al. deflates by all eigenvectors at
    once, by I - U U^T = 0, and so returns a gradient of 1e-15: this is the method as described, not that.

    Raises:
        ValueError: `iterations` below 1.
    """
    check_whole_number("iterations", iterations, least=1)
    return PublishedChain(partial(_geometric, terms=iterations))


@dataclass(frozen=True)
class IterationGradient:
    """The exact derivative of another map than that of the forward pass: `newton`."""

    iteration: NewtonSchulzRoot

    def __call__(self, f: EigenvalueMap, eigenvalues: Eigenvalues) -> Loewner:
        if f != SQRT or eigenvalues.keep is not None:
            raise ValueError("gradient 'newton' is that of the square root of all eigenvalues, of no other map")
        lam = eigenvalues.clamped
        off_diagonal = self.iteration.divided_differences(lam, eigenvalues.first)
        return Loewner(off_diagonal, lambda v: self.iteration.pullback(lam, v))


def newton(iterations: int = 10) -> GradientRule:
    """SVD-Newton: the gradient of the Newton-Schulz iteration at S, for the square root. [Song et al., ICCV 2021]

    The iteration is itself a map of the eigenvalues, so its gradient needs no matrix products of its own.

    Raises:
        ValueError: `iterations` not from 1 to 100; when applied, a map other than the square root of all eigenvalues.
    """
    return IterationGradient(NewtonSchulzRoot(iterations))


@dataclass(frozen=True)
class SignIteration:
    """The Lyapunov equation F X + X F = G (of an inverse root -F^2 G F^2) by steps of a sign iteration: `lyapunov`."""

    iterations: int

    def __call__(self, f: EigenvalueMap, eigenvalues: Eigenvalues) -> Loewner:
        inverse = f == Reciprocal(PadeRoot())
        if not (inverse or f in (SQRT, PadeRoot(), TaylorRoot())) or eigenvalues.keep is not None:
            raise ValueError(
                "gradient 'lyapunov' is that of a square root of all eigenvalues, or of the inverse of a Padé root"
            )
        lam = eigenvalues.clamped
        value = f.value(lam)
        # a constant to this gradient
        scale = torch.linalg.vector_norm(value if inverse else lam, dim=-1, keepdim=True)
        scale = scale if inverse else scale.sqrt()
        b = (value / scale)[:, eigenvalues.first :]
        off_diagonal = (0.5 / scale[..., None]).repeat(1, b.shape[-1], b.shape[-1])
        if inverse:
            square = value[:, eigenvalues.first :].square()
            off_diagonal.mul_(square[:, :, None]).mul_(-square[:, None, :])
        constants = lam.new_full((), 1.5), lam.new_full((), 0.75)
        for _ in range(self.iterations):  # few operators, since there are eight rounds of them
            factor, part = (torch.addcmul(constant, b, b, value=-0.5) for constant in constants)
            sides = part.unsqueeze(2) + part.unsqueeze(1)
            off_diagonal.mul_(torch.addcmul(sides, b.unsqueeze(2), b.unsqueeze(1), value=0.5))
            b = b * factor
        # the diagonal is what the map does to one eigenvalue; those before `first` are null as the first one is
        own = off_diagonal.diagonal(dim1=-2, dim2=-1)
        own = torch.cat([own[:, :1].expand(-1, eigenvalues.first), own], dim=1)
        return Loewner(off_diagonal, lambda v: own * v)


def lyapunov(iterations: int = 8) -> GradientRule:
    """MPA-Lya, MTP-Lya: the Lyapunov gradient of a root F or its inverse, by some steps. [Song, Sebe, Wang, ICLR 2022]

    b = F / sqrt(n), n = ||S||_F, L = 1 / (2 sqrt(n)); L <- L (3 - b_i^2 - b_j^2 + b_i b_j) / 2, b <- b (3 - b^2) / 2.
    After a few steps L is still finite where both eigenvalues are null. It is not the derivative of MPA or MTP.
    Of an inverse root: b = F / ||F||, L = -F_i^2 F_j^2 / (2 ||F||), and the same steps. The released MPA-Lya-Inv takes
    the norm over the whole batch, so that the gradient of one matrix depends on the others; here each has its own.

    Raises:
        ValueError: `iterations` below 1; when applied, a map that is no (inverse) square root of all eigenvalues.
    """
    check_whole_number("iterations", iterations, least=1)
    return SignIteration(iterations)


GRADIENTS: dict[str, GradientRule] = {
    "exact": exact,
    "ordinary": PublishedChain(_plain),  # the textbook gradient of the SVD; loses the 1 / (2 sqrt lam) of a tie
    "trunc": trunc(),
    "taylor": taylor(),
    "pade": PublishedChain(_pade),  # SVD-Pade, degree [50/50]
    "power_iteration": power_iteration(),
    "newton": newton(),
    "lyapunov": lyapunov(),
    "topn_published": PublishedChain(_plain, leak=True),
}
"""Gradient rules by the name that `matrix_sqrt` and the poolings take."""
