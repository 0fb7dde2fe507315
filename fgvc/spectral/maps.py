"""Maps of eigenvalues f: R^d -> R^d that turn S = U diag(lam) U^T into F(S) = U diag(f(lam)) U^T.

`Eigenvalues` holds what the eigendecomposition found and what of it a map sees. A map knows three things about itself,
all of them exact: its values, the transpose of its Jacobian, and its divided differences in a form without
cancellation. How a gradient is assembled from them is a rule (fgvc.spectral.rules). Eigenvalues arrive clamped to
`Eigenvalues.floor` from below, so every map may divide by them.

Shapes: lam, v (B, d), ascending; divided differences are those of the n = d - `first` eigenvalues from index `first`
on. A map that depends on the whole spectrum still sees all of `lam`.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fgvc.spectral.precision import (
    EIGENVALUE_FLOOR,
    check_iterations,
    check_ridge,
    check_whole_number,
    eigenvalue_floor,
    is_number,
)


class Band(NamedTuple):
    """A range of the eigenvalues, as a slice of them in descending order: (0, 14) the 14 largest, (14, None) the rest.

    Attributes:
        start: Number of the largest eigenvalues that are left out.
        stop: Index after the last one in descending order, None for the end.
    """

    start: int
    stop: int | None

    def limits(self, d: int) -> tuple[int, int]:
        """(start, end) of the band among d eigenvalues in ascending order; start = end where it is empty."""
        end = max(d - self.start, 0)
        return (0 if self.stop is None else min(max(d - self.stop, 0), end)), end


Keep = int | tuple[int, int | None]
"""Which eigenvalues a map sees: the N largest, or a `Band` of them."""


def band(keep: Keep | None) -> Band | None:
    """The band that `keep` means.

    Raises:
        ValueError: N below 1, or a pair that is no band: two whole numbers 0 <= start < stop, or None for stop.
    """
    if keep is None:
        return None
    if not isinstance(keep, tuple):
        check_whole_number("keep", keep, least=1)
        return Band(0, keep)
    if len(keep) != 2:
        raise ValueError(f"keep must be a number or a pair (start, stop), got {keep!r}")
    start, stop = keep
    check_whole_number("the start of keep", start, least=0)
    if stop is not None:
        check_whole_number("the stop of keep", stop, least=start + 1)
    return Band(start, stop)


@dataclass(frozen=True)
class Eigenvalues:
    """Eigenvalues of a batch, with what the layer does to them before the map.

    Attributes:
        found: Eigenvalues from the eigendecomposition, (B, d), ascending.
        keep: Band that the map sees; the others are set to `EIGENVALUE_FLOOR`. None keeps all.
        first: Index of the first eigenvalue of the Loewner matrix; those before it are null and need no row.
        nulls_known: Whether null eigenvalues are exactly 0 in `found`, without rounding noise.
    """

    found: Tensor
    keep: Band | None = None
    first: int = 0
    nulls_known: bool = False

    @property
    def floor(self) -> float:
        """Smallest value after clamping: above the rounding noise of their precision, if there is any."""
        return EIGENVALUE_FLOOR if self.nulls_known else eigenvalue_floor(self.found.dtype)

    @property
    def clamped(self) -> Tensor:
        """(B, d), no smaller than the floor."""
        return self.found.clamp(min=self.floor)

    @property
    def clipped(self) -> Tensor:
        """(B, d), as the map sees them: clamped, and set to the floor outside of `keep`; ascending within it."""
        lam = self.clamped
        if self.keep is not None:
            start, end = self.keep.limits(lam.shape[-1])
            lam[:, :start] = EIGENVALUE_FLOOR
            lam[:, end:] = EIGENVALUE_FLOOR
        return lam

    @property
    def kept(self) -> Tensor:
        """(B, d) bool: not set to the floor."""
        kept = self.found > self.floor
        if self.keep is not None:
            start, end = self.keep.limits(kept.shape[-1])
            kept[:, :start] = False
            kept[:, end:] = False
        return kept

    @property
    def drops_largest(self) -> bool:
        """Whether eigenvalues above the band are set to the floor, so that `clipped` does not ascend."""
        return self.keep is not None and self.keep.start > 0


class EigenvalueMap(Protocol):
    """A map of the eigenvalues together with its exact derivatives; the maps below are hashable and can be pickled."""

    def value(self, lam: Tensor) -> Tensor:
        """f(lam), (B, d) -> (B, d)."""

    def pullback(self, lam: Tensor, v: Tensor) -> Tensor:
        """J_f(lam)^T v, (B, d), (B, d) -> (B, d); f'(lam) v where f acts on each eigenvalue alone."""

    def divided_differences(self, lam: Tensor, first: int) -> Tensor:
        """(f_i - f_j) / (lam_i - lam_j) for i, j >= first, (B, n, n), with the limit on ties.

        The diagonal is not used: the pullback stands there. A new tensor, which the caller may overwrite.
        """


