"""The arithmetic behind the published gradients: errors of 1 / (1 - r), and bounds of K~ and L.

With l_i >= l_j two eigenvalues and r = l_j / l_i, the published chain needs 1 / (l_i - l_j) = (1 / l_i) 1 / (1 - r) and
approximates 1 / (1 - r) by a Taylor polynomial or a Padé approximant. [Song, Sebe, Wang, ICCV 2021]
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import mpmath
import pandas as pd
import torch

from fgvc.analysis.csv_file import read_csv
from fgvc.spectral import EIGENVALUE_FLOOR, GRADIENTS, SQRT
from fgvc.spectral.maps import NewtonSchulzRoot
from fgvc.spectral.pade_coefficients import DENOMINATOR, NUMERATOR
from fgvc.spectral.rules import PublishedChain, Spectrum, pade_ratio

RATIOS = ("0.1", "0.3", "0.5", "0.7", "0.9", "0.99", "0.999")
"""The published values of r."""
DEGREE = 100


def approximation_errors(published: Path) -> pd.DataFrame:
    """|approximation - 1 / (1 - r)| of both approximants at `RATIOS`.

    Args:
        published: approximation_error_iccv21.csv.

    Returns:
        One row an approximant ("Taylor", "Padé") and r: published, exact and float64. `exact` is in rational numbers:
        of Taylor r^101 / (1 - r), of Padé with the coefficients rounded to float64, as every layer uses them (with
        unrounded ones the approximant is 1 / (1 - r) itself). `float64` is what this package's layers compute: Taylor
        as (1 - r^101) / (1 - r), Padé by Horner's scheme.

    Raises:
        RunError: the file is missing or damaged.
    """
    printed = read_csv(published, ("method", "r", "error"), as_text=True).set_index(["method", "r"])["error"]
    rows = []
    for r in RATIOS:
        exact = {"Taylor": _taylor_error(Fraction(r)), "Padé": _pade_error(Fraction(r))}
        for name, computed in _in_float64(float(r)).items():
            error = abs(Fraction(computed) - 1 / (1 - Fraction(float(r))))
            rows.append((name, r, printed.get((name, r)), float(exact[name]), float(error)))
    table: pd.DataFrame = pd.DataFrame(rows, columns=["method", "r", "published", "exact", "float64"])
    ordered: pd.DataFrame = table.sort_values(["method", "r"], ascending=[False, True], ignore_index=True)
    return ordered


def _taylor_error(r: Fraction) -> Fraction:
    return r ** (DEGREE + 1) / (1 - r)


def _pade_error(r: Fraction) -> Fraction:
    def value(coefficients: Sequence[float]) -> Fraction:
        return sum((Fraction(c) * r**k for k, c in enumerate(coefficients)), Fraction(0))

    return abs(value(NUMERATOR) / value(DENOMINATOR) - 1 / (1 - r))


def _in_float64(r: float) -> dict[str, float]:
    one, lower = torch.ones(1, 1, 1, dtype=torch.float64), torch.full((1, 1, 1), r, dtype=torch.float64)
    rule = GRADIENTS["taylor"]
    assert isinstance(rule, PublishedChain)
    return {"Taylor": float(rule.reciprocal_gap(one, lower)), "Padé": float(pade_ratio(lower))}


def gradient_bounds(published: Path) -> pd.DataFrame:
    """Largest value of each rule's K~ (the entries of L where a rule has none), with both eigenvalues at the floor.

    Args:
        published: gradient_bounds_iccv21.csv.

    Returns:
        One row a rule: method (label), quantity ("K~" or "L"), form (analytic), computed, published (text), trigger.

    Raises:
        RunError: the file is missing or damaged.
    """
    printed = read_csv(published, ("method", "bound"), as_text=True).set_index("method")["bound"]
    eps = EIGENVALUE_FLOOR
    rows = [
        ("MPN-COV", "K~", "1 / (λ_i − λ_j)", math.inf, "two eigenvalues that meet"),
        ("SVD-Trunc", "K~", "T", _largest_gap_rule("trunc"), "two eigenvalues closer than 1 / T = 1e-10"),
        ("SVD-Taylor", "K~", "(K + 1) / ε", _largest_gap_rule("taylor"), "two equal eigenvalues at the floor"),
        ("SVD-PI", "K~", "T / ε", _largest_gap_rule("power_iteration"), "two equal eigenvalues at the floor"),
        ("SVD-Padé", "K~", "|P(1) / Q(1)| / ε", _pade_at_one(), "a tie at the floor; Q(1) is the noise of 20 digits"),
        ("SVD-Padé, float64", "K~", "max P(r) / Q(r) / ε", _largest_pade() / eps, "r just below 1; a tie gives 0"),
        ("SVD-TopN", "K~", "1 / λ_N", 1 / eps, "the last kept eigenvalue at the floor"),
        ("SVD-Newton", "L", "(3 / 2)^10 / √(tr S)", _newton_slope(), "null eigenvalues, here with tr S = 1"),
        ("exact", "L", "1 / (2 √ε)", _exact_at_floor(), "two eigenvalues at the floor, which never reach X"),
    ]
    table: pd.DataFrame = pd.DataFrame(rows, columns=["method", "quantity", "form", "computed", "trigger"])
    table.insert(4, "published", table["method"].map(printed))
    return table


def _largest_gap_rule(name: str) -> float:
    """K~ of a rule at two eigenvalues at the floor: a tie, and the closest two float64 numbers."""
    rule = GRADIENTS[name]
    assert isinstance(rule, PublishedChain)
    floor = torch.full((1, 1, 1), EIGENVALUE_FLOOR, dtype=torch.float64)
    above = torch.nextafter(floor, torch.ones_like(floor))
    return max(float(rule.reciprocal_gap(floor, floor)), float(rule.reciprocal_gap(above, floor)))


def _pade_at_one(digits: int = 20) -> float:
    """|P(1) / Q(1)| / eps in the arithmetic that the published coefficients were solved in (mpmath)."""
    with mpmath.workdps(digits):
        taylor = mpmath.taylor(lambda r: 1 / (1 - r), 0, DEGREE)
        numerator, denominator = mpmath.pade(taylor, DEGREE // 2, DEGREE // 2)
        return float(abs(sum(numerator) / sum(denominator)) / EIGENVALUE_FLOOR)


def _largest_pade() -> float:
    """Largest |P(r) / Q(r)| in float64 over the 2^16 numbers below 1, where Q nearly vanishes."""
    r = 1 - torch.arange(1, 2**16, dtype=torch.float64) * 2.0**-53
    return float(pade_ratio(r).abs().max())


def _newton_slope(iterations: int = 10) -> float:
    """df/dl of the iteration at a null eigenvalue of a matrix of trace 1; its smaller sibling has all the trace."""
    lam = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    f = NewtonSchulzRoot(iterations)
    return float(f.pullback(lam, torch.tensor([[1.0, 0.0]], dtype=torch.float64))[0, 0])


def _exact_at_floor() -> float:
    lam = torch.full((1, 2), 2 * EIGENVALUE_FLOOR, dtype=torch.float64)
    scaled: float = float(GRADIENTS["exact"](SQRT, Spectrum(lam)).off_diagonal[0, 0, 1])
    return scaled * math.sqrt(2)  # at the floor itself an eigenvalue counts as null: the limit from above
