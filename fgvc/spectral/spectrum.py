"""Eigenvalues as a layer finds them, and the part of them that its map sees."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from fgvc.spectral.precision import EIGENVALUE_FLOOR, check_whole_number, eigenvalue_floor


class Band(NamedTuple):
    """A range of the eigenvalues, as a slice of them in descending order: (0, 14) the 14 largest, (14, None) the rest.

    Attributes:
        start: how many of the largest are left out.
        stop: index after the last one, None for the smallest.
    """

    start: int
    stop: int | None

    def limits(self, d: int) -> tuple[int, int]:
        """(first, end) of the band among d eigenvalues in ascending order; first = end where it is empty."""
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
class Spectrum:
    """Eigenvalues of a batch, with what the layer does to them before the map.

    Attributes:
        found: (B, d), ascending, as the eigendecomposition found them.
        keep: the map sees only these, the others are set to `EIGENVALUE_FLOOR`; None keeps all.
        first: index of the first eigenvalue of the Loewner matrix; those before it are null and need no row.
        nulls_known: null eigenvalues are exactly 0 in `found`, without rounding noise.
    """

    found: Tensor
    keep: Band | None = None
    first: int = 0
    nulls_known: bool = False

    @property
    def floor(self) -> float:
        """What the eigenvalues are clamped to: above the rounding noise of their precision, where there is any."""
        return EIGENVALUE_FLOOR if self.nulls_known else eigenvalue_floor(self.found.dtype)

    @property
    def clamped(self) -> Tensor:
        """(B, d), no smaller than the floor."""
        return self.found.clamp(min=self.floor)

    @property
    def clipped(self) -> Tensor:
        """(B, d), as the map sees them: clamped, and set to the floor outside of `keep`; ascending within it."""
        lam = self.clamped
        for dropped in self._dropped:
            lam[:, dropped] = EIGENVALUE_FLOOR
        return lam

    @property
    def kept(self) -> Tensor:
        """(B, d) bool: not set to the floor."""
        kept = self.found > self.floor
        for dropped in self._dropped:
            kept[:, dropped] = False
        return kept

    @property
    def drops_largest(self) -> bool:
        """Whether eigenvalues above the band are set to the floor, so that `clipped` does not ascend."""
        return self.keep is not None and self.keep.start > 0

    @property
    def _dropped(self) -> list[slice]:
        if self.keep is None:
            return []
        first, end = self.keep.limits(self.found.shape[-1])
        return [slice(0, first), slice(end, None)]