def _sqrt_divided_differences(lam: Tensor, first: int) -> Tensor:
    # (sqrt a - sqrt b) / (a - b) = 1 / (sqrt a + sqrt b): nothing cancels, ties are no special case
    root = lam[:, first:].sqrt()
    return (root[:, :, None] + root[:, None, :]).reciprocal_()


@dataclass(frozen=True)
class SquareRoot:
    """f(lam) = sqrt(lam): the matrix square root."""

    def value(self, lam: Tensor) -> Tensor:
        return lam.sqrt()

    def pullback(self, lam: Tensor, v: Tensor) -> Tensor:
        return v / (2 * lam.sqrt())

    def divided_differences(self, lam: Tensor, first: int) -> Tensor:
        return _sqrt_divided_differences(lam, first)

    def curvature(self, lam: Tensor) -> Tensor:
        return -(lam**-1.5) / 4


def seb_scale(lam: Tensor) -> Tensor:
    """t = ||Q E^T||_F = sqrt(sum_i lam_i exp(-2 lam_i)), Q = U lam^{1/2} U^T, E = U exp(-lam) U^T; (B, d) -> (B, 1).

    Q and E share their eigenvectors, so no matrix product is needed. [Song, Sebe, Wang, T-PAMI 2022]
    """
    return (lam * torch.exp(-2 * lam)).sum(dim=-1, keepdim=True).sqrt()


@dataclass(frozen=True)
class ScaledSquareRoot:
    """f(lam) = (1 + t(lam)) sqrt(lam): the Scaling Eigen Branch, one scalar per image times the square root."""

    def value(self, lam: Tensor) -> Tensor:
        return (1 + seb_scale(lam)) * lam.sqrt()

    def pullback(self, lam: Tensor, v: Tensor) -> Tensor:
        root, t = lam.sqrt(), seb_scale(lam)
        # exp(-2 lam) underflows for a large spectrum: t = 0 then, and so is its derivative
        slope = torch.where(t > 0, torch.exp(-2 * lam) * (1 - 2 * lam) / (2 * t), 0)  # dt/dlam
        return (1 + t) * v / (2 * root) + (v * root).sum(dim=-1, keepdim=True) * slope

    def divided_differences(self, lam: Tensor, first: int) -> Tensor:
        return _sqrt_divided_differences(lam, first).mul_(1 + seb_scale(lam)[..., None])


def high_and_low(lam: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
    """The larger and the smaller of each two eigenvalues from `first` on, two of (B, n, n)."""
    part = lam[:, first:]
    return torch.maximum(part[:, :, None], part[:, None, :]), torch.minimum(part[:, :, None], part[:, None, :])


@dataclass(frozen=True)
class AmplifiedSquareRoot:
    """f(lam) = sqrt(lam) (1 + c exp(-lam / (T m))) with m the mean of the d eigenvalues: the map of `seb_spectral`.

    Ours, not published: it raises small eigenvalues relative to large ones (by up to 1 + c), which the released SEB
    does not, and F(a S) = sqrt(a) F(S) for any scale a > 0.

    Args:
        amplification: c, at least 0.
        temperature: T, above 0: eigenvalues up to about T m are raised.

    Raises:
        ValueError: c is negative or T not positive, or one of them is not finite.
    """

    amplification: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not (is_number(self.amplification) and self.amplification >= 0):
            raise ValueError(f"the amplification must be a number of at least 0, got {self.amplification!r}")
        if not (is_number(self.temperature) and self.temperature > 0):
            raise ValueError(f"the temperature must be a number above 0, got {self.temperature!r}")

    def _end(self, lam: Tensor) -> Tensor:
        """T m (B, 1): where the amplification has fallen to c / e."""
        return self.temperature * lam.mean(dim=-1, keepdim=True)

    def value(self, lam: Tensor) -> Tensor:
        return lam.sqrt() * (1 + self.amplification * torch.exp(-lam / self._end(lam)))

    def pullback(self, lam: Tensor, v: Tensor) -> Tensor:
        c, end, root = self.amplification, self._end(lam), lam.sqrt()
        decay = torch.exp(-lam / end)
        own = v * ((1 + c * decay) / (2 * root) - c * root * decay / end)
        # every eigenvalue moves e = T m: df_i/de = c sqrt(lam_i) exp(-lam_i / e) lam_i / e^2, de/dlam_j = T / d
        slope = self.temperature / lam.shape[-1]
        return own + (v * c * root * decay * lam / end**2).sum(dim=-1, keepdim=True) * slope

    def divided_differences(self, lam: Tensor, first: int) -> Tensor:
        c, part, end = self.amplification, lam[:, first:], self._end(lam)
        high, low = high_and_low(lam, first)
        gap = (high - low) / end[..., None]
        # (exp(-a/m) - exp(-b/m)) / (a - b) without cancellation: -exp(-b/m) (1 - exp(-g)) / (g m), g = (a - b) / m
        quotient = torch.where(gap == 0, 1, -torch.expm1(-gap) / torch.where(gap == 0, 1, gap))
        of_decay = -quotient * torch.exp(-low / end[..., None]) / end[..., None]
        # product rule of divided differences for sqrt (1 + c exp)
        roots = _sqrt_divided_differences(lam, first)
        return roots * (1 + c * torch.exp(-part / end)[:, None, :]) + c * part.sqrt()[:, :, None] * of_decay


def _log_ratio(lam: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """log(low / high) <= 0 and high for each two eigenvalues from `first` on, accurate for close and distant ones."""
    high, low = high_and_low(lam, first)
    ratio = low / high
    return torch.where(ratio > 0.5, torch.log1p((low - high) / high), torch.log(ratio)), high


@dataclass(frozen=True)
class Power:
    """f(lam) = (lam + ridge)^alpha, alpha != 0: MPN-COV for alpha = 1/2 [Li et al., ICCV 2017], the inverse for -1.

    Raises:
        ValueError: alpha is zero, or no number from -10 to 10; `ridge` is negative or not finite.
    """

    alpha: float
    ridge: float = 0.0

    def __post_init__(self) -> None:
        if not is_number(self.alpha, limit=10) or self.alpha == 0:
            raise ValueError(f"the power must be a number from -10 to 10 other than 0, got {self.alpha!r}")
        check_ridge(self.ridge)

    def value(self, lam: Tensor) -> Tensor:
        return (lam + self.ridge) ** self.alpha

    def pullback(self, lam: Tensor, v: Tensor) -> Tensor:
        return v * self.alpha * (lam + self.ridge) ** (self.alpha - 1)

    def divided_differences(self, lam: Tensor, first: int) -> Tensor:
        x, high = _log_ratio(lam + self.ridge, first)
        # (a^p - b^p) / (a - b) = a^(p-1) (1 - r^p) / (1 - r), r = b / a = exp x; the limit of the quotient is p
        quotient = torch.expm1(self.alpha * x) / torch.expm1(torch.where(x == 0, 1, x))
        return high.pow_(self.alpha - 1).mul_(torch.where(x == 0, self.alpha, quotient))

    def curvature(self, lam: Tensor) -> Tensor:
        return self.alpha * (self.alpha - 1) * (lam + self.ridge) ** (self.alpha - 2)


@dataclass(frozen=True)
class Logarithm:
    """f(lam) = log(lam + ridge): the matrix logarithm of S + ridge I. [Ionescu, Vantzos, Sminchisescu, ICCV 2015]

    Without a ridge a null eigenvalue becomes the logarithm of the floor, -36.04.

    Raises:
        ValueError: `ridge` is negative or not finite.
    """

    ridge: float = 0.0

    def __post_init__(self) -> None:
        check_ridge(self.ridge)

    def value(self, lam: Tensor) -> Tensor:
        return torch.log(lam + self.ridge)

    def pullback(self, lam: Tensor, v: Tensor) -> Tensor:
        return v / (lam + self.ridge)

    def divided_differences(self, lam: Tensor, first: int) -> Tensor:
        x, high = _log_ratio(lam + self.ridge, first)
        # (log a - log b) / (a - b) = x / (a (exp x - 1)), x = log(b / a); 1 / a on ties
        return torch.where(x == 0, 1, x / torch.expm1(torch.where(x == 0, 1, x))).div_(high)

    def curvature(self, lam: Tensor) -> Tensor:
        return -1 / (lam + self.ridge) ** 2


@dataclass(frozen=True)
class NewtonSchulzRoot:
    """f(lam) = sqrt(tau) p(lam / tau), tau = sum lam: what `iterations` Newton-Schulz steps do to each eigenvalue.

    With e = 1 - z y the coupled iteration of Li et al. (CVPR 2018) is e <- (3 e^2 + e^3) / 4, z <- z (1 + e / 2) from
    e = 1 - a, z = 1, and y = a z; a = lam / tau. y^2 = a (1 - e_N), and so y' = (z + s / z) / 2 with s = -de_N/da, the
    product of the slopes (6 e + 3 e^2) / 4. Everything below is a sum of terms of one sign.

    Raises:
        ValueError: `iterations` below 1 or above 100.
    """

    iterations: int = 5

    def __post_init__(self) -> None:
        check_iterations(self.iterations)

    def _iterate(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """z_N (B, n) and the residuals e_0 ... e_{N-1} as one tensor (N, B, n)."""
        residuals = [1 - a]
        for _ in range(self.iterations - 1):
            e = residuals[-1]
            square = e * e
            residuals.append(torch.addcmul(0.75 * square, square, e, value=0.25))
        e = torch.stack(residuals)
        return (1 + e / 2).prod(dim=0), e

    def value(self, lam: Tensor) -> Tensor:
        tau = lam.sum(dim=-1, keepdim=True)
        a = lam / tau
        return tau.sqrt() * a * self._iterate(a)[0]

    def pullback(self, lam: Tensor, v: Tensor) -> Tensor:
        tau = lam.sum(dim=-1, keepdim=True)
        a = lam / tau
        z, e = self._iterate(a)
        slope = (0.75 * e * (2 + e)).prod(dim=0) / z  # s / z
        through_trace = (v * a * slope).sum(dim=-1, keepdim=True)  # 2 (a y' - y / 2) = a s / z
        return (v * (z + slope) - through_trace) / (2 * tau.sqrt())

    def divided_differences(self, lam: Tensor, first: int) -> Tensor:
        tau = lam.sum(dim=-1, keepdim=True)
        a = lam[:, first:] / tau
        z, e = self._iterate(a)
        # each step multiplies the divided difference of e by a positive factor:
        # (3 (e_i + e_j) + e_i^2 + e_i e_j + e_j^2) / 4 = (w_i + w_j + e_i e_j) / 4 with w = 3 e + e^2, of rank three
        w, one = e * (3 + e), torch.ones_like(e)
        of_e = a.new_full((*a.shape, a.shape[-1]), 4.0**-self.iterations)  # minus that of e_N
        left, right = torch.stack([w, one, e], dim=-1), torch.stack([one, w, e], dim=-2)
        for rows, columns in zip(left.unbind(), right.unbind(), strict=True):
            of_e.mul_(torch.bmm(rows, columns))
        y = a * z
        of_square = torch.addcmul((y * z)[:, :, None], a[:, None, :], of_e)  # that of y^2; 1 - e_N = a z^2
        quotient: Tensor = of_square.div_(y[:, :, None] + y[:, None, :])
        return quotient.div_(tau.sqrt()[:, :, None])


class _RootOfRatio:
    """f(lam) = sqrt(n) h(lam / n), n = ||lam||: an approximation h of the square root around 1, scaled by the norm.

    With z = 1 - lam / n the divided differences of h are those of 1 - z p(z): B(z) W B(z)^T for a row B(z) of functions
    of each eigenvalue and a constant W, all of one sign.
    """

    def _basis(self, z: Tensor) -> Tensor:
        """B(z), (B, d) -> (B, d, k)."""
        raise NotImplementedError

    def _weights(self) -> list[list[float]]:
        """W, k x k, symmetric."""
        raise NotImplementedError

    def _parts(self, lam: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """n (B, 1), z (B, d), B(z) (B, d, k) and W."""
        norm = torch.linalg.vector_norm(lam, dim=-1, keepdim=True)
        z = 1 - lam / norm
        return norm, z, self._basis(z), torch.tensor(self._weights(), dtype=lam.dtype, device=lam.device)

    def value(self, lam: Tensor) -> Tensor:
        norm, z, basis, weights = self._parts(lam)
        # h(1) = 1, so h = 1 - z times the divided difference to 1, where z = 0
        return norm.sqrt() * (1 - z * (basis @ (weights @ self._basis(z.new_zeros(())))))

    def pullback(self, lam: Tensor, v: Tensor) -> Tensor:
        norm, _, basis, weights = self._parts(lam)
        slope = (basis * (basis @ weights)).sum(-1) / norm.sqrt()
        # f is homogeneous of degree 1/2: through n every eigenvalue also moves the others
        through_norm = (v * (self.value(lam) / 2 - slope * lam)).sum(dim=-1, keepdim=True)
        return v * slope + through_norm * lam / norm**2

    def divided_differences(self, lam: Tensor, first: int) -> Tensor:
        norm, _, basis, weights = self._parts(lam)
        basis = basis[:, first:]
        return (basis @ weights @ basis.mT).div_(norm.sqrt()[..., None])


@dataclass(frozen=True)
class PadeRoot(_RootOfRatio):
    """f(lam) = sqrt(n) (1 - sum_j a_j z / (1 - b_j z)), z = 1 - lam / n, n = ||lam||: the Padé approximant [5/5].

    a_j = 2/11 sin^2(j pi / 11), b_j = cos^2(j pi / 11). A null eigenvalue becomes sqrt(n) / 11. [Song, Sebe, Wang, ICLR
    2022, MPA]
    """

    def _basis(self, z: Tensor) -> Tensor:
        poles = [math.cos(j * math.pi / 11) ** 2 for j in range(1, 6)]
        return 1 / (1 - z[..., None] * torch.tensor(poles, dtype=z.dtype, device=z.device))

    def _weights(self) -> list[list[float]]:
        return [[2 / 11 * math.sin(i * math.pi / 11) ** 2 * (i == j) for j in range(1, 6)] for i in range(1, 6)]


@dataclass(frozen=True)
class TaylorRoot(_RootOfRatio):
    """f(lam) = sqrt(n) p(z), z = 1 - lam / n, n = ||lam||, p the Taylor polynomial of sqrt(1 - z) of degree 10.

    A null eigenvalue becomes 0.18 sqrt(n). [Song, Sebe, Wang, ICLR 2022, MTP]
    """

    def _basis(self, z: Tensor) -> Tensor:
        return z[..., None] ** torch.arange(10, dtype=z.dtype, device=z.device)

    def _weights(self) -> list[list[float]]:
        # sqrt(1 - z) = 1 - sum_k c_k z^k, and z^k has the divided differences sum_{a + b = k - 1} z_i^a z_j^b
        c = [math.comb(2 * k, k) / (4**k * (2 * k - 1)) for k in range(1, 11)]
        return [[c[a + b] if a + b < 10 else 0.0 for b in range(10)] for a in range(10)]


@dataclass(frozen=True)
class Rescaled:
    """f(lam) = factor * g(lam) + shift: another map times a constant, plus a multiple of the identity matrix.

    Raises:
        ValueError: the factor is not a finite number above 0, or the shift not finite.
    """

    g: EigenvalueMap
    factor: float
    shift: float = 0.0

    def __post_init__(self) -> None:
        if not (is_number(self.factor) and self.factor > 0):
            raise ValueError(f"the scale must be a number above 0, got {self.factor!r}")
        if not is_number(self.shift):
            raise ValueError(f"the shift must be a finite number, got {self.shift!r}")

    def value(self, lam: Tensor) -> Tensor:
        return self.factor * self.g.value(lam) + self.shift

    def pullback(self, lam: Tensor, v: Tensor) -> Tensor:
        return self.factor * self.g.pullback(lam, v)

    def divided_differences(self, lam: Tensor, first: int) -> Tensor:
        return self.g.divided_differences(lam, first).mul_(self.factor)

    def curvature(self, lam: Tensor) -> Tensor:
        curvature: Tensor = self.factor * self.g.curvature(lam)  # type: ignore[attr-defined]  # see has_curvature
        return curvature


@dataclass(frozen=True)
class Reciprocal:
    """f(lam) = 1 / g(lam): the inverse of what another map gives. The map must not be 0."""

    g: EigenvalueMap

    def value(self, lam: Tensor) -> Tensor:
        return 1 / self.g.value(lam)

    def pullback(self, lam: Tensor, v: Tensor) -> Tensor:
        return self.g.pullback(lam, -v / self.g.value(lam) ** 2)

    def divided_differences(self, lam: Tensor, first: int) -> Tensor:
        value = self.value(lam)[:, first:]
        return self.g.divided_differences(lam, first).mul_(value[:, :, None]).mul_(-value[:, None, :])


def has_curvature(f: EigenvalueMap) -> bool:
    """Whether a map has `curvature`, lam -> f''(lam) in any shape: it acts on each eigenvalue alone."""
    return all(hasattr(g, "curvature") for g in (f, getattr(f, "g", f)))


SQRT = SquareRoot()
"""f(l) = sqrt(l)."""
SCALED_SQRT = ScaledSquareRoot()
"""f(l) = (1 + t) sqrt(l), the Scaling Eigen Branch; t depends on all eigenvalues."""
LOG = Logarithm()
"""f(l) = log(l)."""
